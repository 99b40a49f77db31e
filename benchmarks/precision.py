"""Measure the drift of each base precision from fp32: loss, token distributions, and the accuracy of a run's evaluator.

python benchmarks/precision.py [--run runs/bench-loop/seed-0]

The loss is that of the embedded model on fresh replies of its domain. The evaluator was trained on an fp32 base by the run;
its adapter and head are loaded on every other base and judged on the same pairs against gold.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from common import write

from selfeval.backbone.adapters import BASE
from selfeval.backbone.budget import Phase
from selfeval.backbone.load import load_model
from selfeval.backbone.precision import PRECISIONS
from selfeval.backbone.role_files import load_role
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import pad_sequences, reply_hidden
from selfeval.config import RunConfig
from selfeval.judging.templates import Templates, templates_folder
from selfeval.lab.domain import draw_problem
from selfeval.lab.noise import draw_reply, plain_reply
from selfeval.prompt import Prompt
from selfeval.quality.statistics import proportion
from selfeval.store import read_json
from selfeval.training.evaluator import EVALUATOR, score_replies

DOCUMENTS, PAIRS, BATCH_TOKENS = 600, 600, 8192


def _documents(templates: Templates, eos: int) -> list[tuple[Prompt, tuple[int, ...]]]:
    rng, made = random.Random("precision/documents"), []
    for _ in range(DOCUMENTS):
        problem = draw_problem(rng)
        reply = (*templates.reply_ids(draw_reply(problem, rng).text), eos)
        made.append((templates.prompt("reply", question=problem.question), reply))
    return made


@torch.no_grad()
def _distributions(backbone: Backbone, documents: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-distributions before every reply token, and the tokens, in a fixed order."""

    def of_group(group: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = pad_sequences(backbone, [documents[i][0] for i in group], [documents[i][1] for i in group])
        logits = backbone.logits(reply_hidden(backbone, batch)[batch.mask_BR])
        return torch.log_softmax(logits, -1), batch.reply_BR[batch.mask_BR]

    with backbone.acting_as(BASE):
        sizes = [len(p.ids) + len(r) for p, r in documents]
        found = [rows for _, rows in backbone.budget.in_groups(Phase.SCORE, sizes, BATCH_TOKENS, of_group)]
    return torch.cat([rows for rows, _ in found]), torch.cat([targets for _, targets in found])


def _pairs(templates: Templates, eos: int) -> list[tuple[Prompt, tuple[int, ...], tuple[int, ...]]]:
    """Return grade prompt, right reply and wrong reply."""
    rng, made = random.Random("precision/pairs"), []
    for _ in range(PAIRS):
        problem = draw_problem(rng)
        right, wrong = (draw_reply(problem, rng, right=r).text for r in (True, False))
        prompt = templates.prompt("grade", question=problem.question, reference_answer=plain_reply(problem))
        made.append((prompt, (*templates.reply_ids(right), eos), (*templates.reply_ids(wrong), eos)))
    return made


def _scores(backbone: Backbone, pairs: list[Any]) -> torch.Tensor:
    flat = [(prompt, reply) for prompt, *replies in pairs for reply in replies]
    scores = score_replies(backbone, EVALUATOR, [p for p, _ in flat], [r for _, r in flat], BATCH_TOKENS)
    return torch.tensor(scores).view(-1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/bench-loop/seed-0"))
    run = parser.parse_args().run
    config = RunConfig.model_validate(read_json(run / "run.json")["config"])
    figures: dict[str, Any] = {}
    reference: Any = None
    for precision in PRECISIONS:
        backbone = Backbone(
            load_model(config.model, device="cpu", precision=precision), config.backbone.lora, Path(config.model).name
        )
        load_role(backbone, EVALUATOR, run / "roles" / EVALUATOR)
        templates = Templates.load(templates_folder(config.model, config.templates), backbone.loaded.tokenizer)
        eos = backbone.loaded.eos_ids[0]
        logprobs, targets = _distributions(backbone, _documents(templates, eos))
        loss = -logprobs.gather(1, targets[:, None]).mean().item()
        scores = _scores(backbone, _pairs(templates, eos))
        reference = reference or (logprobs, loss, scores)
        figures[precision] = {
            "base_bytes": backbone.census.base_bytes,
            "loss": round(loss, 5),
            "loss_gap": round(loss / reference[1] - 1, 5),
            "kl_from_fp32": round((reference[0].exp() * (reference[0] - logprobs)).sum(-1).mean().item(), 6),
            "evaluator_accuracy": proportion((scores[:, 0] > scores[:, 1]).tolist()).as_json(),
            "score_drift": round(((scores - reference[2]).abs().mean() / reference[2].std()).item(), 5),
            "verdicts_changed": round(
                ((scores[:, 0] > scores[:, 1]) != (reference[2][:, 0] > reference[2][:, 1])).float().mean().item(), 5
            ),
        }
        print(precision, figures[precision], flush=True)
    notes = {
        "loss_gap": "share of the fp32 loss",
        "score_drift": "mean absolute change in standard deviations of the fp32 scores",
    }
    write(
        "precision",
        "python benchmarks/precision.py",
        {"tokens": len(targets), "pairs": PAIRS, "units": notes, "precisions": figures},
    )


if __name__ == "__main__":
    main()
