"""Results as one HTML page that opens from a disk: tables that sort, figures, data points, how to repeat it."""

from .report import Report

__all__ = ["Report"]
