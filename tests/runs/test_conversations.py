"""Conversations in place of questions, in the Python API: the prompts are those of a run that reads them from a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_models
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.errors import DataError, InputError
from selfeval.judging import voting
from selfeval.judging.templates import Templates, templates_folder
from selfeval.prompt import Prompt
from selfeval.records import Question
from selfeval.runs import model as run_model
from selfeval.runs import policy as run_policy
from selfeval.runs.conversations import question_from
from selfeval.runs.evaluator import Evaluator
from selfeval.runs.judge import Judge
from selfeval.runs.model import RunModel
from selfeval.runs.policy import Policy
from selfeval.runs.reward import question_of
from selfeval.stages.given import read_given
from selfeval.stages.pairs import FEWEST
from selfeval.store import write_json
from selfeval.texts import safe_json
from selfeval.training.context import POLICY
from selfeval.training.evaluator import EVALUATOR

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>"
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "Five."},
    {"role": "user", "content": "Why?"},
]
TEXT = "System: Be brief.\n\nUser: What is 2 + 3?\n\nAssistant: Five.\n\nUser: Why?"


def model_of(folder: Path, chat: str | None = CHAT, **values: Any) -> RunModel:
    """A run with a random policy and a random evaluator, without its files."""
    backbone = tiny_models.backbone(vocabulary=384)
    for role in (POLICY, EVALUATOR):
        backbone.roles.add(role, seed=1, head=role == EVALUATOR)
        tiny_models.scramble(backbone, role)
    write_json(folder / EVALUATOR / "evaluator.json", {"temperature": 0.5, "mean": 0.0, "deviation": 1.0, "pairs": 0})
    backbone.loaded.tokenizer.chat_template = chat
    templates = Templates.load(templates_folder("none"), backbone.loaded.tokenizer)
    config = RunConfig.model_validate({"replies": {"max_new_tokens": 4}, "verdicts": {"max_new_tokens": 4}, **values})
    return RunModel(_Reader(folder, config), backbone, templates)  # type: ignore[arg-type]


class _Reader(SimpleNamespace):
    def __init__(self, folder: Path, config: RunConfig) -> None:
        super().__init__(folder=folder, config=config, roles_folder=folder, round=1, check=lambda paths: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RunModel:
    return model_of(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def of_run(tmp_path_factory: pytest.TempPathFactory) -> Question:
    """The conversation as the stages of a run read it from a file."""
    path = tmp_path_factory.mktemp("file") / "questions.jsonl"
    others = [{"question": f"Is {n} odd?", "split": "train"} for n in range(FEWEST)]
    lines = [{"messages": TURNS, "split": "test"}, *others]
    path.write_text("\n".join(map(safe_json, lines)), encoding="utf-8")
    given = read_given(RunConfig.model_validate({"questions": {"file": str(path)}}))
    assert given is not None
    return next(question for question in given.questions if question.messages)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[Prompt]:
    """The prompts from which anything is sampled."""
    seen: list[Prompt] = []
    for module in (run_policy, run_model, voting):
        original: Any = vars(module)["generate"]

        def spying(backbone: Backbone, requests: Any, *rest: Any, _original: Any = original, **options: Any) -> Any:
            seen.extend(request.prompt for request in requests)
            return _original(backbone, requests, *rest, **options)

        monkeypatch.setattr(module, "generate", spying)
    return seen


def test_the_policy_continues_the_turns_as_in_a_run(model: RunModel, of_run: Question, prompts: list[Prompt]) -> None:
    policy, wanted = Policy(model), model.templates.reply_prompt(of_run)
    one = policy.reply(TURNS, seed=3)
    assert prompts == [wanted]
    both = policy.reply([TURNS, "Why?"], n=2, seed=3)
    assert prompts[1:] == [wanted, wanted, *[model.templates.prompt("reply", question="Why?")] * 2]
    assert [len(replies) for replies in both] == [2, 2]
    assert one == both[0][:1], "a list of messages is one question, a list of lists several"
    assert policy.reply([TURNS[1]], seed=3) == policy.reply("What is 2 + 3?", seed=3)


def test_the_evaluator_reads_the_text_of_the_turns(model: RunModel, of_run: Question) -> None:
    evaluator, replies = Evaluator(model), ["Because.", "Two and three."]
    assert question_from(TURNS).text == of_run.text == TEXT
    scores = evaluator.score(of_run.text, replies)
    assert scores[0] != scores[1]
    assert evaluator.score(TURNS, replies) == scores
    assert evaluator.score([TURNS, TURNS], replies) == scores
    assert evaluator.compare(TURNS, *replies).scores == tuple(scores)
    assert evaluator.rank([(TURNS, replies)])[0].scores == tuple(scores)
    assert evaluator.score("Why?", replies) != scores


def test_the_reward_function_takes_trls_conversations(model: RunModel) -> None:
    evaluator, replies = Evaluator(model), ["Because.", "Two and three."]
    reward, completions = evaluator.as_reward_fn(), [[{"role": "assistant", "content": reply}] for reply in replies]
    assert reward(prompts=[TURNS, TURNS], completions=completions) == evaluator.score(TEXT, replies)
    in_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
    assert reward(prompts=[in_parts] * 2, completions=completions) == evaluator.score(TEXT, replies)
    assert question_of(TURNS, None, ()) == TEXT, "exported evaluators build the same text"
    with pytest.raises(InputError, match="must end with a turn of the user, got assistant"):
        reward(prompts=[TURNS[:3]], completions=completions[:1])


def test_a_reference_answer_continues_the_turns(of_run: Question, prompts: list[Prompt], tmp_path: Path) -> None:
    model = model_of(tmp_path)
    settings = model.templates.settings.model_copy(update={"grade_reference_answer": True})
    object.__setattr__(model.templates, "settings", settings)
    Evaluator(model).score(TURNS, ["Because."])
    assert prompts == [model.templates.reply_prompt(of_run)]


def test_a_judge_that_votes_samples_after_the_turns(of_run: Question, prompts: list[Prompt], tmp_path: Path) -> None:
    verdicts = {"judge": "agreement", "agreement": {"votes": 2}, "max_new_tokens": 4}
    model = model_of(tmp_path, verdicts=verdicts)
    Judge.of_run(model).compare(TURNS, "5", "6")
    assert set(prompts) == {model.templates.reply_prompt(of_run)}


def test_the_pairwise_judge_reads_the_text(model: RunModel) -> None:
    judge = Judge.of_run(model)
    assert judge.compare(TURNS, "Five.", "Six.") == judge.compare(TEXT, "Five.", "Six.")


def test_malformed_conversations_and_models_without_a_chat_template_are_refused(model: RunModel, tmp_path: Path) -> None:
    policy = Policy(model)
    with pytest.raises(InputError, match=r"a conversation must end with a turn of the user, got assistant; got \[\{"):
        policy.reply(TURNS[:3])
    with pytest.raises(InputError, match="a conversation has a turn of an unknown role; allowed: system, user, assistant"):
        policy.reply([{"role": "tool", "content": "5"}])
    with pytest.raises(InputError, match="questions must not be empty"):
        policy.reply(["Why?", " "])
    plain = Policy(model_of(tmp_path, chat=None))
    with pytest.raises(DataError, match="no chat template to format their turns"):
        plain.reply(TURNS)
    assert len(plain.reply([TURNS[1]])) == 1, "a single turn needs none"
