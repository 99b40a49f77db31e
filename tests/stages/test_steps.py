"""The stage steps on the embedded model, and what reads its results."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
import torch

from selfeval.backbone.roles import Backbone
from selfeval.config import BackboneConfig, RunConfig, load_config
from selfeval.errors import ConfigError, LoopError
from selfeval.evaluation.evaluator import JudgedPair
from selfeval.judging.steps import step_texts
from selfeval.judging.templates import Templates, templates_folder
from selfeval.lab.oracle import WordProblems
from selfeval.records import Drop, Question, ReferenceAnswer, Reply, Split, StepLabels, Verdict, VerdictState
from selfeval.rollout.requests import Rollout
from selfeval.stages import steps
from selfeval.stages.context import Context
from selfeval.stages.gold import load_gold, right_steps_of
from selfeval.stages.policy import learner_context
from selfeval.stages.step_evidence import evaluate_steps
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore
from selfeval.training.context import QuestionPrompts, Samples, Scores
from selfeval.training.step_evaluator import STEP_EVALUATOR, score_steps
from selfeval.training.step_scoring import StepScorer
from toy import LAB

MODEL = str(LAB / "word_problems")
TEXTS = [f"Tom has {a} pens. He buys {b} more. How many pens does Tom have now?" for a, b in ((3, 2), (5, 4), (7, 6), (9, 3))]
TEXTS.append("What is the meaning of life, the universe and everything?")
SETTINGS = ("steps.enabled=true", "steps.completions=4", "steps.votes=8", "steps.shard=2", "steps.batch=2", "steps.epochs=4")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load(MODEL, BackboneConfig(device="cpu"))


def context(folder: Path, backbone: Backbone, *settings: str) -> Context:
    """A run with a right and a wrong reply to each question, and one that was cut off."""
    config = load_config(None, {"model": MODEL}, [*SETTINGS, *settings])
    made = Context(config, RunStore(folder), Terminal(quiet=True))
    templates = Templates.load(templates_folder(MODEL), backbone.loaded.tokenizer)
    for role in backbone.roles.names:
        backbone.roles.remove(role)
    made.__dict__.update(backbone=backbone, templates=templates)
    questions = [Question(f"q{n}", text, Split.TRAIN, "seed") for n, text in enumerate(TEXTS)]
    replies = []
    for number, question in enumerate(questions):
        a, b = (int(word) for word in question.text.split() if word.isdecimal()) if number < 4 else (1, 2)
        right, wrong = f"{a} + {b} = {a + b}. The answer is {a + b}", f"OK. {a} - {b} = {a - b}. The answer is {a - b}"
        for name, text, finished in (("a", right, True), ("b", wrong, True), ("c", f"{a} +", False)):
            ids = (*templates.reply_ids(text), *(backbone.loaded.eos_ids[:1] if finished else ()))
            replies.append(Reply(f"q{number}{name}", question.id, text, ids, "sample", 1.0, 1.0, -1.0, finished))
    made.store.write_shard("questions", 0, questions)
    made.store.write_shard("replies", 0, replies)
    made.store.write_shard("reference_answers", 0, [ReferenceAnswer(q.id, "The answer is 5") for q in questions])
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Context:
    made = context(tmp_path_factory.mktemp("steps"), backbone)
    made.counts = steps.run(made)  # type: ignore[attr-defined]
    return made


def test_labels_follow_gold_and_drops_have_reasons(run: Context) -> None:
    labels, drops = run.store.read("steps", StepLabels), run.store.read("dropped/steps", Drop)
    assert [found.reply_id for found in labels] == [f"q{n}{name}" for n in range(4) for name in "ab"]
    replies, decode, gold = run.replies(), run.templates.tokenizer.decode, WordProblems()
    shares: dict[bool, list[float]] = {True: [], False: []}
    for found in labels:
        question = TEXTS[int(found.question_id[1:])]
        assert found.reference == str(gold.answer(question))
        rights = gold.right_steps(question, step_texts(replies[found.reply_id].ids, found.ends, decode))
        assert rights is not None
        assert len(rights) == len(found.ends) == (2 if found.reply_id[-1] == "a" else 3)
        for share, right in zip(found.shares, rights, strict=True):
            shares[right].append(share)
    assert fmean(shares[True]) - fmean(shares[False]) > 0.5
    assert {drop.reason for drop in drops} == {"no_majority", "unfinished"}
    assert [drop.text for drop in drops if drop.reason == "no_majority"] == TEXTS[4:]
    assert run.counts == {"replies": 8, "steps": 20, "no_majority": 1, "unfinished": 5}  # type: ignore[attr-defined]


def test_a_lost_shard_and_a_killed_training_are_made_again_with_the_same_result(
    run: Context, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = context(tmp_path, backbone, "steps.checkpoint_every=3")

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps, "save_role", killed)
        with pytest.raises(KeyboardInterrupt):
            steps.run(made)
    made.store.shard_path("steps", 1).unlink()
    backbone.roles.remove(STEP_EVALUATOR)
    steps.run(made)
    weights = "roles/steps/adapter_model.safetensors", "roles/steps/head.safetensors", "steps/shard-00001.jsonl"
    for name in weights:
        assert (made.store.root / name).read_bytes() == (run.store.root / name).read_bytes()
    backbone.roles.remove(STEP_EVALUATOR)
    steps.ensure_step_evaluator(run)


def samples(run: Context, thinking: int = 0) -> tuple[Samples, list[Reply]]:
    replies = [run.replies()[name] for name in ("q0a", "q0b")]
    prompt = QuestionPrompts("q0", run.templates.prompt("reply", question=TEXTS[0]), run.grade_prompt("q0", TEXTS[0]))
    rollouts = [
        Rollout((*range(20, 20 + thinking), *r.ids), (0.0,) * (thinking + len(r.ids)), True, hidden=thinking) for r in replies
    ]
    return Samples([prompt] * 2, rollouts), replies


@pytest.mark.parametrize("thinking", [0, 3])
def test_dense_rewards_are_at_the_last_tokens_of_steps(run: Context, thinking: int) -> None:
    ends = {reply.reply_id: reply.ends for reply in run.store.read("steps", StepLabels)}
    asked, replies = samples(run, thinking)
    whole = torch.tensor([1.5, -0.5])
    by_ids = {run.replies()[name].ids: found for name, found in ends.items()}
    scorer = StepScorer(run.backbone, 512, lambda ids: by_ids[tuple(ids)], "dense", lambda samples: Scores(whole), weight=2.0)
    scores = scorer(asked)
    assert scores.whole_B is whole
    assert scores.steps_BR is not None
    for reply, row in zip(replies, scores.steps_BR, strict=True):
        logits = score_steps(run.backbone, STEP_EVALUATOR, [asked.asked[0].grade], [reply.ids], [ends[reply.id]], 512)[0]
        values = [0.5, *torch.tensor(logits).sigmoid().tolist()]
        places = [thinking + end - 1 for end in ends[reply.id]]
        assert row.nonzero().flatten().tolist() == places
        assert row[places].tolist() == pytest.approx([2 * (b - a) for a, b in pairwise(values)], abs=1e-5)


def test_replies_are_scored_by_their_steps(run: Context) -> None:
    ends = {run.replies()[found.reply_id].ids: found.ends for found in run.store.read("steps", StepLabels)}
    asked, replies = samples(run)

    def score(how: str) -> list[float]:
        scorer = StepScorer(
            run.backbone, 512, lambda ids: ends[tuple(ids)], "reply", lambda samples: Scores(torch.zeros(2)), how
        )  # type: ignore[arg-type]
        found = scorer(asked)
        assert found.steps_BR is None
        return found.whole_B.tolist()

    prompts = [asked.asked[0].grade] * 2
    rows = score_steps(run.backbone, STEP_EVALUATOR, prompts, [r.ids for r in replies], [ends[r.ids] for r in replies], 512)
    logprobs = [torch.nn.functional.logsigmoid(torch.tensor(row)) for row in rows]
    assert score("min") == pytest.approx([float(row.min()) for row in logprobs], abs=1e-5)
    assert score("product") == pytest.approx([float(row.sum()) for row in logprobs], abs=1e-5)
    assert score("last") == pytest.approx([float(row[-1]) for row in logprobs], abs=1e-5)


def test_the_policy_stage_selects_the_scorer(run: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "scorer", lambda self, pessimism="mean": "the evaluators")
    for use, weight in (("off", None), ("dense", 0.5), ("reply", 0.5)):
        config = load_config(None, {"model": MODEL}, [*SETTINGS, f"policy.steps={use}", "policy.step_weight=0.5"])
        monkeypatch.setattr(run, "config", config)
        found = learner_context(run)
        assert found.evaluator == ("steps" if use == "reply" else "evaluator-0")
        if weight is None:
            assert found.scorer == "the evaluators"
        else:
            assert isinstance(found.scorer, StepScorer)
            assert (found.scorer.use, found.scorer.weight, found.scorer.outcomes) == (use, weight, "the evaluators")
            assert found.scorer.ends(run.replies()["q0a"].ids) == run.store.read("steps", StepLabels)[0].ends


def test_the_evidence_has_labels_against_gold_and_pairs_by_steps(run: Context) -> None:
    replies, gold = run.replies(), WordProblems()
    questions = {q.id: q for q in run.questions(Split.TRAIN)}
    verdict = [Verdict(f"q{n}", Split.TEST, f"q{n}a", f"q{n}b", VerdictState.TIE, 0.5, 1.0, None) for n in range(4)]
    # The evaluator is wrong about every pair.
    pairs = [JudgedPair(v, (replies[v.first], replies[v.second]), -1.0, 0.0, (True, False)) for v in verdict]
    found = evaluate_steps(run, questions, pairs, gold.right_steps, has_gold=True)
    assert found is not None
    assert (found.replies, found.steps) == (8, 12)
    assert found.labels_gold is not None
    # Of a right reply the first step is right, of a wrong one "OK." is and the equation is not; last steps do not count.
    labels = {label.reply_id: [share >= 0.5 for share in label.shares] for label in run.store.read("steps", StepLabels)}
    agreeing = [[labels[f"q{n}a"][0], labels[f"q{n}b"][0], not labels[f"q{n}b"][1]] for n in range(4)]
    assert found.labels_gold.known == pytest.approx(fmean(map(fmean, agreeing)))
    assert found.labels_gold.n == 4
    assert found.accuracy_gold is not None
    assert found.gain is not None
    assert found.gain.wins == round(found.accuracy_gold.known * 4) > 2
    without = evaluate_steps(run, questions, pairs, None, has_gold=False)
    assert without is not None
    assert (without.labels_gold, without.accuracy_gold, without.gain) == (None, None, None)


def test_gold_of_steps_is_found_in_an_installed_domain_that_has_it() -> None:
    right_steps = right_steps_of(load_gold(RunConfig(domain="word-problems")))
    assert right_steps is not None
    assert right_steps(TEXTS[0], ["3 + 2 = 5.", " The answer is 6"]) == [True, False]
    assert right_steps_of(None) is None


def test_replies_with_thinking_and_replies_without_answers_are_refused(tmp_path: Path, backbone: Backbone) -> None:
    made = context(tmp_path / "letters", backbone, "steps.answer=letter")
    with pytest.raises(LoopError, match=r"no step could be labelled: of 200 questions.*steps.answer = letter"):
        steps.run(made)
    made = context(tmp_path / "thinking", backbone)
    first, *others = made.store.read("replies", Reply)
    made.store.write_shard("replies", 0, [Reply(**{**first.__dict__, "thinking": "Well"}), *others])
    with pytest.raises(LoopError, match="after a chain of thought cannot be labelled"):
        steps.run(made)


def test_use_without_a_step_evaluator_is_refused() -> None:
    assert RunConfig().policy.steps == "off"
    with pytest.raises(ConfigError, match=r'steps = "dense" needs the step evaluator.*set steps.enabled = true'):
        load_config(None, {}, ["policy.steps=dense"])
