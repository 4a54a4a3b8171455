"""Reductions of log weights: evidence, bounds, comparisons, gaps, rate and distortion, calibration, decoding."""

__all__: list[str] = []
