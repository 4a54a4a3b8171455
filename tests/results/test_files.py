"""Files are whole or not there, and say their schema version."""

import pytest
import torch

from jensen.inference import History
from jensen.results import files


def test_a_write_that_fails_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    files.write_checkpoint(tmp_path / "c.pt", {"a": 1})
    monkeypatch.setattr(files.torch, "save", lambda state, path: path.write_bytes(b"half") and 1 / 0)
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
