"""A function of tensors becomes a graph that gives the same numbers faster: traced, compared, compiled."""

__all__: list[str] = []
