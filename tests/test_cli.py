"""The command line: what it prints, writes and answers."""

import json
import subprocess
import sys

import pytest

from jensen import __version__
from jensen.cli import main

_QUICK = ["--epochs", "2", "--particles", "50", "--test-size", "20"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One quick run of the whole job: its output, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("report")
    command = [sys.executable, "-m", "jensen", "compare", "--out", str(out), *_QUICK]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr, out


def test_both_blocks_are_printed_with_their_sentences(report):
    printed, log, _ = report
    assert printed.count("ELBO  log p(x)  ± data") == 2
    for row in (
        "prior",
        "mean-field",
        "full-covariance",
        "exact",
        "PPCA",
        "VAE mean-field",
        "VAE full-covariance",
    ):
        assert any(line.startswith(row + " ") for line in printed.splitlines()), row
    assert "what a guide loses of the ELBO is its own cost" in printed
    assert "differ in p and q at once" in printed
    assert "digits: 20 test data, 50 particles each, nats per datum" in printed
    assert "training mean-field: 2 epochs" in log  # plain lines, since this is no terminal


def test_the_report_holds_the_numbers_and_the_pictures(report):
    printed, _, out = report
    stored = json.loads((out / "report.json").read_text())
    assert set(stored["blocks"]) == {"one-model", "trained-together"}
    exact = stored["blocks"]["one-model"]["rows"]["exact posterior"]
    assert exact["gap"] == pytest.approx(0, abs=1e-4)
    assert f"{exact['exact']:.2f}" in printed
    assert exact["parameters"] == 0
    assert stored["versions"]["jensen"] == __version__
    names = ["bounds-one-model", "bounds-trained-together", "latent-map", "samples", "reconstructions"]
    assert stored["pictures"] == [f"{name}.png" for name in names]
    for name in stored["pictures"]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_guides_share_their_model_and_pairs_do_not(report):
    stored = json.loads((report[2] / "report.json").read_text())["blocks"]
    assert stored["one-model"]["shared_model"]
    assert not stored["trained-together"]["shared_model"]
    assert len({row["exact"] for row in stored["one-model"]["rows"].values()}) == 1


def test_bits_add_the_grey_levels(tmp_path, capsys):
    arguments = ["compare", "--model", "ppca", "--guides", "exact", *_QUICK]
    assert main([*arguments, "--out", str(tmp_path / "a"), "--bits"]) == 0
    printed = capsys.readouterr().out
    assert "log2 17 of the grey-level scale is added" in printed
    row = json.loads((tmp_path / "a" / "report.json").read_text())["blocks"]["one-model"]["rows"]["exact posterior"]
    bits = -row["exact"] / (64 * 0.6931471805599453) + 4.087462841250339
    assert f"{bits:.3f}" in printed


@pytest.mark.data("binarized_mnist")
def test_binary_data_leave_ppca_out_of_the_second_block(tmp_path, capsys):
    assert (
        main(
            [
                "compare",
                "--data",
                "binarized_mnist",
                "--model",
                "vae",
                "--out",
                str(tmp_path),
                "--epochs",
                "1",
                "--particles",
                "30",
                "--test-size",
                "10",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "A Bernoulli VAE" in printed
    assert "\nPPCA" not in printed


@pytest.mark.data("oil_flow")
def test_data_that_are_no_images_have_no_image_pictures(tmp_path):
    assert main(["compare", "--data", "oil_flow", "--latent", "2", "--out", str(tmp_path), *_QUICK]) == 0
    assert not (tmp_path / "samples.png").exists()
    assert (tmp_path / "latent-map.png").exists()


def test_gaps_are_printed_drawn_and_stored(tmp_path, capsys):
    guides = ["--guides", "mean-field,laplace,exact"]
    assert main(["compare", "--model", "ppca", "--gaps", *guides, "--out", str(tmp_path), *_QUICK]) == 0
    head, _, mean_field, laplace, _ = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert head.split()[-6:-4] == ["approximation", "amortization"]
    assert mean_field.startswith("mean-field") and laplace.startswith("laplace")
    stored = json.loads((tmp_path / "report.json").read_text())
    split = {name: row["gaps"] for name, row in stored["blocks"]["one-model"]["rows"].items()}
    assert split["mean-field"]["approximation"] == pytest.approx(0.477, abs=0.1)  # its known KL
    assert split["laplace"]["gap"] == pytest.approx(0, abs=1e-3)
    assert (tmp_path / "gaps-one-model.png").exists() and "gaps-one-model.png" in stored["pictures"]


def test_help_explains_every_option_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no word is broken at a hyphen
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in (
        "data",
        "model",
        "guides",
        "latent",
        "particles",
        "epochs",
        "seed",
        "out",
        "bits",
        "gaps",
        "test-size",
    ):
        assert f"--{option}" in text
    for default in (
        "digits",
        "all",
        "8",
        "5000",
        "0",
        "jensen-report",
        "prior,mean-field,full-covariance,exact",
    ):
        assert f"(default: {default})" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guides", "mean-feld"], "there is no guide 'mean-feld'; did you mean mean-field?"),
        (["--guides", ","], "--guides needs at least one of"),
        (["--particles", "0"], "--particles is at least 1, but got 0"),
        (["--epochs", "0"], "--epochs is at least 1, but got 0"),
        (["--latent", "64"], "PPCA needs 1 <= latent < features, but got latent=64, features=64"),
        (["--model", "vae", "--guides", "exact"], "--guides needs one of mean-field, low-rank, full-covariance"),
    ],
)
def test_mistakes_are_named_and_exit_with_2(arguments, message, tmp_path, capsys):
    assert main(["compare", "--out", str(tmp_path), *_QUICK, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_absent_data_say_where_to_put_them(tmp_path, monkeypatch, capsys):
    from jensen.datasets import files

    monkeypatch.setenv("JENSEN_DATA", str(tmp_path))
    monkeypatch.setattr(files.pooch, "os_cache", lambda name: tmp_path / "cache")
    assert main(["compare", "--data", "oil_flow", "--out", str(tmp_path)]) == 2
    assert "JENSEN_DATA" in capsys.readouterr().err


def test_an_interruption_is_not_a_traceback(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("jensen.cli.command.run", interrupt)
    assert main(["compare", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
