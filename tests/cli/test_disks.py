"""Full disks, and folders that are read-only or removed: exit status 2, one line, no incomplete files."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from jensen.cli import main
from jensen.plots import plot_latent, save
from jensen.results import files

_SMALL = ["--latent", "2", "--hidden", "16", "--batch-size", "300", "--epochs", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", "--run", str(folder), *_SMALL, "--no-pictures"]) == 0
    return folder


def _full(monkeypatch, ending):
    """Flushing a file with this suffix fails after half of it is written."""
    real = os.fsync

    def fsync(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith(ending):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)


def test_a_full_disk_ends_a_new_run_before_its_first_epoch_without_a_folder(tmp_path, capsys, monkeypatch):
    _full(monkeypatch, "checkpoint.pt")
    assert main(["train", "--run", str(tmp_path / "run"), *_SMALL, "--json"]) == 2
    out, err = capsys.readouterr()
    assert "No space left on device: " in err.splitlines()[-1]
    assert "checkpoint.pt could not be written" in err.splitlines()[-1]
    assert json.loads(out)["status"] == 2
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_ends_a_run_that_goes_on_later(tmp_path):
    """In a process whose files may not grow: the first checkpoint fits, those with the state of Adam do not."""
    code = """
import resource, signal, sys
from jensen.cli import main
from jensen.results import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write, written = files.write_checkpoint, []
import jensen.inference.training.checkpoint as module
def counted(path, state):
    written.append(path)
    if len(written) == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    try:
        write(path, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
module.write_checkpoint = counted
sys.exit(main(sys.argv[1:]))
"""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    arguments = [*_SMALL, "--no-pictures"]
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--run", str(folder), *arguments], capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert "checkpoint.pt could not be written; continue with: jensen train --run" in last
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "configuration.json"]
    assert main(["train", "--run", str(folder), "--resume", "--no-pictures"]) == 0
    assert main(["train", "--run", str(whole), *arguments]) == 0
    one, other = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, whole))
    assert all(torch.equal(a, b) for a, b in zip(one["parameters"], other["parameters"], strict=True))


def test_evaluate_shows_what_it_cannot_keep(run, capsys, monkeypatch):
    _full(monkeypatch, "report.json")
    (run / "report.json").unlink(missing_ok=True)
    assert main(["evaluate", "--no-pictures", str(run), "--particles", "20", "--test-size", "30"]) == 2
    out, err = capsys.readouterr()
    assert "ELBO" in out
    assert "the result is printed above, but could not be saved: [Errno 28] No space left on device: " in err
    assert main(["evaluate", "--no-pictures", str(run), "--particles", "20", "--test-size", "30", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["runs"]["small"]["summary"]["n"] == 30
    assert not list(run.glob("*report.json*"))


@pytest.mark.parametrize("ending", ["npy", "npz", "csv", "png", "pdf"])
def test_samples_are_written_whole_or_not_at_all(ending, run, tmp_path, capsys, monkeypatch):
    path = tmp_path / f"draws.{ending}"
    path.write_bytes(b"the last ones")
    _full(monkeypatch, f"draws.{ending}")
    assert main(["sample", str(run), "-n", "4", "--out", str(path)]) == 2
    assert "could not be written" in capsys.readouterr().err
    assert path.read_bytes() == b"the last ones"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_picture_is_written_whole_and_no_link_is_followed(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "map.png").symlink_to(tmp_path / "elsewhere")
    picture = plot_latent(torch.zeros(3, 2) + torch.arange(3.0)[:, None])
    save(picture, tmp_path / "map")
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert not (tmp_path / "map.png").is_symlink()
    whole = (tmp_path / "map.png").read_bytes()
    _full(monkeypatch, "map.png")
    with pytest.raises(OSError, match=r"map\.png could not be written"):
        save(picture, tmp_path / "map")
    assert (tmp_path / "map.png").read_bytes() == whole


def test_a_run_whose_folder_is_removed_ends_with_an_error(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    moved = iter([False, True])
    write = files.write_checkpoint

    def removed(path, state):
        if next(moved):
            folder.rename(tmp_path / "moved")
        write(path, state)

    monkeypatch.setattr("jensen.inference.training.checkpoint.write_checkpoint", removed)
    assert main(["train", "--run", str(folder), *_SMALL, "--no-pictures"]) == 2
    assert "checkpoint.pt could not be written" in capsys.readouterr().err
    assert not folder.exists()
    assert {path.name for path in (tmp_path / "moved").iterdir()} == {"configuration.json", "checkpoint.pt"}
