from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_models
from chats import CHATML, chat_tokenizer
from processes import selfeval
from selfeval.backbone.vocabulary.tokenizer import BpeTokenizer
from selfeval.cli.tuning import say_tuned
from selfeval.config import load_config
from selfeval.errors import ConfigError, ModelError, TextError
from selfeval.stages import tuning_vocabulary
from selfeval.stages.terminal import Terminal
from selfeval.stages.tuning import Tuned, tune
from selfeval.stages.tuning_chats import ChatFiles
from selfeval.stages.tuning_replies import PreferredReplies
from selfeval.stages.tuning_rows import Source
from selfeval.stages.tuning_split import split_texts
from selfeval.stages.tuning_texts import TextFiles
from selfeval.store import read_json
from selfeval.training import sft

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft and transformers

SETTINGS = (
    *("backbone.lora.rank=4", "backbone.lora.alpha=8.0", "backbone.device=cpu", "backbone.precision=fp32"),
    *("tuning.steps=6", "tuning.batch=4", "tuning.learning_rate=0.02", "tuning.checkpoint_every=2", "tuning.held_out=0.2"),
)
TEXT = "".join(
    f"The {who} received {dose} mg of amoxicillin {when}.\n患者服用阿莫西林{dose}毫克。\n"
    for who in ("patient", "child", "woman", "man")
    for dose in (250, 500, 750, 1000, 1500)
    for when in ("at noon", "in the evening", "twice")
)


class World:
    """A tiny model, a text of its domain, and the messages to the user."""

    def __init__(self, root: Path, *, chat: bool = False, spare: int = 0, **changes: Any) -> None:
        self.root, self.model, self.out, self.text = root, root / "model", root / "out", root / "text.txt"
        tokenizer = chat_tokenizer(CHATML) if chat else tiny_models.words_tokenizer()
        made = tiny_models.model("llama", len(tokenizer) + spare, max_position_embeddings=96, **changes)
        tiny_models.save_model(made, tokenizer, self.model)
        self.text.write_text(TEXT)
        self.told: list[str] = []

    def tune(
        self, *assignments: str, tokens: int = 40, source: Source | None = None, out: Path | None = None, length: int = 32
    ) -> Tuned:
        terminal: Any = Terminal(quiet=True)
        terminal.note = self.told.append
        values = (*SETTINGS, f"tuning.extend_vocabulary={tokens}", *assignments)
        config = load_config(None, {"model": str(self.model), "name": "out"}, values)
        return tune(config, source or TextFiles([self.text]), out or self.out, length, terminal)


@pytest.fixture
def world(tmp_path: Path, one_thread: None) -> World:
    return World(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def nats(model: Any, tokenizer: Any, texts: list[str], size: int | None = None) -> float:
    """The loss of texts by plain transformers, with the logits cut to the first `size` tokens."""
    total = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, :-1, :size].double(), -1)
        total -= float(logprobs.gather(1, ids[0, 1:, None]).sum())
    return total


# -- what is written ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_has_the_new_tokens_and_reads_the_domain_better(tmp_path: Path, one_thread: None, tied: bool) -> None:
    world = World(tmp_path, tie_word_embeddings=tied)
    done = world.tune("tuning.steps=12")
    base, larger = (AutoTokenizer.from_pretrained(folder) for folder in (world.model, world.out))
    model = AutoModelForCausalLM.from_pretrained(world.out)
    facts = done.facts["vocabulary"]
    assert (facts["wanted"], facts["added"], facts["tokens_before"], facts["tokens"]) == (40, 40, 380, 420)
    assert (facts["rows_before"], facts["rows"]) == (380, 420) == (380, model.config.vocab_size)
    # Independently: the held-out passages as plain transformers reads them, with both models.
    split = split_texts([TEXT], 0.2, "0/held out")
    passages = [larger.decode(ids[1:]) for held in split.held for ids in tuning_texts_passages(larger, held.text)]
    # The Chinese lines of the end are also in the text before it.
    end = TEXT.removeprefix(split.train[0]).splitlines(keepends=True)
    assert "".join(passages) == "".join(line for line in end if line not in split.train[0].splitlines(keepends=True))
    assert "阿" not in "".join(passages)
    characters = sum(map(len, passages))
    assert facts["characters"] == characters
    before = nats(AutoModelForCausalLM.from_pretrained(world.model), base, passages) / characters
    after = nats(model, larger, passages) / characters
    assert facts["loss_per_character_before"]["value"] == pytest.approx(before, rel=1e-4)
    assert facts["loss_per_character"]["value"] == pytest.approx(after, rel=1e-4)
    assert facts["loss_per_character_change"]["value"] == pytest.approx(after - before, rel=1e-3)
    assert facts["loss_per_character_change"]["n"] == len({held.cluster for held in split.held}) < len(passages)
    assert (facts["before"], facts["clusters"]) == ("untuned base", "parts of the documents' ends")
    assert after < before - 0.5
    for name, tokenizer in (("characters_per_token_before", base), ("characters_per_token", larger)):
        tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in passages)
        assert facts[name]["value"] == pytest.approx(characters / tokens, rel=1e-6)
    assert facts["characters_per_token"]["value"] > 1.5 * facts["characters_per_token_before"]["value"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]
    assert read_json(world.out / "export.json")["base"] == "model"


def tuning_texts_passages(tokenizer: Any, text: str) -> list[list[int]]:
    from selfeval.stages.tuning_texts import _passages

    return list(_passages(tokenizer, text, 32))


def test_new_rows_are_trained_and_all_others_are_those_of_the_base(world: World) -> None:
    world.tune()
    before, after = (load_file(folder / "model.safetensors") for folder in (world.model, world.out))
    text = split_texts([TEXT], 0.2, "").train[0]
    tokens = BpeTokenizer(AutoTokenizer.from_pretrained(world.model), "").learn([text], 40, 380)
    moved = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:380], before[name])
        means = torch.stack([before[name][list(token.pieces)].mean(0) for token in tokens])
        moved[name] = (after[name][380:] - means).abs().amax(-1)
        # AdamW moves by about the learning rate, 0.02, in each of the 6 steps.
        assert moved[name].max() < 6 * 0.02 * 1.5
    # The softmax moves every row of the output layer; tokens that occur only within others keep their rows in the embedding.
    assert (moved["lm_head.weight"] > 1e-3).all()
    occurs = set(AutoTokenizer.from_pretrained(world.out).encode(text))
    is_used = torch.tensor([380 + number in occurs for number in range(len(tokens))])
    assert (moved["model.embed_tokens.weight"][is_used] > 1e-3).sum() >= 5
    assert (moved["model.embed_tokens.weight"][~is_used] < 1e-6).all()


def test_free_rows_are_used(tmp_path: Path, one_thread: None) -> None:
    world = World(tmp_path, spare=64)
    facts = world.tune().facts["vocabulary"]
    assert (facts["rows_before"], facts["rows"]) == (444, 444)
    assert any("40 new tokens after the 380 of the model; in free rows" in told for told in world.told)


def test_a_killed_extension_resumes_to_the_same_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = world.root / "whole" / "out"
    world.tune(out=whole)
    step, seen = sft._step, []

    def stopped(*arguments: Any) -> float:
        seen.append(1)
        if len(seen) > 5:
            raise KeyboardInterrupt
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            world.tune()
    learnt = BpeTokenizer.learn
    calls: list[int] = []
    monkeypatch.setattr(BpeTokenizer, "learn", lambda self, *rest: [calls.append(1), learnt(self, *rest)][1])
    folder = world.root / "out.tuning" / "vocabulary" / "model"
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # damaged: written again, to the same bytes
    world.tune()
    assert calls == [1]
    assert files(world.out) == files(whole)


def test_a_resumed_tuning_does_not_learn_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfeval.stages.tuning.export_role", stop)
        with pytest.raises(KeyboardInterrupt):
            world.tune()
    monkeypatch.setattr(BpeTokenizer, "learn", stop)
    world.tune()
    assert world.out.is_dir()


def test_an_interrupt_before_the_first_checkpoint_keeps_the_finished_extension(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = world.root / "whole" / "out"
    world.tune(out=whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfeval.stages.tuning._train", stop)
        with pytest.raises(KeyboardInterrupt):
            world.tune()
    assert (world.root / "out.tuning" / "vocabulary" / "vocabulary.json").is_file()
    monkeypatch.setattr(BpeTokenizer, "learn", stop)
    world.tune()
    assert files(world.out) == files(whole)


def test_an_interrupt_before_the_extension_is_finished_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfeval.stages.tuning_vocabulary.write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        world.tune()
    assert not (world.root / "out.tuning").exists()


def stop(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_conversations_extend_the_vocabulary_without_their_held_out_part(tmp_path: Path, one_thread: None) -> None:
    world = World(tmp_path, chat=True)
    path = tmp_path / "chat.jsonl"
    asked = [{"prompt": f"Dose for weight {n}?", "completion": f"{n} mg of amoxicillin."} for n in range(20)]
    secret = [{"prompt": f"Code {n}?", "completion": "xylophone"} for n in range(1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*asked, *secret]))
    source = ChatFiles([path])
    config = load_config(None, {"model": str(world.model)}, ("tuning.extend_vocabulary=30", "tuning.held_out=0.2"))
    held = source._held_out(config)
    texts = source.texts(config)
    assert len(held) == 4
    assert len(texts) == 2 * (21 - 4)
    done = world.tune(source=source, length=96)
    facts = done.facts["vocabulary"]
    assert done.facts["held_out"] == 4
    assert facts["loss_per_character_change"]["n"] == 4
    assert facts["characters_per_token"]["value"] > facts["characters_per_token_before"]["value"]
    tokenizer = AutoTokenizer.from_pretrained(world.out)
    assert len(tokenizer.encode(" amoxicillin", add_special_tokens=False)) == 1
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(world.model).chat_template


# -- what is refused or reported ----------------------------------------------------------------------------------------


def test_more_tokens_than_the_text_has_are_reported(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    done = world.tune(tokens=100_000)
    added = done.facts["vocabulary"]["added"]
    assert 40 < added < 1000
    assert any(f"{added:,} new tokens of 100,000, because the text has no more," in told for told in world.told)
    say_tuned(done.facts)
    said = capsys.readouterr().out
    assert re.search(r"held-out characters: untuned base [\d.]+ characters per token .* tuned with new tokens [\d.]+ and", said)
    assert "The change is that of tuning and new tokens together" in said


def test_zero_new_tokens_are_a_plain_tuning(world: World) -> None:
    assert "vocabulary" not in world.tune("tuning.held_out=0.05", tokens=0).facts
    assert AutoModelForCausalLM.from_pretrained(world.out).config.vocab_size == 380


def test_text_without_a_new_token_is_refused_and_leaves_nothing(world: World) -> None:
    world.text.write_text("a b c d e\n")
    with pytest.raises(TextError, match=r"has no new token: every sequence of tokens that occurs at least twice"):
        world.tune("tuning.held_out=0")
    world.text.write_text("amoxicillin")
    with pytest.raises(TextError, match=r"the text of 11 characters is too short to hold out 20% of it"):
        world.tune()
    assert sorted(path.name for path in world.root.iterdir()) == ["model", "text.txt"]


def test_replies_of_a_run_are_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="among which no new token is; extend the vocabulary on text"):
        world.tune(source=PreferredReplies(world.root / "run"))


def test_a_tokenizer_without_merges_is_refused_before_a_folder_is_made(world: World) -> None:
    path = world.model / "tokenizer.json"
    values = json.loads(path.read_text())
    pieces = sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)
    values["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[piece, -float(len(piece))] for piece in pieces]}
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"is a Unigram model, whose vocabulary cannot be extended by merges"):
        world.tune()
    assert sorted(p.name for p in world.root.iterdir()) == ["model", "text.txt"]


def test_a_damaged_record_of_the_extension_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "vocabulary.json").write_text('{"key": "k", "model": "m", "first": 1, "facts": {}, "pieces": 3, "files": []}')
    assert tuning_vocabulary._read(tmp_path, "k") is None
    assert tuning_vocabulary._read(tmp_path / "none", "k") is None


# -- the real command ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_extends_the_embedded_model(tmp_path: Path) -> None:
    found = importlib.util.find_spec("selfeval")
    assert found is not None
    assert found.origin is not None
    model = Path(found.origin).parent / "lab" / "word_problems"
    (tmp_path / "text.txt").write_text(TEXT)
    settings = [part for each in (*SETTINGS, "tuning.steps=4") for part in ("--set", each)]
    done = selfeval(
        *("tune", str(tmp_path / "text.txt"), "--model", str(model), "--to", str(tmp_path / "out"), "--length", "64"),
        *("--extend-vocabulary", "50", "--json", "--quiet", *settings),
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["vocabulary"]["added"] == 50
    assert facts["vocabulary"]["characters_per_token"]["value"] > facts["vocabulary"]["characters_per_token_before"]["value"]
    tokenizer = AutoTokenizer.from_pretrained(facts["folder"])
    loaded = AutoModelForCausalLM.from_pretrained(facts["folder"])
    assert len(tokenizer.encode(" amoxicillin", add_special_tokens=False)) == 1
    ids = torch.tensor([tokenizer.encode("2 mg of amoxicillin", add_special_tokens=False)])
    with torch.no_grad():
        assert torch.isfinite(loaded(ids).logits).all()
