"""The command line: ``jensen compare`` runs the main job and writes a report, ``jensen train`` leaves a run folder.

``evaluate`` and ``sample`` need nothing but that folder; ``datasets`` says what data there are.

This room stands on top: it puts the others together and holds nothing that they need.
"""

from .entry import main

__all__ = ["main"]
