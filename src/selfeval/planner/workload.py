"""The longest texts that a configuration allows, in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from selfeval.config import JudgeRole, JudgeSpec, RunConfig, judge_spec
from selfeval.judging.chat import with_system
from selfeval.judging.rubric import with_rubric
from selfeval.judging.templates import template_texts, templates_folder

__all__ = ["Workload", "workload"]

_CHARACTERS_PER_TOKEN = 3
_ROLES: tuple[JudgeRole, ...] = ("judge", "referee")
_CHAT_TOKENS = 16
"""Approximate number of tokens that a chat template adds around a message."""


@dataclass(frozen=True)
class Workload:
    """Lengths of the longest texts that the configuration allows, and how many are processed at once.

    Attributes:
        reply_prompt, grade_prompt: tokens before a reply, as read by policy and evaluator.
        judge_prompt: tokens of a prompt of judge or referee, with the replies that it shows.
        reply, reasoning: token limits of a reply with its thinking, and of the judge's output; 0 if it writes nothing.
    """

    reply_prompt: int
    grade_prompt: int
    judge_prompt: int
    reply: int
    reasoning: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is scored or trained on."""
        return max(self.reply_prompt, self.grade_prompt) + self.reply


def workload(config: RunConfig, context: int | None) -> Workload:
    """Compute the largest workload that the limits allow; template text is counted at three characters per token."""
    source = template_texts(templates_folder(config.model, config.templates))
    texts = with_system(with_rubric(source, config.verdicts.rubric), config.chat.system)
    own = {name.removesuffix(".jinja"): len(text) // _CHARACTERS_PER_TOKEN + _CHAT_TOKENS for name, text in texts.items()}
    question, reply = config.questions.max_new_tokens, config.replies.longest
    # Longest prompt that leaves room for one token of a reply; without a known context, a number above every limit.
    room = (context or 1 << 40) - 1
    reply_prompt = min(own["reply"] + question, room)
    shown_reference = reply if "reference_answer" in texts["grade.jinja"] else 0
    grade_prompt = min(own["grade"] + question + shown_reference, room)
    name = config.verdicts.judge
    # The referee shows two replies in the evaluation, whatever the judge shows.
    specs = [(role, judge_spec(role, member.judge)) for role in _ROLES for member in config.verdicts.members]
    prompts = [spec.replies_per_prompt * reply + _texts(spec, role, own) for role, spec in specs]
    judge_prompt = min(question + max(prompts), room)
    writes = config.verdicts.reasoning or not judge_spec("judge", name).can_answer_at_once
    sampled = reply + (config.replies.max_thinking_tokens or 0)
    return Workload(
        reply_prompt,
        grade_prompt,
        judge_prompt,
        min(sampled, room + 1 - max(reply_prompt, grade_prompt)),
        min(config.verdicts.max_new_tokens, room + 1 - judge_prompt) if writes else 0,
    )


def _texts(spec: JudgeSpec, role: JudgeRole, own: Mapping[str, int]) -> int:
    return sum(own[name.removesuffix(".jinja")] for kind in spec.templates.get(role, ()) for name in kind.files)
