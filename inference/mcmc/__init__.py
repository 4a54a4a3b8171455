"""Draws from p(z | x) of a few data, and how far a guide is from them."""

__all__: list[str] = []
