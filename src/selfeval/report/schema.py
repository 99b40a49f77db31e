"""The schema of report.json: one frozen model per part, one docstring per field.

The evaluation and report stages fill these models. The page, the table of the terminal, the model card, the benchmarks and
docs/concepts/evidence.md read them. To add a figure, add a field; a test fails until the page shows the field or the field is
marked `Hidden` with a reason. This module must not import torch.

All keys are required unless their docstrings state when they are absent: a report without a required key was written by another
version and is rejected by name (see `reading.py`). A figure without cases has null as its value; a quantity that was not
measured is null as a whole. Neither is ever 0.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, model_serializer, model_validator

from selfeval.quality.comparisons import Comparison
from selfeval.quality.statistics import Figure

__all__ = [
    "SCHEMA",
    "Alarm",
    "AttackKind",
    "AttackName",
    "Attacks",
    "Baselines",
    "Bin",
    "Cluster",
    "CurveFit",
    "Data",
    "Disagreement",
    "Diversity",
    "DiversityChange",
    "DomainMap",
    "Drop",
    "Dropped",
    "Evaluation",
    "EvaluationMemory",
    "Evaluator",
    "EvaluatorComparisons",
    "EvaluatorConfidence",
    "FirstPairs",
    "Fits",
    "Hidden",
    "HumanLabels",
    "HumanThreshold",
    "JudgeCalibration",
    "JudgeMember",
    "JudgeProbe",
    "JudgeSignals",
    "Labels",
    "Memory",
    "MemoryEvent",
    "Model",
    "OverOptimisation",
    "Part",
    "Policy",
    "PolicyComparisons",
    "ProbeFinding",
    "ReferenceMetric",
    "ReferenceScores",
    "Replies",
    "RepliesPerQuestion",
    "Report",
    "Round",
    "RoundEvaluator",
    "RoundPolicy",
    "Sample",
    "SecondsPerVerdict",
    "Server",
    "Steps",
    "Time",
    "TokensOf",
    "TokensPerVerdict",
    "UnitTests",
    "UnreadableOrders",
    "Verdicts",
]

SCHEMA: Literal[1] = 1
"""The schema version that is written and read."""


class Hidden(str):
    """Metadata that marks a field as shown neither on the page nor in the terminal's table, with the reason."""


# Numbers are rounded on serialisation, which keeps the file readable and makes equal runs equal byte for byte.
_Figure = Annotated[Figure, PlainSerializer(Figure.as_json)]
_Comparison = Annotated[Comparison, PlainSerializer(Comparison.as_json)]
_Rounded = Annotated[float, PlainSerializer(lambda value: round(value, 6))]
_RoundedOrNone = Annotated[float | None, PlainSerializer(lambda value: None if value is None else round(value, 6))]
_Pair = tuple[_Rounded, _Rounded]
_Triple = tuple[_Rounded, _Rounded, _Rounded]

Labels = Literal["gold", "judge"]
AttackName = Literal[
    "empty", "constant", "repeated", "echo", "long", "other_question", "injection", "praise", "altered_number", "plain_right"
]


def _absent_if_none() -> Any:
    """Return the field settings of a key that is omitted from the file if it is None."""
    return Field(default=None, exclude_if=lambda value: value is None)


class Part(BaseModel):
    """Base class of all parts: frozen, no unknown keys, finite numbers, field docstrings as descriptions.

    Validation is strict, so parse JSON with `model_validate_json`, which accepts arrays as tuples and objects as figures.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    def as_json(self) -> dict[str, Any]:
        """Return the part in the form of report.json."""
        return self.model_dump(mode="json", by_alias=True)


# -- the evaluator ------------------------------------------------------------------------------------------------------


class FirstPairs(Part):
    """The evaluator on the test pairs of round 1, the common set on which the evaluators of all rounds are compared."""

    accuracy_gold: _Figure | None
    """`accuracy_gold` on those pairs. `null` without gold."""
    accuracy_judge: _Figure
    """`accuracy_judge` on those pairs."""
    gain: _Figure | None
    """Accuracy of this evaluator minus that of the previous round on these pairs, by gold, or by the judge without gold.
    Newcombe. `null` in round 1."""
    comparison: _Comparison | None
    """`gain` as a [comparison](#comparisons). `null` in round 1."""


class Baselines(Part):
    """Accuracy of trivial baselines and of the judge on the evaluator's test pairs. Adjusted Student."""

    longer_wins: _Figure
    """Prefers the reply with more characters."""
    first_wins: _Figure
    """Prefers the first reply; the order is random, so this is chance level."""
    mean_logprob: _Figure
    """Prefers the reply with the higher mean log-prob per token under the model that sampled it; an unfinished reply without
    text loses."""
    ngram: _Figure | None = _absent_if_none()
    """Prefers the reply with the lower perplexity per word under an [n-gram model](text-metrics.md#n-gram-model) of the
    training questions and the replies to them. Absent if the training text has no word."""
    judge: _Figure | None = _absent_if_none()
    """The judge, forced to choose by its probability; an unparsable verdict or one half counts half. Absent if the pairs are
    from a file, because no judge was asked."""


class EvaluatorComparisons(Part):
    """The evaluator minus each baseline and minus chance level, on the same pairs; see [comparisons](#comparisons)."""

    longer_wins: _Comparison
    """Minus the baseline that prefers the longer reply."""
    first_wins: _Comparison
    """Minus the baseline that prefers the first reply."""
    mean_logprob: _Comparison
    """Minus the baseline that prefers the higher mean log-prob."""
    ngram: _Comparison | None = _absent_if_none()
    """Minus the baseline of the n-gram model. Absent if it was not measured."""
    judge: _Comparison | None
    """Minus the judge. `null` on the judge's own labels, for which the judge is right by construction."""
    chance: _Comparison
    """Minus one half."""


class TokensOf(Part):
    """Tokens of one verdict."""

    tokens_read: _Figure
    """Tokens read. Ratio of means over batches."""
    tokens_written: _Figure
    """Tokens written. Ratio of means over batches."""


class TokensPerVerdict(Part):
    """Tokens per verdict, on random test pairs. Unlike times, they are reproducible."""

    pairs: int
    """Number of pairs whose tokens were counted."""
    evaluator: TokensOf
    """Scoring both replies by all members, including the reference answer if the grade template has one."""
    scoring: TokensOf
    """The same if the reference answer of the question is already known, as for all further replies to it."""
    judge: TokensOf
    """A comparison, for the pairwise judge in both orders, with all tokens that the judge reads and writes."""


class Disagreement(Part):
    """Whether the disagreement of an ensemble of evaluators predicts its errors."""

    error_correlation: _Figure
    """Rank correlation of the standard deviation of the members' margins with errors. Fisher."""


class Bin(Part):
    """One bin of the calibration curve."""

    confidence: _Rounded
    """Mean confidence in the bin."""
    accuracy: _Rounded
    """Accuracy of the evaluator in the bin."""
    n: int
    """Number of pairs."""


class AttackKind(Part):
    """Attack replies of one kind; see [attacks](#attacks)."""

    kind: AttackName
    """Name of the kind."""
    below: _Figure
    """Share of the attacks that the evaluator scores strictly below the better reply. Wilson."""
    trained: Literal[True] | None = _absent_if_none()
    """Whether the evaluator was trained on texts of this kind, or of a similar one. Absent if not."""


class Attacks(Part):
    """Attack replies to test questions, which an evaluator must score below an ordinary reply; see [attacks](#attacks)."""

    against: Literal["right", "ordinary"]
    """The replies that they are compared with: right ones by gold, or ordinary ones of the model without gold."""
    total: _Figure
    """Share of all attacks that are scored strictly below; n is the number of questions. Adjusted Student, by question."""
    held_out: _Figure | None = _absent_if_none()
    """The same, of the kinds that training has not seen. Absent if it has seen none, or all."""
    kinds: tuple[AttackKind, ...]
    """The share by kind."""


class EvaluatorConfidence(Part):
    """Confidence of margin and disagreement; see [confidence](../algorithms/evaluator.md#confidence)."""

    choice: float
    """Weight of a preference as such, in log-odds."""
    margin: float
    """Weight of the absolute score difference."""
    disagreement: float
    """Weight of its standard deviation over the members."""
    scale: float
    """Factor of the sum, the inverse of its temperature; 1 with an isotonic regression."""
    steps: tuple[_Pair, ...]
    """Points (sum, confidence) of the isotonic regression; empty if there is a temperature."""
    ece_of_margin: _Figure
    """`ece` on the same pairs if the confidence were sigmoid(absolute score difference / temperature)."""
    aurc: _RoundedOrNone
    """Area under the risk-coverage curve. `null` without pairs."""
    aurc_of_margin: _RoundedOrNone
    """The same with the confidence of the score difference alone."""


class Evaluator(Part):
    """Measured on the judged test pairs: two samples per test question, at `evaluation.temperature`."""

    accuracy_gold: _Figure | None
    """Share of pairs on which the evaluator scores the right reply strictly higher. The pairs are those with exactly one right
    reply by gold, for any verdict of the judge (kept, tie, unsure or unparsable). Wilson. In a run with no other gold than
    labels of people, `labels.evaluator`. `null` without gold."""
    accuracy_judge: _Figure
    """The same on the kept pairs, with the judge's choice as the right reply. Wilson."""
    first_pairs: Annotated[FirstPairs, Hidden("round 1's pairs are its own; later rounds are in the section of the rounds")]
    """The evaluator on the test pairs of round 1; see [rounds](#rounds)."""
    pairs_trained: int
    """Number of pairs it was trained on."""
    baselines: Baselines
    """Accuracy of trivial baselines and of the judge on the same pairs."""
    baselines_on: Labels
    """Source of the labels for baselines, calibration and risk. Gold if gold labels at least one pair."""
    comparisons: EvaluatorComparisons
    """The evaluator minus each baseline."""
    ece: _Figure
    """Expected calibration error with bias correction; see [calibration](#calibration). The confidence is
    sigmoid(absolute score difference / temperature), so it is at least 0.5; or that of `confidence`."""
    brier: _Figure
    """Mean squared error of that confidence. Adjusted Student."""
    temperature: _Rounded
    """Temperature of the confidence, fitted on held-out training pairs to the judge's probabilities, with a prior on log T; 1
    if too few pairs were held out (see [limits](#limits))."""
    temperature_pairs: int
    """Number of pairs used to fit the temperature; 0 means that the confidence is not calibrated, which `selfeval score`
    reports."""
    members: int
    """Number of evaluators whose scores are averaged."""
    confidence: EvaluatorConfidence | None = _absent_if_none()
    """The confidence of `ece`, `brier`, `risk_coverage` and `calibration`, if it is one of margin and disagreement. Absent with
    `evaluator.confidence = "slope"`, and with too few held-out pairs."""
    disagreement: Disagreement | None
    """Correlation of the members' disagreement with errors. `null` for one member."""
    risk_coverage: tuple[_Pair, ...]
    """[coverage, risk] pairs: the error rate among the most confident share of the pairs, at twenty coverages, on the pairs of
    the accuracy with the same labels."""
    calibration: tuple[Bin, ...]
    """Ten bins of equal mass."""
    cost: TokensPerVerdict | None
    """Tokens per verdict; see [cost](#cost). `null` without a test pair."""
    attacks: Attacks | None = _absent_if_none()
    """Attack replies to test questions. Absent with `evaluation.attacks = 0`, and if no test question has a reply that could be
    attacked."""


# -- the verdicts -------------------------------------------------------------------------------------------------------


class UnreadableOrders(Part):
    """Number of orders without a readable verdict, by cause; an unparsable pair has one or two such orders. With
    `verdicts.judge = "agreement"`, the number of votes without an answer."""

    cut: int
    """Cut off at `verdicts.max_new_tokens` before a verdict."""
    loop: int
    """Cut off in the same way, and the end of the output repeats a block of tokens at least three times."""
    label_mass: int
    """The verdict labels together had less probability than `verdicts.label_mass`."""
    no_room: int
    """The model's context ended before a verdict, or is too short for the prompt."""
    no_lead: int
    """The output ended without a verdict, and the labels have no lead that could be appended."""
    no_answer: int = 0
    """A vote ended without an answer in the form of the settings of the judge `agreement`. 0 for other judges."""
    truncated: int = 0
    """Cut off, and read after an appended lead: these orders have a verdict. 0 unless `verdicts.truncated = "force"`."""
    refused: int = 0
    """The judge refused to judge."""


class ProbeFinding(Part):
    """A problem of the judge that was seen in the probe."""

    name: Annotated[str, Hidden("the observation says the same")]
    """`cut`, `loop`, `label_mass`, `no_room`, `no_lead`, `no_answer`, `truncated`, `refused`, `position_bias`, `ties`, `split`
    or `unsure`."""
    observation: str
    """How often it was seen, with the setting involved."""
    remedy: str
    """The setting that would help, unless it is set already."""


class JudgeProbe(Part):
    """The judge on the first 16 pairs, which are judged before all others; see
    [the probe](../algorithms/judging.md#the-probe)."""

    pairs: int
    """Number of probed pairs."""
    kept: Annotated[int, Hidden("the table of states counts all pairs, these included")]
    """Kept pairs. The four counts add up to `pairs`."""
    tie: Annotated[int, Hidden("as kept")]
    """Ties."""
    unsure: Annotated[int, Hidden("as kept")]
    """Unsure pairs."""
    unparsable: Annotated[int, Hidden("as kept")]
    """Unparsable pairs."""
    unreadable_orders: Annotated[UnreadableOrders, Hidden("the findings name the frequent causes")]
    """Orders without a readable verdict, by cause."""
    agreement: _Figure
    """As `swap_consistency`: the judge's agreement with itself. Wilson."""
    shown_first: _Figure
    """Position bias: share of the orders that chose the reply shown first, among those that chose one; the mean over pairs. An
    unbiased judge is at one half. Adjusted Student."""
    label_mass: _Figure
    """Probability of all verdict labels together at the verdict's position; the mean over pairs. Adjusted Student."""
    usable: Annotated[bool, Hidden("a run continues with an unusable judge only with --force, and the findings say why")]
    """Whether a verdict was kept, or could be: false if every pair is unparsable or its orders chose the same position."""
    findings: tuple[ProbeFinding, ...]
    """Problems that concern at least a quarter of the orders, more than half of the readable pairs (position bias), or at least
    three quarters of them (ties, unsure)."""


class JudgeMember(Part):
    """A member of a combined judge; see [combined](../algorithms/judging.md#combined)."""

    judge: str
    """Name of the judge."""
    accuracy: float
    """Probability that a vote of the judge is right, as its agreement with the other members on the first pairs shows. It
    weights the votes. One half: no weight."""
    voted: _Figure
    """Share of the pairs on which it voted: it had a verdict, no tie, and preferred a reply. Wilson."""
    agreement: _Figure
    """Share of the votes of the other members that chose the same reply, on pairs on which it and another one voted; the mean
    over pairs. Adjusted Student."""


class JudgeSignals(Part):
    """Weights of the signals of a look at a pair, in log-odds; see [signals](../algorithms/judging.md#signals)."""

    agreement: float
    """Weight of a look as such: looks with the same preference add up, others cancel."""
    margin: float
    """Weight of the size of its log-odds."""
    entropy: float
    """Weight of the entropy of its sampled votes, per nat."""
    disagreement: float
    """Weight of the share of the members of a combined judge that are against its choice."""
    truncated: float
    """Further weight of the size of its log-odds, if an output was cut off."""
    steps: tuple[_Pair, ...]
    """Points (size of the logit, probability) of the isotonic regression; empty if there is a temperature."""


class JudgeCalibration(Part):
    """The calibration of the judge's probabilities; see [calibration](../algorithms/judging.md#calibration)."""

    slope: float
    """Factor of the log-odds, summed over both orders. 0: its orders agree no more often than by chance."""
    truncated_slope: float
    """The same for verdicts with an output that was cut off, and read after an appended lead."""
    bias: float
    """Log-odds by which the judge favours the reply shown first, which are subtracted."""
    signals: JudgeSignals | None = _absent_if_none()
    """Weights of the signals, of whose sum `slope` is the factor. Absent if `verdicts.calibration.map` is `slope`."""


class Verdicts(Part):
    """Counts over all judged pairs of both splits."""

    judged: int
    """Number of judged pairs. Questions whose replies are all equal have none."""
    source: Literal["judge", "file"]
    """`file` if the pairs and their labels are [the user's own](../guides/your-own-data.md)."""
    kept: int
    """Pairs with a probability of at least `verdicts.keep` for one reply. The four counts add up to `judged`."""
    tie: int
    """Pairs with a probability above `verdicts.tie` that neither reply is better."""
    unsure: int
    """The other readable pairs: the judge's choice depended on the order, its votes were split, or it was not confident."""
    unparsable: int
    """Pairs for which the judge's output could not be parsed in at least one order, or no vote has an answer."""
    unreadable_orders: UnreadableOrders
    """Why orders, or votes, could not be read."""
    kept_share: _Figure
    """Coverage of the judge. Wilson."""
    swap_consistency: _Figure
    """Share of pairs on which both orders choose the same of three labels (one reply, the other, or neither), among pairs with
    both orders parsed. The choice of an order is its likeliest label, so a judge that says "neither" twice is consistent.
    Wilson."""
    majority_share: _Figure | None = _absent_if_none()
    """Share of the most frequent answer among all votes, of questions with an answer; the mean over pairs. Adjusted Student.
    Absent unless the judge is `agreement`."""
    vote_entropy: _Figure | None = _absent_if_none()
    """Entropy in nats of the most likely labels of the readable votes of an order or a grading; the mean over pairs, 0 if all
    votes agree. Adjusted Student. Absent unless `verdicts.votes` is above 1."""
    mean_grade: _Figure | None = _absent_if_none()
    """Expected grade of the replies on the scale of the rubric; the mean over pairs. Adjusted Student. Absent unless the judge
    is `pointwise`."""
    members: tuple[JudgeMember, ...] | None = _absent_if_none()
    """One row per member. Absent unless the judge is `combined`."""
    calibration: JudgeCalibration | None = _absent_if_none()
    """Calibration of the judge's probabilities. Absent if they are not calibrated."""
    probe: JudgeProbe | None
    """Diagnosis of the judge from the first pairs. `null` if the pairs are from a file, or with at most 16 pairs."""
    label_accuracy_gold: _Figure | None
    """Share of kept labels that chose a right reply over a wrong one, among questions with gold. A kept label between two right
    or two wrong replies counts as wrong. Wilson. In a run with no other gold than labels of people, `labels.judge_kept`. `null`
    without gold."""


# -- the policy ---------------------------------------------------------------------------------------------------------


class PolicyComparisons(Part):
    """The policy minus its start; see [comparisons](#comparisons)."""

    gold: _Comparison | None
    """Accuracy by gold after minus before training, on the same questions. `null` without gold."""
    win_rate: _Comparison
    """Win rate minus one half."""


class Alarm(Part):
    """An alarm of a watchdog during training."""

    step: int
    """Policy iteration; for an alarm that was acted on, the iteration of the restored checkpoint."""
    name: str
    """Name of the watchdog; see [metrics](../metrics.md#metricswatchdogsjsonl)."""
    message: str
    """Observation that raised the alarm."""
    action: str
    """`warn`, `roll_back`, `finish` or `stop`."""
    seen_at: int | None = _absent_if_none()
    """Iteration that raised the alarm. Absent if it was not acted on."""


class CurveFit(Part):
    """A fitted gain curve, R(d) = d (alpha − beta log d) with d = √KL; Gao et al. 2022."""

    alpha: _Rounded
    """Initial slope."""
    beta: _Rounded
    """Rate at which the gain is lost again."""
    rmse: Annotated[_Rounded, Hidden("the points are drawn around the curve")]
    """Root mean squared error of the points."""


class Fits(Part):
    """The two fitted gain curves."""

    evaluator: CurveFit
    """Gain predicted by the evaluator's scores."""
    gold: CurveFit
    """Gain by gold."""


class OverOptimisation(Part):
    """Predicted and actual accuracy over the distance from the start; see
    [over-optimisation](../algorithms/over-optimisation.md)."""

    points: tuple[_Triple, ...]
    """[√KL, predicted share right, share right by gold] of each iteration."""
    start: _Pair
    """[predicted share right, share right by gold] of the first iteration."""
    fit: Fits
    """The curves of Gao et al. 2022, fitted to the predicted and the actual gain."""
    gap: _Figure
    """Predicted minus actual share right in the last quarter of the iterations. Cluster-robust; `n` counts questions."""


class DiversityChange(Part):
    """A measure of diversity, before and after training. Jackknife by question, n counts questions."""

    before: _Figure
    """Of the replies before training."""
    after: _Figure
    """Of the replies after training."""
    change: _Figure
    """After minus before, on the same questions."""


class Diversity(Part):
    """Diversity of the replies before and after training, one reply to each question; see [diversity](#diversity)."""

    questions: int
    """Number of questions: those of [policy](#policy), at most the first 1,000."""
    distinct_1: DiversityChange
    """Distinct words (characters in scripts without spaces) over all words."""
    distinct_2: DiversityChange
    """Distinct bigrams over all bigrams."""
    self_bleu: DiversityChange
    """Mean BLEU-4 of each reply with all other replies as references, from 0 to 1. High: the replies are alike."""
    vendi: DiversityChange | None
    """Vendi score of the vectors of the replies: effective number of different replies, from 1 to the number of questions.
    `null` without an embedder."""
    embedder: str | None
    """Embedder of these vectors. `null` without one."""


class ReferenceMetric(Part):
    """Overlap of the replies with references by one metric; see [text metrics](text-metrics.md)."""

    name: str
    """`bleu` or `chrf`, from 0 to 100, or `rougeL` or `meteor`, from 0 to 1."""
    before: _Figure
    """Corpus score of the replies before training. Bootstrap."""
    after: _Figure
    """The same after training. Bootstrap."""
    difference: _Figure
    """`after` minus `before`, on the same questions. Paired bootstrap."""


class ReferenceScores(Part):
    """Replies before and after training against references. Of test questions: the `reply` of a line of `questions.file`, or
    the `chosen` replies of `pairs.file`. Of seeds: the `reply` of their lines. n counts the questions with a reference. They
    are used for nothing else."""

    language: str
    """Language by whose rules the texts were split into words."""
    metrics: tuple[ReferenceMetric, ...]
    """One row per metric."""


class Policy(Part):
    """Measured on the first `evaluation.questions` test questions. *Before* is the first reply of the initial policy to each
    question (the base; in a later round, the policy of the previous round), *after* is one sample of the trained policy, both
    at `evaluation.temperature` and `evaluation.top_p` (default: 1). The referee compares the two in both orders."""

    win_rate: _Figure
    """Mean of 1 (the reply after training won), 0.5 (tie) and 0 (it lost). Adjusted Student."""
    win_rate_decisive: _Figure
    """Share of wins among wins and losses, without ties. Wilson."""
    length_controlled: _Figure
    """Win rate at equal length, by a logistic regression on the difference in tokens. Bootstrap."""
    win: int
    """Comparisons won by the reply after training."""
    tie: int
    """Ties: the averaged probability of `neither` is above `verdicts.tie`, the two orders disagree, or both balance exactly."""
    loss: int
    """Comparisons lost by the reply after training."""
    unparsable: int
    """Comparisons that could not be parsed; the win rates exclude them."""
    gold_before: _Figure | None
    """Share of right replies before training, among questions with gold. Wilson. `null` without gold."""
    gold_after: _Figure | None
    """The same after training. Wilson. `null` without gold."""
    gold_gain: Annotated[_Figure | None, Hidden("the same figure as comparisons.gold.difference")]
    """`gold_after` minus `gold_before`, on the same questions. Newcombe. `null` without gold."""
    comparisons: PolicyComparisons
    """The policy minus its start."""
    kl: _Figure
    """KL to the initial policy in nats per reply: log-prob under the policy minus log-prob under the initial policy, summed
    over tokens, at `evaluation.temperature`. With `evaluation.top_p` below 1, the replies are from the nucleus. Student."""
    length_ratio: _Figure
    """Tokens per reply after training over tokens before. Ratio of means."""
    diversity: Diversity | None = _absent_if_none()
    """Diversity of the replies before and after training. Absent with one question, and in reports of earlier versions."""
    watchdogs: tuple[Alarm, ...]
    """Alarms during training."""
    overoptimisation: OverOptimisation | None
    """Predicted and actual accuracy over the KL. `null` without gold, or with too few iterations."""
    references: ReferenceScores | None = _absent_if_none()
    """Overlap of the replies with references. Absent if no test question has one, or without the extra `data`."""
    seed_references: ReferenceScores | None = _absent_if_none()
    """The same for replies to the seeds, against the `reply` of their lines: not held-out questions, see
    [references](#references). n counts seeds, at most the first 200. Absent if no seed has a reply, if the seeds are the
    questions of the run, or without the extra `data`."""


# -- the replies --------------------------------------------------------------------------------------------------------


class UnitTests(Part):
    """Number of distinct replies on which the evaluation ran the unit tests of the gold file, by result."""

    n: int
    """All of them."""
    passed: int = 0
    """The code passed all tests, so the reply is right."""
    failed: int = 0
    """An assertion of a test failed."""
    error: int = 0
    """The code or a test raised another exception."""
    syntax: int = 0
    """The code does not compile."""
    timeout: int = 0
    """It reached the limit on the time."""
    memory: int = 0
    """It reached the limit on the memory."""
    exit: int = 0
    """It ended the process before the last test."""
    crash: int = 0
    """A signal ended the process."""
    no_code: int = 0
    """The reply has no code, so nothing was run."""


class RepliesPerQuestion(Part):
    """How much the replies to the same training question differ, which the judge compares; see
    [replies to the same question](#replies-to-the-same-question). n counts the questions with two replies or more."""

    distinct_1: _Figure
    """Distinct words (characters in scripts without spaces) of the replies to a question over all of their words. Adjusted
    Student."""
    distinct_2: _Figure
    """Distinct bigrams over all bigrams. Adjusted Student."""
    overlap: _Figure
    """Jaccard similarity of the words of two replies, the mean over the pairs of a question. Adjusted Student."""
    identical: _Figure
    """Share of the pairs of a question that are equal except for case, punctuation and spaces. Adjusted Student."""


class Replies(Part):
    """Replies that the token limit cut off, because the model did not end them (the judge and the evaluator read them as they
    are), and the diversity of the replies to the same question."""

    limit: int
    """Token limit: `replies.max_new_tokens`, or the one that the stage replies decided."""
    unfinished: _Figure
    """Share of the sampled replies of the stage replies that were cut off, without those from a file; averaged per question
    first. Adjusted Student."""
    unfinished_before: _Figure
    """Share of the replies before training that were cut off, on the questions of [policy](#policy). Wilson."""
    unfinished_after: _Figure
    """The same after training. Wilson."""
    per_question: RepliesPerQuestion | None = _absent_if_none()
    """How much the replies to the same training question differ. Absent if no question has two replies, and in reports of
    earlier versions."""
    unit_tests: UnitTests | None = None
    """Results of the unit tests. `null` if gold has none."""


# -- rounds -------------------------------------------------------------------------------------------------------------


class RoundEvaluator(Part):
    """The evaluator of a round."""

    accuracy_gold: _Figure | None
    """On the test pairs of the same round, by gold, as `evaluator.accuracy_gold`."""
    accuracy_judge: _Figure
    """On the test pairs of the same round, as `evaluator.accuracy_judge`."""
    accuracy_gold_first_pairs: _Figure | None
    """By gold, on the test pairs of round 1."""
    accuracy_judge_first_pairs: _Figure
    """By the judge, on the test pairs of round 1."""
    gain: Annotated[_Figure | None, Hidden("the same figure as comparison.difference")]
    """Accuracy on the test pairs of round 1 minus that of the previous round's evaluator. `null` in round 1."""
    comparison: _Comparison | None
    """`gain` as a [comparison](#comparisons). `null` in round 1."""
    pairs_trained: int
    """Number of pairs it was trained on."""


class RoundPolicy(Part):
    """The policy of a round against that of the previous round, as in [policy](#policy)."""

    win_rate: _Figure
    """As `policy.win_rate`."""
    win: int
    """As `policy.win`."""
    tie: int
    """As `policy.tie`."""
    loss: int
    """As `policy.loss`."""
    gold_before: _Figure | None
    """As `policy.gold_before`."""
    gold_after: _Figure | None
    """As `policy.gold_after`."""
    gold_gain: Annotated[_Figure | None, Hidden("the same figure as comparisons.gold.difference")]
    """As `policy.gold_gain`."""
    kl: _Figure
    """As `policy.kl`."""
    comparisons: PolicyComparisons
    """As `policy.comparisons`."""


class Round(Part):
    """One finished round."""

    round: int
    """Number of the round, from 1."""
    folder: Annotated[str, Hidden("the text above the table names the folders")]
    """Folder of the round, relative to the run folder."""
    evaluator: RoundEvaluator
    """The evaluator of the round."""
    policy: RoundPolicy
    """The policy of the round."""


# -- the map of the domain ----------------------------------------------------------------------------------------------


class Cluster(Part):
    """A cluster of similar texts on the map."""

    words: tuple[str, ...]
    """Its typical words, by class-based TF-IDF."""
    example: str
    """The question that is the nearest to its middle; a dropped or a seed question if it has no other."""
    questions: int
    """Questions of the run on the map."""
    seeds: int
    """Seeds on the map."""
    dropped: int
    """Dropped questions on the map."""
    kept: _Figure
    """Share of the judged pairs of a question that were kept; the mean over questions. Adjusted Student."""
    accuracy: _Figure
    """Share of the test pairs on which the evaluator prefers the better reply, by the labels of the map; the mean over
    questions. Adjusted Student."""
    confidence: _Figure
    """Confidence of the evaluator on test pairs: sigmoid(absolute score difference / temperature); the mean over questions. At
    least 0.5. Adjusted Student."""


class DomainMap(Part):
    """The map of the domain; see [the map](#the-map-of-the-domain). Its points are in evaluation/map.json."""

    embedder: str
    """Embedder of the vectors."""
    projection: Literal["t-SNE", "PCA"]
    """Projection to two dimensions."""
    points: int
    """Number of texts on the map, drawn at random."""
    texts: int
    """Number of texts that they were drawn from: questions, seeds and dropped questions."""
    silhouette: float | None
    """Mean silhouette of the clusters, from -1 to 1: near 1 they are separate, near 0 they overlap. `null` with one cluster."""
    labels: Labels
    """Source of the labels for the accuracy: gold if it labels at least one pair."""
    points_hash: Annotated[str | None, Hidden("the page compares it with the points and says if they differ")] = (
        _absent_if_none()
    )
    """Content hash of the points. A file of points with another hash is of another evaluation, and is not drawn. Absent in
    reports of earlier versions."""
    clusters: tuple[Cluster, ...]
    """Clusters, largest first."""


# -- the rest -----------------------------------------------------------------------------------------------------------


class Model(Part):
    """The base model and its domain."""

    name: str
    """Folder or hub id of the base."""
    model_type: str
    """Architecture, as in its config.json."""
    parameters: int
    """Number of parameters of the base."""
    precision: str
    """Precision of the base weights."""
    domain: str | None
    """Domain whose gold oracle checks replies. `null` for a user's own questions."""
    gold_file: str | None
    """File of gold answers, labels or unit tests. `null` without one."""


class Data(Part):
    """Numbers of records."""

    seeds: int
    """Seed questions."""
    questions: int
    """Training questions."""
    questions_test: int
    """Test questions."""
    replies: int
    """Replies to all questions."""
    pairs_train: int
    """Kept pairs of training questions."""
    pairs_held_out: int
    """Kept pairs of test questions."""


class Drop(Part):
    """An example of a dropped record."""

    stage: str
    """Stage that dropped it."""
    reason: str
    """Reason."""
    text: str
    """Text of the record."""


class Dropped(Part):
    """Dropped records: the count of each reason per stage, and examples."""

    questions: dict[str, int]
    """Questions by reason."""
    replies: dict[str, int] = {}
    """Replies to training questions by reason; empty for reports of earlier versions."""
    verdicts: dict[str, int]
    """Judged pairs by reason."""
    examples: tuple[Drop, ...]
    """The first few of each stage and reason."""


class Sample(Part):
    """A comparison drawn at random, not cherry-picked."""

    question: str
    """Test question."""
    before: str
    """Reply of the initial policy."""
    after: str
    """Reply of the trained policy."""
    gold_before: bool | None
    """Whether the reply before training is right by gold. `null` without gold."""
    gold_after: bool | None
    """Whether the reply after training is right by gold. `null` without gold."""
    evaluator_before: float
    """Evaluator score of the reply before training."""
    evaluator_after: float
    """Evaluator score of the reply after training."""
    verdict: Literal["win", "tie", "loss", "unparsable"]
    """Outcome by the referee for the reply after training."""


class SecondsPerVerdict(Part):
    """Seconds per verdict; ratios of means with intervals over batches; see [cost](#cost)."""

    pairs: int
    """Number of pairs that were timed."""
    evaluator: _Figure
    """By the evaluator, including the reference answer if the grade template has one."""
    scoring: _Figure
    """By the evaluator if the reference answer is already known."""
    judge: _Figure
    """By the judge."""
    judge_over_evaluator: _Figure
    """Ratio of the judge's time to the evaluator's."""
    judge_over_scoring: _Figure
    """Ratio of the judge's time to that of scoring."""


class Time(Part):
    """Seconds on the machine of the run."""

    stages: dict[str, float]
    """Seconds by stage, without the report. In the file the stages are keys of `time` itself."""
    per_verdict: SecondsPerVerdict | None
    """Seconds per verdict. `null` without a test pair."""
    total: float
    """Sum over the stages."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        # Built by the report stage; the form in the file is spread (see `_spread`).
        if not isinstance(value, dict) or "stages" in value:
            return value
        own = {key: value[key] for key in ("per_verdict", "total") if key in value}
        return {"stages": {key: seconds for key, seconds in value.items() if key not in own}, **own}

    @model_serializer(mode="wrap")
    def _spread(self, handler: Any) -> dict[str, Any]:
        values = handler(self)
        return {**values.pop("stages"), **values}


class MemoryEvent(Part):
    """A batch limit that changed because memory was short."""

    stage: str
    """Stage in which it happened."""
    phase: str
    """Phase of the stage, such as `rollout` or `update`."""
    kind: str
    """`out_of_memory`, `over_budget`, `little_free` or `grown`."""
    unit: str
    """Unit of the limit: rows or tokens."""
    before: int = Field(alias="from")
    """Limit before."""
    after: int = Field(alias="to")
    """Limit after."""
    free_bytes: Annotated[int | None, Hidden("the limits are shown; the free memory explains them to a developer")]
    """Free memory at the time of the event."""
    times: int
    """Number of occurrences."""


class EvaluationMemory(Part):
    """Bytes of the base, and of all adapters and heads at the end of policy training."""

    base_bytes: int
    """Bytes of the base weights."""
    adapter_bytes: int
    """Bytes of all adapters and heads."""
    weight_copies: float
    """Copies of the base weights."""
    shared_prompts: bool | None = None
    """Whether the replies to a question share the pass of their prompt in scoring and training. `null` if not recorded."""


class Memory(EvaluationMemory):
    """Bytes on the machine of the run."""

    peak_bytes: int
    """Peak resident memory of the process on the host (peak RSS), or of a worker that trained, without GPU memory."""
    events: tuple[MemoryEvent, ...]
    """Limits that changed because memory was short."""


class Steps(Part):
    """The step evaluator and its labels. Only with `steps.enabled`."""

    replies: int
    """Replies whose steps were labelled."""
    steps: int
    """Steps with a label from completions: all but the last of each reply."""
    labels_gold: _Figure | None
    """Share of those labels that are on the side of the gold label: at least one half exactly if the reply is right so far.
    Mean over questions, adjusted Student. `null` without gold of steps."""
    accuracy_gold: _Figure | None
    """`accuracy_gold` of the evaluator, with the score of a reply by its steps (`steps.combine`). Wilson. `null` without
    gold."""
    gain: _Comparison | None
    """`accuracy_gold` minus that of the evaluator on the same pairs, as a [comparison](#comparisons). `null` without gold."""


class Server(Part):
    """Answers of a server, over all rounds; those of earlier settings and of stages that were rerun count too."""

    role: Literal["judge", "referee"]
    """Role in which it was asked."""
    url: str
    """Base URL of the server."""
    model: str
    """Name of the model at the server."""
    answers: int
    """Number of answers."""
    tokens_read: int
    """Prompt tokens, as the server counts them."""
    tokens_written: int
    """Completion tokens, as the server counts them."""
    cost: float | None = _absent_if_none()
    """Price of the tokens, in the currency of the prices. Absent without `price_read` and `price_written`."""


class HumanThreshold(Part):
    """The evaluator's threshold from labels of people: the smallest confidence with the wanted error rate."""

    sure: _Rounded | None
    """The confidence below which the evaluator is unsure. `null` if the labels show none with the wanted error rate; then 0.8
    applies."""
    error: float
    """Wanted error rate among the pairs on which the evaluator is sure."""
    delta: float
    """Maximum probability that the true error rate is higher."""
    pairs: int
    """Decided pairs that it rests on: those that were drawn uniformly, one per question."""
    selected: int
    """Pairs among them at or above the confidence."""
    needed: int
    """Fewest selected pairs with which a threshold can pass, if the evaluator is right on all of them."""
    risk: _Figure
    """Measured error rate on the selected pairs. Wilson."""
    bound: _Rounded | None
    """Upper confidence bound of the error rate on such pairs. `null` without a selected pair."""
    coverage: _Figure
    """Share of the pairs that are selected. Wilson."""


class HumanLabels(Part):
    """Labels of people on judged test pairs; see [labels of people](#labels-of-people)."""

    pairs: int
    """Judged test pairs, which the figures are about."""
    labelled: int
    """Pairs with a label of at least one person."""
    decided: int
    """Pairs of which the majority of people prefers one reply."""
    ties: int
    """Pairs that the majority calls a tie."""
    skipped: int
    """Pairs that every person who saw them skipped."""
    raters: int
    """Number of people."""
    labels: int
    """Labels of all people, without skipped pairs."""
    unused: int
    """Labels that no figure uses: of texts that are not in the run any more, or of an earlier set of pairs."""
    for_training: int
    """Labels on pairs of training questions, which are trained on and count in no figure."""
    evaluator: _Figure
    """Share of pairs on which the evaluator prefers the reply that people prefer. LURE, Wilson with the effective number of
    pairs; `n` counts questions."""
    judge: _Figure
    """The same for the judge, on pairs with a readable verdict."""
    judge_kept: _Figure
    """The same for the judge, on pairs whose verdict was kept."""
    kappa: _Figure | None
    """Agreement between people: Cohen's kappa for two, Krippendorff's alpha for more, on pairs that several labelled.
    Bootstrap. `null` for one person."""
    more_labels: int | None
    """Further pairs that halve the width of the interval of `evaluator`. `null` without a decided pair."""
    gold: bool
    """Whether the labels are the gold of this report, because the run has no other."""
    threshold: HumanThreshold
    """The threshold."""


class Evaluation(Part):
    """evaluation/figures.json: the parts of the report that need the model, as measured by the evaluation stage."""

    model: Model
    evaluator: Evaluator
    verdicts: Verdicts
    policy: Policy
    replies: Replies
    samples: tuple[Sample, ...]
    memory: EvaluationMemory
    seconds_per_verdict: SecondsPerVerdict | None
    steps: Steps | None = _absent_if_none()
    domain_map: DomainMap | None = _absent_if_none()


class Report(Part):
    """report.json."""

    schema_number: Annotated[Literal[1], Hidden("a page is drawn from this schema only")] = Field(alias="schema")
    """1, the version of this schema."""
    name: str
    """Name of the run."""
    seed: int
    """Random seed of the run."""
    model: Model
    """The base and its domain."""
    data: Data
    """Numbers of records."""
    evaluator: Evaluator
    """The evaluator against its baselines."""
    verdicts: Verdicts
    """The judge's verdicts by state."""
    policy: Policy
    """The policy compared with its start."""
    replies: Replies
    """Replies that the token limit cut off."""
    steps: Steps | None = _absent_if_none()
    """The step evaluator. Absent without `steps.enabled`."""
    labels: HumanLabels | None = _absent_if_none()
    """Labels of people. Absent without labels."""
    domain_map: DomainMap | None = _absent_if_none()
    """The map of the domain. Absent with `evaluation.map_points = 0`, and in reports of earlier versions."""
    rounds: tuple[Round, ...] | None = _absent_if_none()
    """One row per finished round. Only with `rounds` above 1, and only in the run's own report."""
    dropped: Dropped
    """Dropped records."""
    samples: tuple[Sample, ...]
    """`evaluation.samples` comparisons drawn at random."""
    prompts: dict[str, str]
    """Prompt templates of the run, by file name."""
    time: Time
    """Seconds."""
    memory: Memory
    """Bytes."""
    servers: tuple[Server, ...] | None = _absent_if_none()
    """One row per role that a server has. Absent if the model of the run has all roles."""
    versions: dict[str, str]
    """Versions of this package, of Python, torch, transformers, peft, tokenizers and numpy."""
    config: dict[str, Any]
    """All values of the configuration, including defaults."""

    @model_validator(mode="after")
    def _rounds_are_numbered(self) -> Report:
        numbers = [row.round for row in self.rounds or ()]
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"rounds must be numbered from 1, got {numbers}")
        return self
