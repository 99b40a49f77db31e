from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM

import tiny_models
from processes import selfeval
from selfeval.backbone.check import read_parts
from selfeval.backbone.vocabulary.folder import _write_config, check_extendable, first_new_id, write_extended
from selfeval.backbone.vocabulary.tokenizer import BpeTokenizer, NewToken, expanded
from selfeval.backbone.vocabulary.weight_rows import Growth, grow_file
from selfeval.backbone.weight_headers import read_headers
from selfeval.errors import ModelError
from selfeval.runs.reader import RunReader
from selfeval.store import read_json, write_json

DOMAIN = "The patient received amoxicillin. 患者服用阿莫西林。 The patient recovered.\n" * 9
TEXT = "The patient received amoxicillin. " * 9


class World:
    def __init__(self, root: Path, family: str = "llama", spare: int = 0, tokenizer: Any = None, **changes: Any) -> None:
        self.source, self.target = root / "model", root / "larger"
        tokenizer = tokenizer or tiny_models.words_tokenizer()
        made = tiny_models.model(family, len(tokenizer) + spare, **changes)
        tiny_models.save_model(made, tokenizer, self.source)
        (self.source / "templates").mkdir()
        (self.source / "templates" / "reply.jinja").write_text("{{ question }}")
        self.target.mkdir()

    def extend(self, count: int, text: str = TEXT) -> tuple[list[NewToken], int, int]:
        parts = read_parts(str(self.source))
        check_extendable(parts, "tiny")
        tokenizer = BpeTokenizer(parts.tokenizer, "tiny")
        first = first_new_id(parts, tokenizer)
        tokens = tokenizer.learn([text], count, first)
        return tokens, first, write_extended(parts, str(self.source), tokens, first, self.target)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("qwen3", False)])
def test_new_rows_are_the_means_of_their_pieces_and_all_else_is_the_same(tmp_path: Path, family: str, tied: bool) -> None:
    world = World(tmp_path, family, tie_word_embeddings=tied)
    tokens, first, rows = world.extend(7)
    before, after = load_file(world.source / "model.safetensors"), load_file(world.target / "model.safetensors")
    changed = [name for name, tensor in after.items() if tensor.shape != before[name].shape]
    assert len(changed) == (1 if tied else 2)
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
    for name in changed:
        for number, token in enumerate(tokens):
            expected = sum(before[name][piece] for piece in token.pieces) / len(token.pieces)
            torch.testing.assert_close(after[name][first + number], expected)
        torch.testing.assert_close(
            after[name][first + len(tokens) :], before[name].mean(0).expand(rows - first - len(tokens), -1)
        )
    # 380 = 4 * 95 rows and 7 more: the size stays a multiple of 4.
    assert (first, rows) == (380, 388)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world.target), AutoTokenizer.from_pretrained(world.target)
    assert model.config.vocab_size == rows
    assert tokenizer.convert_ids_to_tokens(first) == tokens[0].text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (tiny_models.EOS, tiny_models.PAD)
    assert (world.target / "templates" / "reply.jinja").read_text() == "{{ question }}"
    assert (world.target / "generation_config.json").read_bytes() == (world.source / "generation_config.json").read_bytes()


def test_free_rows_are_used_before_the_model_grows(tmp_path: Path) -> None:
    world = World(tmp_path, spare=10, tie_word_embeddings=False)
    tokens, first, rows = world.extend(7)
    assert (len(tokens), first, rows) == (7, 380, 390)
    assert (world.target / "config.json").read_bytes() == (world.source / "config.json").read_bytes()
    name = "model.embed_tokens.weight"
    before = load_file(world.source / "model.safetensors")[name]
    after = load_file(world.target / "model.safetensors")[name]
    assert torch.equal(after[387:], before[387:])
    assert not torch.equal(after[380:387], before[380:387])


def test_a_token_that_only_the_config_names_keeps_its_row(tmp_path: Path) -> None:
    world = World(tmp_path, spare=10)
    write_json(world.source / "config.json", {**read_json(world.source / "config.json"), "image_token_id": 382})
    assert world.extend(3)[1] == 383


def test_a_bias_of_the_output_layer_grows_with_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PhiConfig(vocab_size=380, max_position_embeddings=32, bos_token_id=1, eos_token_id=1, **size)
    model: Any = PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(world.source)
    tokens, first, _ = world.extend(5)
    before = load_file(world.source / "model.safetensors")["lm_head.bias"]
    after = load_file(world.target / "model.safetensors")["lm_head.bias"]
    expected = torch.stack([before[list(token.pieces)].mean() for token in tokens])
    torch.testing.assert_close(after[first : first + len(tokens)], expected)


def test_sharded_weights_keep_their_files(tmp_path: Path) -> None:
    world = World(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(world.source)
    (world.source / "model.safetensors").unlink()
    model.save_pretrained(world.source, max_shard_size="60KB")
    _, first, _ = world.extend(5)
    names = sorted(path.name for path in world.source.glob("*.safetensors"))
    assert len(names) > 1
    assert sorted(path.name for path in world.target.glob("*.safetensors")) == names
    larger = AutoModelForCausalLM.from_pretrained(world.target)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(larger(ids).logits[..., :first], model(ids).logits[..., :first])
    size = read_json(world.target / "model.safetensors.index.json")["metadata"]["total_size"]
    assert size == sum(sum(t.nbytes for t in load_file(world.target / name).values()) for name in names)


def test_quantised_embeddings_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = world.source / "model.safetensors"
    parts = read_parts(str(world.source))
    tensors = load_file(path)
    save_file({**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"].to(torch.int8)}, path)
    tokenizer = BpeTokenizer(parts.tokenizer, "tiny")
    with pytest.raises(ModelError, match=r"embed_tokens.weight is stored as I8 .* quantised or packed"):
        write_extended(parts, str(world.source), tokenizer.learn([TEXT], 3, 380), 380, world.target)


def test_other_weights_with_a_row_per_token_are_refused(tmp_path: Path) -> None:
    parts = read_parts(str(World(tmp_path).source))
    parts.shell.model.embed_tokens_per_layer = nn.Embedding(100, 4, device="meta")  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"further weights with one row per token \(model.embed_tokens_per_layer.weight\)"):
        check_extendable(parts, "tiny")


# -- families -------------------------------------------------------------------------------------------------------------

TOKENIZERS = {
    "gpt2": tiny_models.words_tokenizer,
    "llama": tiny_models.bytes_tokenizer,
    "qwen2": lambda: tiny_models.words_tokenizer(("<|endoftext|>", "<|im_start|>")),
}


def extended_family(root: Path, family: str, tied: bool) -> tuple[World, list[NewToken], int]:
    world = World(root, family, tokenizer=TOKENIZERS[family](), tie_word_embeddings=tied)
    tokens, first, _ = world.extend(40, DOMAIN)
    return world, tokens, first


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TOKENIZERS)
def test_a_family_reads_old_tokens_as_before_and_new_ones_as_their_means(tmp_path: Path, family: str, tied: bool) -> None:
    world, tokens, first = extended_family(tmp_path, family, tied)
    old, new = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (world.source, world.target))
    is_tied = old.get_input_embeddings().weight is old.get_output_embeddings().weight
    assert is_tied == (new.get_input_embeddings().weight is new.get_output_embeddings().weight) == tied
    assert new.config.vocab_size == len(new.get_input_embeddings().weight) >= first + len(tokens)
    before, after = AutoTokenizer.from_pretrained(world.source), AutoTokenizer.from_pretrained(world.target)
    pieces = {first + number: token.pieces for number, token in enumerate(tokens)}
    ids = after.encode(DOMAIN, add_special_tokens=False)
    assert len(ids) < 0.7 * len(before.encode(DOMAIN, add_special_tokens=False))
    assert expanded(ids, pieces) == before.encode(DOMAIN, add_special_tokens=False)
    assert after.decode(ids) == before.decode(expanded(ids, pieces))
    read = torch.tensor([before.encode("Tom has 7", add_special_tokens=False)])
    with torch.no_grad():
        logits, larger = old(read).logits, new(read).logits
    torch.testing.assert_close(larger[..., :first], logits[..., :first], atol=1e-5, rtol=1e-5)
    # The logit is linear in the row, so that of a new token is the mean of those of its pieces.
    expected = torch.stack([logits[..., list(token.pieces)].mean(-1) for token in tokens], -1)
    torch.testing.assert_close(larger[..., first : first + len(tokens)], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("llama", False), ("qwen2", True)])
def test_a_run_uses_the_written_folder(tmp_path: Path, family: str, tied: bool) -> None:
    world, _, _ = extended_family(tmp_path, family, tied)
    seeds, out = tmp_path / "seeds.txt", tmp_path / "run"
    seeds.write_text("".join(f"Did patient {number} receive amoxicillin?\n" for number in range(24)))
    settings = (f"questions.file={seeds}", "replies.max_new_tokens=8", "backbone.device=cpu", "backbone.precision=fp32")
    named = [part for each in settings for part in ("--set", each)]
    done = selfeval(
        *("run", "--model", str(world.target), "--seeds", str(seeds), "--output", str(out), "--until", "replies", "--quiet"),
        *named,
    )
    assert done.returncode == 0, done.stderr
    replies = RunReader(out).records("replies")
    assert replies
    assert max(max(reply.ids) for reply in replies) < AutoModelForCausalLM.from_pretrained(world.target).config.vocab_size


# -- sections of config.json ----------------------------------------------------------------------------------------------


def test_all_sections_of_the_language_model_get_the_size_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    other = {"vocab_size": 380, "hidden_size": 8}
    write_json(
        path,
        {
            "vocab_size": 380,
            "text_config": {"vocab_size": 380, "pad_token_id": 0},
            "thinker_config": {"text_config": {"vocab_size": 380}, "audio_config": other},
            "llm_config": {"vocab_size": 380},
            "vision_config": other,
            "audio_decoder_config": other,
            "talker_config": {"text_config": other},
            "decoder": {"vocab_size": 99},
        },
    )
    _write_config(path, 380, 388, "tiny")
    assert read_json(path) == {
        "vocab_size": 388,
        "text_config": {"vocab_size": 388, "pad_token_id": 0},
        "thinker_config": {"text_config": {"vocab_size": 388}, "audio_config": other},
        "llm_config": {"vocab_size": 388},
        "vision_config": other,
        "audio_decoder_config": other,
        "talker_config": {"text_config": other},
        "decoder": {"vocab_size": 99},
    }
    with pytest.raises(ModelError, match=r"does not give the 77 rows as vocab_size"):
        _write_config(path, 77, 80, "tiny")


def test_a_tokenizer_with_code_is_read_only_with_the_users_consent(tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.source / "my_tokenizer.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\nclass MyTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = world.source / "tokenizer_config.json"
    values = {
        **read_json(path),
        "tokenizer_class": "MyTokenizer",
        "auto_map": {"AutoTokenizer": [None, "my_tokenizer.MyTokenizer"]},
    }
    write_json(path, values)
    parts = read_parts(str(world.source), trust_remote_code=True)
    assert type(parts.tokenizer).__name__ == "MyTokenizer"
    tokens = BpeTokenizer(parts.tokenizer, "tiny").learn([TEXT], 3, 380)
    write_extended(parts, str(world.source), tokens, 380, world.target, trust_remote_code=True)
    assert type(AutoTokenizer.from_pretrained(world.target, trust_remote_code=True)).__name__ == "MyTokenizer"


# -- large files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("first", "after"), [(380, 388), (378, 380), (384, 392)])
def test_a_file_grows_as_a_tensor_does(tmp_path: Path, dtype: torch.dtype, first: int, after: int) -> None:
    torch.manual_seed(0)
    tensors = {
        "head.bias": torch.randn(380).to(dtype),
        "embed": torch.randn(380, 6).to(dtype),
        "other": torch.randn(5, 7),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
    }
    save_file(tensors, tmp_path / "old", metadata={"format": "pt"})
    growth = Growth(380, after, first, [(1, 2, 3), (5,)])
    grown = {"head.bias", "embed"}
    added = grow_file(tmp_path / "old", tmp_path / "new", read_headers([tmp_path / "old"]), {"format": "pt"}, grown, growth)
    for name in grown:
        old = tensors[name].double()
        mean = old[: min(first, 380)].mean(0)
        rows = [*old[: min(first, 380)], *[mean] * (first - 380), old[[1, 2, 3]].mean(0), old[5], *old[first + 2 :]]
        rows += [mean] * (after - len(rows))
        tensors[name] = torch.stack(rows)
    found = load_file(tmp_path / "new")
    for name, tensor in tensors.items():
        assert found[name].dtype == (dtype if name in grown else tensor.dtype)
        torch.testing.assert_close(found[name].double(), tensor.double(), atol=0 if name not in grown else 2e-2, rtol=1e-2)
    # The same bytes as the library writes.
    save_file(found, tmp_path / "again", metadata={"format": "pt"})
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new").read_bytes()
    assert added == sum(found[name].nbytes for name in grown) * (after - 380) // after


def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    size = 400 << 20
    header = {
        "embed": {"dtype": "F32", "shape": [8, 4], "data_offsets": [size, size + 128]},
        "other": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
    }
    text = json.dumps(header).encode()
    with (tmp_path / "old").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size + 128)
    (tmp_path / "script.py").write_text(
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from selfeval.backbone.vocabulary.weight_rows import Growth, grow_file\n"
        "from selfeval.backbone.weight_headers import read_headers\n"
        "old, new = map(Path, sys.argv[1:])\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "before = peak()\n"
        "grow_file(old, new, read_headers([old]), None, {'embed'}, Growth(8, 16, 8, [(1, 2)]))\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "old", tmp_path / "new"], capture_output=True, text=True, check=True
    )
    (tmp_path / "old").unlink()
    assert int(done.stdout) * 1024 < size / 4
