"""The model card of an exported folder: front matter for the hub, usage, figures with n and interval, data, limitations.

A card is meant to be published, so it never contains a local path: a base is identified by its hub id or its folder's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers.utils import cached_file

from selfeval.config import VerdictsConfig, judge_spec
from selfeval.errors import ExportError
from selfeval.quality.statistics import Figure
from selfeval.report.figures import defined, describe
from selfeval.report.labels import is_gold_by_people
from selfeval.report.reading import read_report
from selfeval.report.schema import Policy, Report

__all__ = ["BaseModel", "card_text", "find_base"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class BaseModel:
    """Public identity of a base model.

    Attributes:
        hub_id: `org/name`; None for a folder that is not known to be on the hub.
        revision: commit of the hub repository; None if it is not known.
        name: hub id, or the name of the folder.
        license: the license keys of its model card; `other` if it has none.
    """

    hub_id: str | None
    revision: str | None
    name: str
    license: Mapping[str, str]


def find_base(model: str, given: str | None = None) -> BaseModel:
    """Return the public identity of the base of a run.

    Args:
        model: the folder or hub id that the run used. The path of a folder in the hub's cache contains its hub id.
        given: Optional. Hub id specified by the user, for a local copy.

    Raises:
        ExportError: `given` is not a valid hub id.
    """
    if given is not None and not _HUB_ID.fullmatch(given):
        raise ExportError(f"--base-id {given} is not a hub id; expected organisation and name, such as org/name")
    folder = Path(model)
    if not folder.is_dir():
        return BaseModel(given or model, None, given or model, _license(model))
    # The hub's cache has the layout models--ORG--NAME/snapshots/COMMIT.
    snapshot = folder.resolve()
    cached = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    is_cached = snapshot.parent.name == "snapshots" and _HUB_ID.fullmatch(cached)
    hub_id = given or (cached if is_cached else None)
    return BaseModel(hub_id, snapshot.name if is_cached and not given else None, hub_id or snapshot.name, _license(model))


def _license(model: str) -> dict[str, str]:
    """Return the license keys in the front matter of a base's card; `other` if the card cannot be read."""
    try:
        found = cached_file(model, "README.md", _raise_exceptions_for_missing_entries=False)
        values: Any = metadata_load(found) if found else None
    except Exception:  # the hub client and the YAML parser raise many types, and the card is an external file
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("license"), str):
        return {"license": "other"}
    return {key: str(values[key]) for key in _LICENSE if isinstance(values.get(key), str)}


def card_text(facts: Mapping[str, Any], shown: Mapping[str, Any], base: BaseModel, run: Path) -> str:
    """Return the README of an exported folder.

    Args:
        facts: content of export.json.
        shown: further values of the template.
        base: base of the role.
        run: folder of the run, whose report has the figures.
    """
    environment = Environment(
        loader=PackageLoader("selfeval.runs", "."), undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    environment.filters["python"] = repr
    environment.filters["inline"] = _inline
    report = read_report(run / "report.json") if (run / "report.json").is_file() else None
    # The report is optional: a role can be exported as soon as it is trained.
    values = {**facts, **shown, "base": base, "figures": _figures(facts, report), "data": _data(report)}
    return _front_matter(facts, base) + environment.get_template("card.md.jinja").render(values)


def _inline(text: str) -> str:
    """Escape a name for use within a line of markdown."""
    return re.sub(r"[\s|`<>]+", " ", str(text)).strip()


def _front_matter(facts: Mapping[str, Any], base: BaseModel) -> str:
    is_adapter, scores = "adapter" in facts["layout"], facts["bias"] is not None
    values: dict[str, Any] = dict(base.license)
    if base.hub_id:
        values |= {"base_model": base.hub_id, "base_model_relation": "adapter" if is_adapter else "finetune"}
    card = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if scores else "text-generation",
        tags=["self-evaluator", *_tags(facts, is_adapter, scores)],
        **values,
    )
    return f"---\n{card.to_yaml()}\n---\n\n"


def _tags(facts: Mapping[str, Any], is_adapter: bool, scores: bool) -> list[str]:
    tuning = facts["tuning"]
    tuned = None if tuning is None else "continued-pretraining" if tuning["kind"] == "text" else "sft"
    kind = "reward-model" if scores else tuned or "reinforcement-learning"
    return [kind, *(["lora"] if is_adapter else [])]


def _figures(facts: Mapping[str, Any], report: Report | None) -> list[tuple[str, str]]:
    """Return the measured figures of the role, each with its interval and n."""
    if report is None or facts["tuning"]:
        return []
    rows = _of_evaluator(report) if facts["bias"] is not None else _of_policy(report.policy)
    return [(name, describe(figure, as_percent=is_share)) for name, figure, is_share in rows if defined(figure) is not None]


def _of_evaluator(report: Report) -> list[tuple[str, Figure | None, bool]]:
    """Return each figure with its name, and whether it is a share."""
    evaluator, baselines = report.evaluator, report.evaluator.baselines
    return [
        (f"pairs ranked correctly, by {'people' if is_gold_by_people(report) else 'gold'}", evaluator.accuracy_gold, True),
        ("pairs ranked as by its judge", evaluator.accuracy_judge, True),
        ("the same pairs, ranked by the prompted judge", baselines.judge, True),
        ("the same pairs, ranked by mean log-probability", baselines.mean_logprob, True),
        ("the same pairs, ranked by an n-gram model of the replies", baselines.ngram, True),
        ("the same pairs, ranked by length", baselines.longer_wins, True),
        ("calibration error of its confidence", evaluator.ece, False),
    ]


def _of_policy(policy: Policy) -> list[tuple[str, Figure | None, bool]]:
    """Return each figure with its name, and whether it is a share."""
    return [
        ("win rate against the base, by a judge not used in training", policy.win_rate, True),
        ("length-controlled win rate", policy.length_controlled, True),
        ("gold accuracy before training", policy.gold_before, True),
        ("gold accuracy after training", policy.gold_after, True),
        ("gain in gold accuracy, paired", policy.gold_gain, True),
        ("KL to the base, nats per reply", policy.kl, False),
        ("reply length, ratio of after to before", policy.length_ratio, False),
    ]


def _data(report: Report | None) -> dict[str, Any] | None:
    """Return counts of the training data."""
    if report is None:
        return None
    judged = report.verdicts
    verdicts = {name: getattr(judged, name) for name in ("judged", "kept", "tie", "unsure", "unparsable")}
    judge = report.config.get("verdicts", {}).get("judge", VerdictsConfig().judge)
    return {**report.data.model_dump(), **verdicts, "compares": judge_spec("judge", judge).compares}
