"""Samples from p(z | x) of a few data points, and the distance of a guide from them."""

__all__: list[str] = []
