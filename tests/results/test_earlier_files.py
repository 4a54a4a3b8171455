"""Files that an earlier version wrote still load."""

import json
import shutil
from pathlib import Path

import pytest

from jensen.cli import main
from jensen.families import MeanField
from jensen.guides import amortize
from jensen.inference import Comparison, Evidence, History, restore
from jensen.models import PPCA
from jensen.networks import mlp

FILES = Path(__file__).parent / "files"
REPORT = json.loads((FILES / "run" / "report.json").read_text())


def test_a_comparison_loads_with_its_gaps():
    table = Comparison.from_json(FILES / "comparison.json")
    assert list(table.rows) == ["a", "b"]
    assert table.rows["a"].gaps.approximation.tolist() == [-0.5, 0.5, 1.5]
    assert table.rows["b"].evidence.exact.tolist() == [-4.5, -3.5, -2.5]


def test_a_history_loads():
    history = History.from_json(FILES / "run" / "history.json")
    assert (len(history.elbo), history.steps) == (2, 4)


def test_a_checkpoint_loads():
    model = PPCA(2, latent=1)
    history = restore(model, amortize(model, mlp(2, [2]), MeanField, context=2), FILES / "run" / "checkpoint.pt")
    assert history == History.from_checkpoint(FILES / "run" / "checkpoint.pt")
    assert history.elbo == History.from_json(FILES / "run" / "history.json").elbo


def test_the_evidence_in_a_report_loads():
    evidence = Evidence.from_json(json.dumps(REPORT["evidence"]))
    assert evidence.summary() == REPORT["summary"]


def test_a_run_folder_is_measured_again(tmp_path, capsys):
    folder = shutil.copytree(FILES / "run", tmp_path / "run")
    assert (
        main(
            ["evaluate", "--no-pictures", str(folder), "--data", str(FILES / "rows.csv"), "--particles", "30", "--json"]
        )
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    report = printed["runs"]["run"]
    assert printed["schema"] == report["schema"] == json.loads((folder / "report.json").read_text())["schema"] == 1
    assert report["epochs"] == 2
    assert report["summary"]["exact"] == pytest.approx(REPORT["summary"]["exact"], abs=1e-6)
