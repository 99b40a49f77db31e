from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from selfeval.config import RunConfig, load_config
from selfeval.errors import ConfigError, DataError, ModelError
from selfeval.judging.templates import Templates, templates_folder
from selfeval.quality.dedupe import jaccard, shingles
from selfeval.records import Question, Split, from_json, to_json
from selfeval.runs.conversations import check_conversations
from selfeval.stages.given import Given, Labelled, given_key, read_given
from selfeval.stages.gold import FileGold


def _write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _config(kind: str, path: Path, *more: str) -> RunConfig:
    return load_config(None, {}, [f"{kind}.file={path}", *more])


def _given(kind: str, path: Path, *more: str) -> Given:
    found = read_given(_config(kind, path, *more))
    assert found is not None
    return found


def _refusal(kind: str, path: Path, *more: str) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        read_given(_config(kind, path, *more))
    return str(caught.value)


QUESTIONS = [f"What is {n} + {n}?" for n in range(12)]


def _splits(given: Given) -> dict[str, str]:
    return {question.text: question.split.value for question in given.questions}


def test_without_a_file_nothing_is_given() -> None:
    assert read_given(RunConfig()) is None
    assert given_key(RunConfig()) == []


def test_questions_from_json_lines_and_from_plain_text_are_the_same(tmp_path: Path) -> None:
    lines = _write(tmp_path / "a.jsonl", *({"question": q, "answer": 3} for q in QUESTIONS))
    plain = tmp_path / "a.txt"
    plain.write_text("\ufeff" + "\r\n".join(QUESTIONS) + "\n")
    first, second = _given("questions", lines), _given("questions", plain)
    assert first.questions == second.questions
    assert [question.text for question in first.questions] == QUESTIONS
    assert [question.id for question in first.questions][:2] == ["q000000", "q000001"]
    assert {question.source for question in first.questions} == {"file"}


def test_the_split_has_the_wanted_proportion_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", *({"question": q} for q in QUESTIONS))
    sizes = ("questions.train=2", "questions.test=1")
    found = _splits(_given("questions", path, *sizes))
    assert sorted(found.values()) == ["test"] * 4 + ["train"] * 8
    assert _splits(_given("questions", path, *sizes)) == found
    shuffled = _write(tmp_path / "b.jsonl", *({"question": q} for q in reversed(QUESTIONS)))
    assert _splits(_given("questions", shuffled, *sizes)) == found
    assert _splits(_given("questions", path, *sizes, "seed=1")) != found


def test_a_split_that_a_line_asks_for_is_kept(tmp_path: Path) -> None:
    asked = [{"question": q, "split": "test" if n < 5 else "train"} for n, q in enumerate(QUESTIONS)]
    found = _splits(_given("questions", _write(tmp_path / "a.jsonl", *asked)))
    assert [q for q, split in found.items() if split == "test"] == QUESTIONS[:5]


LONG = "Tom has three red apples and buys some more at the market today. How many apples has he now?"


def test_near_duplicates_are_never_in_both_splits(tmp_path: Path) -> None:
    twin, other = LONG, f"Now, {LONG}"
    rows = [{"question": q} for q in QUESTIONS]
    given = _given("questions", _write(tmp_path / "a.jsonl", *rows, {"question": twin}, {"question": other}))
    assert [(d.reason, d.text, d.detail) for d in given.dropped] == [("near_duplicate", other, {"of": twin})]
    # A training question that is near a test question is dropped, wherever it is in the file.
    asked = [*rows, {"question": twin, "split": "train"}, {"question": other, "split": "test"}]
    given = _given("questions", _write(tmp_path / "b.jsonl", *asked))
    assert [d.text for d in given.dropped] == [twin]
    # Questions that come with replies are both kept, in one split.
    both = [{"question": q, "replies": ["one", "two"]} for q in (*QUESTIONS, twin, other)]
    for seed in range(6):
        found = _splits(_given("replies", _write(tmp_path / "c.jsonl", *both), f"seed={seed}"))
        assert found[twin] == found[other]
    both[-1]["split"] = "test"
    found = _splits(_given("replies", _write(tmp_path / "d.jsonl", *both)))
    assert found[twin] == found[other] == "test"
    both[-2]["split"] = "train"
    given = _given("replies", _write(tmp_path / "e.jsonl", *both))
    assert [d.text for d in given.dropped] == [twin]


def test_a_chain_of_near_duplicates_has_one_split(tmp_path: Path) -> None:
    """The first and the last are no near-duplicates, but each is one of the question between them."""
    words = [f"w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(60)]
    chain = [" ".join(words[start : start + 40]) for start in (0, 2, 4, 6)]
    assert jaccard(shingles(chain[0]), shingles(chain[3])) < 0.8 <= jaccard(shingles(chain[0]), shingles(chain[1]))
    rows = [{"prompt": q, "chosen": "yes", "rejected": "no"} for q in (*chain, *QUESTIONS)]
    for order in (rows, [rows[0], rows[3], rows[2], rows[1], *rows[4:]]):  # the last one may join two groups
        path = _write(tmp_path / "a.jsonl", *order)
        for seed in range(12):
            found = _splits(_given("pairs", path, f"seed={seed}"))
            assert len(found) == len(rows)
            assert len({found[q] for q in chain}) == 1


def test_a_question_that_connects_two_splits_is_dropped(tmp_path: Path) -> None:
    words = [f"w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(60)]
    first, between, last = (" ".join(words[start : start + 40]) for start in (0, 4, 8))
    assert jaccard(shingles(first), shingles(last)) < 0.8 <= jaccard(shingles(first), shingles(between))
    asked = {first: "train", between: None, last: "test"}
    rows = [{"prompt": q, "chosen": "yes", "rejected": "no", **({"split": s} if s else {})} for q, s in asked.items()]
    given = _given(
        "pairs", _write(tmp_path / "a.jsonl", *rows, *({"prompt": q, "chosen": "a", "rejected": "b"} for q in QUESTIONS))
    )
    assert [(d.reason, d.text) for d in given.dropped] == [("near_duplicate", between)]
    assert _splits(given)[first] == "train"
    assert _splits(given)[last] == "test"


@pytest.mark.parametrize(
    "lines",
    [
        [{"question": "{}", "replies": ["one", "two", " One. "]}],
        [{"prompt": "{}", "response": "one"}, {"prompt": "{}", "response": "two"}],
        [{"question": "{}", "reply": "one"}, {"question": "{}", "reply": "two"}],
        [
            {"prompt": [{"role": "user", "content": "{}"}], "completion": [{"role": "assistant", "content": c}]}
            for c in ("one", "two")
        ],
    ],
)
def test_replies_in_every_format(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    rows = [json.loads(json.dumps(line).replace("{}", q)) for q in QUESTIONS for line in lines]
    given = _given("replies", _write(tmp_path / "a.jsonl", *rows))
    assert [question.text for question in given.questions] == QUESTIONS
    assert set(given.replies.values()) == {("one", "two")}
    assert given.pairs == {}


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "{}", "chosen": "good", "rejected": "bad"},
        {"question": "{}", "chosen": "good", "rejected": "bad", "confidence": 1, "chosen_ids": [1, 2], "split": None},
        {"prompt": [_turn("user", "{}")], "chosen": [_turn("assistant", "good")], "rejected": [_turn("assistant", "bad")]},
        {
            "chosen": [_turn("user", "{}"), _turn("assistant", "good")],
            "rejected": [_turn("user", "{}"), _turn("assistant", "bad")],
        },
    ],
)
def test_pairs_in_every_format(tmp_path: Path, line: dict[str, Any]) -> None:
    rows = [json.loads(json.dumps(line).replace("{}", q)) for q in QUESTIONS]
    given = _given("pairs", _write(tmp_path / "a.jsonl", *rows))
    assert [question.text for question in given.questions] == QUESTIONS
    ((pair,),) = set(given.pairs.values())
    assert (pair.chosen, pair.rejected, pair.confidence) == ("good", "bad", 1.0)
    assert set(given.replies.values()) == {("good", "bad")}


GOOD = [{"question": q, "replies": ["one", "two"], "chosen": "one", "rejected": "two"} for q in QUESTIONS]


@pytest.mark.parametrize(
    ("kind", "line", "said"),
    [
        (
            "questions",
            {"text": "Why?"},
            'line 13: missing or empty "question"; got {"text": "Why?"}; write {"question": "..."}',
        ),
        ("questions", {"question": 3}, 'line 13: missing or empty "question"'),
        ("questions", {"question": "Why?", "split": "dev"}, 'line 13: "split" must be "train" or "test", got "dev"'),
        ("questions", ["Why?"], "line 13: not a JSON object"),
        ("replies", {"question": "Why?"}, 'line 13: missing or empty "reply"'),
        ("replies", {"question": "Why?", "replies": []}, 'line 13: "replies" must be a list of strings'),
        ("replies", {"question": "Why?", "replies": ["a", 3]}, 'line 13: missing or empty "replies"'),
        ("pairs", {"prompt": "Why?", "chosen": "a"}, 'line 13: missing or empty "rejected"'),
        ("pairs", {"prompt": "Why?", "chosen": "a", "rejected": " A. "}, '"chosen" and "rejected" are identical'),
        (
            "pairs",
            {"prompt": "Why?", "chosen": "a", "rejected": "b", "confidence": 0.4},
            "must be a number from 0.5 to 1, got 0.4",
        ),
        (
            "pairs",
            {"prompt": "Why?", "chosen": "a", "rejected": "b", "confidence": True},
            "must be a number from 0.5 to 1, got true",
        ),
        (
            "pairs",
            {"prompt": [_turn("user", "a"), _turn("assistant", "b")], "chosen": "a", "rejected": "b"},
            '"prompt" must end with a turn of the user, got assistant',
        ),
        ("questions", {"messages": []}, '"messages" must be a list of turns, each with "role" and "content"'),
        ("questions", {"messages": "Why?"}, '"messages" must be a list of turns, each with "role" and "content"'),
        ("questions", {"messages": ["Why?"]}, '"messages" has a turn of an unknown role; allowed: system, user, assistant'),
        ("questions", {"messages": [_turn("tool", "a")]}, '"messages" has a turn of an unknown role'),
        ("questions", {"messages": [_turn("user", " ")]}, '"messages" has a turn with a missing or empty "content"'),
        (
            "questions",
            {"messages": [_turn("user", "a"), _turn("system", "b"), _turn("user", "c")]},
            '"messages" may have a system turn at the beginning only',
        ),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, kind: str, line: Any, said: str) -> None:
    path = _write(tmp_path / "a.jsonl", *GOOD, line)
    assert said in _refusal(kind, path)
    assert str(path) in _refusal(kind, path)


def test_a_question_asked_for_in_both_splits_is_refused(tmp_path: Path) -> None:
    rows = [{**GOOD[0], "split": "train"}, *GOOD[1:], {**GOOD[0], "split": "test"}]
    said = _refusal("replies", _write(tmp_path / "a.jsonl", *rows))
    assert 'line 13: "split" is test, but line 1 has the same question with train; a question must be in one split' in said


def test_too_little_is_refused(tmp_path: Path) -> None:
    few = _write(tmp_path / "few.jsonl", *GOOD[:4])
    assert "has 3 training and 1 test questions; at least 4 and 1 are needed" in _refusal("questions", few)
    train = _write(tmp_path / "train.jsonl", *({**row, "split": "train"} for row in GOOD))
    assert "has 12 training and 0 test questions" in _refusal("questions", train)
    assert "set questions.extend = true" in _refusal("questions", train)
    assert "questions.extend" not in _refusal("pairs", few), "a file of pairs cannot be extended"
    single = _write(tmp_path / "single.jsonl", *({"question": q, "reply": "one"} for q in QUESTIONS))
    assert "no training question with two different replies" in _refusal("replies", single)
    assert "is empty; write" in _refusal("pairs", _write(tmp_path / "empty.jsonl"))
    assert "pairs.file " + str(tmp_path / "none") + " does not exist" in _refusal("pairs", tmp_path / "none")


def test_one_file_is_given_and_rounds_need_replies_of_the_policy(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", *GOOD)
    said = _refusal("pairs", path, f"questions.file={path}")
    assert said.startswith("questions.file and pairs.file are set; set only one")
    assert "set rounds = 1, or use questions.file" in _refusal("pairs", path, "rounds=2")
    assert _given("questions", path, "rounds=2").kind == "questions"


def test_the_key_is_the_content_wherever_it_is(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", *GOOD)
    key = given_key(_config("pairs", path))
    (tmp_path / "b").mkdir()
    copied = _write(tmp_path / "b" / "c.jsonl", *GOOD)
    assert given_key(_config("pairs", copied)) == key
    assert given_key(_config("replies", copied)) != key
    _write(path, *GOOD[1:])
    assert given_key(_config("pairs", path)) != key


def test_confidence_is_the_label(tmp_path: Path) -> None:
    rows = [{"prompt": q, "chosen": "good", "rejected": "bad", "confidence": 0.7} for q in QUESTIONS]
    given = _given("pairs", _write(tmp_path / "a.jsonl", *rows))
    assert {pair.confidence for pairs in given.pairs.values() for pair in pairs} == {0.7}
    assert {question.split for question in given.questions} == set(Split)


def test_a_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.csv"
    path.write_text("question,answer\nWhat is 2 + 3?,5\n")
    assert "questions.csv is a table, which is not supported; use JSON lines" in _refusal("questions", path)


def test_thousands_of_replies_to_one_question_take_time_in_proportion(tmp_path: Path) -> None:
    """Comparing each with all before took 22 minutes for this file."""
    rows = [{"question": q, "replies": ["one", "two"]} for q in QUESTIONS]
    rows.append({"question": "How many?", "replies": [f"Reply number {n}" for n in range(10_000)]})
    given = _given("replies", _write(tmp_path / "a.jsonl", *rows))
    assert max(len(replies) for replies in given.replies.values()) == 10_000


# -- conversations ------------------------------------------------------------------------------------------------------


def _conversation(number: int, role: str = "system") -> list[dict[str, str]]:
    first = [_turn("system", "Be brief.")] if role == "system" else []
    return [*first, _turn("user", f"What is {number} + {number}?"), _turn("assistant", "A number."), _turn("user", " Which? ")]


@pytest.mark.parametrize("key", ["messages", "prompt", "question"])
def test_a_conversation_is_one_question_with_its_turns(tmp_path: Path, key: str) -> None:
    given = _given("questions", _write(tmp_path / "a.jsonl", *({key: _conversation(n)} for n in range(12))))
    first = given.questions[0]
    assert first.text == "System: Be brief.\n\nUser: What is 0 + 0?\n\nAssistant: A number.\n\nUser: Which?"
    assert [(m.role, m.content) for m in first.messages] == [
        ("system", "Be brief."),
        ("user", "What is 0 + 0?"),
        ("assistant", "A number."),
        ("user", "Which?"),
    ]
    assert first.opening == "What is 0 + 0?"
    assert len(given.questions) == 12, "their last turns are equal, but not what they are about"
    assert from_json(Question, json.loads(json.dumps(to_json(first)))) == first


def test_a_conversation_of_one_turn_is_a_question(tmp_path: Path) -> None:
    given = _given("questions", _write(tmp_path / "a.jsonl", *({"messages": [_turn("user", q)]} for q in QUESTIONS)))
    plain = _given("questions", _write(tmp_path / "b.jsonl", *({"question": q} for q in QUESTIONS)))
    assert given.questions == plain.questions


def test_pairs_may_continue_a_conversation(tmp_path: Path) -> None:
    rows = [
        {"chosen": [*_conversation(n), _turn("assistant", "Yes")], "rejected": [*_conversation(n), _turn("assistant", "No")]}
        for n in range(12)
    ]
    given = _given("pairs", _write(tmp_path / "a.jsonl", *rows))
    assert given.questions[3].messages[1].content == "What is 3 + 3?"
    assert given.pairs[given.questions[3].id] == (Labelled("Yes", "No", 1.0),)


def test_gold_knows_a_conversation_by_its_turns(tmp_path: Path) -> None:
    lines = [{"messages": _conversation(n), "answer": 2 * n} for n in range(12)]
    path = _write(tmp_path / "a.jsonl", *lines)
    gold, asked = FileGold(path), _given("questions", path).questions
    assert [gold.is_right(question.text, "The answer is 4.") for question in asked[:4]] == [False, False, True, False]


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>"


def _templates(chat: str | None, system: str = "") -> Templates:
    tokenizer = tiny_models.words_tokenizer()
    tokenizer.chat_template = chat
    return Templates.load(templates_folder("none"), tokenizer, system=system)


def _asked(tmp_path: Path, role: str = "system") -> tuple[Question, ...]:
    rows = ({"messages": _conversation(n, role)} for n in range(12))
    return _given("questions", _write(tmp_path / f"{role}.jsonl", *rows)).questions


def test_the_prompt_of_a_reply_has_the_turns_of_the_conversation(tmp_path: Path) -> None:
    templates, question = _templates(CHAT), _asked(tmp_path)[1]
    check_conversations(templates, [question])
    text = templates.tokenizer.decode(list(templates.reply_prompt(question).ids))
    assert text == "<system>Be brief.<user>What is 1 + 1?<assistant>A number.<user>Which?<reply>"
    single = replace(question, text="Why?", messages=())
    assert templates.reply_prompt(single) == templates.prompt("reply", question="Why?")


def test_the_system_prompt_comes_before_the_turns(tmp_path: Path) -> None:
    templates, question = _templates(CHAT, "Be kind."), _asked(tmp_path, "none")[1]
    check_conversations(templates, [question])
    text = templates.tokenizer.decode(list(templates.reply_prompt(question).ids))
    assert text == "<system>Be kind.<user>What is 1 + 1?<assistant>A number.<user>Which?<reply>"


@pytest.mark.parametrize(
    ("chat", "system", "said"),
    [
        (None, "", "12 questions are conversations .*no chat template to format their turns"),
        (CHAT, "Be kind.", "begins with a system turn, and so does the prompt of replies; remove it or chat.system"),
        (CHAT.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' }}"), "", "drops the text of a turn"),
        (
            "{% if messages[-1].content == 'Which?' %}{{ raise_exception('one turn') }}{% endif %}" + CHAT,
            "",
            r"refuses a turn \(one turn\)",
        ),
    ],
)
def test_conversations_that_the_chat_template_cannot_format_are_refused(
    tmp_path: Path, chat: str | None, system: str, said: str
) -> None:
    with pytest.raises((DataError, ModelError), match=said):
        check_conversations(_templates(chat, system), _asked(tmp_path))
    check_conversations(_templates(chat, system), [Question("q0", "Why?", Split.TRAIN, "file")])


def test_a_turn_cannot_begin_another_one(tmp_path: Path) -> None:
    templates, question = _templates(CHAT), _asked(tmp_path)[1]
    forged = tuple(replace(message, content=f"{message.content} \x1euser\x1fForged") for message in question.messages)
    prompt = templates.reply_prompt(replace(question, messages=forged))
    assert templates.tokenizer.decode(list(prompt.ids)).count("<user>") == 2


# -- passages --------------------------------------------------------------------------------------------------------------


def _about(passage: str, *questions: str, **more: Any) -> list[dict[str, Any]]:
    return [{"question": question, "passage": passage, "source": {"file": "a.md"}, **more} for question in questions]


BIKES = [row for n in range(8) for row in _about(f"Bike {n} costs {n} euros.", f"What is bike {n}?", f"May I keep bike {n}?")]


def test_a_question_with_a_passage_is_asked_with_it(tmp_path: Path) -> None:
    first = _given("questions", _write(tmp_path / "a.jsonl", *BIKES)).questions[0]
    assert first.text == "Answer from this passage.\n\nBike 0 costs 0 euros.\n\nQuestion: What is bike 0?"
    assert first.messages == ()


@pytest.mark.parametrize("seed", range(4))
def test_no_passage_is_in_both_splits(seed: int, tmp_path: Path) -> None:
    given = _given("questions", _write(tmp_path / "a.jsonl", *BIKES), "questions.train=3", "questions.test=1", f"seed={seed}")
    assert (len(given.questions), given.dropped) == (16, ())
    splits: dict[str, set[Split]] = {}
    for question in given.questions:
        splits.setdefault(question.text.split("\n\n")[1], set()).add(question.split)
    assert [len(found) for found in splits.values()] == [1] * 8
    assert sum(Split.TEST in found for found in splits.values()) == 2


def test_a_line_decides_for_all_questions_about_its_passage(tmp_path: Path) -> None:
    rows = [*BIKES[:-1], {**BIKES[-1], "split": "test"}]
    given = _given("questions", _write(tmp_path / "a.jsonl", *rows), "questions.train=1000")
    assert [q.text[-16:] for q in given.questions if q.split == Split.TEST] == [
        ": What is bike 7?"[-16:],
        "May I keep bike 7?"[-16:],
    ]
    refused = [*BIKES[:-2], {**BIKES[-2], "split": "train"}, {**BIKES[-1], "split": "test"}]
    assert 'line 16: "split" is test, but line 15 has the same passage in the other split' in _refusal(
        "questions", _write(tmp_path / "b.jsonl", *refused)
    )


LOST = "If you lose a key, report the loss in the app on the same day, and pay the fee of 18 euros at the station desk."
WRAPPED = "If you lose a key,\nreport the loss in the *app* on the same day,\nand pay the fee of 18 euros at the station desk."
REVISED = f"Please note: {LOST}"
"""LOST has 26 words and so 24 shingles, which are 24 of the 26 shingles here: an overlap of 24/26 = 0.92."""


@pytest.mark.parametrize("seed", range(4))
def test_no_passage_is_in_both_splits_in_another_form(seed: int, tmp_path: Path) -> None:
    rows = [*BIKES, *(row for n, p in enumerate((LOST, WRAPPED, REVISED)) for row in _about(p, f"What {n}?", f"Who pays {n}?"))]
    given = _given("questions", _write(tmp_path / "a.jsonl", *rows), "questions.train=1", "questions.test=1", f"seed={seed}")
    lost = [question.split for question in given.questions if "key" in question.text]
    assert len(lost) == 6
    assert len(set(lost)) == 1


def test_versions_of_a_passage_that_differ_in_a_number_are_in_one_split(tmp_path: Path) -> None:
    """Of 30 shingles, the three with the number differ: an overlap of 27/33 = 0.82."""
    older = f"{LOST} You have one week from the loss."
    newer = older.replace("18 euros", "20 euros")
    assert older != newer
    rows = [*BIKES, *_about(older, "What is it?", split="train"), *_about(newer, "Who pays?", split="test")]
    assert "a near-duplicate of its passage in the other split" in _refusal("questions", _write(tmp_path / "a.jsonl", *rows))


def test_the_same_question_about_another_form_of_a_passage_is_a_near_duplicate(tmp_path: Path) -> None:
    rows = [*BIKES, *_about(LOST, LONG), *_about(WRAPPED, LONG), *_about(REVISED, LONG)]
    given = _given("questions", _write(tmp_path / "a.jsonl", *rows))
    assert [drop.text.count("*app*") for drop in given.dropped] == [1]  # only the one whose passage has the same words


@pytest.mark.parametrize(("other", "same"), [(WRAPPED, "the same passage"), (REVISED, "a near-duplicate of its passage")])
def test_lines_that_put_two_forms_of_a_passage_in_both_splits_are_refused(other: str, same: str, tmp_path: Path) -> None:
    rows = [*BIKES, *_about(LOST, "What?", split="train"), *_about(other, "Who?", split="test")]
    assert f'line 18: "split" is test, but line 17 has {same} in the other split' in _refusal(
        "questions", _write(tmp_path / "a.jsonl", *rows)
    )


def test_passages_that_are_near_duplicates_through_a_third_one_are_in_one_split(tmp_path: Path) -> None:
    """Of 18 shingles, 17 are those of the passage one word on (17/19 = 0.89), and 16 of the one two words on (16/20 = 0.8)."""
    words = (
        "the cold rain fell on an old stone bridge while seven quiet riders left their bikes near that dry wooden shed today"
    )
    names = words.split()
    passages = [" ".join(names[at : at + 20]) for at in (0, 1, 2)]
    ends = [*_about(passages[0], "Who rode?", split="train"), *_about(passages[2], "Who left?", split="test")]
    middle = _about(passages[1], "Who parked?")
    given = _given("questions", _write(tmp_path / "a.jsonl", *BIKES, *ends), "questions.near_duplicate=0.85")
    assert len(given.questions) == 18
    rows = [*BIKES, *ends, *middle]
    refused = _refusal("questions", _write(tmp_path / "a.jsonl", *rows), "questions.near_duplicate=0.85")
    assert "a near-duplicate of its passage in the other split" in refused


def test_too_few_passages_are_named(tmp_path: Path) -> None:
    rows = _about(LOST, *(f"What is thing {n}?" for n in range(8)))
    refused = _refusal("questions", _write(tmp_path / "a.jsonl", *rows))
    assert "has 0 training and 8 test questions" in refused
    assert "They are about 1 passage, counting near-duplicates once, and all questions about a passage get the same" in refused
    assert "Add lines about other passages" in refused


def test_near_duplicates_are_searched_among_the_questions_about_a_passage(tmp_path: Path) -> None:
    same = [row for n in range(6) for row in _about(f"City {n} has a station in street {n}.", LONG)]
    twins = _about("City 0 has a station in street 0.", f"Now, {LONG}")
    given = _given("questions", _write(tmp_path / "a.jsonl", *same, *twins))
    assert len(given.questions) == 6  # the same question about six passages is six questions
    assert [drop.text.rpartition("Question: ")[2] for drop in given.dropped] == [f"Now, {LONG}"]


def test_replies_and_answers_may_have_a_passage(tmp_path: Path) -> None:
    rows = [{**row, "replies": ["It is one.", "It is two."]} for row in BIKES]
    path = _write(tmp_path / "a.jsonl", *rows)
    given = _given("replies", path)
    assert given.replies[given.questions[0].id] == ("It is one.", "It is two.")
    questions = _write(tmp_path / "b.jsonl", *({**row, "answer": "one"} for row in BIKES))
    assert FileGold(questions).knows(given.questions[0].text)


def test_a_passage_of_another_type_and_further_questions_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", *BIKES, {"question": "What?", "passage": ["a"]})
    assert 'line 17: "passage" must be a text' in _refusal("questions", path)
    path = _write(tmp_path / "b.jsonl", *BIKES)
    assert "questions.extend = true adds generated questions, which have no passage" in _refusal(
        "questions", path, "questions.extend=true"
    )


# -- references ---------------------------------------------------------------------------------------------------------


def test_replies_of_questions_and_chosen_replies_are_references(tmp_path: Path) -> None:
    rows = [{"question": q, "reply": [f"{n} ", "sum"] if n % 2 else str(n)} for n, q in enumerate(QUESTIONS)]
    given = _given("questions", _write(tmp_path / "a.jsonl", *rows, {"question": "Is it?", "reply": " "}, {"question": "Why?"}))
    by_text = {question.text: given.references.get(question.id) for question in given.questions}
    expected = {q: (str(n), "sum") if n % 2 else (str(n),) for n, q in enumerate(QUESTIONS)}
    assert by_text == {**expected, "Is it?": None, "Why?": None}
    assert not given.replies  # they are not judged
    pairs = [{"prompt": QUESTIONS[n % 12], "chosen": f"good {n // 12}", "rejected": "bad"} for n in range(24)]
    given = _given("pairs", _write(tmp_path / "b.jsonl", *pairs))
    assert set(given.references.values()) == {("good 0", "good 1")}
    replies = [{"question": q, "replies": ["a", "b"]} for q in QUESTIONS]
    assert _given("replies", _write(tmp_path / "c.jsonl", *replies)).references == {}


@pytest.mark.parametrize("reply", [3, {"content": "a"}, ["a", None]])
def test_a_reference_is_a_text(tmp_path: Path, reply: Any) -> None:
    rows = [{"question": q} for q in QUESTIONS]
    said = _refusal("questions", _write(tmp_path / "a.jsonl", *rows, {"question": "Why?", "reply": reply}))
    assert 'line 13: "reply" must be a text or a list of texts' in said
