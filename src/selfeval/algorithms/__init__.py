"""Pure functions of reinforcement and preference learning: tensors in, tensors out, one quantity per function.

Each module is one family (masked reductions, returns, advantages of groups, KL, policy, value and preference losses,
ensembles, controllers, the trust-region step, Q-learning, exact MDPs). A function has its formula, its paper and its shapes
in the docstring, and never sees a configuration, a model, a logger or a device. Nothing is imported here, so that
`import selfeval` costs no torch; write `from selfeval.algorithms.returns import gae`.
"""
