"""ChatGLM for the tests: the golden folders, and SentencePiece files built piece by piece (the published ones are not here)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["GENERATIONS", "GOLDEN", "golden", "model_folder", "sentencepiece_file", "tiny_pieces", "tokenizer_cases"]

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
GENERATIONS = (1, 2, 3)


def golden(name: str) -> tuple[Path, dict[str, Tensor]]:
    """A golden folder (config.json, model.safetensors) and the outputs of the published code on it."""
    if not (GOLDEN / name).is_dir():
        pytest.skip("the golden ChatGLM folders are not here: they lie in shared/golden beside the repository")
    return GOLDEN / name, load_file(GOLDEN / name / "golden.safetensors")


def tokenizer_cases(name: str) -> Any:
    """Return the recorded outputs of the published tokenizers: `1` or `23`."""
    file = GOLDEN / f"tokenizer-chatglm{name}.json"
    if not file.is_file():
        pytest.skip("the golden ChatGLM tokenizer cases are not here: they lie in shared/golden beside the repository")
    return json.loads(file.read_text(encoding="utf-8"))


def sentencepiece_file(
    pieces: Mapping[int, str],
    count: int,
    file: Path,
    *,
    first_byte: int,
    controls: Mapping[int, str],
    scores: Mapping[str, float] | None = None,
) -> Path:
    """A SentencePiece file with these pieces at these numbers; the numbers between are filled with characters nobody writes.

    Args:
        pieces: number -> text; "▁" is a space, `<...>` in it is taken whole wherever it occurs.
        count: pieces in all.
        first_byte: number of the piece for byte 0; 255 more follow.
        controls: number -> name of what no text can give; number 0 is the unknown piece.
        scores: of single pieces, where the longest-first rule of the rest (-1 each) does not decide as wanted.
    """
    pytest.importorskip("sentencepiece", reason="SentencePiece is not installed (extra: sentencepiece)")
    pytest.importorskip("google.protobuf", reason="protobuf is not installed (extra: sentencepiece)")
    from sentencepiece import sentencepiece_model_pb2 as proto

    kinds = proto.ModelProto.SentencePiece
    model = proto.ModelProto()
    model.trainer_spec.model_type = proto.TrainerSpec.UNIGRAM
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = count
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    for i in range(count):
        text, kind, score = pieces.get(i, chr(0xF0000 + i)), kinds.NORMAL, -1.0
        if i in controls:
            text, kind, score = controls[i], kinds.UNKNOWN if i == 0 else kinds.CONTROL, 0.0
        elif first_byte <= i < first_byte + 256:
            text, kind, score = f"<0x{i - first_byte:02X}>", kinds.BYTE, 0.0
        elif text[0] in "<[" and text[-1] in ">]" and len(text) > 2:
            kind = kinds.USER_DEFINED
        model.pieces.add(piece=text, type=kind, score=(scores or {}).get(text, score))
    file.write_bytes(model.SerializeToString())
    return file


_LETTERS = "etaoinshrdlucmfwypvbgkjqxz0123456789?.,:ATQBVR"


def tiny_pieces(generation: int, file: Path) -> Path:
    """A file that fits the golden folders (320 rows): bytes, letters, and the control tokens where those configs have them."""
    if generation == 1:
        pieces = dict(enumerate(_LETTERS[:38], start=262)) | {3: "<pad>", 4: "<n>", 5: "▁"}
        names = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>", "<|tab|>")
        pieces |= dict(enumerate(names, start=300)) | {307 + n: f"<|blank_{n}|>" for n in range(2, 13)}
        return sentencepiece_file(pieces, 320, file, first_byte=6, controls={0: "<unk>", 1: "<s>", 2: "</s>"})
    pieces = dict(enumerate(["▁", *_LETTERS], start=259))
    return sentencepiece_file(pieces, 259 + len(pieces), file, first_byte=3, controls={0: "<unk>", 1: "<s>", 2: "</s>"})


def model_folder(generation: int, folder: Path, *, room: int | None = None) -> Path:
    """The golden weights of a generation with a tiny tokenizer file: like a published folder, code included."""
    source, _ = golden(f"chatglm{generation}")
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, folder / name)
    if room is not None:  # a tiny tokenizer needs a token a letter, and positions are no weights
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["max_sequence_length" if generation == 1 else "seq_length"] = room
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tiny_pieces(generation, folder / ("ice_text.model" if generation == 1 else "tokenizer.model"))
    settings = {
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    code = 'raise RuntimeError("code of a checkpoint was run")\n'
    roles = 'ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]\n' if generation == 3 else ""
    for name in ("configuration", "modeling", "tokenization"):
        (folder / f"{name}_chatglm.py").write_text(code + roles, encoding="utf-8")
    return folder
