"""Several processes: a step is that of one, measurements do not depend on their number, and none is left waiting."""

import os
import pickle
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from tempfile import gettempdir

import pytest
import together
import torch

SHARED = (
    "full_batch,started_apart,batches,read_by_the_batch,fewer_rows_than_processes,scaled,global_latent,value_per_datum,"
    "free_bits,divided,of_mean,normed,children,validated,noise,resumed,logged,measured,unseeded,swept,apart"
)


def _launched(count, *words, restarts=0):
    how = ["--standalone", "--nproc-per-node", str(count), "--max-restarts", str(restarts)]
    command = [sys.executable, "-m", "torch.distributed.run", *how, *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)


@cache
def _by(count, names=SHARED, restarts=0):
    """The results of each process, and the folder where they were written; computed once for all workers of pytest."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(gettempdir()) / f"jensen-{run}-{count}-{names.partition(',')[0]}"
    try:
        folder.mkdir()
    except FileExistsError:  # another worker has begun
        while not (folder / "done").exists():
            time.sleep(0.1)
    else:
        done = _launched(count, together.__file__, folder, names, restarts=restarts)
        (folder / "done").write_text(done.stderr[-3000:] if done.returncode else "")
    assert not (folder / "done").read_text(), (folder / "done").read_text()
    return [pickle.loads((folder / f"result-{i}.pickle").read_bytes()) for i in range(count)], folder


TWO_AND_THREE = [2, pytest.param(3, marks=pytest.mark.slow)]


def _alike(one, other, tolerance):
    (values, bounds, _), (others, other_bounds, _) = one, other
    assert all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(values, others, strict=True))
    assert bounds == pytest.approx(other_bounds, rel=1e-12)


@pytest.mark.parametrize("count", TWO_AND_THREE)
@pytest.mark.parametrize("name", ["full_batch", "fewer_rows_than_processes", "scaled", "of_mean", "global_latent"])
def test_a_full_batch_moves_parameters_as_in_one_process(count, name):
    alone = getattr(together, name)()
    for found in _by(count)[0]:
        _alike(found[name], alone, 1e-12)
    assert alone[1][-1] > alone[1][0] + 1e-3


def test_processes_start_from_the_parameters_of_the_first():
    for found in _by(2)[0]:
        _alike(found["started_apart"], found["full_batch"], 0.0)


@pytest.mark.parametrize("count", TWO_AND_THREE)
def test_every_row_is_in_one_batch_of_one_process_and_noise_differs(count):
    batches = [found["noise"] for found in _by(count)[0]]
    rows = [value for of_process in batches for values, _ in of_process for value in values]
    assert sorted(rows) == sorted(together._x()[:, 0].tolist())
    sizes = [[len(values) for values, _ in of_process] for of_process in batches]
    assert all(sum(step) == 20 for step in zip(*sizes, strict=False) if step != (1,))
    assert len({noise for of_process in batches for _, noise in of_process}) == sum(map(len, batches))


@pytest.mark.parametrize("count", TWO_AND_THREE)
def test_data_that_are_read_by_the_batch_are_shared(count):
    results, folder = _by(count)
    alone = together.read_by_the_batch(folder)
    for found in results:
        (exact, *others), measured = found["read_by_the_batch"]
        _alike(exact, found["batches"], 0.0)
        for one, other in zip(others, results[0]["read_by_the_batch"][0][1:], strict=True):
            _alike(one, other, 0.0)  # the processes stay together
        assert torch.allclose(measured, alone[1], rtol=1e-12)


def test_the_order_of_batches_is_shared():
    first, second = _by(2)[0]
    _alike(first["batches"], second["batches"], 0.0)
    assert first["batches"][2] == "eager: compile=False; 2 processes, each with a share of every batch"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("global_latent", "a latent site is outside of the plate"),
        ("value_per_datum", "AutoNormal holds a value for each data point"),
        ("free_bits", "ELBO does not sum over the data points"),
    ],
)
def test_what_does_not_divide_is_averaged_and_said(name, reason):
    first, second = (found[name] for found in _by(2)[0])
    _alike(first, second, 0.0)
    assert reason in first[2]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dropout", "each with a share of every batch"),
        ("importance", "each with a share of every batch"),
        ("mean", "each with a share of every batch"),
        ("centred", "each on whole batches: the loss of a batch is not the sum of those of its parts"),
        ("norm", "each on whole batches: the loss of a batch is not the sum of those of its parts"),
        ("spread", "each on whole batches: the loss of a batch is not the sum of those of its parts"),
    ],
)
def test_batches_are_divided_if_their_loss_is(name, said):
    for found in _by(2)[0]:
        assert found["divided"][name].endswith(said)


def test_processes_measure_together_what_they_trained():
    first, second = (found["normed"] for found in _by(2)[0])
    assert first.equal(second)
    assert first.isfinite().all()


def test_threads_started_apart_and_child_processes_work_alone():
    for found in _by(2)[0]:
        assert found["children"] == (2, 1, 1)


@pytest.mark.parametrize("count", TWO_AND_THREE)
def test_measurements_do_not_depend_on_the_number_of_processes(count):
    alone = together.measured()
    for found in _by(count)[0]:
        for one, other in zip(found["measured"], alone, strict=True):
            assert repr(one) == repr(other)
    assert all(found["unseeded"][0].equal(_by(count)[0][0]["unseeded"][0]) for found in _by(count)[0])
    assert not found["unseeded"][0].equal(found["unseeded"][1])


def test_the_validation_bound_is_that_of_all_processes():
    first, second = (found["validated"] for found in _by(2)[0])
    assert first == second
    model, guide = together._vae()
    before = together.fit(
        model, guide, together._x(), epochs=1, lr=1e-12, validation=together._x(70), batch_size=30, progress=False
    )
    assert first[0][0] == pytest.approx(before.validation[0], abs=1.0)


@pytest.mark.parametrize("count", TWO_AND_THREE)
def test_a_resumed_run_is_the_uninterrupted_one(count):
    for found in _by(count)[0]:
        whole, resumed = found["resumed"]
        _alike(whole, resumed, 0.0)


def test_a_checkpoint_of_two_processes_is_continued_by_one():
    results, folder = _by(2)
    model, guide = together._vae(7)
    _, bounds, _ = together._trained(
        model, guide, together._x(), batch_size=20, checkpoint=folder / "of-2.pt", resume=True, epochs=6
    )
    assert bounds[:4] == results[0]["resumed"][1][1]
    assert len(bounds) == 6


def test_the_first_process_alone_writes():
    lines = (_by(2)[1] / "log-2.csv").read_text().splitlines()
    assert len(lines) == 5


def test_the_first_process_sweeps_learning_rates_for_all():
    (losses, kept), (others, others_kept) = (found["swept"] for found in _by(2)[0])
    assert torch.equal(losses, others)
    assert kept
    assert others_kept


def test_apart_each_works_for_itself():
    first, second = (found["apart"] for found in _by(2)[0])
    assert first[1] != second[1]
    assert "processes" not in first[2]


def test_an_error_in_one_process_reaches_all():
    first, second = (found["mistakes"] for found in _by(2, "mistakes")[0])
    for what in ("data", "order", "seed", "model", "validation", "parameters"):
        assert "ValueError: the processes call the same function with different" in first[what], what
        assert "jensen.processes.apart" in first[what]
        assert first[what] == second[what]
    assert "checksum" in first["order"]
    assert "{'seed': 0} in process 0" in first["seed"]
    for what, said in {
        "infinite": "ValueError: data[0] holds 5 values that are NaN or infinite",
        "callback": "ValueError: of my own",
        "step": "ValueError: batch_transform fails",
        "optimizer": "RuntimeError: of the optimizer",
    }.items():
        assert second[what].startswith(said), what
        assert first[what].startswith(f"PeerError: process 1 of 2: {said}"), what
    for what, said in {
        "function": "process 0 is in fit, process 1 in evaluate",
        "elsewhere": "process 0 is in fit > evaluate, process 1 in fit;",
        "interrupt": "KeyboardInterrupt",
        "moved": "parameters of process 1 differ",
        "unfrozen": "they are [] in process 0 and ['model.",
        "nan": "rows",
    }.items():
        assert said in first[what], what
        assert first[what] == second[what], what
    assert first["after"] == second["after"]
    assert len(first["after"]) == 30


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_goes_on():
    results, _ = _by(2, "killed,uninterrupted", restarts=1)
    for found in results:
        restarted, again = found["killed"]
        assert restarted
        _alike(again, found["uninterrupted"], 0.0)


@pytest.mark.slow
def test_compiled_steps_are_those_of_one_process():
    for found in _by(2, "compiled,batches")[0]:
        assert found["compiled"][2].startswith("traced and compiled; 2 processes")
    first, second = (found["compiled"] for found in _by(2, "compiled,batches")[0])
    _alike(first, second, 0.0)
    alone = together._trained(*together._vae(), together._x(), batch_size=20)
    assert first[1][-1] == pytest.approx(alone[1][-1], rel=0.05)


@pytest.mark.slow
def test_the_command_line_trains_and_measures_in_two_processes(tmp_path):
    run = tmp_path / "run"
    train = ["jensen", "train", "--data", "digits", "--epochs", "3", "--run", run, "--no-pictures"]
    done = _launched(2, "-m", "--", *train)
    assert not done.returncode, done.stderr[-3000:]
    assert done.stdout.count("measure it with: jensen evaluate") == 1
    again = _launched(2, "-m", "--", *train)
    assert again.returncode
    assert again.stderr.count("already holds a run") == 1
    measure = ["-m", "jensen", "evaluate", str(run), "--particles", "100", "--json", "--no-pictures"]
    alone = subprocess.run([sys.executable, *measure], capture_output=True, text=True, check=True, cwd=tmp_path)
    both = _launched(2, "-m", "--", *measure[1:])
    ours, theirs = (eval(text, {"null": None, "true": True, "false": False}) for text in (alone.stdout, both.stdout))
    one, other = (next(iter(found["runs"].values()))["summary"]["log_evidence"] for found in (ours, theirs))
    assert one == pytest.approx(other, rel=1e-6)
