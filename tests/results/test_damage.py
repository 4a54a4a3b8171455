"""Damaged files raise an error that names them, or read like undamaged ones; with a digest there is no third result."""

import pytest

from .. import damage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    damage.make_files(folder)
    return folder


@pytest.mark.parametrize("name", damage.KINDS)
def test_a_damaged_file_is_refused_or_read_as_it_was(name, folder, monkeypatch):
    monkeypatch.setenv("JENSEN_DATA", str(folder.parent))
    found = damage.attack(folder, name, 100)
    assert found["refused"] > 0
    assert found["short"] == []
