"""Attacks on files and runs: what came back whole, what was refused in one sentence, and what fell short.

    python benchmarks/faults.py --mutations 10000 --kills 20 --attacks mutations kills

Every attack is a function of the options in ``ATTACKS``. It gives back a row for each thing attacked: ``attack``,
``tries``, ``refused`` (the documented error), ``same`` (the undamaged result), ``other`` (another result that no digest
can tell from the undamaged one) and ``short``, the failures: foreign errors, crashes, losses, silent differences.

The table goes to results/faults.md, everything to results/faults.json; the exit status is 1 where anything fell short.
"""

import argparse
import sys
from pathlib import Path

import _common as common

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
COLUMNS = ("attack", "tries", "refused", "same", "other", "short")
ATTACKS = {}


def main():
    """Run the attacks that are named, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    add("--mutations", type=int, default=10_000)
    add("--kills", type=int, default=20)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    start = common.started()
    rows = [row for name in options.attacks for row in ATTACKS[name](options)]
    about = common.provenance(__file__, options, start)
    cells = [[str(len(row[c]) if c == "short" else row[c]) for c in COLUMNS] for row in rows]
    text = f"{common.made_by(about)}\n\n{common.table(COLUMNS, cells)}"
    common.write(options, "faults", about, {"rows": rows}, text)
    return int(any(row["short"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
