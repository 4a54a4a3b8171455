"""Runs: a self-contained folder that survives interrupts of the process."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from jensen.cli import main
from jensen.cli.runs import RunFolder
from jensen.families import MeanField
from jensen.guides import ExactPosterior, amortize
from jensen.inference import Evidence, History, fit, restore
from jensen.models import PPCA
from jensen.networks import mlp
from jensen.results.schema import digest_of

_QUICK = ["--latent", "2", "--hidden", "16", "--lr", "5e-3", "--batch-size", "300"]
_SMALL = [*_QUICK, "--epochs", "3", "--no-pictures"]
_LONG = [*_QUICK, "--epochs", "60", "--schedule", "cosine"]  # 240 steps: long enough for a traced graph
_PICTURES = ("training", "samples", "reconstructions", "latent-map")
_JSON = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}


def _command(*arguments):
    """The command line, with products that no trial of their speed chooses: runs in two processes are compared."""
    code = (
        "import sys; from jensen.cli import main; from jensen.inference import float32_products; "
        "float32_products('default'); sys.exit(main())"
    )
    return [sys.executable, "-c", code, *map(str, arguments)]


def _interrupt(folder, how):
    """Start a run, and send a signal after its first epoch; return the result."""
    reset = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    command = _command("train", "--run", folder, *_LONG, "--no-pictures")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=reset)
    deadline = time.monotonic() + 60
    while not (folder / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    _, log = process.communicate(timeout=60)
    return process.returncode, log


def _state(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def _history(folder):
    return History.from_json(folder / "history.json")


def _epochs(folder):
    return len(_state(folder)["history"]["elbo"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder, its output and log, and the files after training."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run(
        _command("train", "--run", folder, *_LONG, "--json"), capture_output=True, text=True, check=True
    )
    return folder, json.loads(done.stdout, **_JSON), done.stderr, {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run in this process."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", "--run", str(folder), *_SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Two stopped and resumed runs: folders, epochs at the stop, exit status, log."""
    found = {}
    for name, how in {"Ctrl-C": signal.SIGINT, "kill -9": signal.SIGKILL}.items():
        folder = tmp_path_factory.mktemp("stopped") / "run"
        status, log = _interrupt(folder, how)
        kept = (folder / "history.json").exists() and len(_history(folder).elbo)
        found[name] = folder, _epochs(folder), status, log, kept
        (folder / "checkpoint.pt.1.partial").write_bytes(b"half a checkpoint")
    resume = [["train", "--run", str(folder), "--resume", "--no-pictures"] for folder, *_ in found.values()]
    code = f"from jensen.cli import main; print([main(arguments) for arguments in {resume}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[0, 0]\n")
    return found


@pytest.mark.parametrize("how", ["Ctrl-C", "kill -9"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(how, whole, stopped):
    folder, epochs, *_ = stopped[how]
    assert 1 <= epochs < 60
    one, other = _state(whole[0]), _state(folder)
    assert one["names"] == other["names"]
    assert all(torch.equal(a, b) for a, b in zip(one["parameters"], other["parameters"], strict=True))
    assert torch.equal(one["random"], other["random"])
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    for i, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(moment, other["optimizer"]["state"][i][name]) for name, moment in moments.items())
    for name in ("elbo", "validation", "rate", "learning_rate", "steps"):
        assert one["history"][name] == other["history"][name]
    assert not list(folder.glob("*.partial"))


def test_ctrl_c_leaves_a_usable_run_and_says_how_to_go_on(stopped):
    folder, epochs, status, log, kept = stopped["Ctrl-C"]
    assert status == 130
    assert kept == epochs
    last = log.splitlines()[-1]
    assert last == (
        f"jensen: interrupted; {folder} holds epoch {epochs} of 60; continue with: jensen train --run {folder} --resume"
    )
    assert "Traceback" not in log


def test_a_run_folder_holds_all_there_is_to_know(whole):
    folder, document, log, names = whole
    pictures = {
        f"{name}.{kind}" for name in ("training", "samples", "reconstructions", "latent-map") for kind in ("png", "pdf")
    }
    assert names == {"configuration.json", "checkpoint.pt", "history.json", "report.html"} | pictures
    stored = json.loads((folder / "configuration.json").read_text(), **_JSON)
    assert document["configuration"] == {name: part for name, part in stored.items() if name != "sha256"}
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["pair"]["likelihood"] == "gaussian"
    assert stored["facts"]["features"] == 64
    assert _history(folder).elbo == document["history"]["elbo"]
    assert "epoch 3 of 60" in log and "\r" not in log
    assert (folder / "samples.pdf").read_bytes().startswith(b"%PDF")


def test_evaluate_needs_the_folder_alone(whole, capsys):
    folder, document, *_ = whole
    assert main(["evaluate", str(folder), "--split", "validation", "--particles", "300", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, **_JSON)["runs"]["whole"]
    assert found["summary"]["n"] == 200
    error = 4 * found["summary"]["elbo_data_error"]
    assert found["summary"]["elbo"] == pytest.approx(document["history"]["validation"][-1], abs=error)
    assert json.loads((folder / "report.json").read_text(), **_JSON) == found
    again = Evidence.from_json(json.dumps(found["evidence"]))
    assert float(again.elbo.mean()) == found["summary"]["elbo"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "--split validation --particles 300" in page
    assert "<h2>Reconstructions" in page
    assert "Log p(x) is not measured yet" not in page


def test_several_runs_make_one_table(run, tmp_path, capsys):
    other = tmp_path / "exact"
    assert main(["train", "--run", str(other), *_SMALL, "--model", "ppca", "--guide", "exact"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--no-pictures", str(run), str(other), "--particles", "50", "--test-size", "20"]) == 0
    printed = capsys.readouterr().out
    assert "ELBO  log p(x)  ± data" in printed
    assert printed.count("\nsmall ") == 1 and printed.count("\nexact ") == 1
    summary = json.loads((other / "report.json").read_text())["summary"]
    assert summary["gap"] == pytest.approx(0, abs=1e-3)  # the exact posterior


def test_runs_on_other_data_do_not_share_a_table(run, tmp_path, capsys):
    other = tmp_path / "binary"
    assert main(["train", "--run", str(other), *_SMALL, "--binarize", "threshold"]) == 0
    assert json.loads((other / "configuration.json").read_text())["pair"]["likelihood"] == "bernoulli"
    assert main(["evaluate", "--no-pictures", str(run), str(other)]) == 2
    assert "their numbers cannot be compared: evaluate them one at a time" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["npy", "npz", "csv", "png"])
def test_samples_are_written_in_the_format_of_the_ending(ending, run, tmp_path, capsys):
    file = tmp_path / f"draws.{ending}"
    assert main(["sample", str(run), "-n", "5", "--seed", "3", "--out", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shape"] == [5, 64]
    if ending == "npz":
        with np.load(file, allow_pickle=False) as archive:
            assert archive["x"].shape == (5, 64) and archive["z"].shape == (5, 2)
    elif ending == "png":
        assert file.read_bytes().startswith(b"\x89PNG")
    else:
        x = np.load(file) if ending == "npy" else np.loadtxt(file, delimiter=",", skiprows=1)
        assert x.shape == (5, 64) and x.std() > 0.1


def test_means_are_those_of_the_drawn_latents(run, tmp_path):
    from jensen.cli.runs import RunFolder
    from jensen.inference import decode

    file = tmp_path / "means.npz"
    assert main(["sample", str(run), "-n", "4", "--mean", "--out", str(file)]) == 0
    model, _, _ = RunFolder.open(run).trained()
    with np.load(file) as archive:
        assert np.allclose(archive["x"], decode(model, {"z": torch.tensor(archive["z"])}), atol=1e-6)


def test_a_longer_run_goes_on_where_a_shorter_one_ended(tmp_path, capsys):
    short, long = tmp_path / "short", tmp_path / "long"
    assert main(["train", "--run", str(short), *_SMALL]) == 0
    assert main(["train", "--run", str(long), *_SMALL, "--epochs", "5"]) == 0
    assert main(["train", "--run", str(short), "--resume", "--epochs", "5"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(_state(short)["parameters"], _state(long)["parameters"], strict=True))
    assert main(["train", "--run", str(short), "--resume", "--epochs", "4"]) == 2
    assert "--epochs is 4, but" in capsys.readouterr().err


def test_a_run_is_not_overwritten_unasked(run, tmp_path, capsys):
    before = _state(run)["history"]["elbo"]
    assert main(["train", "--run", str(run), *_SMALL, "--seed", "1"]) == 2
    assert "continue it with --resume, replace it with --overwrite" in capsys.readouterr().err
    assert _state(run)["history"]["elbo"] == before
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["train", "--run", str(tmp_path), *_SMALL, "--overwrite"]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_overwriting_removes_the_files_of_a_run_alone(tmp_path):
    folder = tmp_path / "run"
    assert main(["train", "--run", str(folder), *_SMALL]) == 0
    (folder / "notes.txt").write_text("mine")
    (folder / "report.json").write_text("{}")
    assert main(["train", "--run", str(folder), *_SMALL, "--seed", "1", "--overwrite"]) == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "report.json").exists()
    assert json.loads((folder / "configuration.json").read_text())["training"]["seed"] == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--lr", "1", "--lr was 0.005 when"),
        ("--model", "ppca", "--model was vae when"),
        ("--seed", "4", "--seed was 0 when"),
        ("--data", "mnist", "--data was digits when"),
    ],
)
def test_a_run_goes_on_as_it_was_begun(option, value, message, run, capsys):
    assert main(["train", "--run", str(run), "--resume", option, value]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_diverges_fails_with_1_and_keeps_its_epochs(tmp_path, monkeypatch, capsys):
    from jensen.cli import train

    fall = lambda optimizer, T_max: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: 1.0 if e < 2 else 1e30)
    monkeypatch.setattr(train.torch.optim.lr_scheduler, "CosineAnnealingLR", fall)
    arguments = ["train", "--run", str(tmp_path / "r"), *_SMALL, "--epochs", "9", "--schedule", "cosine", "--json"]
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert "start again with a lower --lr and --overwrite" in json.loads(shown.out)["error"]
    assert len(_history(tmp_path / "r").elbo) == 2


def test_a_run_that_never_began_leaves_no_folder(tmp_path, capsys):
    folder = tmp_path / "r"
    assert main(["train", "--run", str(folder), *_SMALL, "--lr", "1e30"]) == 1
    assert not folder.exists()
    arguments = ["--model", "hierarchical", "--guide", "ladder", "--latent", "2,2", "--objective", "iwae"]
    assert main(["train", "--run", str(folder), *_SMALL, *arguments, "--gradient", "dreg"]) == 2
    assert "both depend on" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("model", "guide", "more"),
    [
        ("ppca", "full-covariance", []),
        ("factor-analysis", "exact", []),
        ("mixture-of-ppca", "mean-field", ["--components", "3"]),
        ("gaussian-mixture-vae", "iaf", ["--objective", "iwae"]),
        ("hierarchical", "bottom-up", ["--latent", "4,2", "--hidden", "16,16/8,8", "--gradient", "stl"]),
        ("hierarchical", "ladder", ["--latent", "4,2", "--beta", "0.5"]),
        ("hierarchical", "spline", ["--latent", "4,2", "--objective", "renyi", "--alpha", "0.3"]),
        ("vae", "mixture", ["--likelihood", "student-t", "--patience", "2"]),
    ],
)
def test_every_model_is_trained_and_measured_again(model, guide, more, tmp_path):
    folder = tmp_path / "run"
    options = [*_SMALL, "--epochs", "2", "--batch-size", "600", "--model", model, "--guide", guide, *more]
    assert main(["train", "--run", str(folder), *options]) == 0
    assert (
        main(
            [
                "evaluate",
                "--no-pictures",
                str(folder),
                "--particles",
                "30",
                "--test-size",
                "40",
                "--split",
                "validation",
            ]
        )
        == 0
    )
    measured = json.loads((folder / "report.json").read_text())["summary"]["elbo"]
    assert measured == pytest.approx(_history(folder).validation[-1], abs=3.0)


def test_patience_keeps_the_best_epoch(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "r"
    options = [*_SMALL, "--epochs", "60", "--lr", "0.1", "--patience", "3"]
    assert main(["train", "--run", str(folder), *options]) == 0
    history = _history(folder)
    assert len(history.elbo) == history.best_epoch + 3
    state = _state(folder)
    from jensen.cli.runs import RunFolder

    model, guide, _ = RunFolder.open(folder).trained()
    parts = [*model.buffers(), *guide.buffers(), *model.parameters(), *guide.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(parts, state["best"], strict=True))
    restore(model, guide, folder / "checkpoint.pt", best=False)
    assert all(torch.equal(a, b) for a, b in zip(parts, state["parameters"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(state["best"], state["parameters"], strict=True))


_MOVES = ("average", "clip", "weight_decay", "schedule", "tolerance")
_MOVED = ["--average", "polyak", "--clip", "5", "--weight-decay", "1e-4", "--schedule", "warmup-cosine"]


def test_how_parameters_move_is_recorded_and_resumed(tmp_path, monkeypatch, capsys):
    from jensen.cli import train

    given = []
    monkeypatch.setattr(train, "fit", lambda *data, **how: given.append(how) or fit(*data, **how))
    folder = tmp_path / "r"
    assert main(["train", "--run", str(folder), *_SMALL, *_MOVED]) == 0
    kept = json.loads((folder / "configuration.json").read_text())["training"]
    assert [kept[name] for name in _MOVES] == ["polyak", 5.0, 1e-4, "warmup-cosine", None]
    assert main(["train", "--run", str(folder), "--resume", "--no-pictures"]) == 0
    for how in given:
        assert [how[name] for name in _MOVES] == [kept[name] for name in _MOVES]
    model, guide, _ = RunFolder.open(folder).trained()
    parameters = [*model.parameters(), *guide.parameters()]
    for mean in _state(folder)["average"]:
        assert any(torch.equal(mean, p) for p in parameters if p.shape == mean.shape)
    for more in (["--clip", "2"], ["--tolerance", "0.1"], ["--epochs", "9"]):
        assert main(["train", "--run", str(folder), "--resume", *more]) == 2
    shown = capsys.readouterr().err
    assert "--clip was 5.0 when" in shown
    assert "--tolerance was not given when" in shown
    assert "follows a schedule (warmup-cosine) over 3 epochs" in shown


def test_tolerance_stops_a_run(tmp_path):
    folder = tmp_path / "r"
    options = [*_SMALL, "--epochs", "40", "--tolerance", "1000"]
    assert main(["train", "--run", str(folder), *options]) == 0
    assert len(_history(folder).elbo) == 11  # the window of ten epochs is full
    assert "average" in _state(folder)


def test_a_folder_of_an_earlier_version_is_resumed(run, tmp_path, capsys):
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    (folder / "configuration.json").write_bytes((run / "configuration.json").read_bytes())

    def older(configuration):
        for name in ("clip", "weight_decay", "average", "tolerance"):
            del configuration["training"][name]

    _edited(older)(folder)
    assert main(["train", "--run", str(folder), "--resume", "--average", "ema"]) == 2
    assert "--average was not given when" in capsys.readouterr().err
    assert main(["train", "--run", str(folder), "--resume", "--epochs", "4", "--no-pictures"]) == 0
    assert _epochs(folder) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clip", "0"], "--clip must be a positive number, but got 0"),
        (["--tolerance", "nan"], "--tolerance must be a positive number, but got nan"),
        (["--weight-decay", "-1"], "--weight-decay must be 0 or a positive number, but got -1"),
        (["--tolerance", "0.1", "--patience", "3"], "use only one"),
        (["--average", "emma"], "there is no average 'emma'; did you mean ema?"),
    ],
)
def test_impossible_ways_to_move_are_refused_before_anything_is_written(options, message, tmp_path, capsys):
    folder = tmp_path / "r"
    try:
        status = main(["train", "--run", str(folder), *_SMALL, *options])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def _edited(change, digest=True):
    """A change of the configuration, with a new digest."""

    def damage(folder):
        path = folder / "configuration.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps({**document, "sha256": digest_of(document)} if digest else document))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "checkpoint.pt").write_bytes(b"torn"), "cannot be read as a checkpoint"),
        (lambda folder: (folder / "checkpoint.pt").unlink(), "has no checkpoint, because no epoch was completed"),
        (lambda folder: (folder / "configuration.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "configuration.json").write_text("{}"), "is not the configuration of a run"),
        (
            lambda folder: (folder / "configuration.json").write_text('{"jensen_run": 2}'),
            "configuration.json has schema version 2",
        ),
        (lambda folder: (folder / "configuration.json").unlink(), "it has no configuration.json"),
        (lambda folder: (folder / "configuration.json").write_text('{"a":' * 100_000), "is not valid JSON"),
        (_edited(lambda c: c["training"].update(lr=0.1), digest=False), "its SHA-256 does not match"),
        (_edited(lambda c: c.pop("training")), r"misses ['training']"),
        (_edited(lambda c: c["pair"].pop("latent")), r"misses ['latent']"),
        (_edited(lambda c: c["pair"].update(model="vea")), "there is no model 'vea': did you mean vae?"),
        (_edited(lambda c: c["pair"].update(latent=[])), "--latent and --hidden must have at least one number"),
        (_edited(lambda c: c["pair"].update(latent=["2"])), "configuration.pair.latent[0] must be of type int"),
        (_edited(lambda c: c["training"].update(objective="x")), "there is no objective 'x'"),
        (_edited(lambda c: c["training"].update(seed=-1)), "seed must be below 2^32"),
        (_edited(lambda c: c["training"].update(schedule="none")), "configuration.training.schedule must be one of"),
        (_edited(lambda c: c["facts"].update(features=0)), "these numbers must be at least 1"),
        (_edited(lambda c: c["facts"].update(image_shape=[9, 9])), "cannot have 64 features"),
        (_edited(lambda c: c.update(versions=None)), "configuration.versions must be an object"),
    ],
)
def test_a_damaged_folder_says_what_is_wrong(damage, message, run, tmp_path, capsys):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("configuration.json", "checkpoint.pt"):
        (folder / name).write_bytes((run / name).read_bytes())
    damage(folder)
    assert main(["evaluate", "--no-pictures", str(folder)]) == 2
    assert message in capsys.readouterr().err


def _own(folder, rows):
    """A user's file, with a class in its last column."""
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    text = "\n".join(f"{a:.6f},{b:.6f},{c:.6f},{int(a > 0)}" for a, b, c in x.tolist())
    (folder / "x.csv").write_text(f"a,b,c,kind\n{text}\n")
    return folder / "x.csv"


def test_a_file_of_ones_own_is_trained_on_and_told_by_its_content(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _own(tmp_path, 300)
    assert main(["train", "--run", "r", "--data", "x.csv", "--label", "kind", *_SMALL]) == 0
    facts = json.loads((tmp_path / "r" / "configuration.json").read_text())["facts"]
    assert facts["features"] == 3 and facts["train"] == 240
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the file is found from anywhere
    assert main(["evaluate", "../r", "--particles", "30"]) == 0
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert '<th scope="col">a</th><th scope="col">b</th><th scope="col">c</th>' in page  # of samples
    assert re.search(r"\\na -?\d[\d.e-]*, b -?\d[\d.e-]*, c -?\d", page)  # of marks
    assert main(["train", "--run", "../r", "--resume", "--data", "../x.csv"]) == 0
    _own(tmp_path, 301)
    capsys.readouterr()
    assert main(["evaluate", "--no-pictures", "../r", "--particles", "30"]) == 2
    assert "has changed since the run was started" in capsys.readouterr().err


def test_images_of_ones_own_are_drawn_and_dequantized(tmp_path, capsys):
    grey = np.random.default_rng(0).integers(0, 4, size=(120, 12))
    np.save(tmp_path / "grey.npy", grey.astype(np.float32))
    own = ["--data", str(tmp_path / "grey.npy"), "--levels", "4", "--image-shape", "3,4"]
    assert main(["train", "--run", str(tmp_path / "r"), *own, *_QUICK, "--epochs", "1"]) == 0
    assert "grey levels are dequantized" in capsys.readouterr().err
    stored = json.loads((tmp_path / "r" / "configuration.json").read_text())
    assert stored["facts"]["image_shape"] == [3, 4] and stored["facts"]["bits_offset"] == 2.0
    assert (tmp_path / "r" / "reconstructions.png").exists()
    assert main(["sample", str(tmp_path / "r"), "-n", "4", "--out", str(tmp_path / "s.png")]) == 0
    assert main(["evaluate", str(tmp_path / "r"), "--particles", "30"]) == 0
    assert main(["train", "--run", str(tmp_path / "r"), "--resume", *own]) == 0


def test_a_misspelt_folder_suggests_the_right_one(run, capsys):
    assert main(["sample", str(run.with_name("smal"))]) == 2
    assert f"did you mean {run}?" in capsys.readouterr().err


def _pair():
    model = PPCA(5, latent=2)
    return model, amortize(model, mlp(5, [8]), MeanField, context=8)


@pytest.mark.parametrize(("option", "value"), [("lr", 1.0), ("batch_size", 7), ("optimizer", torch.optim.SGD)])
def test_a_checkpoint_says_with_which_settings_it_was_begun(option, value, tmp_path):
    pair, x = _pair(), torch.randn(20, 5)
    settings = {"batch_size": 10, "checkpoint": tmp_path / "c.pt", "progress": False}
    fit(*pair, x, epochs=1, **settings)
    with pytest.raises(ValueError, match=f"was started with .*{option}.*: use the first settings"):
        fit(*pair, x, epochs=2, resume=True, **{**settings, option: value})
    with pytest.raises(ValueError, match=r"was started with \{'n': 20\}, but now got \{'n': 19\}"):
        fit(*pair, x[1:], epochs=2, resume=True, **settings)


def test_a_checkpoint_of_another_pair_is_not_restored(tmp_path):
    fit(*_pair(), torch.randn(20, 5), epochs=1, checkpoint=tmp_path / "c.pt", progress=False)
    other = PPCA(5, latent=3)
    before = other.weight.clone()
    with pytest.raises(ValueError, match=r"only it has .*model.weight \[5, 2\].*only these have .*\[5, 3\]"):
        restore(other, ExactPosterior(other), tmp_path / "c.pt")
    assert torch.equal(other.weight, before)


def test_a_run_goes_on_where_its_data_are_now(tmp_path, capsys):
    file = _own(tmp_path, 60)
    arguments = ["train", "--run", str(tmp_path / "r"), *_SMALL]
    assert main([*arguments, "--data", str(file)]) == 0
    file.rename(tmp_path / "moved.csv")
    again = ["train", "--run", str(tmp_path / "r"), "--resume", "--epochs", "4", "--no-pictures"]
    assert main(again) == 2
    assert "give its new path with --data FILE" in capsys.readouterr().err
    _own(tmp_path, 61).rename(tmp_path / "other.csv")
    assert main([*again, "--data", str(tmp_path / "other.csv")]) == 2
    assert "has changed since the run was started" in capsys.readouterr().err
    assert main([*again, "--data", str(tmp_path / "moved.csv")]) == 0
    assert _epochs(tmp_path / "r") == 4
    assert (
        main(["evaluate", "--no-pictures", str(tmp_path / "r"), "--particles", "20"]) == 0
    )  # it has the absolute path now


def test_two_processes_do_not_train_into_one_folder(run, tmp_path, capsys):
    folder = RunFolder.open(run)
    with folder.alone():
        for how in (["--resume"], ["--overwrite"]):
            assert main(["train", "--run", str(run), *how, *_SMALL]) == 2
            assert f"another process is training in {run}" in capsys.readouterr().err
    assert _epochs(run) == 3
    assert main(["train", "--run", str(run), "--resume", "--no-pictures"]) == 0


def test_a_checkpoint_that_another_run_wrote_is_not_written_over(tmp_path):
    file, x = tmp_path / "c.pt", torch.randn(20, 5)
    pair, other = _pair(), _pair()

    class Intruder:
        def __init__(self, act):
            self.act = act

        def after_epoch(self, history, model, guide):
            if len(history.elbo) == 2:
                self.act()

        def close(self):
            pass

    same = {"checkpoint": file, "progress": False}
    begin = Intruder(lambda: fit(*other, x, epochs=1, **same))
    with pytest.raises(FileExistsError, match=r"c\.pt was written by another run since the last epoch of this run"):
        fit(*pair, x, epochs=4, callbacks=begin, **same)
    assert History.from_checkpoint(file).steps == 1
    go_on = Intruder(lambda: fit(*other, x, epochs=4, resume=True, **same))
    file.unlink()
    with pytest.raises(FileExistsError, match="another run"):
        fit(*pair, x, epochs=4, callbacks=go_on, **same)
    assert len(History.from_checkpoint(file).elbo) == 4
    touch = Intruder(lambda: file.write_bytes(file.read_bytes()))
    assert len(fit(*pair, x, epochs=6, resume=True, callbacks=touch, **same).elbo) == 6
    assert len(fit(*pair, x, epochs=3, callbacks=Intruder(file.unlink), **same).elbo) == 3


def _said(folder, x, capsys, *more):
    """The output of train and evaluate for a user's table."""
    np.savetxt(folder / "own.csv", x, delimiter=",", header=",".join("abcdefgh"[: x.shape[1]]), comments="")
    run = str(folder / "run")
    assert main(["train", "--data", str(folder / "own.csv"), "--run", run, *_SMALL, *more, "--overwrite"]) == 0
    told = capsys.readouterr()
    assert main(["evaluate", "--no-pictures", run, "--particles", "30"]) == 0
    return told, capsys.readouterr()


def test_features_of_other_scales_are_told_and_stand_beside_a_baseline(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(200, 3)) * [1, 1, 300]
    train, measured = _said(tmp_path, x, capsys)
    assert "features differ in scale by a factor of" in train.err and "--standardize" in train.err
    assert "below the baseline" in measured.out and "below" not in measured.err
    assert "\nGaussian per feature  " in measured.out  # fitted to the training data, or its row would say otherwise
    train, measured = _said(tmp_path, x, capsys, "--standardize", "--model", "ppca", "--guide", "exact")
    assert "scale" not in train.err + measured.err and "below" not in measured.err + measured.out


def test_bytes_without_levels_are_told(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (100, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    arguments = ["train", "--data", str(tmp_path / "x.npy"), "--image-shape", "4,4", "--run", str(tmp_path / "r")]
    assert main([*arguments, *_SMALL]) == 0
    assert "give their number, levels=256, in a shell --levels 256" in capsys.readouterr().err
    assert main([*arguments, *_SMALL, "--levels", "256", "--overwrite"]) == 0
    assert "say how many" not in capsys.readouterr().err


def test_a_collapsed_posterior_is_told(tmp_path, capsys):
    arguments = ["--run", str(tmp_path / "r"), *_QUICK, "--epochs", "5", "--no-pictures", "--json"]
    assert main(["train", "--data", "pinwheel", "--beta", "50", *arguments]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["active_units"] == {"z": "0 of 2"}
    assert "posterior collapse: no unit of z carries information about the data" in shown.err
    assert main(["evaluate", "--no-pictures", str(tmp_path / "r"), "--particles", "30", "--test-size", "100"]) == 0
    shown = capsys.readouterr()
    assert "active units, z: 0 of 2" in shown.out and "posterior collapse" in shown.err


def test_runs_of_several_seeds_are_one_row(tmp_path, capsys):
    several = ["train", "--data", "pinwheel", *_SMALL, "--epochs", "2", "--seed", "5"]
    assert main([*several, "--seeds", "2", "--run", str(tmp_path / "a"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["runs"]) == ["seed-5", "seed-6"]
    assert [run["configuration"]["training"]["seed"] for run in document["runs"].values()] == [5, 6]
    assert main([*several, "--run", str(tmp_path / "b")]) == 0
    assert torch.equal(
        _state(tmp_path / "a" / "seed-5")["parameters"][-1], _state(tmp_path / "b")["parameters"][-1]
    )  # the same run as one alone
    assert main([*several, "--seeds", "2", "--run", str(tmp_path / "b")]) == 2
    assert "holds a single run, so --seeds cannot use it" in capsys.readouterr().err
    assert main([*several, "--seeds", "0"]) == 2
    (tmp_path / "a" / "seed-6" / "configuration.json").unlink()  # as without the second
    for file in (tmp_path / "a" / "seed-6").iterdir():
        file.unlink()
    assert main([*several, "--seeds", "2", "--run", str(tmp_path / "a"), "--resume"]) == 0
    assert "measure them with: jensen evaluate" in capsys.readouterr().out
    quick = ["--particles", "20", "--test-size", "50"]
    assert main(["evaluate", "--no-pictures", str(tmp_path / "a"), str(tmp_path / "b"), *quick, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert list(measured["runs"]) == ["a/seed-5", "a/seed-6", "b"]
    row = measured["comparison"]["rows"]["a"]
    means = [measured["runs"][f"a/seed-{seed}"]["summary"]["elbo"] for seed in (5, 6)]
    assert [run["elbo"] for run in row["runs"]] == pytest.approx(means)
    assert row["elbo"] == pytest.approx(sum(means) / 2)
    assert "b, one training run, assumed to vary like the other rows" in measured["comparison"]["sentence"]
    assert (tmp_path / "a" / "seed-6" / "report.json").is_file()
    assert main(["evaluate", "--no-pictures", str(tmp_path / "a"), *quick]) == 0
    shown = capsys.readouterr().out
    assert "2 training runs" in shown and "± runs" in shown


def test_seeds_that_are_not_begun_go_on_as_the_others(tmp_path, capsys):
    file, run = tmp_path / "own.csv", tmp_path / "several"
    np.savetxt(file, np.random.default_rng(0).normal(size=(60, 3)), delimiter=",", header="a,b,c", comments="")
    quick = ["--epochs", "2", "--no-pictures"]
    begun = ["train", "--data", str(file), "--drop", "b", "--latent", "1", "--hidden", "4", "--lr", "0.02"]
    assert main([*begun, *quick, "--seeds", "2", "--run", str(run)]) == 0
    again = ["train", "--run", str(run), "--seeds", "3", "--resume", "--no-pictures"]
    assert main([*again, "--lr", "0.1"]) == 2
    assert "--lr was 0.02 when" in capsys.readouterr().err
    assert main(again) == 0
    one, third = (RunFolder.open(run / f"seed-{seed}").configuration for seed in (1, 2))
    assert third["training"] == {**one["training"], "seed": 2}
    assert all(third[part] == one[part] for part in ("data", "facts", "pair"))
    for mistake in (["train", "--resume", "--run", str(run)], ["evaluate", str(run / "seed-3")], ["sample", str(run)]):
        assert main(mistake) == 2
    said = capsys.readouterr().err
    assert said.count("it holds the runs of --seeds 3: give one of them") == 2
    assert main(["train", "--run", str(tmp_path / "none"), "--seeds", "2", "--resume"]) == 2
    assert "holds no run of --seeds to continue: omit --resume" in capsys.readouterr().err
    assert main(["train", "--resume", "--run", str(run / "seed-2"), "--epochs", "3", "--no-pictures"]) == 0
    assert main(["evaluate", "--no-pictures", str(run), "--particles", "5"]) == 2
    assert "differ in more than the seed (epochs 2 and 3)" in capsys.readouterr().err


def test_runs_older_than_an_option_are_as_if_it_was_not_given(tmp_path, capsys):
    file = tmp_path / "own.csv"
    np.savetxt(file, np.random.default_rng(0).normal(size=(60, 3)), delimiter=",")
    runs = [str(tmp_path / name) for name in ("old", "new")]
    for run in runs:
        assert main(["train", "--data", str(file), *_QUICK, "--epochs", "1", "--no-pictures", "--run", run]) == 0
    old = RunFolder.open(tmp_path / "old")
    for name in ("header", "drop", "only", "missing", "member"):
        del old.configuration["data"][name]
    old.write()
    assert main(["evaluate", "--no-pictures", *runs, "--particles", "5"]) == 0
    capsys.readouterr()
    for option in (["--drop", "1"], ["--no-header"], ["--only", "0"], ["--missing", "NA"]):
        assert main(["train", "--resume", "--run", runs[0], *option, "--epochs", "2", "--no-pictures"]) == 2
        assert f"{option[0].replace('no-', '')} was not given when" in capsys.readouterr().err
    assert main(["train", "--resume", "--run", runs[0], "--epochs", "2", "--no-pictures"]) == 0
