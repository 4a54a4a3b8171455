"""The command line: ``jensen compare`` trains, measures and writes a report; ``jensen train`` writes a run folder.

``evaluate`` and ``sample`` read only that folder; ``datasets`` lists the data sets.

This subpackage uses the others; none of them uses it.
"""

from .entry import main

__all__ = ["main"]
