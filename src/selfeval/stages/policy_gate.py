"""The gate of policy training: an evaluator that is not shown to beat chance and the trivial rules trains no policy.

Policy gradients whiten the scores, so even noise of 0.01 becomes a reward of unit variance. The gate reads the labels of
the judge (or of the user's file) on held-out pairs, never gold.
"""

from __future__ import annotations

from selfeval.backbone.process_group import by_first
from selfeval.errors import LoopError
from selfeval.evaluation.evaluator import by_judge, compare_with_rules
from selfeval.quality.comparisons import FEWEST
from selfeval.quality.statistics import proportion
from selfeval.records import Question, Split, Verdict, VerdictState
from selfeval.report.figures import describe, describe_difference
from selfeval.report.summary import hardest_rule
from selfeval.stages.context import Context
from selfeval.stages.held_out import score_pairs

__all__ = ["check_evaluator"]


def check_evaluator(context: Context) -> None:
    """Stop if the evaluator is not shown to beat chance and every trivial rule on the kept pairs of the test questions.

    Skipped if `policy.gate` is `off`, for a learner that reads the kept pairs instead of the evaluator's scores, and if the
    training has already begun.

    Raises:
        LoopError: a paired comparison does not show that the evaluator is better, and the user has not forced the run.
    """
    policy = context.config.policy
    # Process 0 looks: on a shared file system another one may not see yet what an earlier worker wrote.
    begun = by_first(context.processes, "whether the training has begun", context.checkpoint_folder("policy").is_dir)
    if policy.gate == "off" or policy.settings.reads_kept_pairs or begun:
        return
    obstacle = _obstacle(context)
    if obstacle is None:
        return
    if not context.force:
        raise LoopError(
            f"{obstacle}. A policy trained on its scores may learn noise. Get more pairs (questions.test to show a difference, "
            "questions.train to learn one) or better labels (a stronger model, settings of [verdicts]); finished stages are "
            'kept. To learn from the pairs without the evaluator, set policy.learner = "dpo" and policy.dpo.pairs = "kept". To '
            'train anyway, rerun the same command with --force, or set policy.gate = "off"'
        )
    context.terminal.note(f"policy: {obstacle}; trained anyway, because of --force")


def _obstacle(context: Context) -> str | None:
    """Describe the baseline that the evaluator is not shown to beat; None if it beats all."""
    verdicts = [v for v in context.store.read("verdicts", Verdict) if v.split == Split.TEST and v.state == VerdictState.KEPT]
    questions = {q.id: q for q in context.store.read("questions", Question)}
    labelled = by_judge(score_pairs(context, verdicts, questions))
    if len(labelled) < FEWEST:
        return (
            f"the evaluator cannot be compared with trivial rules: {len(labelled)} held-out pairs were kept, and a comparison "
            f"needs at least {FEWEST}"
        )
    accuracy = describe(proportion([pair.evaluator_right for pair in labelled]))
    hardest = hardest_rule(compare_with_rules(labelled))
    if hardest is None:
        context.terminal.note(
            f"policy: the evaluator beats chance and the trivial rules on held-out pairs: accuracy {accuracy}"
        )
        return None
    name, comparison = hardest
    return (
        f"the evaluator is not shown to beat {name} on held-out pairs: its accuracy is {accuracy}, and the difference "
        f"{describe_difference(comparison)}"
    )
