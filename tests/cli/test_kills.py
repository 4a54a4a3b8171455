"""Runs that are killed, half of them during a write, resume to a result bitwise identical to an uninterrupted run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_KILLS = Path(__file__).parent.parent / "kills.py"


@pytest.mark.parametrize(
    ("route", "kills"),
    [
        pytest.param("eager", 4, marks=pytest.mark.slow),
        ("traced", 2),
        pytest.param("compiled", 6, marks=pytest.mark.slow),
    ],
)
def test_killed_runs_end_as_one_that_nothing_stopped(route, kills):
    done = subprocess.run([sys.executable, _KILLS, route, "--kills", str(kills)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)[route]
    assert found["short"] == [] and found["same"] == kills, done.stderr
    assert found["inside writes"] == kills // 2
