"""The figures of the evidence, as pure functions on records: no model, no store, no gold oracle.

| file | contents |
|---|---|
| `evaluator.py` | the evaluator against its baselines on judged test pairs |
| `verdicts.py` | the judge's verdicts by state, their consistency, and the accuracy of the labels |
| `policy.py` | the policy before and after, reply against reply |
| `over_optimisation.py` | predicted and actual accuracy of the replies of training, over the KL |

The stage evaluation collects scores, replies, judgements and the answers of gold, and passes them in.
"""
