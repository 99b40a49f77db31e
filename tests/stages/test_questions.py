from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.config import RunConfig
from selfeval.errors import ConfigError, LoopError, SeedsError
from selfeval.judging.templates import Templates, templates_folder
from selfeval.prompt import Prompt
from selfeval.quality.embeddings import Vectors, unit_rows
from selfeval.records import Drop, Question, Split
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout
from selfeval.stages import questions
from selfeval.stages.context import Context
from selfeval.stages.given import read_given
from selfeval.stages.seeds import seeds_of
from selfeval.stages.shards import Batch
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore

SEEDS = [
    f"Seed {word} asks how many marbles {word} has after a long and windy day outside?" for word in ("one", "two", "three")
]
SIZES = {"train": 24, "test": 12, "examples": 5, "seed_examples": 2, "shard": 10, "attempts": 8.0}
NAMES = ("Ben", "Mia", "Tom", "Ann", "Sam", "Eve")
THINGS = ("apples", "pens", "eggs", "cards", "books", "shells", "coins", "stamps")

Writer = Callable[[int, Sequence[Request]], list[tuple[str, bool]]]
"""Stand-in for the model: maps the shard's seed and prompts to a text and whether it is complete, for each prompt."""


def fresh(rng: random.Random) -> str:
    """One of some million questions."""
    a, b, c = (rng.choice(NAMES) for _ in range(3))
    thing, other = rng.choice(THINGS), rng.choice(THINGS)
    return (
        f"{a} gives {rng.randrange(2, 99)} {thing} to {b} and {c} who already had {other} at home so who has more in the end?"
    )


def twin(text: str) -> str:
    """The same question with another last word: of 19 shingles 18 are shared, 18 / 20 = 0.9 of all."""
    return text.removesuffix("end?") + "evening?"


def mixed(seed: int, requests: Sequence[Request]) -> list[tuple[str, bool]]:
    """New questions, twins of them and of a seed, short and unfinished ones: everything that can happen."""
    rng, written, made = random.Random(seed), [fresh(random.Random(0))], []
    for _ in requests:
        kind = rng.random()
        text = rng.choice(written) if kind < 0.3 else fresh(rng)
        text = twin(text) if kind < 0.15 else SEEDS[0].upper() if kind > 0.97 else "Why 1?" if kind > 0.92 else text
        made.append((text, not 0.85 < kind < 0.92))
        written.append(text)
    return made


def context(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Writer = mixed,
    *,
    seed: int = 0,
    seeds: Sequence[str] = SEEDS,
    **changes: Any,
) -> Context:
    """A run whose model is scripted; everything else is real."""
    (folder / "seeds.txt").write_text("\n".join(seeds))
    config = RunConfig(seeds=str(folder / "seeds.txt"), seed=seed, questions={**SIZES, **changes})
    run = Context(config, RunStore(folder / "run"), Terminal(quiet=True))
    backbone = tiny_models.backbone("llama", 384)
    vars(run)["backbone"] = backbone
    vars(run)["templates"] = templates = Templates.load(templates_folder("no such model"), backbone.loaded.tokenizer)

    def generate(backbone: Any, requests: Sequence[Request], *, seed: int, first: int, **options: Any) -> list[Rollout]:
        assert backbone.acting == BASE
        assert all(r.temperature == config.questions.temperature for r in requests)
        stop = tuple(templates.tokenizer.encode("\n", add_special_tokens=False))
        made = [
            (templates.tokenizer.encode(" " + text), ended)
            for text, ended in write(seed, [*requests[:1] * first, *requests])[first:]
        ]
        return [Rollout((*ids, *(stop if ended else ())), (), ended) for ids, ended in made]

    monkeypatch.setattr(questions, "generate", generate)
    return run


def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The examples of every prompt that is made from now on."""
    prompts: list[list[str]] = []
    plain = Templates.prompt

    def prompt(self: Templates, kind: str, **values: Any) -> Prompt:
        assert kind == "ask"
        prompts.append(list(values["examples"]))
        return plain(self, kind, **values)

    monkeypatch.setattr(Templates, "prompt", prompt)
    return prompts


def of(run: Context, split: Split) -> list[str]:
    return [q.text for q in run.store.read("questions", Question) if q.split == split]


def drops(run: Context) -> list[tuple[str, str]]:
    return [(d.reason, d.text) for d in run.store.read_dropped("questions")]


def overlap(a: str, b: str) -> float:
    """Jaccard overlap of word 3-grams, the plain way; 0 where the numbers differ."""
    first, second = (re.findall(r"\w+", text.lower()) for text in (a, b))
    if sorted(filter(str.isdigit, first)) != sorted(filter(str.isdigit, second)):
        return 0.0
    grams = [{tuple(w[i : i + 3]) for i in range(len(w) - 2)} for w in (first, second)]
    return len(grams[0] & grams[1]) / max(1, len(grams[0] | grams[1]))


@pytest.mark.parametrize("seed", range(4))
def test_no_question_has_a_near_duplicate_in_the_run_or_across_the_split(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = context(tmp_path, monkeypatch, seed=seed)
    questions.run(run)
    train, test = of(run, Split.TRAIN), of(run, Split.TEST)
    assert not set(train) & set(test)
    assert max(overlap(a, b) for a in train for b in test) < 0.8
    assert max(overlap(a, b) for a, b in itertools.combinations([*train, *test, *SEEDS], 2)) < 0.8
    twins = [text for reason, text in drops(run) if reason == "near_duplicate"]
    assert max(overlap(a, b) for a in twins for b in [*train, *test]) > 0.8  # so there was something to find


@pytest.mark.parametrize("seed", range(4))
def test_the_examples_of_a_prompt_are_seeds_and_training_questions_never_test_questions(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, prompts = context(tmp_path, monkeypatch, seed=seed), asked(monkeypatch)
    questions.run(run)
    shown = {text for examples in prompts for text in examples}
    assert shown & set(of(run, Split.TEST)) == set()
    assert shown <= {*SEEDS, *of(run, Split.TRAIN)}
    assert shown & set(of(run, Split.TRAIN))  # self-instruct does reuse its own questions
    assert len(prompts) >= 40
    for examples in prompts:
        assert len(set(examples)) == len(examples)
        assert sum(text in SEEDS for text in examples) >= 2
    assert {len(examples) for examples in prompts[:10]} == {3}  # the first shard has the three seeds only
    assert {len(examples) for examples in prompts[10:]} == {5}


@pytest.mark.parametrize("seed", range(4))
def test_both_quotas_are_filled_exactly(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = context(tmp_path, monkeypatch, seed=seed)
    counts = questions.run(run)
    assert (counts["train"], counts["test"]) == (24, 12)
    assert (len(of(run, Split.TRAIN)), len(of(run, Split.TEST))) == (24, 12)
    ids = [q.id for q in run.store.read("questions", Question)]
    assert len(set(ids)) == 36
    assert {q.source for q in run.store.read("questions", Question)} == {"self"}


def _numbered() -> Writer:
    """New questions whatever the seed."""
    rng = random.Random(5)
    return lambda seed, requests: [(fresh(rng), True) for _ in requests]


def test_the_seed_decides_the_split_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = []
    for number, seed in enumerate((0, 1, 0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = context(folder, monkeypatch, _numbered(), seed=seed)
        questions.run(run)
        splits.append([q.split for q in run.store.read("questions", Question)])
    assert splits[0] == splits[2]
    assert splits[0] != splits[1]
    for split in splits:
        # One in three is for testing. Of the first 18 of 36 questions, drawn at random, some 6 are; that 0 or all 12 are,
        # has a probability of C(18, 12) / C(36, 12), one in 67,000.
        assert 0 < split[:18].count(Split.TEST) < 12


SIX = [*SEEDS, *(fresh(random.Random(seed)) for seed in (100, 101, 102))]
BY_MEANING = {"off_domain": 1.0, "paraphrase": 0.9, "coverage": True}


@pytest.mark.parametrize(("kept", "settings"), [(1, {}), (2, {}), (3, {}), (2, BY_MEANING)])
def test_a_stage_that_was_stopped_ends_with_the_same_questions(
    kept: int, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("through", "stopped"):
        (tmp_path / name).mkdir()
    through = context(tmp_path / "through", monkeypatch, seeds=SIX, **settings)
    counts = questions.run(through)
    shards = through.store.shards("questions")
    assert len(shards) >= 5
    shards_asked: list[int] = []

    def counting(seed: int, requests: Sequence[Request]) -> list[tuple[str, bool]]:
        shards_asked.append(seed)
        return mixed(seed, requests)

    stopped = context(tmp_path / "stopped", monkeypatch, counting, seeds=SIX, **settings)
    for path in shards[:kept]:
        for folder in ("questions", "dropped/questions"):
            source = through.store.root / folder / path.name
            if source.exists():
                (stopped.store.root / folder).mkdir(parents=True, exist_ok=True)
                shutil.copy(source, stopped.store.root / folder / path.name)
    shutil.copy(through.store.root / "questions" / "written.json", stopped.store.root / "questions" / "written.json")
    assert questions.run(stopped) == counts
    assert len(shards_asked) == len(shards) - kept
    assert stopped.store.read("questions", Question) == through.store.read("questions", Question)
    assert stopped.store.read_dropped("questions") == through.store.read_dropped("questions")


# -- drops --------------------------------------------------------------------------------------------------------------


def test_every_drop_is_kept_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    first, second, third = fresh(rng), fresh(rng), fresh(rng)

    def write(seed: int, requests: Sequence[Request]) -> list[tuple[str, bool]]:
        return [
            (first, True),
            (twin(first), True),  # near an accepted one
            (first.upper(), True),  # equal but for case
            (SEEDS[1].replace("outside", "out"), True),  # near a seed: of 13 shingles 12 are shared, 12 / 14 of all
            ("Why me?", True),  # 7 characters, without its mark 6
            ("", True),
            ("What is the su", False),  # cut at the token limit
            (second, True),
            (third, True),
            (fresh(rng), True),  # one more than is wanted: neither a question nor a drop
        ]

    run = context(tmp_path, monkeypatch, write, train=2, test=1, shortest=8)
    counts = questions.run(run)
    assert sorted([*of(run, Split.TRAIN), *of(run, Split.TEST)]) == sorted([first, second, third])
    assert run.store.read_dropped("questions") == [
        Drop("questions", "near_duplicate", twin(first), {"of": "q000000"}),
        Drop("questions", "near_duplicate", first.upper(), {"of": "q000000"}),
        Drop("questions", "near_duplicate", SEEDS[1].replace("outside", "out"), {"of": "seed-1"}),
        Drop("questions", "too_short", "Why me?"),
        Drop("questions", "too_short", ""),
        Drop("questions", "unfinished", "What is the su"),
    ]
    assert counts == {"train": 2, "test": 1, "dropped_near_duplicate": 3, "dropped_too_short": 2, "dropped_unfinished": 1}


class Characters:
    """Embeds a text as the counts of its characters. The tiny model is random, so its states hardly tell topics apart."""

    name = "characters"

    def embed(self, texts: Sequence[str]) -> Vectors:
        counts = np.zeros((len(texts), 2048), np.float32)
        for row, text in enumerate(texts):
            np.add.at(counts[row], [ord(character) for character in text], 1)
        return unit_rows(counts)


def test_questions_outside_the_domain_are_dropped_with_the_nearest_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(5)
    seeds, inside = [fresh(rng) for _ in range(8)], [fresh(rng) for _ in range(9)]
    outside = "Разложи многочлен на множители и найди все его корни!"
    texts = [*inside[:5], outside, *inside[5:]]
    run = context(
        tmp_path, monkeypatch, lambda seed, requests: [(t, True) for t in texts], seeds=seeds, train=6, test=3, off_domain=1.5
    )
    # It would drop the text first.
    monkeypatch.setattr(questions.QuestionFilters, "reason", lambda self, text: None)
    monkeypatch.setattr(questions, "plain_embedder", lambda backbone, role, batch_tokens: Characters())
    counts = questions.run(run)
    assert counts["dropped_off_domain"] == 1
    [drop] = run.store.read_dropped("questions")
    assert (drop.reason, drop.text) == ("off_domain", outside)
    assert drop.detail["nearest_seed"] in seeds
    assert drop.detail["distance"] > drop.detail["threshold"] > 0


def test_each_text_is_embedded_once_but_for_the_last_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """150 questions in shards of 10: embedding all seeds and questions for each shard would take over 1,000 texts."""
    embedded: list[str] = []

    class Counting(Characters):
        def embed(self, texts: Sequence[str]) -> Vectors:
            embedded.extend(texts)
            return super().embed(texts)

    rng = random.Random(5)
    seeds = [fresh(rng) for _ in range(64)]
    monkeypatch.setattr(questions, "plain_embedder", lambda backbone, role, batch_tokens: Counting())
    run = context(tmp_path, monkeypatch, fresh_texts, seeds=seeds, train=149, test=1, shard=10, paraphrase=1e-5, coverage=True)
    questions.run(run)
    written = run.store.read("questions", Question)
    counts = Counter(embedded)
    assert len(run.store.shards("questions")) >= 15
    assert {counts[seed] for seed in seeds} == {1}
    # Once as a sample; in each of two lists (all questions, training questions) once in a full group, and in the groups of up
    # to 32 at its end, which at most 4 shards see. Without groups, the first question would be read for each of 15 shards.
    assert max(counts[question.text] for question in written) <= 1 + 2 * (1 + 4)
    assert counts[written[0].text] >= 2


def fresh_texts(seed: int, requests: Sequence[Request]) -> list[tuple[str, bool]]:
    rng = random.Random(seed)
    return [(fresh(rng), True) for _ in requests]


def test_off_domain_questions_need_five_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"at least 5 different seeds.* has 3;"):
        questions.run(context(tmp_path, monkeypatch, off_domain=1.5))


def test_a_thin_topic_is_shown_more_often_with_coverage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One question in twenty is about something else. It is drawn in 1 of 20 examples without coverage, in more with it."""
    shares = []
    for steered in (False, True):
        (folder := tmp_path / str(steered)).mkdir()
        rare = ["Разложи многочлен на множители и найди все его корни!"]
        rng = random.Random(3)
        texts = [*rare, *(fresh(rng) for _ in range(19))]
        config = {"train": 40, "test": 1, "shard": 20, "examples": 3, "seed_examples": 1, "coverage": steered}
        monkeypatch.setattr(questions, "plain_embedder", lambda backbone, role, batch_tokens: Characters())
        run = context(folder, monkeypatch, lambda seed, requests, texts=texts: [(t, True) for t in texts], **config)
        work = questions._work(run)
        asked_of = [Question(f"q{n}", text, Split.TRAIN, "self") for n, text in enumerate(texts)]
        prompts = asked(monkeypatch)
        for shard in range(1, 11):
            list(work._requests(run.model, Batch(shard, asked_of), work._embedder(run.model)))
        shares.append(sum(rare[0] in shown for shown in prompts) / len(prompts))
        monkeypatch.undo()
    assert shares[0] == pytest.approx(2 / 20, abs=0.05)  # two of the three examples are questions so far
    assert shares[1] > 2 * shares[0]


def test_a_question_that_reached_a_stop_text_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    texts = [f"{fresh(rng)}\nQuestion: And" for _ in range(10)]  # went on after it, up to the token limit
    run = context(tmp_path, monkeypatch, lambda seed, requests: [(text, False) for text in texts], train=6, test=4)
    questions.run(run)
    assert {q.text for q in run.store.read("questions", Question)} == {text.split("\n")[0] for text in texts}
    assert drops(run) == []


def test_a_model_that_says_the_same_again_and_again_is_given_up_with_the_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [("Why 1?", True), *[(SEEDS[0], True)] * 8, ("cut", False)]
    calls: list[int] = []

    def write(seed: int, requests: Sequence[Request]) -> list[tuple[str, bool]]:
        calls.append(seed)
        return texts

    run = context(tmp_path, monkeypatch, write, attempts=1.0)
    with pytest.raises(LoopError, match=r"only 0 usable questions out of 36 \(dropped: near_duplicate 32, .*more varied seeds"):
        questions.run(run)
    # 36 wanted, 1 attempt each, 10 a shard: 4 shards, 8 near-duplicates in each.
    assert len(calls) == 4
    assert len(set(calls)) == 4  # every shard draws differently


@pytest.mark.parametrize("seed", range(3))
def test_sampling_only_as_much_as_is_needed_gives_the_questions_of_whole_shards(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, fewest in (("whole", 10**6), ("needed", 2)):
        monkeypatch.setattr(questions, "_FEWEST_AT_ONCE", fewest)
        (tmp_path / name).mkdir()
        run = context(tmp_path / name, monkeypatch, seed=seed, shard=20)
        prompts = asked(monkeypatch)
        questions.run(run)
        found.append([run.store.read("questions", Question), drops(run)])
        found[-1].append(len(prompts))
        monkeypatch.undo()
    assert found[0][:2] == found[1][:2]
    assert found[1][2] <= found[0][2]


def test_a_few_questions_cost_a_few_samples_whatever_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = context(tmp_path, monkeypatch, shard=1024, train=4, test=2)
    prompts = asked(monkeypatch)
    assert questions.run(run)["train"] == 4
    assert len(prompts) == 16


def test_a_part_of_a_list_is_sampled_as_it_would_be_in_the_whole() -> None:
    backbone = tiny_models.backbone("llama")
    requests = [Request(Prompt((5 + i, 9, 12)), 1.0) for i in range(12)]
    with backbone.acting_as(BASE):
        whole = generate(backbone, requests, max_new_tokens=6, seed=3)
        part = generate(backbone, requests[7:], max_new_tokens=6, seed=3, first=7)
        other = generate(backbone, requests[7:], max_new_tokens=6, seed=3)
    assert [r.ids for r in part] == [r.ids for r in whole[7:]]
    assert [r.ids for r in other] != [r.ids for r in whole[7:]]


def _file(folder: Path, *, train: int = 5, test: int = 3) -> tuple[Path, list[str]]:
    """Write a file of questions with their splits; return its path and the questions."""
    rng = random.Random(0)  # `mixed` begins with the first of these, so the model repeats it
    rows = [{"question": fresh(rng), "split": "test" if n < test else "train"} for n in range(train + test)]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return path, [row["question"] for row in rows]


def test_a_file_of_questions_is_extended_with_generated_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, own = _file(tmp_path)
    run, prompts = context(tmp_path, monkeypatch, file=str(path), extend=True), asked(monkeypatch)
    counts = questions.run(run)
    written = run.store.read("questions", Question)
    assert [q.text for q in written[:8]] == own
    assert [q.source for q in written] == ["file"] * 8 + ["self"] * 28
    assert [q.id for q in written] == [f"q{n:06d}" for n in range(36)]
    assert (counts["train"], counts["test"]) == (24, 12)
    assert max(overlap(a, b) for a, b in itertools.combinations([q.text for q in written], 2)) < 0.8
    assert ("near_duplicate", own[0]) in drops(run), "the model repeats a question of the file"
    shown = {example for examples in prompts for example in examples}
    assert not shown & set(of(run, Split.TEST))
    assert shown & set(own[3:])


def test_no_example_is_shown_twice_in_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = _file(tmp_path, train=6)
    run, prompts = context(tmp_path, monkeypatch, file=str(path), extend=True), asked(monkeypatch)
    run.config = run.config.model_copy(update={"seeds": ""})
    questions.run(run)
    assert prompts
    assert all(len(set(examples)) == len(examples) for examples in prompts)


@pytest.mark.parametrize(("train", "test"), [(30, 15), (2, 15), (30, 0)])
def test_a_file_larger_than_what_is_wanted_is_kept_whole(
    train: int, test: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, own = _file(tmp_path, train=train, test=test)
    run = context(tmp_path, monkeypatch, file=str(path), extend=True)
    counts = questions.run(run)
    assert (counts["train"], counts["test"]) == (max(24, train), max(12, test))
    assert set(own) <= {q.text for q in run.store.read("questions", Question)}


def test_without_seeds_the_training_questions_of_the_file_are_the_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, own = _file(tmp_path)
    run = context(tmp_path, monkeypatch, file=str(path), extend=True)
    run.config = run.config.model_copy(update={"seeds": ""})
    assert [seed.question for seed in run.seeds] == own[3:]
    only_tests = RunConfig(questions={"file": str(_file(tmp_path, train=0)[0]), "extend": True})
    with pytest.raises(SeedsError, match="has only test questions, which are never shown as examples"):
        seeds_of(only_tests, read_given(only_tests))


def test_only_a_file_of_questions_can_be_extended(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which is the only file that may be set; no file is set"):
        read_given(RunConfig(questions={"extend": True}))
    both = RunConfig(questions={"extend": True}, replies={"file": str(tmp_path / "replies.jsonl")})
    with pytest.raises(ConfigError, match=r"replies\.file is set"):
        read_given(both)
