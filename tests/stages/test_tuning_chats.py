from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_models
from chats import CHATML, CONTROL, DAY, chat_tokenizer
from processes import selfeval
from selfeval.cli.tuning import check_source, config_and_source
from selfeval.config import RunConfig, load_config
from selfeval.errors import ConfigError, InputError, RunFolderError, TextError
from selfeval.judging.turns import Turn
from selfeval.records import Message, Pair, Question, Reply, Split
from selfeval.runs.reader import pairs_of
from selfeval.stages import tuning_replies
from selfeval.stages.prompts import keep_templates, load_templates
from selfeval.stages.terminal import Terminal
from selfeval.stages.tuning import Tuned, tune
from selfeval.stages.tuning_chats import ChatFiles, read_conversations
from selfeval.stages.tuning_rows import Source
from selfeval.stages.tuning_texts import TextFiles
from selfeval.store import RunStore, read_json
from selfeval.training import sft
from selfeval.training.documents import Document

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft and transformers

CONTEXT = 96
BACKBONE = ("backbone.lora.rank=4", "backbone.lora.alpha=8.0", "backbone.device=cpu", "backbone.precision=fp32")
SETTINGS = (
    *BACKBONE,
    *("tuning.steps=6", "tuning.batch=2", "tuning.learning_rate=0.02", "tuning.checkpoint_every=2", "tuning.held_out=0.2"),
)
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def lines() -> list[dict[str, Any]]:
    """Ten conversations of two turns, and ten prompts with completions."""
    found: list[dict[str, Any]] = []
    for number in NUMBERS:
        asked = [said("user", f"Tom has {number} apples. How many?"), said("assistant", number)]
        found.append({"messages": [*asked, said("user", "Are left?"), said("assistant", "two")], "id": 7})
        found.append({"prompt": f"Mary has {number} apples. How many?", "completion": number})
    return found


class World:
    """A tiny model with a chat template, a file of conversations, and the messages to the user."""

    def __init__(self, root: Path, template: str | None = CHATML, family: str = "llama") -> None:
        self.root, self.model, self.out = root, root / "model", root / "out"
        tokenizer = chat_tokenizer(template)
        made = tiny_models.model(family, len(tokenizer), max_position_embeddings=CONTEXT)
        tiny_models.save_model(made, tokenizer, self.model)
        self.chat = self.write("chat.jsonl", lines())
        self.told: list[str] = []

    def write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        path = self.root / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def tune(self, *assignments: str, source: Source | None = None, out: Path | None = None, **options: Any) -> Tuned:
        terminal: Any = Terminal(quiet=True)
        terminal.note = self.told.append
        config = options.pop("config", None) or load_config(
            None, {"model": str(self.model), "name": "out"}, (*SETTINGS, *assignments)
        )
        return tune(config, source or ChatFiles([self.chat]), out or self.out, options.pop("length", None), terminal)


@pytest.fixture
def world(tmp_path: Path, one_thread: None) -> World:
    return World(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- what is written ----------------------------------------------------------------------------------------------------


def reply_loss(folder: Path, question: str, reply: str) -> float:
    """The loss of a reply and its end-of-turn token, computed with transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer.apply_chat_template([said("user", question)], add_generation_prompt=True, return_dict=False)
    answer = tokenizer.encode(f"{reply}<|im_end|>", add_special_tokens=False)
    ids = torch.tensor([[*asked, *answer]])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=torch.tensor([[*[-100] * len(asked), *answer]])).loss)


def test_the_folder_is_a_model_that_answers_better(world: World) -> None:
    done = world.tune()
    question = "Lily has nine apples. How many?"
    assert reply_loss(world.out, question, "nine") < reply_loss(world.model, question, "nine") - 1.0
    facts = done.facts
    assert (facts["kind"], facts["documents"], facts["held_out"], facts["too_long"]) == ("conversations", 16, 4, 0)
    assert facts["length"] == CONTEXT
    assert facts["held_out_loss"] < facts["held_out_loss_before"] - 1.0
    assert facts["best_step"] in (2, 4, 6)
    assert facts["rows"] < 16
    assert any("16 conversations in " in note and "4 held out" in note for note in world.told)
    card = (world.out / "README.md").read_text()
    assert "a base model fine-tuned on conversations" in card
    assert f"on 4 of 20 conversations; the weights are those of step {facts['best_step']}" in card
    assert "- sft" in card


def test_a_killed_tuning_is_resumed_and_writes_the_same_bytes(world: World) -> None:
    settings = ("tuning.neftune_alpha=5", "tuning.steps=5")
    whole = world.root / "whole" / "out"
    world.tune(*settings, out=whole)
    step, seen = sft._step, []

    def counted(*arguments: Any) -> float:
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "_step", counted)
        with pytest.raises(KeyboardInterrupt):
            world.tune(*settings)
    assert (world.root / "out.tuning" / "checkpoints" / "tuning" / "best").is_dir()
    world.tune(*settings)
    assert files(world.out) == files(whole)


def test_packing_changes_the_rows_only(world: World) -> None:
    packed = world.tune("tuning.steps=1", out=world.root / "packed").facts
    assert not any("cannot separate" in note for note in world.told)
    alone = world.tune("tuning.steps=1", "tuning.packing=false", "tuning.batch=16", out=world.root / "alone").facts
    assert (alone["rows"], alone["documents"]) == (16, packed["documents"])
    assert alone["held_out_loss_before"] == packed["held_out_loss_before"]


def test_a_family_that_cannot_separate_conversations_is_told(tmp_path: Path, one_thread: None) -> None:
    world = World(tmp_path, family="opt")
    facts = world.tune("tuning.steps=1").facts
    assert facts["rows"] < facts["documents"]
    told = [note for note in world.told if "models of type opt cannot separate conversations that share a row" in note]
    assert len(told) == 1


def test_a_base_without_a_chat_template_takes_plain_completions(tmp_path: Path, one_thread: None) -> None:
    world = World(tmp_path, None)
    with pytest.raises(
        TextError, match=r"chat\.jsonl, line 1: this model has no chat template, so messages cannot be rendered"
    ):
        world.tune()
    world.chat = world.write("plain.jsonl", [row for row in lines() if "prompt" in row])
    assert world.tune().facts["documents"] == 8


def test_long_conversations_are_dropped_or_cut_and_counted(world: World) -> None:
    long = {"messages": [said("user", "How many?"), said("assistant", "five apples " * 60)]}
    world.chat = world.write("long.jsonl", [*lines(), long])
    facts = world.tune("tuning.steps=1", out=world.root / "dropped").facts
    assert (facts["documents"] + facts["held_out"], facts["too_long"], facts["too_long_are"]) == (20, 1, "dropped")
    facts = world.tune("tuning.steps=1", "tuning.too_long=cut", out=world.root / "cut").facts
    assert (facts["documents"] + facts["held_out"], facts["too_long"], facts["too_long_are"]) == (21, 1, "cut")
    assert any("1 too long (dropped)" in note for note in world.told)
    with pytest.raises(TextError, match=r"none of the 21 conversations fits a row of 4 tokens .*raise --length, or set tuning"):
        world.tune(length=4)


def test_control_tokens_in_conversations_are_reported(world: World) -> None:
    world.chat = world.write("attack.jsonl", [*lines(), {"prompt": f"x{CONTROL[3]}y", "completion": "five"}])
    world.tune("tuning.steps=1")
    assert "1 conversations contain control tokens of the model, which are read as spaces" in world.told


def test_a_tuning_that_makes_it_worse_says_so(world: World) -> None:
    world.tune("tuning.learning_rate=20", "tuning.steps=2", "tuning.warmup=0")
    assert any("the held-out loss was lowest before training" in note for note in world.told)


# -- replies that a run preferred ---------------------------------------------------------------------------------------


CONVERSATION = (Message("user", "How many is one?"), Message("assistant", "no"), Message("user", "Think again."))


def finished_run(world: World, thinking: str = "") -> Path:
    """A run whose pairs are written; its second question is a conversation."""
    folder = world.root / "run"
    config = load_config(None, {"model": str(world.model), "name": "run"}, (*BACKBONE, "chat.system=Be brief."))
    store = RunStore(folder)
    store.update_run(status="partial", config=config.model_dump(mode="json"))
    keep_templates(config, store, DAY)
    load_templates(config, store, chat_tokenizer(CHATML), DAY)
    encode = chat_tokenizer(CHATML).encode
    pairs = [
        Pair(str(i), f"How many is {n}?", n, "no", 0.9, (*encode(n), 3), (*encode("no"), 3), Split.TRAIN)
        for i, n in enumerate(NUMBERS)
    ]
    asked = [Question(pair.question_id, pair.prompt, Split.TRAIN, "file") for pair in pairs]
    asked[1] = replace(asked[1], messages=CONVERSATION)
    store.write_shard("questions", 0, asked)
    store.write_shard("replies", 0, [Reply("0-r0", "0", "one", (5, 3), "sample", 1.0, 1.0, -1.0, True, thinking)])
    store.write_shard(pairs_of(Split.TRAIN), 0, [*pairs, pairs[0]])
    store.write_shard(pairs_of(Split.TEST), 0, [Pair("t", "Test?", "a", "b", 0.9, (5, 3), (6, 3), Split.TEST)])
    store.close()
    return folder


def test_a_model_is_tuned_on_the_replies_that_its_judge_preferred(world: World) -> None:
    folder = finished_run(world)
    config, source = config_and_source(None, None, folder, None, "out", SETTINGS)
    assert config.model == str(world.model)
    facts = world.tune(config=config, source=source).facts
    assert (facts["kind"], facts["documents"], facts["held_out"]) == ("preferred replies", 8, 2)  # each reply once
    assert facts["held_out_loss"] < facts["held_out_loss_before"]
    card = (world.out / "README.md").read_text()
    assert "on its own replies to generated questions, those that it judged to be the better ones" in card
    # The prompts are the run's: those of its templates, with its system message.
    assert "Be brief." in (world.out / "templates" / "reply.jinja").read_text()
    assert read_json(world.out / "export.json")["tuning"] == facts


def test_the_prompt_of_a_preferred_reply_is_that_of_its_conversation(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = finished_run(world), list[Document]()

    def rows(context: Any, kind: str, documents: list[Document], length: int | None) -> Any:
        seen.extend(documents)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning_replies, "conversation_rows", rows)
    config, source = config_and_source(None, None, folder, None, "out", SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        world.tune(config=config, source=source)
    text = chat_tokenizer(CHATML).decode(list(seen[1].ids))
    assert text.index("How many is one?") < text.index("Think again."), text
    assert text.count("user") == 2, text


def test_replies_that_followed_reasoning_are_refused(world: World) -> None:
    config, source = config_and_source(None, None, finished_run(world, "Hm."), None, "out", SETTINGS)
    with pytest.raises(TextError, match=r"reasoned before its replies.*enable_thinking = false"):
        source.check(config)


def test_a_run_without_preferred_replies_is_refused(world: World) -> None:
    folder = world.root / "run"
    store = RunStore(folder)
    store.update_run(status="partial", config=RunConfig(model=str(world.model)).model_dump(mode="json"))
    store.close()
    config, source = config_and_source(None, None, folder, None, "out", SETTINGS)
    with pytest.raises(RunFolderError, match="has no pairs yet"):
        source.check(config)
    with pytest.raises(RunFolderError, match=r"no run\.json"):
        config_and_source(None, None, world.root / "nothing", None, "out", SETTINGS)


# -- reading ------------------------------------------------------------------------------------------------------------


def test_lines_have_messages_or_a_prompt_with_a_completion(tmp_path: Path) -> None:
    asked, answered = said("user", "How many?"), said("assistant", "five")
    rows: list[dict[str, Any]] = [
        {"messages": [said("system", "Be brief."), asked, answered], "source": "x", "tools": []},
        {"prompt": "How many?", "completion": " five"},
        {"prompt": [asked, answered, asked], "completion": [answered]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "How"}, {"type": "text", "text": " many?"}]},
                answered,
            ]
        },
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    user, assistant = Turn("user", "How many?"), Turn("assistant", "five")
    found = read_conversations([path])
    assert [conversation.turns for conversation in found] == [
        (Turn("system", "Be brief."), user, assistant),
        (user, Turn("assistant", " five")),
        (user, assistant, user, assistant),
        (user, assistant),
    ]
    assert [(conversation.prompt, conversation.plain) for conversation in found] == [
        (None, False), (1, True), (3, False), (None, False),
    ]  # fmt: skip
    assert found[2].where == f"{path}, line 3"


BAD: dict[str, tuple[Any, str]] = {
    "neither": ({"text": "a"}, 'needs "messages", or "prompt" and "completion"; got {"text": "a"}; write one {"messages": ['),
    "both": ({"messages": [], "prompt": "a", "completion": "b"}, 'needs "messages", or "prompt" and "completion"'),
    "half": ({"prompt": "a"}, 'needs "messages", or "prompt" and "completion"'),
    "no list": ({"messages": "a"}, '"messages" must be a list of messages; got "a"'),
    "empty list": ({"messages": []}, '"messages" must be a list of messages; got []'),
    "no message": ({"messages": ["a"]}, 'message 1 of "messages" must be {"role": "...", "content": "..."}; got "a"'),
    "role": (
        {"messages": [said("tool", "a")]},
        'message 1 of "messages" has the role "tool"; allowed: system, user, assistant',
    ),
    "no text": ({"messages": [said("user", " ")]}, 'message 1 of "messages" has no text; got " "; write it as a text'),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        'message 1 of "messages" has no text; got [{"type": "image"}]',
    ),
    "tool call": (
        {"messages": [said("user", "a"), {**said("assistant", "b"), "tool_calls": [{}]}]},
        'message 2 of "messages" has "tool_calls", which is not supported; remove it',
    ),
    "tools": ({"messages": [], "tools": [{}]}, '"tools" is not supported; remove it, or the conversations that need it'),
    "last": (
        {"messages": [said("user", "a"), said("assistant", "b"), said("user", "c")]},
        "the last message is one of the user; a conversation must end with one of the assistant",
    ),
    "system": (
        {"messages": [said("user", "a"), said("system", "s"), said("assistant", "b")]},
        "message 2 is a system message; it must be the first message",
    ),
    "mixed": (
        {"prompt": "a", "completion": [said("assistant", "b")]},
        "must be two texts or two lists of messages; got str and list",
    ),
    "blank": ({"prompt": "a", "completion": " "}, '"completion" is empty; write the reply, or remove the line'),
    "prompt": (
        {"prompt": [said("user", "a"), said("assistant", "b")], "completion": [said("assistant", "c")]},
        '"prompt" ends with a message of the assistant; it must end with one of the user',
    ),
    "completion": (
        {"prompt": [said("user", "a")], "completion": [said("user", "b"), said("assistant", "c")]},
        '"completion" begins with a message of the user; it must be one of the assistant',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_one_sentence_with_its_number(name: str, tmp_path: Path) -> None:
    row, message = BAD[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "a", "completion": "b"}}\n\n{json.dumps(row)}\n')
    with pytest.raises(TextError) as caught:
        read_conversations([path])
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert message in str(caught.value)


def test_a_file_that_is_no_json_or_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("hello\n")
    with pytest.raises(TextError, match=r"line 1: not JSON .*; got hello; write one"):
        read_conversations([tmp_path / "a.jsonl"])
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(TextError, match=r"a\.jsonl is empty; write JSON lines"):
        read_conversations([tmp_path / "a.jsonl"])
    with pytest.raises(TextError, match=r"b\.jsonl does not exist"):
        read_conversations([tmp_path / "b.jsonl"])


def test_text_and_conversations_are_not_mixed_up(world: World) -> None:
    with pytest.raises(TextError, match=r"conversations are read with --chat"):
        world.tune("tuning.held_out=0.05", source=TextFiles([world.chat]))
    text = TextFiles([world.write("text.jsonl", [{"text": "a"}])])
    with pytest.raises(ConfigError, match=r"plain text does not use tuning\.held_out; remove it, or tune on conversations"):
        world.tune("tuning.held_out=0.3", source=text)
    with pytest.raises(ConfigError, match="does not use chat; allowed"):
        world.tune("chat.system=Hi", "tuning.held_out=0.05", source=text)


# -- the command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((None, None, None, "m"), "as one of TEXT..., --chat FILE and --run DIR; got none of them"),
        (([Path("a")], [Path("b")], None, "m"), "got TEXT... and --chat FILE"),
        ((None, [Path("b")], None, None), "--chat FILE needs a model to tune; add --model MODEL"),
        ((None, None, Path("r"), "m"), "--run DIR tunes the model of the run; remove --model"),
    ],
)
def test_the_options_name_one_kind_of_data(options: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_source(*options)
    assert message in str(caught.value)


@pytest.mark.slow
def test_the_command_tunes_on_conversations(world: World) -> None:
    arguments = [part for assignment in SETTINGS for part in ("--set", assignment)]
    done = selfeval("tune", "--chat", str(world.chat), "--model", str(world.model), "--to", str(world.out), *arguments)
    assert done.returncode == 0, done.stderr
    assert "held-out loss of 4 conversations: " in done.stdout
    assert f"tuned as language model: {world.out}" in done.stdout
    wrong = selfeval("tune", "--chat", str(world.chat), "--to", str(world.root / "x"))
    assert (wrong.returncode, wrong.stderr) == (2, "Error: --chat FILE needs a model to tune; add --model MODEL\n")
