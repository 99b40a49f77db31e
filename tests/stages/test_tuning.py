from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_models
from processes import selfeval, start
from selfeval.backbone.load import load_model
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig, load_config
from selfeval.errors import ConfigError, ExportError, InputError, ModelError, RunFolderError, StorageError, TextError
from selfeval.judging.templates import templates_folder
from selfeval.stages import tuning, tuning_texts
from selfeval.stages.terminal import Terminal
from selfeval.stages.tuning import Tuned, tune
from selfeval.stages.tuning_rows import row_length
from selfeval.stages.tuning_texts import TextFiles, read_texts
from selfeval.store import RunStore, read_json, write_sealed
from selfeval.training import sft

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft and transformers

STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"
TRAINED = 32
SETTINGS = (
    *("backbone.lora.rank=4", "backbone.lora.alpha=8.0", "backbone.device=cpu", "backbone.precision=fp32"),
    *("tuning.steps=6", "tuning.batch=2", "tuning.learning_rate=0.02", "tuning.checkpoint_every=2"),
)
YARN = ("backbone.context.rope_scaling=yarn", "backbone.context.rope_factor=2")


class World:
    """A tiny model whose context is `TRAINED` tokens, a text, and the messages to the user."""

    def __init__(self, root: Path, family: str = "llama", **changes: Any) -> None:
        self.root, self.model, self.out = root, root / "model", root / "out"
        tokenizer = tiny_models.words_tokenizer()
        size = {"max_position_embeddings": TRAINED} if family == "llama" else {}
        tiny_models.save_model(tiny_models.model(family, len(tokenizer), **size, **changes), tokenizer, self.model)
        self.text = root / "text.txt"
        self.text.write_text("Tom has seven apples and gives away two of them. How many apples are left? " * 40)
        self.told: list[str] = []

    def config(self, *assignments: str) -> RunConfig:
        return load_config(None, {"model": str(self.model), "name": self.out.name}, (*SETTINGS, *assignments))

    def tune(self, *assignments: str, length: int | None = None, texts: Any = None, out: Path | None = None) -> Tuned:
        terminal: Any = Terminal(quiet=True)
        terminal.note = self.told.append
        return tune(self.config(*assignments), TextFiles(texts or [self.text]), out or self.out, length, terminal)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())


@pytest.fixture
def world(tmp_path: Path, one_thread: None) -> World:
    return World(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def mean_loss(model: Any, rows: list[tuple[int, ...]]) -> float:
    ids = torch.tensor(rows)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


# -- what is written ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "reach"), [(YARN, 2 * TRAINED), ((), TRAINED)], ids=["stretched", "plain"])
def test_the_folder_is_a_model_that_reads_the_text_better(world: World, settings: tuple[str, ...], reach: int) -> None:
    before = load_model(str(world.model), device="cpu", precision="fp32", context=world.config(*settings).backbone.context)
    done = world.tune(*settings)
    tokenizer = AutoTokenizer.from_pretrained(world.out)
    stream = tuning_texts._encode(tokenizer, world.text.read_text())
    assert stream[-1] == tiny_models.EOS
    rows = sft.pack([stream], reach)
    model = AutoModelForCausalLM.from_pretrained(world.out)
    assert model.config.max_position_embeddings == reach
    assert mean_loss(model, rows) < mean_loss(before.model, rows) - 1.0
    assert (done.facts["length"], done.facts["rows"]) == (reach, len(rows))
    assert done.facts["loss_end"] < done.facts["loss_start"] - 1.0
    assert done.facts["tokens"] == 6 * 2 * (reach - 1)
    assert world.names() == ["model", "out", "text.txt"]  # the work folder next to the output is removed
    assert read_json(world.out / "export.json")["tuning"] == done.facts
    assert (world.out / "templates" / "templates.toml").is_file()
    assert f"6 steps on rows of {reach} tokens" in (world.out / "README.md").read_text()


def test_the_folder_says_what_the_adapter_says_on_the_stretched_positions(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, torch.Tensor] = {}
    ids = torch.arange(2, 2 + 2 * TRAINED).unsqueeze(0)
    trained = tuning._train

    def train_and_look(rows: Any, vocabulary: Any, context: Any) -> dict[str, Any]:
        facts = trained(rows, vocabulary, context)
        with torch.no_grad(), context.backbone.acting_as("tuned"):
            kept["role"] = context.backbone.model(input_ids=ids).logits
        with torch.no_grad(), context.backbone.acting_as("base"):
            kept["base"] = context.backbone.model(input_ids=ids).logits
        return facts

    monkeypatch.setattr(tuning, "_train", train_and_look)
    world.tune(*YARN)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(world.out)(input_ids=ids).logits
    torch.testing.assert_close(found, kept["role"], rtol=0, atol=1e-4)
    assert (found - kept["base"]).abs().max() > 0.1


def test_a_run_can_start_from_the_folder_as_it_is(world: World) -> None:
    world.tune(*YARN)
    config = load_config(None, {"model": str(world.out)}, ["backbone.device=cpu", "backbone.precision=fp32"])
    backbone = Backbone.load(config.model, config.backbone)
    assert backbone.loaded.context_length == 2 * TRAINED
    with pytest.raises(ModelError, match=r"its config already has RoPE scaling \(yarn x2"):
        Backbone.load(str(world.out), world.config(*YARN).backbone)


def test_tools_that_cut_texts_cut_them_at_the_new_length(world: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    tokenizer.model_max_length = TRAINED
    tokenizer.save_pretrained(world.model)
    world.tune(*YARN)
    assert AutoTokenizer.from_pretrained(world.out).model_max_length == 2 * TRAINED


def test_a_model_without_rope_is_tuned_as_it_is(tmp_path: Path) -> None:
    world = World(tmp_path, "gpt2")
    done = world.tune(length=24)
    assert done.facts["length"] == 24
    assert done.facts["loss_end"] < done.facts["loss_start"]


# -- killed, and given again --------------------------------------------------------------------------------------------


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The process is stopped in the middle of that step."""
    step, seen = sft._step, []

    def counted(*arguments: Any) -> float:
        seen.append(1)
        if len(seen) > count:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(sft, "_step", counted)


def test_a_killed_tuning_goes_on_and_writes_the_same_bytes(world: World) -> None:
    whole = world.root / "whole" / "out"
    world.tune(*YARN, out=whole)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            world.tune(*YARN)
    assert not world.out.exists()
    kept = sorted(p.name for p in (world.root / "out.tuning" / "checkpoints" / "tuning").iterdir())
    assert kept == ["step-000002", "step-000004"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)  # two steps are left: a third would stop it
        world.tune(*YARN)
    assert files(world.out) == files(whole)
    assert not (world.root / "out.tuning").exists()


def test_a_system_prompt_is_refused_also_on_resume(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            world.tune()
    before = files(world.root / "out.tuning")
    with pytest.raises(ConfigError, match="tuning does not use chat"):
        world.tune("chat.system=Answer briefly.")
    assert files(world.root / "out.tuning") == before


def test_a_resumed_tuning_exports_the_templates_of_its_last_command(world: World) -> None:
    other = world.root / "templates"
    shutil.copytree(templates_folder("none"), other)
    with (other / "reply.jinja").open("a") as file:
        file.write("Be brief.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "export_role", stopped)
        with pytest.raises(KeyboardInterrupt):
            world.tune()
    world.tune(f"templates={other}")
    assert (world.out / "templates" / "reply.jinja").read_text() == (other / "reply.jinja").read_text()


def stopped(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_what_was_trained_is_kept_when_writing_fails(world: World) -> None:
    def full(*arguments: Any) -> None:
        raise StorageError("cannot write: the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfeval.runs.export.write_merged", full)
        with pytest.raises(StorageError):
            world.tune()
    assert not world.out.exists()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 0)  # no further step
        assert world.tune().facts["steps"] == 6


@pytest.mark.parametrize("change", ["settings", "text", "model", "length"])
def test_other_settings_or_another_text_begin_anew(world: World, change: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            world.tune()
    settings, length = ("tuning.learning_rate=0.01",) if change == "settings" else (), 20 if change == "length" else None
    if change == "text":
        world.text.write_text(world.text.read_text().replace("seven", "eight"))
    if change == "model":
        tokenizer = tiny_models.words_tokenizer()
        other = tiny_models.model("llama", len(tokenizer), seed=5, max_position_embeddings=TRAINED)
        tiny_models.save_model(other, tokenizer, world.model)
    world.tune(*settings, length=length)
    assert any("another model, other settings or other data, so training starts from scratch" in line for line in world.told)
    fresh = world.root / "fresh" / "out"
    world.tune(*settings, length=length, out=fresh)
    assert files(world.out) == files(fresh)


def test_the_same_command_says_nothing_of_beginning_anew(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            world.tune()
    world.tune(
        "backbone.device=auto" if not torch.cuda.is_available() else "backbone.device=cpu", "backbone.memory_budget=8GiB"
    )
    assert not any("anew" in line for line in world.told)


# -- text ---------------------------------------------------------------------------------------------------------------


def test_documents_are_files_or_json_lines(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("One.\n\nStill one.\n")
    lines.write_text('{"text": "Two.\\nTwo.", "id": 7}\n\n{"text": ""}\n{"text": "Three\u2028."}\n')
    assert read_texts([lines, plain]) == ["Two.\nTwo.", "Three\u2028.", "One.\n\nStill one.\n"]


def test_documents_are_separated_by_the_tokens_that_begin_and_end_one() -> None:
    class Counts:
        eos_token_id: int | None = 1

        def encode(self, text: str) -> list[int]:
            return [7, *(int(c) for c in text)]  # 7 begins a text

    tokenizer = Counts()
    assert tuning_texts._encode(tokenizer, "23") == [7, 2, 3, 1]
    assert tuning_texts._encode(tokenizer, "231") == [7, 2, 3, 1]  # it ends with one already
    tokenizer.eos_token_id = None
    assert tuning_texts._encode(tokenizer, "23") == [7, 2, 3]


TEXTS = {
    "empty.txt": ("", "is empty"),
    "blank.jsonl": ('{"text": " "}\n', "is empty"),
    "broken.jsonl": (
        '{"text": "a"}\n{"text" "b"}\n',
        """line 2: not JSON (Expecting ':' delimiter); got {"text" "b"}; write""",
    ),
    "other.jsonl": ('{"txt": "a"}\n', 'line 1: missing or empty "text"; got {"txt": "a"}; write one {"text": "..."} per line'),
    "list.json": ('["a"]\n', 'line 1: not a JSON object; got ["a"]'),
    "number.jsonl": ('\n{"text": 3}\n', 'line 2: missing or empty "text"; got {"text": 3}'),
    "half.jsonl": ('{"text": "\\ud800"}\n', "line 1: an unpaired surrogate"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    content, sentence = TEXTS[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError) as found:
        read_texts([tmp_path / name])
    assert sentence in str(found.value)
    assert str(tmp_path / name) in str(found.value)


def test_text_that_is_not_there_or_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"none\.txt does not exist; use plain text"):
        read_texts([tmp_path / "none.txt"])
    with pytest.raises(TextError, match="is a folder, not a file; use plain text"):
        read_texts([tmp_path])
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1"))
    with pytest.raises(TextError, match="is not UTF-8"):
        read_texts([tmp_path / "latin.txt"])


# -- what is refused ----------------------------------------------------------------------------------------------------


def refused(world: World, kind: type[InputError], sentence: str, *settings: str, **options: Any) -> None:
    before = world.names()
    with pytest.raises(kind, match=sentence):
        world.tune(*settings, **options)
    assert world.names() == before  # nothing remains of it


def test_rows_that_the_text_or_the_model_cannot_fill_are_refused(world: World) -> None:
    short = world.root / "short.txt"
    short.write_text("Two apples.")
    refused(world, TextError, r"the text has \d+ tokens, fewer than one row of 64; add text, or", *YARN, texts=[short])
    refused(world, TextError, r"--length 33 is more than this model's context of 32 tokens; lower it, or extend", length=33)
    refused(world, TextError, r"--length 65 is more than this model's context of 64 tokens", *YARN, length=65)


def test_settings_that_a_tuning_cannot_use_are_refused(world: World) -> None:
    refused(world, ConfigError, r"tuning does not use policy, rounds; allowed: name, model", "policy.iterations=3", "rounds=2")
    refused(world, ConfigError, r"tuning does not use backbone\.rollout_batch_size; allowed:", "backbone.rollout_batch_size=8")
    dynamic = ("backbone.context.rope_scaling=dynamic", "backbone.context.rope_factor=2")
    refused(world, ConfigError, r"dynamic recomputes the angles in each forward pass.*use yarn or linear", *dynamic)
    refused(world, ConfigError, r'unknown key "tuning.step"; did you mean "steps"\?', "tuning.step=3")
    refused(world, ModelError, r"templates folder nowhere has no templates\.toml", "templates=nowhere")


def test_a_model_without_rope_or_length_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path, "gpt2")
    refused(world, ModelError, r"models of type gpt2 have no rotary positions", *YARN)
    config = read_json(world.model / "config.json")
    loaded: Any = load_model(str(world.model), device="cpu", precision="fp32")
    assert config["n_positions"] == loaded.context_length
    loaded.model.config.n_positions = 0
    with pytest.raises(TextError, match="has no context length; set the tokens per row with --length"):
        row_length(loaded, None)
    assert row_length(loaded, 9) == 9


def test_a_folder_that_holds_something_is_refused_and_left_alone(world: World) -> None:
    (world.out).mkdir()
    (world.out / "thesis.txt").write_text("mine")
    refused(world, ExportError, "exists and is not empty")
    assert (world.out / "thesis.txt").read_text() == "mine"
    for name, content in (("thesis.txt", {}), ("run.json", {"status": "finished"})):  # a run of that name is not ours either
        out = world.root / name.replace(".", "-")
        write_sealed(world.root / f"{out.name}.tuning" / name, content)
        refused(
            world, RunFolderError, r"is the working folder of this command, but it contains other files; pass another", out=out
        )
        assert (world.root / f"{out.name}.tuning" / name).is_file()


def test_two_processes_do_not_tune_to_one_folder(world: World) -> None:
    store = RunStore(world.root / "out.tuning")
    try:
        with pytest.raises(RunFolderError, match="another process is using"):
            world.tune()
        assert (world.root / "out.tuning").is_dir()
    finally:
        store.close()
    world.tune()


# -- the real command ---------------------------------------------------------------------------------------------------


def options(*assignments: str) -> list[str]:
    return [part for assignment in (*SETTINGS, *assignments) for part in ("--set", assignment)]


def test_the_command_stopped_by_a_kill_goes_on_to_the_same_bytes(world: World) -> None:
    def arguments(out: Path) -> list[str]:
        steps = options(*YARN, "tuning.steps=30", "tuning.checkpoint_every=3")
        return ["tune", str(world.text), "--model", str(world.model), "--to", str(out), *steps]

    whole = selfeval(*arguments(world.root / "whole" / "out"))
    assert whole.returncode == 0, whole.stderr
    assert f"tuned as language model: {world.root / 'whole' / 'out'}" in whole.stdout
    assert "tuned on 3,780 tokens in 30 steps: loss " in whole.stdout
    assert "verified: the reloaded logits differ from the role's by at most" in whole.stdout
    process, deadline = start(arguments(world.out)), time.monotonic() + 200
    folder = world.root / "out.tuning" / "checkpoints" / "tuning"
    while not list(folder.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "killed while it trained"
    assert not world.out.exists()
    done = selfeval(*arguments(world.out), "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert files(world.out) == files(world.root / "whole" / "out")
    again = selfeval(*arguments(world.out))
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.splitlines() == [
        f"Error: {world.out} exists and is not empty, and nothing is overwritten; pass a new or empty folder to --to"
    ]


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"the model stories260K is not there ({STORIES})")
def test_the_command_stretches_a_pretrained_model(tmp_path: Path) -> None:
    story = "Once upon a time, there was a little girl named Lily. She loved to play with her dog in the park. "
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": story * n}) + "\n" for n in range(10, 30)))
    settings = ("backbone.context.rope_scaling=yarn", "backbone.context.rope_factor=2.0", "tuning.steps=4", "tuning.batch=1")
    done = selfeval(
        *("tune", str(tmp_path / "stories.jsonl"), "--model", str(STORIES), "--to", str(tmp_path / "longer")),
        *options(*settings),
    )
    assert done.returncode == 0, done.stderr
    assert "context of 1024 tokens, trained on 512 (RoPE scaling yarn x2)" in done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "longer")
    rope = model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 2.0, 512)
    facts = read_json(tmp_path / "longer" / "export.json")["tuning"]
    assert facts["length"] == model.config.max_position_embeddings == 1024
    assert facts["loss_end"] < facts["loss_start"]


# -- remedies -----------------------------------------------------------------------------------------------------------


def _interrupted_before_writing(world: World) -> Path:
    """A tuning whose role is trained and whose folder could not be written."""

    def full(*arguments: Any) -> None:
        raise StorageError("cannot write: the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfeval.runs.export.write_merged", full)
        with pytest.raises(StorageError):
            world.tune()
    return world.root / "out.tuning"


@pytest.mark.parametrize("name", ["tuning.json", "adapter_model.safetensors"])
def test_the_remedy_for_a_lost_file_of_a_trained_role_works(world: World, name: str) -> None:
    work = _interrupted_before_writing(world)
    (work / "roles" / "tuned" / name).unlink()
    with pytest.raises(RunFolderError, match=rf"{name} is missing; .*remove \S+ and rerun") as caught:
        world.tune()
    found = re.search(r"remove (\S+) and rerun", str(caught.value))
    assert found
    shutil.rmtree(found.group(1))
    assert world.tune().facts["steps"] == 6


def test_a_tuning_without_its_run_json_is_resumed(world: World) -> None:
    work = _interrupted_before_writing(world)
    (work / "run.json").write_text("[]")
    with pytest.raises(RunFolderError, match=r"run\.json is damaged .*remove it and rerun the full command"):
        world.tune()
    (work / "run.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 0)
        assert world.tune().facts["steps"] == 6
