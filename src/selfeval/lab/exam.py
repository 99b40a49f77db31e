"""Exam of the embedded model: each skill that the loop needs, measured by gold on fresh problems."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from selfeval.backbone.adapters import BASE
from selfeval.backbone.load import load_model
from selfeval.backbone.roles import Backbone
from selfeval.config import JudgeRole, LoraConfig, VerdictsConfig
from selfeval.judging.judges import make_judge
from selfeval.judging.protocol import Comparison, Judgement
from selfeval.judging.templates import Templates, templates_folder
from selfeval.lab.domain import Problem, draw_problem
from selfeval.lab.noise import draw_reply
from selfeval.lab.oracle import WordProblems
from selfeval.quality.statistics import proportion
from selfeval.records import PairwiseEvidence
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request

__all__ = ["examine"]

_REPLY_TOKENS = 64


class _Exam:
    def __init__(self, model: str, questions: int, seed: int) -> None:
        self.backbone = Backbone(load_model(model, device="cpu"), LoraConfig(), model)
        self.templates = Templates.load(templates_folder(model), self.backbone.loaded.tokenizer)
        self.rng = random.Random(f"exam/{seed}")
        self.problems = [draw_problem(self.rng) for _ in range(questions)]
        self.seed = seed
        self.gold = WordProblems()

    def replies(self, temperature: float) -> dict[str, Any]:
        """Measure the share of right replies."""
        requests = [Request(self.templates.prompt("reply", question=p.question), temperature) for p in self.problems]
        rollouts = generate(self.backbone, requests, max_new_tokens=_REPLY_TOKENS, seed=self.seed)
        texts = [self.templates.text(r.ids) for r in rollouts]
        right = [bool(self.gold.is_right(p.question, t)) for p, t in zip(self.problems, texts, strict=True)]
        # A reply that is cut off counts as wrong even if the number is there already.
        return proportion([r and o.finished for r, o in zip(right, rollouts, strict=True)]).as_json()

    def questions(self, examples: int) -> dict[str, Any]:
        """Measure the share of generated questions that are well posed."""
        count = len(self.problems)
        shown = [[p.question for p in self.rng.sample(self.problems, min(examples, count))] for _ in range(count)]
        requests = [Request(self.templates.prompt("ask", examples=e)) for e in shown]
        stop = self.templates.ask_stop_ids
        rollouts = generate(self.backbone, requests, max_new_tokens=_REPLY_TOKENS, seed=self.seed, stop=stop)
        written = [self.templates.question_from(r.ids) or "" for r in rollouts]
        return proportion([self.gold.answer(text) is not None for text in written]).as_json()

    def judge(self, role: JudgeRole) -> dict[str, Any]:
        """Measure right verdicts on pairs with exactly one right reply, by order, and ties if both replies are equally good."""
        pairs = [self._pair(problem, one_right=True) for problem in self.problems]
        judge = make_judge(self.backbone, self.templates, VerdictsConfig(), batch_size=256, role=role)
        judged = judge.judge([c for c, _ in pairs])
        # Both right or both wrong: the judge should call a tie.
        alike = [self._pair(problem, one_right=False) for problem in self.problems]
        ties = judge.judge([c for c, _ in alike])
        first_right = [first for _, first in pairs]
        return {
            "right_first_shown_first": _right_share([_evidence(j).in_order for j in judged], first_right),
            "right_first_shown_second": _right_share([_evidence(j).swapped for j in judged], first_right),
            "tie_found": proportion([(j.tie or 0.0) > 0.5 for j in ties]).as_json(),
            "tie_claimed_wrongly": proportion([(j.tie or 0.0) > 0.5 for j in judged]).as_json(),
        }

    def _pair(self, problem: Problem, *, one_right: bool) -> tuple[Comparison, bool]:
        first = self.rng.random() < 0.5
        second = first if not one_right else not first
        one, other = (draw_reply(problem, self.rng, right=right).text for right in (first, second))
        return Comparison(problem.question, one, other), first

    @torch.no_grad()
    def marks(self) -> dict[str, Any]:
        """Measure the share of right marks at the end of replies without marks on their steps."""
        outcomes = []
        right_id, wrong_id = (self.backbone.loaded.tokenizer.convert_tokens_to_ids(m) for m in ("<|right|>", "<|wrong|>"))
        for problem in self.problems:
            is_right = self.rng.random() < 0.5
            text = draw_reply(problem, self.rng, right=is_right).text
            # The mark is predicted after the end token, where the evaluator's head will read its score.
            reply = self.backbone.loaded.tokenizer.encode(text + "<|eos|>", add_special_tokens=False)
            prompt = self.backbone.loaded.tokenizer.encode(
                f"<|bos|><|grade|>{problem.question}<|reply|>", add_special_tokens=False
            )
            ids = torch.tensor([[*prompt, *reply]])
            logits = self.backbone.logits(self.backbone.hidden(ids, torch.ones_like(ids)))[0, -1]
            outcomes.append(bool(logits[right_id] > logits[wrong_id]) == is_right)
        return proportion(outcomes).as_json()


def _evidence(judgement: Judgement) -> PairwiseEvidence:
    if not isinstance(judgement.evidence, PairwiseEvidence):
        raise TypeError("the exam needs a judge that compares in both orders")
    return judgement.evidence


def _right_share(probabilities: Sequence[float | None], first_right: Sequence[bool]) -> dict[str, Any]:
    return proportion([_agrees(p, first) for p, first in zip(probabilities, first_right, strict=True)]).as_json()


def _agrees(probability: float | None, first_is_right: bool) -> bool:
    return probability is not None and (probability > 0.5) == first_is_right


def examine(model: str, questions: int, seed: int) -> dict[str, Any]:
    """Measure all skills of the model in a folder, each as a figure with its interval and n."""
    exam = _Exam(model, questions, seed)
    tasks: Sequence[tuple[str, Callable[[], dict[str, Any]]]] = (
        ("replies_right_sampled", lambda: exam.replies(1.0)),
        ("replies_right_greedy", lambda: exam.replies(0.0)),
        ("questions_well_posed_free", lambda: exam.questions(0)),
        ("questions_well_posed_with_examples", lambda: exam.questions(4)),
        ("judge", lambda: exam.judge("judge")),
        ("referee", lambda: exam.judge("referee")),
        ("final_marks_right", exam.marks),
    )
    with exam.backbone.acting_as(BASE):
        return {name: task() for name, task in tasks}
