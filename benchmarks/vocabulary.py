"""Vocabulary extension: characters per token and loss per character, with and without new tokens, three seeds.

python benchmarks/vocabulary.py --model stories260K --english tinyshakespeare.txt.xz --chinese zh_classics.tar.xz

A model of another domain is tuned on each text: as it is, with new tokens for the same number of steps, and with new tokens for
the same text (fewer steps, since a row of tokens then has more text). All of them read the same held-out passages. Losses per
token depend on the tokenizer, so losses are given per character; differences are paired by passage.
"""

from __future__ import annotations

import argparse
import json
import lzma
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import write

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import load_config
from selfeval.quality.statistics import ratio_of_means
from selfeval.stages.terminal import Terminal
from selfeval.stages.tuning import tune
from selfeval.stages.tuning_texts import TextFiles
from selfeval.training.documents import Document, whole_text
from selfeval.training.sft import document_losses

SETTINGS = ("backbone.device=cpu", "backbone.precision=fp32", "backbone.lora.rank=16")
PASSAGE = 200
"""Characters of a held-out passage: short enough for the context, also as bytes."""


def english(path: Path) -> str:
    return lzma.decompress(path.read_bytes()).decode()


def chinese(path: Path) -> str:
    """Return the strings of the JSON files in an archive, one a line, without the names of their fields."""
    with tarfile.open(path) as archive:
        files = [
            archive.extractfile(member) for member in sorted(archive.getmembers(), key=lambda m: m.name) if member.isfile()
        ]
        return "\n".join(text for file in files if file is not None for text in _strings(json.loads(file.read())))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def passages(text: str) -> list[str]:
    return [text[start : start + PASSAGE] for start in range(0, len(text) - PASSAGE + 1, PASSAGE)]


def losses(model: Path, held: Sequence[str]) -> tuple[list[float], list[int]]:
    """Return the loss in nats and the number of tokens of each passage, which follows the start token."""
    backbone = Backbone.load(str(model), load_config(None, {"model": str(model)}, SETTINGS).backbone)
    tokenizer: Any = backbone.loaded.tokenizer
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in held]
    documents: list[Document] = [whole_text([tokenizer.bos_token_id, *ids]) for ids in encoded]
    return document_losses(backbone, BASE, documents, batch_tokens=4096), list(map(len, encoded))


def tuned(model: Path, text: Path, out: Path, seed: int, steps: int, tokens: int, options: Any) -> dict[str, Any]:
    """Tune and return the facts."""
    values = (f"seed={seed}", f"tuning.steps={steps}", f"tuning.batch={options.batch}", f"tuning.extend_vocabulary={tokens}")
    values = (*values, f"tuning.learning_rate={options.learning_rate}", "tuning.checkpoint_every=1000")
    if tokens:
        values = (*values, "tuning.held_out=0")  # the passages are held out here
    config = load_config(None, {"model": str(model), "name": out.name}, (*SETTINGS, *values))
    return tune(config, TextFiles([text]), out, options.length, Terminal(quiet=True)).facts


def compare(name: str, train: str, held: list[str], folder: Path, options: Any) -> dict[str, Any]:
    """Return the figures of one text."""
    text, rows = folder / f"{name}.txt", {}
    text.write_text(train, encoding="utf-8")
    characters = [len(passage) for passage in held]
    before, old = losses(options.model, held)
    found: dict[str, list[list[float]]] = {"plain": [], "steps": [], "text": []}
    counts: dict[str, Any] = {}
    for seed in range(options.seeds):
        new = old
        for kind in found:
            steps = options.steps if kind != "text" else round(options.steps * sum(new) / sum(old))
            out = folder / f"{name}-{seed}-{kind}"
            facts = tuned(options.model, text, out, seed, steps, 0 if kind == "plain" else options.tokens, options)
            nats, lengths = losses(out, held)
            new = lengths if kind != "plain" else new
            found[kind].append(nats)
            counts[kind] = {"steps": steps, "tokens": facts["tokens"], "passage_tokens": sum(lengths)}
            counts[kind] |= {"added": facts["vocabulary"]["added"]} if "vocabulary" in facts else {}
            print(name, seed, kind, steps, round(sum(nats) / sum(characters), 4), flush=True)
    plain = _mean(found["plain"])
    for kind, seeds in found.items():
        mean = _mean(seeds)
        rows[kind] = {
            **counts[kind],
            "characters_per_token": sum(characters) / counts[kind]["passage_tokens"],
            "loss": ratio_of_means(mean, characters).as_json(),
            "loss_of_seeds": [round(sum(nats) / sum(characters), 4) for nats in seeds],
            "change": ratio_of_means([a - b for a, b in zip(mean, plain, strict=True)], characters).as_json(),
        }
    start = {"loss": ratio_of_means(before, characters).as_json(), "characters_per_token": sum(characters) / sum(old)}
    return {"before": start, **rows, "train_characters": len(train), "held_characters": sum(characters)}


def _mean(seeds: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*seeds, strict=True)]


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--english", type=Path, required=True, help="xz-compressed text")
    parser.add_argument("--chinese", type=Path, required=True, help="archive of JSON files")
    parser.add_argument("--tokens", type=int, default=500, help="new tokens")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--characters", type=int, default=200_000, help="characters to train on")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    started, found = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, read, path in (("English", english, options.english), ("Chinese", chinese, options.chinese)):
            text, reach = read(path), options.characters
            held = passages(text[reach : reach + reach // 10])
            found[name] = compare(name, text[:reach], held, Path(folder), options)
    command = (
        f"python benchmarks/vocabulary.py --model {options.model.name} --english {options.english.name} "
        f"--chinese {options.chinese.name}"
    )
    shown = {key: getattr(options, key) for key in ("tokens", "steps", "batch", "length", "learning_rate", "seeds")}
    write("vocabulary", command, {**shown, "minutes": round((time.monotonic() - started) / 60, 1), "texts": found})


if __name__ == "__main__":
    main()
