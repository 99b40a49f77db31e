from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

import tiny_models
from judge_engine import judges_generate_with
from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import JudgeRole, VerdictsConfig
from selfeval.errors import ModelError
from selfeval.judging.choices import choice
from selfeval.judging.judges import make_judge
from selfeval.judging.labels import Labels, verdict_tokens
from selfeval.judging.orders import combine
from selfeval.judging.pooling import Reading
from selfeval.judging.protocol import Comparison, Judge, Judgement, state_of
from selfeval.judging.templates import Templates, templates_folder
from selfeval.prompt import Prompt
from selfeval.records import PairwiseEvidence, Unreadable, VerdictState
from selfeval.rollout.requests import Request, Rollout

DUELS = [Comparison("What is 2 + 3?", "five", "four"), Comparison("And 1 + 1?", "two", "eleven")]


def templates(tokenizer: Any = None) -> Templates:
    return Templates.load(templates_folder("no such model"), tokenizer or tiny_models.words_tokenizer())


def labels(lead: str = "Verdict:", first: str = " A", second: str = " B", tie: str = " tie") -> Labels:
    return Labels(lead=lead, first=first, second=second, tie=tie)


def config(**changes: Any) -> VerdictsConfig:
    return VerdictsConfig(**changes)


# -- which tokens distinguish the labels --------------------------------------------------------------------------------


def character_tokenizer(*pieces: str) -> PreTrainedTokenizerFast:
    """Greedy longest pieces, else characters."""
    characters = sorted({*string.ascii_letters, *string.digits, *" :.[]="})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters, *pieces])}
    merges: list[tuple[str, str]] = []
    for piece in pieces:  # a piece is put together from the left
        for end in range(2, len(piece) + 1):
            vocabulary.setdefault(piece[:end], len(vocabulary))
            merges.append((piece[: end - 1], piece[end - 1]))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.decoder = token_decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def spelled(tokenizer: Any, paths: Sequence[Sequence[int]]) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(list(path)) for path in paths]


def test_labels_of_one_token_each() -> None:
    tokenizer = tiny_models.words_tokenizer()
    found = verdict_tokens(templates(tokenizer), labels())
    assert spelled(tokenizer, found.paths) == [["ĠA"], ["ĠB"], ["Ġtie"]]
    assert spelled(tokenizer, [found.lead]) == [["Verdict", ":"]]
    assert found.forks == ((),)


def test_labels_that_begin_alike_are_read_where_they_differ() -> None:
    tokenizer = character_tokenizer()
    found = verdict_tokens(templates(tokenizer), labels(lead="", first="[A]", second="[B]", tie="[=]"))
    assert spelled(tokenizer, [found.lead, *found.paths]) == [["["], ["A"], ["B"], ["="]]


def test_labels_that_part_at_different_tokens() -> None:
    # As Llama's and Qwen's tokenizers do it: a digit never goes with the space before it, a word does.
    tokenizer = character_tokenizer(" neither")
    found = verdict_tokens(templates(tokenizer), labels(lead="r:", first=" 1", second=" 2", tie=" neither"))
    assert spelled(tokenizer, [found.lead, *found.paths]) == [["r", ":"], [" ", "1"], [" ", "2"], [" neither"]]
    assert spelled(tokenizer, found.forks) == [[], [" "]]
    assert spelled(tokenizer, [found.all])[0] == sorted([" ", "1", "2", " neither"], key=lambda t: tokenizer.get_vocab()[t])


def test_every_package_label_can_be_told_apart_by_several_tokenizers() -> None:
    for tokenizer in (tiny_models.words_tokenizer(), character_tokenizer(), character_tokenizer(" neither", " tie", " A")):
        own = templates(tokenizer)
        for kind in ("judge", "referee"):
            paths = verdict_tokens(own, own.labels(kind)).paths
            assert len(set(paths)) == 3


@pytest.mark.parametrize("same", [(" A", " A", " tie"), (" A", " At", " B")])
def test_labels_that_cannot_be_told_apart_are_refused(same: tuple[str, str, str]) -> None:
    with pytest.raises(ModelError, match="cannot distinguish the verdict labels"):
        verdict_tokens(templates(character_tokenizer()), labels("", *same))


# -- reading verdicts ---------------------------------------------------------------------------------------------------


@dataclass
class Script:
    """Replace the engine by one that writes these words and returns these label probabilities after a text."""

    tokenizer: Any
    words: Callable[[str], str]
    chances: Callable[[str], dict[str, float]]

    def __call__(self, backbone: Any, requests: Sequence[Request], **options: Any) -> list[Rollout]:
        self.asked = getattr(self, "asked", 0) + len(requests)
        assert all(r.temperature == 0.0 for r in requests)
        return [self._rollout(r, options["max_new_tokens"], options["watch"]) for r in requests]

    def _rollout(self, request: Request, limit: int, watch: Sequence[int]) -> Rollout:
        prompt = self.tokenizer.decode(list(request.prompt.ids))
        said = [*self.tokenizer.encode(self.words(prompt), add_special_tokens=False), tiny_models.EOS]
        ids = said if limit > 1 else [2]
        watched = [self._chances(prompt + self.tokenizer.decode(ids[:i]), watch) for i in range(len(ids))]
        return Rollout(tuple(ids), (0.0,) * len(ids), True, tuple(watched))

    def _chances(self, text: str, watch: Sequence[int]) -> tuple[float, ...]:
        chances = {self.tokenizer.convert_tokens_to_ids(t): p for t, p in self.chances(text).items()}
        return tuple(math.log(chances.get(token, 1e-12)) for token in watch)


def judge_of(backbone: Backbone, own: Templates, settings: VerdictsConfig | None = None, role: JudgeRole = "judge") -> Judge:
    return make_judge(backbone, own, settings or config(), batch_size=8, role=role)


def evidence(judgement: Judgement) -> PairwiseEvidence:
    assert judgement.evidence is not None
    return judgement.evidence


def judged(
    monkeypatch: pytest.MonkeyPatch,
    words: Callable[[str], str],
    chances: Callable[[str], dict[str, float]],
    settings: VerdictsConfig | None = None,
    *,
    role: JudgeRole = "judge",
    own: Templates | None = None,
    duels: Sequence[Comparison] = DUELS[:1],
) -> tuple[list[Judgement], Script]:
    own = own or templates()
    script = Script(own.tokenizer, words, chances)
    judges_generate_with(monkeypatch, script)
    backbone = tiny_models.backbone("llama", 400, max_position_embeddings=4096)
    return judge_of(backbone, own, settings, role).judge(duels), script


def test_a_temperature_samples_the_chain_of_thought_by_the_seed() -> None:
    backbone = tiny_models.backbone("llama", 400, max_position_embeddings=4096)

    def outputs(temperature: float, seed: int) -> tuple[str, ...]:
        settings = config(max_new_tokens=8)
        judge = make_judge(backbone, templates(), settings, batch_size=8, seed=seed, temperature=temperature)
        with backbone.acting_as(BASE):
            return evidence(judge.judge(DUELS[:1])[0]).raw_output

    assert outputs(0.0, 0) == outputs(0.0, 1)
    assert len({outputs(1.0, 0), outputs(1.0, 1), outputs(0.0, 0)}) == 3
    assert outputs(1.0, 0) == outputs(1.0, 0)


def asks_in_order(prompt: str) -> bool:
    return prompt.index("five") < prompt.index("four")


def test_the_verdict_is_read_where_the_judge_gives_it_and_orders_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def words(prompt: str) -> str:
        return "2 + 3 is five. A and B differ. Verdict: A" if asks_in_order(prompt) else "Verdict: B"

    def chances(text: str) -> dict[str, float]:
        if not text.endswith("Verdict:"):  # "A and B" is not a verdict
            return {"ĠA": 0.01, "ĠB": 0.98, "Ġtie": 0.01}
        return {"ĠA": 0.7, "ĠB": 0.1, "Ġtie": 0.1} if asks_in_order(text) else {"ĠA": 0.05, "ĠB": 0.6, "Ġtie": 0.15}

    (found,), script = judged(monkeypatch, words, chances)
    # In order: (0.7 + 0.05) / 0.9. Swapped, the judge's second is our first: (0.6 + 0.075) / 0.8.
    assert evidence(found).in_order == pytest.approx(0.75 / 0.9)
    assert evidence(found).swapped == pytest.approx(0.675 / 0.8)
    assert found.probability == pytest.approx((0.75 / 0.9 + 0.675 / 0.8) / 2)
    assert found.tie == pytest.approx((0.1 / 0.9 + 0.15 / 0.8) / 2)
    assert evidence(found).raw_output == ("2 + 3 is five. A and B differ. Verdict: A<eos>", "Verdict: B<eos>")
    assert script.asked == 2  # no second prompt was needed


def test_a_judge_that_forgot_its_verdict_is_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def chances(text: str) -> dict[str, float]:
        assert "<eos>" not in text  # the end token that it wrote is removed
        return {"ĠA": 0.8, "ĠB": 0.1, "Ġtie": 0.1} if text.endswith("I cannot say.Verdict:") else {}

    (found,), script = judged(monkeypatch, lambda prompt: "I cannot say.", lambda text: chances(text.removesuffix("<eos>")))
    assert evidence(found).in_order == pytest.approx(0.85)
    assert evidence(found).swapped == pytest.approx(0.15)
    assert found.probability == pytest.approx(0.5)  # always answers A: pure position bias
    assert script.asked == 4


def test_without_reasoning_the_verdict_is_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def chances(text: str) -> dict[str, float]:
        assert text.endswith('"Verdict: tie".Verdict:')
        return {"ĠA": 0.2, "ĠB": 0.6, "Ġtie": 0.2}

    (found,), script = judged(monkeypatch, lambda prompt: "never said", chances, config(reasoning=False))
    assert (evidence(found).in_order, evidence(found).swapped) == (pytest.approx(0.3), pytest.approx(0.7))
    assert evidence(found).raw_output == ("", "")
    assert script.asked == 2


def test_probabilities_multiply_along_labels_of_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    own = templates(character_tokenizer(" neither"))

    def chances(text: str) -> dict[str, float]:
        return {"1": 0.75, "2": 0.25} if text.endswith("response: ") else {" ": 0.4, " neither": 0.2, "1": 1e-9, "2": 1e-9}

    monkeypatch.setattr(type(own), "prompt", lambda self, kind, **v: Prompt((2, 3) if v["first"] == "five" else (3, 2)))
    monkeypatch.setattr(type(own), "labels", lambda self, kind: labels("response:", " 1", " 2", " neither"))
    (found,), script = judged(monkeypatch, lambda prompt: "", chances, config(reasoning=False), role="referee", own=own)
    # P(1) = 0.4 * 0.75, P(2) = 0.4 * 0.25, P(neither) = 0.2; first better = (0.3 + 0.1) / 0.6.
    assert evidence(found).in_order == pytest.approx(0.4 / 0.6)
    assert evidence(found).swapped == pytest.approx(1 - 0.4 / 0.6)
    assert found.tie == pytest.approx(0.2 / 0.6)
    assert script.asked == 4  # both orders, both forks


def test_a_label_of_several_tokens_that_was_written_is_followed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    own = templates(character_tokenizer(" neither"))
    monkeypatch.setattr(type(own), "prompt", lambda self, kind, **v: Prompt((2, 3) if v["first"] == "five" else (3, 2)))
    monkeypatch.setattr(type(own), "labels", lambda self, kind: labels("response:", " 1", " 2", " neither"))

    def chances(text: str) -> dict[str, float]:
        return {"1": 0.1, "2": 0.8} if text.endswith("there. response: ") else {" ": 0.5, " neither": 0.5}

    (found,), script = judged(
        monkeypatch, lambda prompt: "there. response: 2 then 1", chances, config(), role="referee", own=own
    )
    assert evidence(found).in_order == pytest.approx((0.05 + 0.25) / 0.95)
    assert script.asked == 4


def test_no_verdict_and_no_lead_to_ask_with_is_unparsable(monkeypatch: pytest.MonkeyPatch) -> None:
    own = templates()
    monkeypatch.setattr(type(own), "labels", lambda self, kind: labels("", " A", " B", " tie"))
    sure = {"ĠA": 0.9, "ĠB": 0.05, "Ġtie": 0.05}
    found, script = judged(monkeypatch, lambda prompt: "no idea", lambda text: sure, own=own, duels=DUELS)
    assert [state_of(j, config()) for j in found] == [VerdictState.UNPARSABLE] * 2
    assert [j.probability for j in found] == [None, None]
    assert script.asked == 4
    (found_at_once,), _ = judged(monkeypatch, lambda prompt: "", lambda text: sure, config(reasoning=False), own=own)
    assert evidence(found_at_once).in_order == pytest.approx(0.925)  # but without reasoning, it is read at once


def test_a_verdict_of_little_mass_is_unparsable(monkeypatch: pytest.MonkeyPatch) -> None:
    faint = {"ĠA": 0.3, "ĠB": 0.05, "Ġtie": 0.05}
    (found,), _ = judged(monkeypatch, lambda prompt: "Verdict: A", lambda text: faint, config(label_mass=0.5))
    assert (found.probability, evidence(found).in_order, found.tie) == (None, None, None)
    assert state_of(found, config()) == VerdictState.UNPARSABLE
    (found,), _ = judged(monkeypatch, lambda prompt: "Verdict: A", lambda text: faint, config(label_mass=0.39))
    assert evidence(found).in_order == pytest.approx(0.325 / 0.4)


def test_one_unparsable_order_makes_the_verdict_unparsable(monkeypatch: pytest.MonkeyPatch) -> None:
    def chances(text: str) -> dict[str, float]:
        return {"ĠA": 0.9, "ĠB": 0.05, "Ġtie": 0.05} if asks_in_order(text) else {"ĠA": 0.01}

    (found,), _ = judged(monkeypatch, lambda prompt: "Verdict: A", chances)
    assert (found.probability, evidence(found).swapped) == (None, None)
    assert evidence(found).in_order == pytest.approx(0.925)


def test_what_the_judge_reads_from_a_real_model_is_what_a_plain_pass_says() -> None:
    backbone: Backbone = tiny_models.backbone("llama", 400)
    own = templates()
    with backbone.acting_as(BASE):
        found = judge_of(backbone, own, config(reasoning=False, label_mass=0.0)).judge(DUELS)
        for judgement, duel in zip(found, DUELS, strict=True):
            better = []
            for first, second in ((duel.first, duel.second), (duel.second, duel.first)):
                prompt = own.prompt("judge", question=duel.question, first=first, second=second).ids
                lead = own.tokenizer.encode("Verdict:", add_special_tokens=False)
                chances = tiny_models.full_logprobs(backbone.model, (*prompt, *lead))[-1].exp()
                a, b, tie = (chances[own.tokenizer.convert_tokens_to_ids(t)].item() for t in ("ĠA", "ĠB", "Ġtie"))
                better.append((a + tie / 2) / (a + b + tie))
            assert (evidence(judgement).in_order, evidence(judgement).swapped) == (
                pytest.approx(better[0], abs=1e-4),
                pytest.approx(1 - better[1], abs=1e-4),
            )
            assert judgement.probability == pytest.approx((better[0] + 1 - better[1]) / 2, abs=1e-4)
            assert abs(better[0] - 0.5) > 1e-3


# -- why a verdict cannot be read ---------------------------------------------------------------------------------------


def unfinished(ids: Sequence[int]) -> Callable[..., list[Rollout]]:
    """An engine that writes these tokens, up to the limit, and no end."""

    def engine(backbone: Any, requests: Sequence[Request], **options: Any) -> list[Rollout]:
        said, width = tuple(ids[: options["max_new_tokens"]]), len(options["watch"])
        return [Rollout(said, (0.0,) * len(said), False, ((-9.0,) * width,) * len(said)) for _ in requests]

    return engine


@pytest.mark.parametrize(
    ("ids", "limit", "cause"),
    [(range(10, 34), 24, Unreadable.CUT), ([10, 11, 12] * 8, 24, Unreadable.LOOP), (range(10, 34), 25, Unreadable.NO_ROOM)],
)
def test_an_output_that_was_cut_off_says_why(
    ids: Sequence[int], limit: int, cause: Unreadable, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges_generate_with(monkeypatch, unfinished(ids))
    backbone = tiny_models.backbone("llama", 400, max_position_embeddings=4096)
    (found,) = judge_of(backbone, templates(), config(max_new_tokens=limit)).judge(DUELS[:1])
    assert evidence(found).causes == (cause, cause)
    assert evidence(found).label_masses == (None, None)


def test_a_verdict_of_little_mass_or_without_a_lead_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def chances(text: str) -> dict[str, float]:
        return {"ĠA": 0.9, "ĠB": 0.05, "Ġtie": 0.05} if asks_in_order(text) else {"ĠA": 0.25}

    (found,), _ = judged(monkeypatch, lambda prompt: "Verdict: A", chances)
    assert evidence(found).causes == (None, Unreadable.LABEL_MASS)
    assert evidence(found).label_masses == (pytest.approx(1.0), pytest.approx(0.25))
    own = templates()
    monkeypatch.setattr(type(own), "labels", lambda self, kind: labels("", " A", " B", " tie"))
    (found,), _ = judged(monkeypatch, lambda prompt: "no idea", chances, own=own)
    assert evidence(found).causes == (Unreadable.NO_LEAD, Unreadable.NO_LEAD)


def test_a_real_model_without_room_for_the_prompt_or_the_verdict_says_so() -> None:
    own = templates()
    prompt = own.prompt("judge", question=DUELS[0].question, first=DUELS[0].first, second=DUELS[0].second)
    for room, skipped in ((2, True), (40, False)):
        backbone = tiny_models.backbone("llama", 400, max_position_embeddings=len(prompt.ids) + room)
        with backbone.acting_as(BASE):
            (found,) = judge_of(backbone, own, config(max_new_tokens=256)).judge(DUELS[:1])
        # A random model never ends its output: in 40 tokens it runs into the end of the context, possibly in a loop.
        expected = {Unreadable.NO_ROOM} if skipped else {Unreadable.NO_ROOM, Unreadable.LOOP}
        assert set(evidence(found).causes) <= expected
        assert evidence(found).raw_output[0].startswith("(skipped") is skipped


def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every output of a `Script` end at the token limit."""
    whole = Script._rollout

    def unfinished(self: Script, request: Request, limit: int, watch: Sequence[int]) -> Rollout:
        found = whole(self, request, limit, watch)
        return found if limit == 1 else Rollout(found.ids[:-1], found.logprobs[:-1], False, found.watched[:-1])

    monkeypatch.setattr(Script, "_rollout", unfinished)


@pytest.mark.parametrize("words", ["right.\n", "<think>Verdict: A, or </think>right.\n", "<think>Verdict: A"])
def test_a_verdict_can_be_forced_where_the_judge_was_cut_off(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    cut_off(monkeypatch)
    (dropped,), _ = judged(monkeypatch, lambda prompt: words, decided)
    assert state_of(dropped, config()) == VerdictState.UNPARSABLE
    (found,), script = judged(monkeypatch, lambda prompt: words, decided, config(truncated="force"))
    assert evidence(found).causes == (Unreadable.TRUNCATED, Unreadable.TRUNCATED)
    assert (evidence(found).in_order, evidence(found).swapped) == (pytest.approx(0.075), pytest.approx(0.925))
    assert script.asked == 4


def test_a_forced_verdict_of_little_mass_is_unparsable_and_a_stated_one_is_not_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch)
    (found,), _ = judged(monkeypatch, lambda prompt: "x", lambda text: {"ĠA": 0.1}, config(truncated="force"))
    assert evidence(found).causes == (Unreadable.LABEL_MASS, Unreadable.LABEL_MASS)
    (found,), _ = judged(monkeypatch, lambda prompt: "B is right.\nVerdict: B\n", decided, config(truncated="force"))
    assert evidence(found).causes == (None, None)


def test_a_refusal_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    sure = {"ĠA": 0.9, "ĠB": 0.05, "Ġtie": 0.05}
    (found,), script = judged(monkeypatch, lambda prompt: "I'm sorry, but I cannot compare them.", lambda text: sure)
    assert (found.probability, evidence(found).causes) == (None, (Unreadable.REFUSED, Unreadable.REFUSED))
    assert script.asked == 2
    (found,), _ = judged(monkeypatch, lambda prompt: "I cannot judge well. Verdict: A", lambda text: sure)
    assert evidence(found).causes == (None, None)


# -- putting readings together ------------------------------------------------------------------------------------------


def test_combine_by_hand() -> None:
    found = combine(Reading((0.6, 0.2, 0.2), "x"), Reading((0.1, 0.9, 0.0), "y"))
    ties = (pytest.approx(0.2), 0.0)
    both = PairwiseEvidence(pytest.approx(0.7), pytest.approx(0.9), ties, ("x", "y"))
    assert found == Judgement(pytest.approx(0.8), pytest.approx(0.1), both)
    assert combine(Reading(None, "x"), Reading((0.1, 0.9, 0.0), "y")) == Judgement(
        None, None, PairwiseEvidence(None, pytest.approx(0.9), (None, 0.0), ("x", "y"))
    )


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ((0.5, 0.3, 0.2), "first"),
        ((0.3, 0.5, 0.2), "second"),
        ((0.3, 0.2, 0.5), "neither"),  # although the first is ahead of the second
        ((0.375, 0.25, 0.375), "neither"),  # as likely as the first
        ((0.25, 0.25, 0.125), "neither"),  # of the two, none is ahead
        ((0.5, 0.125, 0.0), "first"),
    ],
)
def test_the_choice_of_an_order_is_its_likeliest_label(labels: tuple[float, float, float], expected: str) -> None:
    found = evidence(combine(Reading(labels, ""), Reading(labels, "")))
    assert found.in_order is not None
    assert found.ties[0] is not None
    assert choice(found.in_order, found.ties[0]) == expected


@pytest.mark.parametrize(
    ("probability", "tie", "state"),
    [
        (0.80, 0.10, VerdictState.KEPT),
        (0.20, 0.10, VerdictState.KEPT),
        (0.79, 0.10, VerdictState.UNSURE),
        (0.21, 0.10, VerdictState.UNSURE),
        (0.95, 0.51, VerdictState.TIE),
        (0.95, 0.50, VerdictState.KEPT),
        (0.95, None, VerdictState.KEPT),  # the judge estimates no ties
        (None, None, VerdictState.UNPARSABLE),
    ],
)
def test_states(probability: float | None, tie: float | None, state: VerdictState) -> None:
    assert state_of(Judgement(probability, tie), config(keep=0.8, tie=0.5)) == state


def test_a_judge_that_prefers_neither_reply_is_unsure_at_any_threshold() -> None:
    assert state_of(Judgement(0.5), config(keep=0.5)) == VerdictState.UNSURE
    assert state_of(Judgement(0.51), config(keep=0.5)) == VerdictState.KEPT


def test_a_prompt_that_does_not_fit_the_context_is_unparsable_and_says_so() -> None:
    backbone = tiny_models.backbone("llama", 400, max_position_embeddings=64)
    with backbone.acting_as(BASE):
        found = judge_of(backbone, templates()).judge(DUELS)
    assert all(j.probability is None and "does not fit" in evidence(j).raw_output[0] for j in found)


# -- judges that think, quote, or are cut off ---------------------------------------------------------------------------


def decided(text: str) -> dict[str, float]:
    """Sure of A in a draft or a quotation, and of B behind the words that decide."""
    decides = text.endswith(("right.\nVerdict:", "right.\n**Verdict:**", "</think>Verdict:"))
    return {"ĠA": 0.05, "ĠB": 0.9, "Ġtie": 0.05} if decides else {"ĠA": 0.9, "ĠB": 0.05, "Ġtie": 0.05}


@pytest.mark.parametrize(
    "words",
    [
        "<think>\nVerdict: A? No.\n</think>\nB is right.\nVerdict: B",
        'I must say "Verdict: A", "Verdict: B" or "Verdict: tie". B is right.\nVerdict: B',
        "Verdict: A? No, B is right.\n**Verdict:** B",
        'B is right.\nVerdict: B\nI was asked for "Verdict: A" or "Verdict: tie".',
        "<think>Verdict: A",  # ended inside its thinking: the block is closed and the verdict asked for
    ],
)
def test_probabilities_are_those_at_the_deciding_verdict(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    (found,), _ = judged(monkeypatch, lambda prompt: words, decided)
    assert evidence(found).in_order == pytest.approx(0.075)
    assert evidence(found).swapped == pytest.approx(0.925)


def test_a_verdict_spelled_as_no_label_is_read_behind_a_lead_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def chances(text: str) -> dict[str, float]:
        return {"ĠA": 0.05, "ĠB": 0.9, "Ġtie": 0.05} if text.endswith(("right.Verdict:", "right. Verdict:")) else {}

    (found,), script = judged(monkeypatch, lambda prompt: "B is right. Verdict:B. Bye.", chances)
    assert evidence(found).in_order == pytest.approx(0.075)
    assert script.asked == 4


def test_a_judge_that_is_cut_off_has_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch)
    for words in ("<think>Verdict: B\n", "Verdict: B seems", "<think>x</think>Verdict: B"):
        (found,), _ = judged(monkeypatch, lambda prompt, words=words: words, decided)  # type: ignore[misc]
        assert state_of(found, config()) == VerdictState.UNPARSABLE, words
    (found,), _ = judged(monkeypatch, lambda prompt: "<think>Verdict: A\n</think>B is right.\nVerdict: B\n", decided)
    assert evidence(found).in_order == pytest.approx(0.075)
    (found,), _ = judged(monkeypatch, lambda prompt: "B is right.\nVerdict: B\nVerdict: A\n", decided)
    assert evidence(found).in_order == pytest.approx(0.075), "a base model that writes on is read at its first verdict"


def test_thinking_that_the_chat_template_opens_is_closed_before_the_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    own = templates()
    opened = tuple(own.tokenizer.encode("assistant\n<think>\n", add_special_tokens=False))
    monkeypatch.setattr(type(own), "prompt", lambda self, kind, **v: Prompt(opened))
    (found,), _ = judged(monkeypatch, lambda prompt: "", decided, config(reasoning=False), own=own)
    assert evidence(found).in_order == pytest.approx(0.075)


# -- replies that a token limit cut off ---------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["judge", "referee"])
def test_the_prompt_says_which_reply_was_cut_off(monkeypatch: pytest.MonkeyPatch, role: JudgeRole) -> None:
    own, backbone = templates(), tiny_models.backbone("llama", 384)
    names = {"judge": ("Reply A", "Reply B"), "referee": ("Response 1", "Response 2")}[role]
    read: list[str] = []

    def asked(backbone: Any, requests: Sequence[Request], **options: Any) -> list[Rollout]:
        read.extend(own.tokenizer.decode(list(r.prompt.ids)) for r in requests)
        return [Rollout((tiny_models.EOS,), (0.0,), True, ((0.0,) * len(options["watch"]),)) for _ in requests]

    judges_generate_with(monkeypatch, asked)
    judge = judge_of(backbone, own, role=role)
    with backbone.acting_as(BASE):
        judge.judge([Comparison("What is 2 + 3?", "It is five.", "It is", second_cut=True)])
    both, swapped = read[:2]
    assert [f"{name} was cut off" in both for name in names] == [False, True]
    assert [f"{name} was cut off" in swapped for name in names] == [True, False]
    read.clear()
    with backbone.acting_as(BASE):
        judge.judge([Comparison("What is 2 + 3?", "It is five.", "It is")])
    assert not any("cut off" in text for text in read)
