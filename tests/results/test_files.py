"""Files are complete or absent, and contain their schema version."""

import errno
import os
import subprocess
import sys
import zipfile

import pytest
import torch

from jensen.inference import History
from jensen.results import files


def test_a_write_that_fails_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    files.write_checkpoint(tmp_path / "c.pt", {"a": 1})
    monkeypatch.setattr(files.torch, "save", lambda state, file: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_checkpoint(tmp_path / "c.pt", {"a": 2})
    assert files.read_checkpoint(tmp_path / "c.pt")["a"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_a_checkpoint_of_a_newer_schema_is_refused_in_one_sentence(tmp_path):
    torch.save({"jensen_checkpoint": 2, "history": {}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt has schema version 2, but jensen \S+ reads versions up to 1: install"):
        History.from_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("state", [{}, {"jensen_checkpoint": "1"}, [1, 2]])
def test_what_is_no_checkpoint_of_fit_is_said(state, tmp_path):
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt is not a checkpoint written by fit"):
        History.from_checkpoint(tmp_path / "c.pt")


def test_every_flipped_bit_of_a_checkpoint_is_an_error(tmp_path):
    files.write_checkpoint(tmp_path / "c.pt", {"a": torch.arange(3.0)})
    whole = (tmp_path / "c.pt").read_bytes()
    for place in range(0, len(whole), 7):
        (tmp_path / "c.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"c\.pt cannot be read as a checkpoint, because it is damaged or another"):
            files.read_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("part", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_a_torn_checkpoint_is_a_value_error_that_names_it(part, tmp_path):
    files.write_checkpoint(tmp_path / "c.pt", {"a": torch.arange(3000.0)})
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ValueError, match=r"c\.pt cannot be read as a checkpoint, .* damaged .*; give the file"):
        files.read_checkpoint(tmp_path / "c.pt")


def test_torch_reads_a_checkpoint_with_a_digest_and_a_file_without_one_is_read(tmp_path):
    files.write_checkpoint(tmp_path / "c.pt", {"a": torch.arange(3.0)})
    assert torch.load(tmp_path / "c.pt", weights_only=True)["a"].tolist() == [0.0, 1.0, 2.0]
    torch.save({"jensen_checkpoint": 1, "a": 5}, tmp_path / "old.pt")
    assert files.read_checkpoint(tmp_path / "old.pt")["a"] == 5
    whole = (tmp_path / "old.pt").read_bytes()
    place = whole.index(b"jensen_checkpoint") + 21  # in the pickled state, whose checksum the archive has
    (tmp_path / "old.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"the checksum of old/data\.pkl is wrong"):
        files.read_checkpoint(tmp_path / "old.pt")


def test_a_compressed_checkpoint_is_refused_before_it_is_expanded(tmp_path):
    torch.save({"jensen_checkpoint": 1, "a": torch.zeros(10**6)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as old, zipfile.ZipFile(tmp_path / "c.pt", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="its members are compressed"):
        files.read_checkpoint(tmp_path / "c.pt")


def test_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with files.whole(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert (tmp_path / "link").read_text() == "new"
    assert not (tmp_path / "link").is_symlink()


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: done.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    files.write_checkpoint(tmp_path / "c.pt", {})
    assert done == ["fsync", "replace", "fsync"]


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path):
    """In a separate process with a file size limit of 20,000 bytes."""
    files.write_checkpoint(tmp_path / "c.pt", {"a": 1})
    script = f"""
import resource, signal, torch
from jensen.results.files import write_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write_checkpoint({str(tmp_path / "c.pt")!r}, {{"a": torch.zeros(100_000)}})
except OSError as error:
    print(error.errno, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(f"{errno.EFBIG} "), done.stderr
    assert done.stdout.strip().endswith("c.pt could not be written")
    assert files.read_checkpoint(tmp_path / "c.pt")["a"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]
