"""Replies of a run to fine-tune on: those that its judge preferred (rejection-sampling fine-tuning).

Dong et al. 2023, https://arxiv.org/abs/2304.06767; Touvron et al. 2023, https://arxiv.org/abs/2307.09288, section 3.2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from selfeval.config import RunConfig, load_config
from selfeval.errors import ConfigError, TextError
from selfeval.records import Pair, Split
from selfeval.runs.model_defaults import model_defaults
from selfeval.runs.reader import RunReader, backbone_config
from selfeval.runs.templates import templates_of, templates_of_run
from selfeval.stages.context import Context
from selfeval.stages.tuning import is_read
from selfeval.stages.tuning_rows import TuningRows, conversation_rows
from selfeval.training.documents import Document

__all__ = ["PreferredReplies"]


@dataclass(frozen=True)
class PreferredReplies:
    """The chosen replies of the training pairs of a run, each once, as answers to the run's `reply` prompt."""

    run: Path
    also_read: ClassVar[tuple[str, ...]] = ("verdicts",)

    def config(self, name: str, assignments: Sequence[str]) -> RunConfig:
        """Return the configuration of the tuning: model, prompts, adapters and precision of the run, with changed values.

        Args:
            name: name of the tuning.
            assignments: `key=value` strings.

        Raises:
            ConfigError: a key or a value is wrong.
            RunFolderError: the folder is not a run.
        """
        reader = RunReader(self.run)
        values = reader.config.model_dump(mode="json")
        backbone = backbone_config(reader.config, reader.run).model_dump(mode="json")
        kept = {"model": values["model"], "name": name, "verdicts": values["verdicts"]}
        kept["templates"] = str(templates_of(self.run).resolve())
        # Not its folder for weights: a run folder may come from somebody else, and must not decide what is written where.
        kept["backbone"] = {key: backbone[key] for key in ("context", "lora", "precision")}
        made = model_defaults(values["model"])
        read = {} if made is None else {key: value for key, value in made.values.items() if is_read(key)}
        return load_config(None, kept, assignments, read)

    def check(self, config: RunConfig) -> None:
        """Read the pairs.

        Raises:
            ConfigError: new tokens are configured.
            RunFolderError: the folder is not a run, or has no pairs yet.
            TextError: the run kept no training pair, or its replies followed reasoning, which pairs do not have.
        """
        if config.tuning.extend_vocabulary:
            raise ConfigError(
                "the replies of a run are learned as the tokens that were sampled, among which no new token is; extend the "
                "vocabulary on text (TEXT...) or conversations (--chat FILE)"
            )
        self._pairs()
        if any(reply.thinking for reply in RunReader(self.run).records("replies")):
            raise TextError(
                f"the model of {self.run} reasoned before its replies, and pairs have the replies only, so tuning on them "
                "would remove the reasoning; turn it off in the run, for example with "
                "--set 'chat.arguments={enable_thinking = false}'"
            )

    def texts(self, config: RunConfig) -> list[str]:
        """Return no text; see `check`."""
        return []

    def rows(self, context: Context, length: int | None) -> TuningRows:
        """Return the token ids that the run sampled, after the prompt that it asked."""
        reader = RunReader(self.run)
        templates = templates_of_run(self.run, context.backbone.loaded.tokenizer, reader.config.verdicts)
        documents: dict[tuple[int, ...], Document] = {}
        questions = {question.id: question for question in reader.records("questions")}
        for pair in self._pairs():
            prompt = templates.reply_prompt(questions[pair.question_id]).ids
            trained = (False,) * len(prompt) + (True,) * len(pair.chosen_ids)
            documents.setdefault((*prompt, *pair.chosen_ids), Document((*prompt, *pair.chosen_ids), trained))
        return conversation_rows(context, "preferred replies", list(documents.values()), length)

    def _pairs(self) -> list[Pair]:
        pairs: list[Pair] = RunReader(self.run).records("pairs", split=Split.TRAIN)
        # A pair from a file may say that neither reply is better.
        found = [pair for pair in pairs if pair.confidence > 0.5]
        if not found:
            raise TextError(f"{self.run} has no training pair with a preferred reply; see `selfeval show {self.run} dropped`")
        return found
