"""The command line: ``jensen compare`` runs the main job and writes a report.

This room stands on top: it puts the others together and holds nothing that they need.
"""

from .command import main

__all__ = ["main"]
