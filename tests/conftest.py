"""Fixtures of the suite: a fixed seed, an empty parameter store, real data if available."""

import os
import sys
from pathlib import Path

import pyro
import pytest
import torch

DATA_FILES = {
    "mnist": "mnist/train-images-idx3-ubyte.gz",
    "binarized_mnist": "binarized_mnist/binarized_mnist.npz",
    "fashion_mnist": "fashion_mnist/train-images-idx3-ubyte.gz",
    "frey_faces": "frey_faces/frey_rawface.mat",
    "oil_flow": "oil_flow/oil_flow_3class.npz",
}


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="run the contract of models and guides there: cpu, cuda, second")


def pytest_configure(config):
    os.environ["JENSEN_TEST_DEVICE"] = device = config.getoption("--device")  # read by members.py
    if device == "second":
        import second

        second.register()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # no warning about a busy machine, here or in subprocesses of tests
    if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the processors: one thread each
        torch.set_num_threads(1)
    config.addinivalue_line("markers", "data(name): needs the files of a data set under JENSEN_DATA")


def pytest_collection_modifyitems(config, items):
    """Deselect (not skip) tests that need missing data files, and report it."""
    folder = Path(os.environ.get("JENSEN_DATA", "/nonexistent"))
    missing = {name for name, file in DATA_FILES.items() if not (folder / file).is_file()}
    left_out = [item for item in items if missing & {m.args[0] for m in item.iter_markers("data")}]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def clean():
    """Every test starts from the same seed and without anybody's parameters, and leaves no figure open."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def float64():
    """Modules made in the test are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def digits():
    from jensen.datasets import load

    return load("digits", dtype=torch.float64)
