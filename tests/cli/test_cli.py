"""The command line: its output, files and exit status."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from jensen import __version__
from jensen.cli import main
from jensen.cli.options import parser
from jensen.cli.report import images_of
from jensen.cli.sources import OWN, batch_transform, holds_bits, reopen, settle
from jensen.kernel.batches import placed

_QUICK = ["--epochs", "2", "--particles", "50", "--test-size", "20", "--no-pictures"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One quick run of the whole job: its output, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("report")
    command = [sys.executable, "-m", "jensen", "compare", "--out", str(out), *_QUICK[:-1]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr, out


def _printed_exact(printed):
    """The exact log p(x) in the first row of the exact posterior, to the printed digits."""
    row = next(line for line in printed.splitlines() if line.startswith("exact posterior "))
    return float(row.split()[6])


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
    assert "All rows share one model, so ELBO differences measure the guides." in printed
    assert "Each row is a different model: compare log p(x), not the ELBO." in printed
    assert "digits: 20 test points, 50 particles each, nats per data point" in printed
    assert "training mean-field: 2 epochs" in log  # plain lines, since this is no terminal


def test_the_report_holds_the_numbers_and_the_pictures(report):
    printed, _, out = report
    stored = json.loads((out / "report.json").read_text())
    assert set(stored["blocks"]) == {"one-model", "trained-together"}
    exact = stored["blocks"]["one-model"]["rows"]["exact posterior"]
    assert exact["gap"] == pytest.approx(0, abs=1e-4)
    assert _printed_exact(printed) == pytest.approx(exact["exact"], abs=0.006)
    assert exact["parameters"] == 0
    assert stored["versions"]["jensen"] == __version__
    names = ["bounds-one-model", "bounds-trained-together", "latent-map", "samples", "reconstructions"]
    assert stored["pictures"] == [f"{name}.png" for name in names]
    for name in stored["pictures"]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_page_of_the_report_says_what_it_was_made_from(report):
    _, _, out = report
    page = (out / "report.html").read_text(encoding="utf-8")
    for title in ("One model: table", "Trained together: table", "Trained together: bounds", "Samples of", "Training"):
        assert f"<h2>{title}" in page, title
    assert "jensen compare --out" in page
    assert f"jensen {__version__}" in page
    assert "&#34;seed&#34;: 0" in page
    assert "Burda, Grosse and Salakhutdinov (2016)" in page
    assert "Alpaydin and Kaynak (1998)" in page  # whom to cite for the data
    assert str(out.parent) not in page.split("How to repeat it")[0]


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
    assert _printed_exact(printed) == pytest.approx(bits, abs=1e-3)


@pytest.mark.data("binarized_mnist")
def test_seeds_of_a_report_are_training_runs(tmp_path, capsys):
    arguments = ["compare", "--data", "pinwheel", "--latent", "1", "--guides", "mean-field,exact", "--seeds", "2"]
    assert main([*arguments, *_QUICK, "--out", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    one, together = (document["blocks"][name] for name in ("one-model", "trained-together"))
    assert "runs" not in one["rows"]["exact posterior"]
    assert {name: len(row["runs"]) for name, row in together["rows"].items()} == {"PPCA": 2, "VAE mean-field": 2}
    for block in (one, together):
        assert "Errors cover test points and training runs (2 of each row)." in block["sentence"]
    assert "PPCA, seed 1" in document["histories"]
    assert main([*arguments[:-1], "0", "--out", str(tmp_path)]) == 2
    assert "--seeds must be at least 1" in capsys.readouterr().err


def test_a_report_says_what_is_wrong_with_data_and_pairs(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(120, 3)) * [1, 1, 300]
    np.savetxt(tmp_path / "own.csv", x, delimiter=",", header="a,b,c", comments="")
    arguments = ["compare", "--data", str(tmp_path / "own.csv"), "--latent", "2", "--guides", "mean-field"]
    assert main([*arguments, "--epochs", "1", *_QUICK[2:], "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "own: features differ in scale by a factor of" in shown.err
    assert "Below one Gaussian per feature: " in shown.out and "Gaussian per feature  log p(x)" in shown.out


@pytest.mark.slow
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
                "--no-pictures",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "Bernoulli VAEs only" in printed
    assert "\nPPCA" not in printed


@pytest.mark.slow
@pytest.mark.data("oil_flow")
def test_data_that_are_no_images_have_no_image_pictures(tmp_path):
    assert main(["compare", "--data", "oil_flow", "--latent", "2", "--out", str(tmp_path), *_QUICK[:-1]]) == 0
    assert not (tmp_path / "samples.png").exists()
    assert (tmp_path / "latent-map.png").exists()


def test_gaps_are_printed_drawn_and_stored(tmp_path, capsys):
    guides = ["--guides", "mean-field,laplace,exact"]
    assert main(["compare", "--model", "ppca", "--gaps", *guides, "--out", str(tmp_path), *_QUICK[:-1]]) == 0
    head, _, mean_field, laplace, _, baseline, own = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert head.split()[-6:-4] == ["approximation", "amortization"]
    assert re.match(r"Gaussian per feature +log p\(x\) ", baseline)
    assert own.startswith("k>0.7, guide samples only  mean-field ")
    assert mean_field.startswith("mean-field") and laplace.startswith("laplace")
    stored = json.loads((tmp_path / "report.json").read_text())
    split = {name: row["gaps"] for name, row in stored["blocks"]["one-model"]["rows"].items()}
    assert split["mean-field"]["approximation"] == pytest.approx(0.477, abs=0.1)  # its known KL
    assert split["laplace"]["gap"] == pytest.approx(0, abs=1e-3)
    assert (tmp_path / "gaps-one-model.png").exists() and "gaps-one-model.png" in stored["pictures"]


def test_help_explains_every_option_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # words are not broken at hyphens
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
        (["--model", "vea"], "argument --model: there is no model 'vea'; did you mean vae?"),
        (["--particels", "5"], "there is no option --particels; did you mean --particles?"),
        (["--data", "digist"], "there is no data set 'digist'; did you mean 'digits'?"),
        (["--epochs", "many"], "argument --epochs: must be a whole number or auto, but got 'many'"),
        (["digits"], "unexpected argument digits"),
        (["--guides", ","], "--guides needs at least one of"),
        (["--particles", "0"], "--particles must be at least 1, but got 0"),
        (["--epochs", "0"], "--epochs must be at least 1, but got 0"),
        (["--latent", "64"], "PPCA needs 1 <= latent < features, but got latent=64, features=64"),
        (
            ["--model", "vae", "--guides", "exact"],
            "--guides needs at least one of mean-field, low-rank",
        ),
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
    from jensen.cli import command

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setitem(command._COMMANDS, "compare", interrupt)
    assert main(["compare", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "jensen: interrupted\n"


def test_a_misspelt_command_suggests_the_right_one(capsys):
    assert main(["evalute"]) == 2
    assert "there is no command 'evalute'; did you mean evaluate?" in capsys.readouterr().err
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["compare", "train", "evaluate", "sample", "datasets", None])
def test_help_reads_well_at_80_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main(["--help"] if name is None else [name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "None" not in text and "functools" not in text
    if name is None:
        assert all(f"\n  {code} " in text for code in (0, 1, 2, 130))
    else:
        assert "--json" in text


def test_errors_are_one_json_document_too(capsys):
    assert main(["train", "--json", "--modle", "vae"]) == 2
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["status"] == 2
    assert "did you mean --model?" in document["error"]
    assert document["error"] in shown.err


def test_compare_prints_its_report_as_json(tmp_path, capsys):
    guides = ["--model", "ppca", "--guides", "exact"]
    assert main(["compare", *guides, *_QUICK, "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "report.json").read_text())


def test_data_sets_are_listed_with_their_cards(capsys, tmp_path, monkeypatch):
    from jensen.datasets import cards

    monkeypatch.setenv("JENSEN_DATA", str(tmp_path))
    monkeypatch.setattr("jensen.cli.datasets.pooch.os_cache", lambda name: tmp_path / "cache")
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "file").touch()
    assert main(["datasets"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines() if line}
    assert set(cards()) <= set(lines)
    assert "embedded" in lines["digits"] and "present" in lines["mnist"]
    assert "to add by hand" in lines["oil_flow"] and "to download" in lines["cifar10"]
    assert str(tmp_path) in printed
    assert main(["datasets", "--json"]) == 0
    listed = {card["name"]: card for card in json.loads(capsys.readouterr().out)["datasets"]}
    assert listed["digits"]["splits"]["train"] == 1197
    assert {name for name, card in listed.items() if card["present"]} >= {"digits", "mnist"}
    assert not listed["oil_flow"]["present"]


def test_a_card_is_printed_by_name(capsys):
    assert main(["datasets", "digits"]) == 0
    printed = capsys.readouterr().out
    assert "CC BY 4.0" in printed and "8 x 8" in printed
    assert main(["datasets", "digist"]) == 2
    assert "did you mean digits?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guide", "mean-feld"], "there is no guide 'mean-feld'; did you mean mean-field?"),
        (["--likelihood", "gausian"], "there is no likelihood 'gausian'; did you mean gaussian?"),
        (["--guide", "exact"], "--guide exact works only with --model ppca or factor-analysis, but got --model vae"),
        (["--guide", "ladder"], "--guide ladder works only with --model hierarchical, but got --model vae"),
        (["--latent", "4,2"], "only --model hierarchical has several layers"),
        (["--latent", "0"], "--latent, --hidden and --components must be at least 1, but got 0"),
        (["--hidden", "16/8/4"], "but got 3"),
        (["--model", "ppca", "--likelihood", "bernoulli"], "has a fixed Gaussian likelihood"),
        (["--model", "ppca", "--binarize", "threshold"], "use --model vae --likelihood bernoulli"),
        (["--binarize", "threshold", "--likelihood", "laplace"], "which is unbounded on binary data"),
        (["--likelihood", "bernoulli"], "binarize them (--binarize threshold, sample or dynamic)"),
        (["--likelihood", "poisson"], "needs counts 0, 1, 2, ..."),
        (["--components", "3"], "--components is only for mixtures, but --model vae is not a mixture"),
        (["--beta", "2", "--objective", "iwae"], "--beta is only for --objective elbo"),
        (["--gradient", "dreg"], "gradient must be 'standard' or 'stl', but got 'dreg'"),
        (["--binarize", "dynamic", "--dequantize"], "use only one of them"),
        (["--epochs", "0"], "--epochs must be at least 1, but got 0"),
        (["--lr", "-1"], "--lr must be a positive number, but got -1"),
        (["--device", "cudda"], "--device cudda cannot be used here"),
        (["--resume"], "it has no configuration.json"),
    ],
)
def test_train_names_a_mistake_before_anything_is_written(arguments, message, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", "--run", str(folder), "--epochs", "1", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def _own_images(folder):
    rng = np.random.default_rng(0)
    file = folder / "bits.npy"
    np.save(file, (rng.uniform(size=(60, 4, 4)) < 0.4).astype(np.uint8))
    return file


def test_own_images_of_zeros_and_ones_are_binary(tmp_path, capsys):
    arguments = ["--data", str(_own_images(tmp_path)), "--epochs", "1"]
    run = ["train", *arguments, "--no-pictures", "--hidden", "8", "--latent", "2", "--run", str(tmp_path / "run")]
    assert main(run) == 2
    assert "for images add --image-shape 4,4" in capsys.readouterr().err
    assert main([*run, "--image-shape", "4,4"]) == 0
    assert "the likelihood is bernoulli" in capsys.readouterr().err
    pair = json.loads((tmp_path / "run" / "configuration.json").read_text())["pair"]
    assert pair["likelihood"] == "bernoulli"
    compare = ["compare", *arguments, "--particles", "20", "--model", "vae", "--guides", "mean-field", "--latent", "2"]
    assert main([*compare, "--out", str(tmp_path / "report")]) == 2
    assert "for images add --image-shape 4,4" in capsys.readouterr().err
    assert main([*compare, "--image-shape", "4,4", "--out", str(tmp_path / "report")]) == 0
    assert "Bernoulli VAEs only" in capsys.readouterr().out


def test_a_column_of_classes_is_named(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [",".join(f"{v:.3f}" for v in rng.normal(size=3)) + f",{kind}" for kind in ["red", "green"] * 30]
    file = tmp_path / "own.csv"
    file.write_text("\n".join(["a,b,c,the kind", *rows]) + "\n")
    compare = ["compare", "--data", str(file), "--model", "ppca", "--guides", "exact", "--latent", "2", "--epochs", "1"]
    compare += ["--particles", "20", "--out", str(tmp_path / "report")]
    assert main(compare) == 2
    assert "label='the kind', in a shell --label 'the kind'" in capsys.readouterr().err
    assert main([*compare, "--label", "the kind", "--standardize"]) == 0
    assert json.loads((tmp_path / "report" / "report.json").read_text())["data"]["features"] == 3


def _table(path, first, n=60, **how):
    rng = np.random.default_rng(0)
    rows = [f"{i + 1},{rng.normal():.3f},{rng.normal():.3f},{rng.normal():.3f},kind{i % 3}" for i in range(n)]
    path.write_text("\n".join([*first, *rows]) + "\n", **how)
    return str(path)


_SHORT = ["--epochs", "1", "--no-pictures", "--hidden", "8", "--latent", "2"]


@pytest.mark.parametrize(
    ("first", "options", "features"),
    [
        (["rownames,a,b,c,kind"], ["--label", "kind", "--drop", "rownames"], 3),
        (["rownames,a,b,c,kind"], ["--label", "-1", "--only", "a", "c"], 2),
        (["rownames,a,b,c,kind"], ["--drop", "0", "--drop", "kind"], 3),
        (["0,1,2,3,4"], ["--header", "--label", "4", "--drop", "0"], 3),
        ([], ["--label", "4", "--drop", "0"], 3),
        (["7,0.5,0.25,1,kind7"], ["--no-header", "--label", "4", "--drop", "0"], 3),
    ],
)
def test_columns_and_headers_are_options(tmp_path, capsys, first, options, features):
    file, run = _table(tmp_path / "own.csv", first), str(tmp_path / "run")
    assert main(["train", "--data", file, *options, *_SHORT, "--run", run]) == 0
    said = capsys.readouterr().err
    assert "warning" not in said and ("has 3 classes" in said or "has 4 classes" in said or "--label" not in options)
    kept = json.loads((tmp_path / "run" / "configuration.json").read_text())
    rows = 60 + ("--no-header" in options)
    assert kept["facts"]["features"] == features
    assert sum(kept["facts"][part] for part in ("train", "validation", "test")) == rows
    assert main(["evaluate", "--no-pictures", run, "--particles", "5"]) == 0
    assert main(["train", "--resume", "--run", run, *options, "--epochs", "2", "--no-pictures"]) == 0
    assert main(["train", "--resume", "--run", run, "--drop", "1", "--epochs", "2", "--no-pictures"]) == 2


def _settled(file, *options):
    given = parser().parse_args(["train", "--data", str(file), *options])
    binarize = None if given.binarize == "none" else given.binarize
    settings = {"source": given.data, "binarize": binarize, "dequantize": None, "seed": 0}
    return settle({**settings, **{name: getattr(given, name) for name in OWN}}, density=True)[:2]


def test_what_marks_missing_values_is_an_option(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(60, 3)).round(3).astype(str)
    x[::3, 0], x[1::3, 1], x[2::3, 2] = "NA", "unknown", "-999"
    (tmp_path / "own.csv").write_text("\n".join(map(",".join, [list("abc"), *x.tolist()])))
    settings, data = _settled(tmp_path / "own.csv", "--missing", "unknown", "-999", "--standardize")
    assert "own: 33 % of the values are missing" in capsys.readouterr().err
    assert sum(int(mask.sum()) for mask in data.masks.values()) == 60
    again = reopen(json.loads(json.dumps(settings)))  # as a run folder keeps them
    torch.testing.assert_close(again.train, data.train, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="in a shell --missing unknown"):
        _settled(tmp_path / "own.csv", "--missing=-999")
    grey = np.where(np.arange(120).reshape(30, 4) % 7 == 0, np.nan, np.arange(120).reshape(30, 4) % 2)
    np.save(tmp_path / "grey.npy", grey / 2)
    settings, data = _settled(tmp_path / "grey.npy", "--missing", "nan", "--binarize", "dynamic")
    (drawn,) = placed((data.train,), None, batch_transform(settings))
    assert torch.equal(drawn.isnan(), data.masks["train"]) and set(drawn[~drawn.isnan()].tolist()) == {0, 1}
    np.save(tmp_path / "bits.npy", grey)
    assert holds_bits(_settled(tmp_path / "bits.npy", "--missing", "nan")[1])
    np.save(tmp_path / "grey.npy", grey * 2)
    with pytest.raises(ValueError, match="--binarize dynamic needs values between 0 and 1, but grey holds values from"):
        _settled(tmp_path / "grey.npy", "--missing", "nan", "--binarize", "dynamic")


def test_a_run_remembers_what_marks_missing_values(tmp_path, capsys):
    file, run = _table(tmp_path / "own.csv", ["id,a,b,c,kind"]), str(tmp_path / "run")
    options = ["--label", "kind", "--drop", "id", "--missing", "NA", "-999"]
    assert main(["train", "--data", file, *options, *_SHORT, "--run", run]) == 0
    assert json.loads((tmp_path / "run" / "configuration.json").read_text())["data"]["missing"] == ["NA", "-999"]
    assert main(["train", "--resume", "--run", run, "--missing", "NA", "--epochs", "2", "--no-pictures"]) == 2
    assert "--missing was ['NA', '-999'] when" in capsys.readouterr().err
    assert main(["evaluate", "--no-pictures", run, "--particles", "5"]) == 0


def test_what_is_doubtful_in_a_table_is_said_once(tmp_path, capsys):
    file, run = _table(tmp_path / "own.csv", ["rownames,a,b,c,kind"]), str(tmp_path / "run")
    assert main(["train", "--data", file, "--label", "kind", *_SHORT, "--run", run]) == 0
    said = capsys.readouterr().err
    assert said.count("warning: own: column 'rownames' counts the rows: if it is an index, leave it out") == 1
    assert "--drop rownames" in said
    assert "counts the rows, like an index" not in said
    assert main(["evaluate", "--no-pictures", run, "--particles", "5"]) == 0
    assert "rownames" not in capsys.readouterr().err
    assert main(["train", "--data", _table(tmp_path / "own.csv", ["0,1,2,3,4"]), *_SHORT, "--run", run]) == 2
    assert "in a shell --header or --no-header" in capsys.readouterr().err


def test_arrays_and_channels_are_options(tmp_path, capsys):
    rng = np.random.default_rng(0)
    colour, file, run = rng.random((60, 6, 5, 3)), str(tmp_path / "own.npz"), str(tmp_path / "run")
    np.savez(file, colour=colour, two=colour[..., :2], kind=np.arange(60) % 3)
    train = ["train", "--data", file, *[option for option in _SHORT if option != "--no-pictures"], "--run", run]
    assert main(train) == 2
    assert "--member colour" in capsys.readouterr().err
    assert main([*train, "--member", "colour", "--label", "kind"]) == 2
    assert "for images add --image-shape 6,5,3" in capsys.readouterr().err
    assert main([*train, "--member", "colour", "--label", "kind", "--image-shape", "6,5,3"]) == 0
    facts = json.loads((tmp_path / "run" / "configuration.json").read_text())["facts"]
    assert (facts["image_shape"], facts["channels"]) == ([6, 5], 3)
    assert (tmp_path / "run" / "samples.png").is_file()
    capsys.readouterr()
    assert main([*train, "--member", "two", "--image-shape", "6,5,2", "--overwrite"]) == 0
    assert "images with 2 channels are used as vectors, and figures do not show them" in capsys.readouterr().err
    assert not (tmp_path / "run" / "samples.png").exists()


def test_a_run_finds_its_moved_data(tmp_path, capsys):
    file = _own_images(tmp_path)
    run = ["train", "--image-shape", "4,4", "--epochs", "1", "--no-pictures", "--hidden", "8", "--latent", "2"]
    assert main([*run, "--data", str(file), "--run", str(tmp_path / "run")]) == 0
    moved = file.rename(tmp_path / "moved.npy")
    evaluate = ["evaluate", str(tmp_path / "run"), "--particles", "20"]
    capsys.readouterr()
    assert main(evaluate) == 2
    assert "give its new path with --data FILE" in capsys.readouterr().err
    assert main([*evaluate, "--data", str(tmp_path / "none.npy")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert main([*evaluate, "--data", str(moved)]) == 0
    assert main([*run, "--data", str(moved), "--run", str(tmp_path / "second")]) == 0
    assert main(["evaluate", "--no-pictures", str(tmp_path / "second"), *evaluate[1:], "--data", str(moved)]) == 0
    np.save(moved, np.zeros((60, 4, 4)))
    assert main([*evaluate, "--data", str(moved)]) == 2
    assert "has changed" in capsys.readouterr().err


def test_planes_of_colour_are_pixels_of_colour():
    red = torch.zeros(4, 3, 2, 2)
    red[:, 0] = 1.0
    facts = {"image_shape": (2, 2), "channels": 3, "value_range": (0.0, 1.0)}
    pixels = images_of(red.flatten(1), facts, columns=4).get_images()[0].get_array()
    assert pixels[:, :2].tolist() == [[[1.0, 0.0, 0.0]] * 2] * 2
