"""Requirements on every model family, one function each; the conformance tests run them, and the docs list the results.

Each check raises AssertionError where the family fails.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.role_files import load_role, save_role
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import final_scores, pad_sequences, reply_hidden, reply_logprobs
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from selfeval.training.documents import Document, pack_documents
from selfeval.training.sft import documents_loss
from tiny_families import FAMILIES, WINDOW
from token_prompts import as_prompts

__all__ = ["CHECKS", "logits", "make_two_roles", "passes", "two_roles"]

VOCABULARY = 36  # below the ids of Gemma 3's picture tokens, which no text has
PROMPTS = [(5, 9, 2), (7,), (30, 31, 32, 33, 34, 35, 3, 4, 5, 6, 7, 8), (11, 12), (5, 9, 2, 14, 22, 13, 14, 15, 3, 2)]
REPLIES = [(2, 17, 30, 8), (8, 8, 21, 4, 4, 19, 2, 33, 28, 6, 31), (3,), (25, 24, 23, 22, 21, 20), (19, 3)]
LIMIT = 20
SCRAMBLE = 0.1


def new(family: str) -> Backbone:
    return tiny_models.backbone(family, VOCABULARY + 4, targets=FAMILIES[family].asked)


def make_two_roles(family: str) -> Backbone:
    """A backbone with a policy and an evaluator, as if trained."""
    backbone = new(family)
    backbone.roles.add("policy", seed=1)
    backbone.roles.add("evaluator-0", seed=2, head=True)
    tiny_models.scramble(backbone, "policy", 7, SCRAMBLE)
    tiny_models.scramble(backbone, "evaluator-0", 8, SCRAMBLE)
    return backbone


two_roles = lru_cache(maxsize=1)(make_two_roles)
"""The same for checks that leave it as they found it."""


def logits(backbone: Backbone, role: str) -> list[Tensor]:
    """The model's own logits `[T, V]` of each prompt and reply under a role, each sequence alone."""
    with torch.no_grad(), backbone.acting_as(role):
        return [
            backbone.model(input_ids=torch.tensor([[*p, *r]]), use_cache=False).logits[0].float()
            for p, r in zip(PROMPTS, REPLIES, strict=True)
        ]


def distance(these: list[Tensor], those: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(these, those, strict=True))


def reply_loss(backbone: Backbone) -> Tensor:
    """Negative mean log-prob of the replies under the acting role: what every policy step differentiates."""
    batch = pad_sequences(backbone, as_prompts(PROMPTS), REPLIES)
    logprobs_BR, *_ = token_logprobs(backbone, reply_hidden(backbone, batch), batch.reply_BR, batch.mask_BR)
    return -logprobs_BR[batch.mask_BR].mean()


def adapters_are_where_they_should_be(family: str) -> None:
    """The modules that get adapters are those of the table, and a policy loss reaches every one of them."""
    backbone = two_roles(family)
    found = [name for name, module in backbone.model.named_modules() if isinstance(module, BaseTunerLayer)]
    names = [name.removesuffix(".base_layer").rsplit(".", 1)[-1] for name in found]  # experts: one inside of the other
    assert dict(Counter(names)) == dict(FAMILIES[family].targets)
    assert not isinstance(backbone.model.get_output_embeddings(), BaseTunerLayer)
    with backbone.acting_as("policy"):
        reply_loss(backbone).backward()
    gradients = {name: p.grad for name, p in backbone.roles.parameters("policy").items()}
    backbone.model.zero_grad()
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.abs().max() > 0] == []


def roles_do_not_touch_one_another(family: str) -> None:
    """Two roles and the base differ; a training step on one changes neither the other nor the base, not by one bit."""
    backbone = make_two_roles(family)  # its own: it is trained
    before = {role: logits(backbone, role) for role in (BASE, "policy", "evaluator-0")}
    for role, other in (("policy", BASE), ("evaluator-0", BASE), ("policy", "evaluator-0")):
        assert distance(before[role], before[other]) > 0.01, f"{role} is {other}"
    with torch.no_grad():
        untouched = tiny_models.model(family, VOCABULARY + 4)
        assert (
            distance(before[BASE], [untouched(input_ids=_row(i), use_cache=False).logits[0].float() for i in range(5)]) < 1e-5
        )
    frozen = {n: p.detach().clone() for n, p in backbone.model.named_parameters() if ".policy." not in n}
    optimizer = torch.optim.AdamW(list(backbone.roles.parameters("policy").values()), lr=0.05)
    with backbone.acting_as("policy"):
        reply_loss(backbone).backward()
    optimizer.step()
    assert distance(logits(backbone, "policy"), before["policy"]) > 0.01
    assert distance(logits(backbone, "evaluator-0"), before["evaluator-0"]) == 0
    assert distance(logits(backbone, BASE), before[BASE]) == 0
    now = dict(backbone.model.named_parameters())
    assert [name for name, tensor in frozen.items() if not torch.equal(tensor, now[name])] == []


def _row(index: int) -> Tensor:
    return torch.tensor([[*PROMPTS[index], *REPLIES[index]]])


def logprobs_equal_a_plain_pass(family: str) -> None:
    """Log-probs of a padded batch equal the log-softmax of the model's own logits to each sequence alone, within 1e-5."""
    backbone = two_roles(family)
    expected = []
    for row, prompt, reply in zip(logits(backbone, "policy"), PROMPTS, REPLIES, strict=True):
        steps = torch.log_softmax(row, dim=-1)[len(prompt) - 1 : -1]
        expected.append(steps[torch.arange(len(reply)), torch.tensor(reply)])
    batch = pad_sequences(backbone, as_prompts(PROMPTS), REPLIES)
    with torch.no_grad(), backbone.acting_as("policy"):
        found_BR, *_ = token_logprobs(backbone, reply_hidden(backbone, batch), batch.reply_BR, batch.mask_BR)
    torch.testing.assert_close(found_BR[batch.mask_BR], torch.cat(expected), rtol=0, atol=1e-5)
    assert torch.cat(expected).std() > 0.1  # flat logits would agree by themselves


def packed_documents_do_not_see_each_other(family: str) -> None:
    """The loss of documents packed into rows equals that of each alone, within 1e-5, in one pass or, if need be, in several."""
    backbone = two_roles(family)
    documents = [Document((*p, *r), (False,) * len(p) + (True,) * len(r)) for p, r in zip(PROMPTS, REPLIES, strict=True)]
    rows, expected = pack_documents(documents, 30), []
    assert len(rows) < len(documents)
    for row, document in zip(logits(backbone, "policy"), documents, strict=True):
        steps = torch.log_softmax(row, dim=-1)
        expected += [-steps[i - 1, document.ids[i]] for i, counts in enumerate(document.trained) if counts]
    found = documents_loss(backbone, "policy", rows, 200)
    torch.testing.assert_close(found, float(torch.stack(expected).mean()), rtol=0, atol=1e-5)


def theirs(backbone: Backbone, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Transformers' greedy search on one prompt alone."""
    out = backbone.model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=LIMIT,
        pad_token_id=backbone.loaded.pad_id,
        eos_token_id=list(backbone.loaded.eos_ids) or None,
    )
    return tuple(out[0, len(prompt) :].tolist())


def greedy_equals_transformers(family: str) -> None:
    """Greedy replies to a left-padded batch are those of transformers to each prompt alone, token for token, past a window too.

    Prompts have 1 to 12 tokens, two rows share one; the end-of-sequence tokens are such that some rows leave early and some
    go on past any sliding window. The log-probs noted on the way are those that training recomputes.
    """
    backbone = two_roles(family)
    requests = [Request(Prompt(p), 0.0) for p in [*PROMPTS, PROMPTS[0]]]
    with backbone.acting_as("policy"):
        backbone.loaded.eos_ids = ()
        free = generate(backbone, requests, max_new_tokens=LIMIT, seed=0)
        backbone.loaded.eos_ids = _ends([r.ids for r in free])
        expected = [theirs(backbone, p) for p in PROMPTS]
        found = generate(backbone, requests, max_new_tokens=LIMIT, seed=0)
        again = reply_logprobs(backbone, [r.prompt for r in requests], [r.ids for r in found], batch_tokens=200)
    noted, recomputed = (torch.tensor([p for row in rows for p in row]) for rows in ([r.logprobs for r in found], again))
    torch.testing.assert_close(noted, recomputed, rtol=0, atol=1e-4)
    assert [r.ids for r in found] == [*expected, expected[0]]
    lengths = {len(r) for r in expected}
    assert len(lengths) > 2
    assert max(lengths) > 2 * WINDOW


def _ends(free: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Tokens that would end these replies at many different steps, one of them past twice the window."""

    def spread(ends: tuple[int, ...]) -> tuple[bool, int]:
        lengths = [next((i + 1 for i, token in enumerate(reply) if token in ends), LIMIT) for reply in free]
        return max(lengths) > 2 * WINDOW, len(set(lengths))

    tokens = sorted({token for reply in free for token in reply})
    return max(((a, b) for a in tokens for b in tokens if a <= b), key=spread)


def merging_gives_the_role(family: str) -> None:
    """PEFT loads the saved role onto a fresh copy of the model and merges it: that gives the role's logits within 1e-4."""
    backbone = two_roles(family)
    expected = logits(backbone, "policy")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match.*")
        save_role(backbone, "policy", Path(folder))
        merged = PeftModel.from_pretrained(tiny_models.model(family, VOCABULARY + 4), folder).merge_and_unload()
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    with torch.no_grad():
        found = [merged(input_ids=_row(i), use_cache=False).logits[0].float() for i in range(len(PROMPTS))]
    assert distance(found, expected) < 1e-4
    assert distance(expected, logits(backbone, BASE)) > 0.01


def a_saved_role_comes_back(family: str) -> None:
    """A role saved and loaded on a fresh base gives the same logits, and its head the same scores, within 1e-5."""
    backbone, fresh = two_roles(family), new(family)
    with tempfile.TemporaryDirectory() as folder:
        save_role(backbone, "evaluator-0", Path(folder))
        load_role(fresh, "evaluator-0", Path(folder))
    assert distance(logits(fresh, "evaluator-0"), logits(backbone, "evaluator-0")) < 1e-5
    scores = []
    for each in (backbone, fresh):
        with torch.no_grad(), each.acting_as("evaluator-0"):
            scores.append(final_scores(each, "evaluator-0", pad_sequences(each, as_prompts(PROMPTS), REPLIES)))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-5)
    assert scores[0].std() > 1e-3


CHECKS: dict[str, Callable[[str], None]] = {
    "targets": adapters_are_where_they_should_be,
    "roles": roles_do_not_touch_one_another,
    "log-probs": logprobs_equal_a_plain_pass,
    "packing": packed_documents_do_not_see_each_other,
    "greedy": greedy_equals_transformers,
    "merge": merging_gives_the_role,
    "files": a_saved_role_comes_back,
}
"""By the name of their column in the table."""


@cache
def passes(family: str, check: str) -> bool:
    """Runs a check, once in a process.

    Raises:
        AssertionError: the family fails it.
    """
    CHECKS[check](family)
    return True
