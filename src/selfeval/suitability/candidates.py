"""The judges to check: every registered one, with the settings of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from selfeval.config import JUDGES, RunConfig, VerdictsConfig, judge_spec
from selfeval.errors import ModelError
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.templates import Templates, templates_folder

__all__ = ["Candidate", "candidates_of", "load_templates"]


@dataclass(frozen=True)
class Candidate:
    """A judge to check.

    Attributes:
        name: name of the judge, and of its variant.
        config: configuration of the run with this judge.
        assignments: values of `--set` that select it.
    """

    name: str
    config: RunConfig
    assignments: tuple[str, ...]

    @property
    def is_sampled(self) -> bool:
        """Whether a second judgement can differ from the first: the judge writes something before its verdict."""
        return self.config.verdicts.reasoning or not judge_spec("judge", self.config.verdicts.judge).can_answer_at_once


def candidates_of(config: RunConfig) -> list[Candidate]:
    """Return every judge that asks the model, without combined ones, and the configured one, which is first.

    Each that can answer at once is returned without reasoning too.

    The values of `[verdicts]` are the same for all. The configured judge has its own section, and the others have the
    defaults of theirs.
    """
    chosen = config.verdicts.judge
    # A server is asked only if the configuration names it, and a combined judge asks the others again.
    allowed = [name for name, spec in JUDGES.items() if name == chosen or not (spec.is_remote or spec.combines)]
    names = sorted(allowed, key=lambda name: name != chosen)
    return [candidate for name in names for candidate in _variants(config, name)]


def _variants(config: RunConfig, name: str) -> list[Candidate]:
    verdicts, chosen = config.verdicts, f"verdicts.judge={name}"
    if name != verdicts.judge:
        # Without the configured judge's own section, which other judges do not know.
        common = {key: value for key, value in verdicts.model_dump(mode="json").items() if key != verdicts.judge}
        votes = verdicts.votes if JUDGES[name].samples_votes else 1
        verdicts = VerdictsConfig.model_validate({**common, "judge": name, "votes": votes})
    greedy = () if config.verdicts.votes == 1 else ("verdicts.votes=1",)
    sets = (chosen,) if verdicts.votes > 1 else (chosen, *greedy)
    found = [Candidate(name, config.model_copy(update={"verdicts": verdicts}), sets)]
    if verdicts.reasoning and JUDGES[name].can_answer_at_once:
        at_once = config.model_copy(update={"verdicts": verdicts.model_copy(update={"reasoning": False, "votes": 1})})
        found.append(Candidate(f"{name}, at once", at_once, (chosen, *greedy, "verdicts.reasoning=false")))
    return found


def load_templates(
    candidates: Sequence[Candidate], tokenizer: PreTrainedTokenizerBase
) -> tuple[Templates, list[Candidate], list[str]]:
    """Load the templates of a run with any of the judges.

    Args:
        candidates: judges; the first is the configured one.
        tokenizer: tokenizer of the model.

    Returns:
        The templates, the judges whose templates the folder has, and a note on each of the others.

    Raises:
        ModelError: the folder cannot be used by the configured judge.
    """
    kept: list[Candidate] = []
    notes: list[str] = []
    kinds: tuple[str, ...] = ()
    for candidate in candidates:
        wanted = tuple(dict.fromkeys((*kinds, *kinds_of_run(candidate.config.verdicts))))
        try:
            templates = _load(candidate.config, tokenizer, wanted)
        except ModelError as error:
            if not kept:
                raise
            notes.append(f"the judge {candidate.name} is not checked: {error}")
            continue
        kept.append(candidate)
        kinds = wanted
    return _load(candidates[0].config, tokenizer, kinds) if notes else templates, kept, notes


def _load(config: RunConfig, tokenizer: PreTrainedTokenizerBase, kinds: tuple[str, ...]) -> Templates:
    folder: Path = templates_folder(config.model, config.templates)
    chat = config.chat
    return Templates.load(folder, tokenizer, kinds=kinds, arguments=chat.arguments, system=chat.system)
