"""The warning about a machine with more load than cores: once, and only if it helps."""

import os
import warnings

import pytest
import torch

from jensen.guides import PriorGuide
from jensen.inference import evaluate, fit
from jensen.kernel import load
from jensen.models import PPCA


@pytest.fixture
def busy(monkeypatch):
    """Three jobs on two cores, two threads, and the default wait policy."""
    monkeypatch.setattr(load, "_said", [])
    monkeypatch.setattr(os, "getloadavg", lambda: (3.2, 0.0, 0.0), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    return monkeypatch


def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load.warn_if_busy()


def test_it_is_said_once(busy):
    with pytest.warns(UserWarning, match=r"load of this machine is 3.2, above its 2 cores, and PyTorch's 2 threads"):
        load.warn_if_busy()
    silent()


@pytest.mark.parametrize("what", ["one thread", "passive", "idle", "unknown", "no such function"])
def test_it_is_not_said_where_nothing_is_wrong(what, busy):
    def fails():
        raise OSError

    if what == "one thread":
        busy.setattr(torch, "get_num_threads", lambda: 1)
    elif what == "passive":
        busy.setenv("OMP_WAIT_POLICY", "passive")
    elif what == "idle":
        busy.setattr(os, "getloadavg", lambda: (2.0, 9.0, 9.0), raising=False)
    elif what == "unknown":
        busy.setattr(os, "getloadavg", fails, raising=False)
    else:
        busy.delattr(os, "getloadavg", raising=False)
    silent()


@pytest.mark.parametrize("run", [evaluate, fit])
def test_runs_say_it(run, busy):
    model = PPCA(5, 2)
    how = {"particles": 5} if run is evaluate else {"epochs": 1}
    with pytest.warns(UserWarning, match="load of this machine") as said:
        run(model, PriorGuide(model), model(n=8).detach(), progress=False, **how)
    assert [w.filename for w in said] == [__file__]


def test_the_suite_waits_passively():
    """No test fails on a busy machine; subprocesses of tests inherit the setting."""
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
