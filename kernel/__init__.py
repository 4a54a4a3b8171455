"""Runs any Pyro pair and returns log weights: the only room that runs traces.

Nothing here knows a model, a guide, a family or what is done with the weights.
"""

__all__: list[str] = []
