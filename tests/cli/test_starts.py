"""Start and end of a command: Ctrl-C at any time, memory, commands to copy, empty folders."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from jensen.cli import entry, main
from jensen.cli.memory import Within, memory_told, of_machine
from jensen.cli.pairs import Design
from jensen.cli.terminal import command

_SMALL = ["--latent", "2", "--hidden", "16", "--epochs", "1", "--no-pictures"]
_LARGE = ["--latent", "2000000000", "--hidden", "16"]


@pytest.mark.parametrize("delay", [0.3, 0.9])
def test_ctrl_c_while_the_command_starts_is_one_line(delay):
    reset = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    told = [sys.executable, "-c", "import sys; print(flush=True); from jensen.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*told, "datasets", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=reset
    )
    process.stdout.readline()  # Python itself has started
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert len(said.splitlines()) <= 1, said
    if process.returncode:
        assert (process.returncode, said) == (130, "jensen: interrupted\n")
        assert json.loads(printed) == {"error": "interrupted", "status": 130}


def test_ctrl_c_is_given_back_as_it_was():
    before = signal.getsignal(signal.SIGINT)
    mine = lambda *_: None
    try:
        for handler in (signal.default_int_handler, mine):
            signal.signal(signal.SIGINT, handler)
            with entry._on_interrupt(print):
                assert signal.getsignal(signal.SIGINT) is (mine if handler is mine else print)
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_commands_to_copy_are_those_of_a_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "pinwheel", "--run", "my 'run'", *_SMALL]) == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("measure it with: ")
    assert shlex.split(line) == ["jensen", "evaluate", "my 'run'"]
    assert command("evaluate", Path("-run")) == "jensen evaluate ./-run"
    (tmp_path / "my 'run'" / "checkpoint.pt").unlink()
    assert main(shlex.split(line)[1:]) == 2
    assert "jensen train --run 'my '\"'\"'run'\"'\"'' --resume" in capsys.readouterr().err


def test_a_model_larger_than_memory_is_refused_before_anything_is_written(tmp_path, capsys):
    assert main(["train", "--data", "bars", "--run", str(tmp_path / "run"), "--json", *_LARGE, "--epochs", "1"]) == 2
    shown = capsys.readouterr()
    error = json.loads(shown.out)["error"]
    assert "not enough memory for --latent 2000000000, --hidden 16 and 16 features: more than 128 GB" in error
    assert len(shown.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert main(["compare", "--data", "bars", "--model", "vae", *_LARGE[:2], "--out", str(tmp_path / "out")]) == 2
    assert "not enough memory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_pair_takes_is_counted_before_it_is_made():
    design = Design("vae", "mean-field", (4,), ((16,),), "gaussian")
    with Within(of_machine(), "the pair") as within:
        model, guide = design.build(30)
    held = sum(t.numel() * t.element_size() for m in (model, guide) for t in (*m.parameters(), *m.buffers()))
    assert held <= within.taken <= 3 * held
    with pytest.raises(MemoryError, match="not enough memory for the pair: more than"), Within(held / 10, "the pair"):
        design.build(30)


@pytest.mark.parametrize("array", [lambda: torch.empty(2**50), lambda: np.empty(2**50)], ids=["torch", "numpy"])
def test_memory_that_there_is_none_of_is_a_sentence(array):
    with pytest.raises(MemoryError, match=r"not enough memory \(.* for one array\): reduce"), memory_told():
        array()
    with pytest.raises(RuntimeError, match="size"), memory_told():
        torch.zeros(3) @ torch.zeros(4)


def test_a_report_that_comes_to_nothing_leaves_no_folder(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(3, 3))
    np.savetxt(tmp_path / "few.csv", x, delimiter=",", header="a,b,c", comments="")
    arguments = ["compare", "--data", str(tmp_path / "few.csv"), "--latent", "1", "--epochs", "1"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "use more data points (2 of them span at most 1 direction)" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["few.csv"]


def test_bits_of_standardized_data_are_in_their_own_units(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(80, 3)) * [5, 50, 500]
    np.savetxt(tmp_path / "own.csv", x, delimiter=",", header="a,b,c", comments="")
    run = str(tmp_path / "run")
    assert main(["train", "--data", str(tmp_path / "own.csv"), "--standardize", "--run", run, *_SMALL]) == 0
    assert main(["evaluate", "--no-pictures", run, "--bits", "--particles", "20"]) == 0
    shown = capsys.readouterr().out
    assert "the mean log2 of the standardization scale (bits refer to the original units) added" in shown
    assert "None" not in shown


def test_one_feature_leaves_no_room_for_pca(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(60, 1))
    np.savetxt(tmp_path / "one.csv", x, header="a", comments="")
    data = ["--data", str(tmp_path / "one.csv"), "--latent", "1", "--epochs", "1"]
    assert main(["compare", *data, "--out", str(tmp_path / "out")]) == 2
    assert "has one feature, but PPCA needs at least two: use jensen train --model vae" in capsys.readouterr().err
    assert main(["train", *data, "--model", "ppca", "--run", str(tmp_path / "run")]) == 2
    assert "with one feature no latent is possible: use a VAE" in capsys.readouterr().err
    assert main(["train", *data, "--model", "vae", "--run", str(tmp_path / "run"), "--no-pictures"]) == 0


def test_draws_larger_than_memory_are_refused(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", "--data", "bars", "--run", run, *_SMALL]) == 0
    assert main(["sample", run, "-n", "2000000000", "--out", str(tmp_path / "x.npy")]) == 2
    assert "-n 2000000000 needs about 864 GB of memory" in capsys.readouterr().err
    assert not (tmp_path / "x.npy").exists()
