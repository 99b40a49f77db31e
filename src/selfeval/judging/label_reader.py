"""Read the verdicts of a prompted judge: the probabilities of its labels at the position where its output names one.

The probabilities are read, not the sampled word alone. An unparsable answer has no probability, never a default.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selfeval.judging.labels import verdict_tokens
from selfeval.judging.loops import ends_in_loop
from selfeval.judging.pooling import Reading, pool_votes
from selfeval.judging.protocol import JudgeContext
from selfeval.judging.reading import Place, find_verdict, is_refusal, thinking_of, token_at
from selfeval.prompt import Prompt
from selfeval.records import Unreadable
from selfeval.rollout.engine import generate
from selfeval.rollout.next_tokens import next_logprobs
from selfeval.rollout.requests import Request, Rollout

__all__ = ["LabelReader"]

TokenIds = tuple[int, ...]
_Case = tuple[Prompt, int]
"""A prompt, and the number of the vote on it."""


_TAIL = 32
"""Number of last tokens of a prompt searched for an opening marker of thinking."""


@dataclass(frozen=True)
class _Spot:
    """Position at which the labels are read.

    Attributes:
        before: all tokens up to the labels.
        watched: Optional. Log-probs of the watched tokens there, if the engine has already computed them.
        cause: Optional. TRUNCATED if the judge was cut off before it came to this position.
    """

    before: Prompt
    watched: tuple[float, ...] | None = None
    cause: Unreadable | None = None


class LabelReader:
    """Runs a prompted judge under the active role, and reads the probabilities of its labels.

    The judge writes greedily, unless its context has a temperature. With `verdicts.votes` above 1 it writes that many samples
    per prompt, whose probabilities are pooled (`pool_votes`).

    Args:
        context: context of the judge.
        kind: kind of template that its prompts are made of, which has verdict labels.
    """

    def __init__(self, context: JudgeContext, kind: str) -> None:
        self.backbone, self.templates, self.config = context.backbone, context.templates, context.config
        self.batch_size, self.labels = context.batch_size, context.templates.labels(kind)
        self.tokens = verdict_tokens(self.templates, self.labels)
        self.seed, self.temperature = context.seed, context.temperature

    def read(self, prompts: Sequence[Prompt], advance: Callable[[int], None] | None) -> list[Reading]:
        """Return one reading per prompt. A prompt longer than the model's context is unparsable, and its raw output says so."""
        reasoning = self._reason(prompts, advance)
        spots = {case: spot for case, said in reasoning.items() if (spot := self._spot(case[0], said)) is not None}
        # Without a chain of thought this pass is all there is to wait for.
        logprobs = self._label_logprobs(spots, None if self.config.reasoning else advance)

        def reading(case: _Case) -> Reading:
            cause = spots[case].cause if case in spots else None
            return self._reading(case[0], reasoning.get(case), logprobs.get(case), cause)

        votes = {prompt: [reading((prompt, n)) for n in range(self.config.votes)] for prompt in dict.fromkeys(prompts)}
        return [votes[prompt][0] if self.config.votes == 1 else pool_votes(votes[prompt]) for prompt in prompts]

    def _room(self, prompt: Prompt) -> int:
        context = self.backbone.loaded.context_length
        return sys.maxsize if context is None else context - len(prompt.ids)

    def _reason(self, prompts: Sequence[Prompt], advance: Callable[[int], None] | None) -> dict[_Case, Rollout]:
        # Equal prompts are asked once. One without room for lead and labels gets no reading.
        distinct = [p for p in dict.fromkeys(prompts) if self._room(p) > len(self.tokens.lead) + self.tokens.longest]
        cases = [(prompt, n) for prompt in distinct for n in range(self.config.votes)]
        if not self.config.reasoning or not distinct:
            # Without a chain of thought the judge writes nothing: the labels are read right after prompt and lead.
            return dict.fromkeys(cases, Rollout((), (), False))
        limit, watch, seed = self.config.max_new_tokens, self.tokens.all, self.seed if self.temperature else 0
        rollouts = generate(
            self.backbone,
            list(map(self._request, cases)),
            max_new_tokens=limit,
            seed=0 if self.config.votes > 1 else seed,  # each vote has a stream with the seed in its name
            batch_size=self.batch_size,
            watch=watch,
            advance=advance,
        )
        return dict(zip(cases, rollouts, strict=True))

    def _request(self, case: _Case) -> Request:
        prompt, number = case
        if self.config.votes == 1:
            return Request(prompt, self.temperature)
        # By the prompt, so a vote does not depend on the other prompts of a shard.
        name = ",".join(map(str, prompt.ids))
        stream = random.Random(f"{self.seed}/verdict votes/{name}/{number}").getrandbits(64)
        return Request(prompt, self.config.vote_temperature, stream=stream)

    def _spot(self, prompt: Prompt, said: Rollout) -> _Spot | None:
        """Return the position of the labels: at the judge's verdict, or after a lead that is appended to its output.

        None if there is nothing to read: the judge refused, was cut off before it decided, or there is no lead to append.
        """
        # The end of the prompt matters, because a chat template may open the thinking there.
        text = self._decode(said.ids)
        thinking = thinking_of(text, self._decode(prompt.ids[-_TAIL:]))
        # Still thinking: close the block first, or the lead would be read as part of the draft.
        if thinking.end is None:
            close = tuple(self.templates.tokenizer.encode(thinking.close, add_special_tokens=False))
            return self._appended(prompt, said, close)
        label = self._label(said, text, thinking.end)
        # The judge named a verdict in the expected tokens, so the engine watched the label probabilities at that step.
        if label is not None:
            return _Spot(prompt.followed_by(said.ids[:label]), said.watched[label])
        place = self._statement(said, text, thinking.end)
        if place is None:
            return None if self._refuses(said) else self._appended(prompt, said)
        # It named one in unexpected tokens: cut its text before the statement, and read the labels after the usual lead.
        return _Spot(self._with_lead(prompt, said.ids[: self._tokens_before(said, place.lead)]))

    def _statement(self, said: Rollout, text: str, begin: int) -> Place | None:
        """Return the deciding statement, as positions in `text`."""
        place = find_verdict(text[begin:], self.labels, finished=said.finished) if self.labels.lead else None
        return None if place is None else Place(begin + place.lead, begin + place.label)

    def _label(self, said: Rollout, text: str, begin: int) -> int | None:
        """Return the index of the token that begins the deciding label; None if its tokens match no label."""
        names = {path[0] for path in self.tokens.paths}
        if not self.labels.lead:
            shared = self._decode(self.tokens.lead).strip()
            places = [i for i, token in enumerate(said.ids) if token in names]
            # As in `find_verdict`: the last label of a finished judge, the first one of a judge that was cut off.
            before = [(i, self._decode(said.ids[:i])) for i in (reversed(places) if said.finished else places)]
            return next((i for i, head in before if len(head) >= begin and head.rstrip().endswith(shared)), None)
        place = self._statement(said, text, begin)
        if place is None:
            return None
        # Token and character positions can differ by a token or two around spaces and decoration, so search nearby.
        near = self._tokens_before(said, place.label)
        label = text[place.label :]
        return next((i for i in range(max(0, near - 2), min(near + 3, len(said.ids))) if self._begins(said, i, label)), None)

    def _begins(self, said: Rollout, index: int, label: str) -> bool:
        """Return whether the token at `index` begins the text `label`, or continues the prefix that all labels share."""
        if said.ids[index] not in {path[0] for path in self.tokens.paths}:
            return False
        shared = self._decode(self.tokens.lead).strip().removeprefix(self.labels.lead.strip()).strip()
        rest = self._decode(said.ids)[len(self._decode(said.ids[:index])) :].lstrip()
        return (shared + rest) == label

    def _tokens_before(self, said: Rollout, character: int) -> int:
        return token_at(lambda count: self._decode(said.ids[:count]), len(said.ids), character)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.templates.tokenizer.decode(list(ids)))

    def _without_end(self, ids: TokenIds) -> TokenIds:
        # An end token would close the turn, and the lead has to continue it.
        ends = set(self.backbone.loaded.eos_ids)
        return tuple(i for i in ids if i not in ends)

    def _refuses(self, said: Rollout) -> bool:
        """Return whether a judge that ended by itself wrote a refusal. Without reasoning it writes nothing."""
        text = self._decode(said.ids)
        return said.finished and is_refusal(text[thinking_of(text).end or 0 :])

    def _appended(self, prompt: Prompt, said: Rollout, close: TokenIds = ()) -> _Spot | None:
        """Return the position after an appended lead.

        None if there is no lead, or if the chain of thought was cut off, because it has no verdict. With `verdicts.truncated =
        "force"`, the verdict of a chain of thought that was cut off is read there (budget forcing: Muennighoff et al. 2025,
        https://arxiv.org/abs/2501.19393, section 3.1).

        Args:
            prompt: the prompt.
            said: the output.
            close: marker that ends the thinking of the output.
        """
        is_cut = self.config.reasoning and not said.finished
        if (self.config.reasoning and not self.labels.lead) or (is_cut and self.config.truncated == "drop"):
            return None
        before = self._with_lead(prompt, self._without_end(said.ids), close)
        return _Spot(before, cause=Unreadable.TRUNCATED if is_cut else None)

    def _with_lead(self, prompt: Prompt, output: TokenIds, close: TokenIds = ()) -> Prompt:
        """Append marker and lead to the output, truncating the output if the context is too short."""
        added = (*close, *self.tokens.lead)
        room = self._room(prompt) - len(added) - self.tokens.longest
        return prompt.followed_by((*output[: max(room, 0)], *added))

    def _label_logprobs(
        self, spots: dict[_Case, _Spot], advance: Callable[[int], None] | None
    ) -> dict[_Case, tuple[float, ...]]:
        """Return the log-probs of the labels at each position, summed along their paths."""
        seen: dict[tuple[_Case, TokenIds], tuple[float, ...]] = {}
        seen |= {(case, ()): spot.watched for case, spot in spots.items() if spot.watched is not None}
        # Labels of several tokens need one extra forward pass per shared prefix.
        needed = [(case, fork) for case in spots for fork in self.tokens.forks if (case, fork) not in seen]
        prompts = [spots[case].before.followed_by(fork) for case, fork in needed]
        watch = self.tokens.all
        found = next_logprobs(self.backbone, prompts, watch, batch_size=self.batch_size, advance=advance)
        seen |= dict(zip(needed, found, strict=True))

        def total(case: _Case, path: TokenIds) -> float:
            # The chain rule along the tokens of a label: log p(a b) = log p(a) + log p(b | a).
            return math.fsum(seen[case, path[:k]][watch.index(token)] for k, token in enumerate(path))

        return {case: tuple(total(case, path) for path in self.tokens.paths) for case in spots}

    def _reading(
        self, prompt: Prompt, rollout: Rollout | None, logprobs: tuple[float, ...] | None, cause: Unreadable | None
    ) -> Reading:
        if rollout is None:
            skipped = f"(skipped: the prompt of {len(prompt.ids)} tokens does not fit the model's context)"
            return Reading(None, skipped, Unreadable.NO_ROOM)
        raw_output = self._decode(rollout.ids)
        if logprobs is None:
            return Reading(None, raw_output, self._cause(rollout))
        probabilities = tuple(math.exp(p) for p in logprobs)
        # If the labels together are unlikely, the judge was about to write something else: no verdict.
        mass = sum(probabilities)
        if mass < self.config.label_mass or mass <= 0:
            return Reading(None, raw_output, Unreadable.LABEL_MASS, mass)
        return Reading(probabilities, raw_output, cause, mass)

    def _cause(self, rollout: Rollout) -> Unreadable:
        """Return why there is no position at which the labels could be read."""
        if rollout.finished:
            return Unreadable.REFUSED if self._refuses(rollout) else Unreadable.NO_LEAD
        if ends_in_loop(rollout.ids):
            return Unreadable.LOOP
        # The engine stops at the end of the model's context, before the limit.
        return Unreadable.CUT if len(rollout.ids) >= self.config.max_new_tokens else Unreadable.NO_ROOM
