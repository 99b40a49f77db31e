"""Pure functions of reinforcement and preference learning: tensors in, tensors out, one quantity per function.

Each module is one family (masked reductions, returns, group advantages, KL, policy, value and preference losses, ensembles,
controllers, the trust-region step, Q-learning, exact MDPs). The docstring of a function has its formula, paper and shapes. No
function takes a configuration, a model, a logger or a device. The package imports no module, because `import selfeval` must not
import torch; use `from selfeval.algorithms.returns import gae`.
"""
