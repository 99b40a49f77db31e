"""Labels of steps: completions of an engine that is written out, and of the embedded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

import tiny_models
from judge_engine import judges_generate_with
from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import BackboneConfig, StepsConfig
from selfeval.judging.step_labels import SteppedReply, complete_steps, share_of
from selfeval.judging.steps import step_ends
from selfeval.judging.templates import Templates, templates_folder
from selfeval.judging.voting import Voter
from selfeval.prompt import Prompt
from selfeval.rollout.requests import Request, Rollout
from toy import LAB

TOKENIZER = tiny_models.words_tokenizer()


def encoded(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


def reply(text: str, question: str = "q") -> SteppedReply:
    ids = (*encoded(text), tiny_models.EOS)
    return SteppedReply(question, Prompt((5, 6)), ids, step_ends(ids, TOKENIZER.decode, "sentences", (tiny_models.EOS,)), "7")


def completed(
    monkeypatch: pytest.MonkeyPatch, replies: Sequence[SteppedReply], endings: Sequence[str]
) -> tuple[Any, list[Request]]:
    """Complete with an engine that writes one of the endings per request, in turn; an ending of "..." is cut off."""
    asked: list[Request] = []

    def engine(backbone: Any, requests: Sequence[Request], **options: Any) -> list[Rollout]:
        asked.extend(requests)
        texts = [endings[n % len(endings)] for n in range(len(requests))]
        return [Rollout((*encoded(text), *(() if text == "..." else (tiny_models.EOS,))), (), text != "...") for text in texts]

    judges_generate_with(monkeypatch, engine)
    backbone = tiny_models.backbone("llama", 400)
    templates = Templates.load(templates_folder("no such model"), TOKENIZER)
    voter = Voter(backbone, templates, StepsConfig(), limit=8, batch_size=4, seed=0)
    return complete_steps(voter, replies, 3), asked


def test_a_reply_is_completed_from_the_end_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    one = reply("Two and two. So four. It is 7")
    [found], asked = completed(monkeypatch, [one], [" It is 7", " No idea", "..."])
    # "No idea" has no number behind the beginning, which has none either; a completion that was cut off has no answer.
    assert found == [["7", None, None], ["7", None, None], ["7", "7", "7"]]
    assert [request.prompt.ids for request in asked] == [(5, 6, *one.ids[:end]) for end in one.ends[:-1] for _ in range(3)]
    assert len({request.stream for request in asked}) == 6
    assert [share_of(answers, "7") for answers in found] == [pytest.approx(1 / 3), pytest.approx(1 / 3), 1.0]
    assert share_of(found[-1], "8") == 0.0


def test_the_answer_may_be_in_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    [found], _ = completed(monkeypatch, [reply("The answer is 9. That is all. Bye")], [" Bye"])
    assert found[0] == ["9"] * 3


def test_equal_beginnings_share_their_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = [reply("Two and two. It is 7"), reply("Two and two. It is 8"), reply("Two and two. It is 8", question="other")]
    found, asked = completed(monkeypatch, replies, [" It is 7", " It is 8", " It is 9", " 4", " 5", " 6"])
    assert len(asked) == 6
    assert found[0][0] == found[1][0] == ["7", "8", "9"]
    assert found[2][0] == ["4", "5", "6"]


@pytest.fixture(scope="module")
def lab() -> tuple[Backbone, Templates]:
    model = str(LAB / "word_problems")
    backbone = Backbone.load(model, BackboneConfig(device="cpu"))
    return backbone, Templates.load(templates_folder(model), backbone.loaded.tokenizer)


def test_completions_of_a_wrong_step_miss_the_answer_of_a_right_one(lab: tuple[Backbone, Templates]) -> None:
    backbone, templates = lab
    question = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"

    def stepped(text: str) -> SteppedReply:
        ids = (*templates.reply_ids(text), *backbone.loaded.eos_ids[:1])
        ends = step_ends(ids, templates.tokenizer.decode, "sentences", backbone.loaded.eos_ids)
        return SteppedReply(question, templates.prompt("reply", question=question), ids, ends, None)

    replies = [stepped("3 + 2 = 5. The answer is 5"), stepped("3 - 2 = 1. The answer is 1")]

    def complete(some: Sequence[SteppedReply], batch_size: int) -> Any:
        voter = Voter(backbone, templates, StepsConfig(), limit=64, batch_size=batch_size, seed=0)
        with backbone.acting_as(BASE):
            return complete_steps(voter, some, 16)

    right, wrong = complete(replies, 64)
    assert share_of(right[0], "5") > 0.8
    assert share_of(wrong[0], "5") < 0.2
    assert complete(replies[1:], 5) == [wrong]  # neither the batch nor the other replies matter
