"""Evaluation metrics as pure functions of records: no model, no store, no gold oracle.

| file | contents |
|---|---|
| `evaluator.py` | the evaluator against its baselines on judged test pairs |
| `verdicts.py` | the judge's verdicts by state, their consistency, and the accuracy of the labels |
| `policy.py` | the policy before and after training, compared reply by reply |
| `over_optimisation.py` | predicted and actual accuracy of training replies over the KL |

The evaluation stage collects scores, replies, judgements and gold answers, and passes them to these functions.
"""
