"""Results as aligned text, HTML, data frames, and JSON that restores them exactly."""

import dataclasses
import json
import math
from html.parser import HTMLParser

import pytest
import scipy.stats
import torch
from members import pair
from one_of_each import one_of_each, some_evidence

from jensen.inference import (
    AIS,
    Bounds,
    Calibration,
    Comparison,
    Evidence,
    ExactEvidence,
    Gaps,
    GuideDistance,
    HeldOut,
    History,
    Imputation,
    LearningRates,
    RateDistortion,
    Sandwich,
    compare,
    evaluate,
)
from jensen.results.schema import digest_of
from jensen.results.standard_errors import within_t
from jensen.results.tables import Table, digits_of, with_error


@pytest.fixture(scope="module")
def measured():
    return one_of_each()


KINDS = range(16)


def _same(one, two):
    """Whether two values are bitwise identical and of the same type."""
    if isinstance(one, torch.Tensor):
        bits = one.nan_to_num(123.0), two.nan_to_num(123.0)
        alike = one.dtype == two.dtype and torch.equal(*bits) and torch.equal(one.isnan(), two.isnan())
        return alike and torch.equal(one.signbit(), two.signbit()) if one.is_floating_point() else alike
    if dataclasses.is_dataclass(one):
        return type(one) is type(two) and all(_same(a, b) for a, b in zip(*map(_values, (one, two)), strict=True))
    if isinstance(one, dict):
        return list(one) == list(two) and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and all(_same(a, b) for a, b in zip(one, two, strict=True))
    return type(one) is type(two) and (one == two or (one != one and two != two))


def _values(record):
    return [getattr(record, f.name) for f in dataclasses.fields(record)]


def _strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("kind", KINDS)
def test_json_gives_back_every_bit(measured, kind, tmp_path):
    result = measured[kind]
    text = result.to_json(tmp_path / "folder" / "result.json")
    assert _strict(text)["format"] == f"jensen.{type(result).__name__}"
    for source in (text, tmp_path / "folder" / "result.json", str(tmp_path / "folder" / "result.json")):
        again = type(result).from_json(source)
        assert _same(result, again)
        assert str(again) == str(result)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["result.json"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_comes_back(dtype):
    info = torch.finfo(dtype)
    odd = [0.1, -0.0, info.tiny, -info.max, 1 / 3, math.nan, math.inf, -math.inf, info.smallest_normal / 2]
    result = some_evidence(len(odd), elbo=torch.tensor(odd, dtype=dtype))
    assert _same(result, Evidence.from_json(result.to_json()))


def test_random_bits_come_back():
    bits = torch.randint(-(2**63), 2**63 - 1, (5000,))
    result = some_evidence(5000, elbo=bits.view(torch.float64), spent=bits, converged=bits > 0)
    again = Evidence.from_json(result.to_json())
    known = ~result.elbo.isnan()
    assert torch.equal(again.elbo[known].view(torch.int64), bits[known])
    assert _same(result, again)


def _changed(change, result=None):
    document = json.loads((result or some_evidence()).to_json())
    change(document)
    document["sha256"] = digest_of(document)
    return json.dumps(document)


def _field(name, **parts):
    return lambda document: document["fields"][name].update(parts)


BROKEN = {
    "torn": (lambda: some_evidence().to_json()[:-30], "cannot be read as the JSON of a Evidence"),
    "empty": (lambda: "", "Expecting value"),
    "a list": (lambda: "[1, 2]", "'jensen.Evidence'"),
    "foreign": (lambda: '{"elbo": [1.0]}', "\"format\" is None, but 'jensen.Evidence' was expected"),
    "another result": (lambda: History().to_json(), "\"format\" is 'jensen.History'"),
    "no version": (
        lambda: _changed(lambda d: d.pop("version")),
        "version must be a number of at least 1, but got 'None'",
    ),
    "no fields": (lambda: _changed(lambda d: d.pop("fields")), "fields must be the object of a Evidence"),
    "bare NaN": (lambda: some_evidence().to_json().replace("-5.0", "NaN"), "NaN is not valid JSON"),
    "missing": (lambda: _changed(lambda d: d["fields"].pop("elbo")), r"misses \['elbo'\]"),
    "unknown": (lambda: _changed(lambda d: d["fields"].update(more=1)), r"\['more'\] are unknown"),
    "a word": (lambda: _changed(_field("elbo", values=[0, "x", 1])), "fields.elbo must be a number, but got 'x'"),
    "null": (lambda: _changed(lambda d: d["fields"].update(elbo=None)), "fields.elbo must be a tensor"),
    "too few": (lambda: _changed(_field("elbo", values=[1.0])), "with the number of values of shape"),
    "a shape": (lambda: _changed(_field("elbo", shape=[-3])), "a shape of whole numbers"),
    "huge": (lambda: _changed(_field("elbo", shape=[10**15])), "with the number of values of shape"),
    "a dtype": (lambda: _changed(_field("elbo", dtype="object")), "one of the dtypes"),
    "a list for a dtype": (lambda: _changed(_field("elbo", dtype=["float64"])), "Evidence"),
    "half a count": (lambda: _changed(_field("elbo", dtype="int64", values=[1.5] * 3)), "a list of int64 values"),
    "too large": (lambda: _changed(_field("elbo", dtype="int8", values=[1000] * 3)), "Evidence"),
    "a bool for a number": (
        lambda: _changed(lambda d: d["fields"].update(particles=True)),
        "of type int, but got 'True'",
    ),
    "a part of another kind": (lambda: _changed(lambda d: d["fields"].update(corrected=[1])), "must be an object"),
    "nested too deep": (lambda: '{"format":' * 100_000, "Evidence"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_such_file_is_one_error_that_says_so(name, tmp_path):
    make, message = BROKEN[name]
    with pytest.raises(ValueError, match=message) as caught:
        Evidence.from_json(make())
    assert "Evidence.to_json()" in str(caught.value)
    (tmp_path / "kept.json").write_text(make())
    with pytest.raises(ValueError, match=r"kept\.json cannot be read as the JSON of a Evidence"):
        Evidence.from_json(tmp_path / "kept.json")


def test_a_result_of_a_newer_schema_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "kept.json").write_text(_changed(lambda d: d.update(version=2, fields={"more": 1})))
    with pytest.raises(
        ValueError, match=r"kept\.json has schema version 2, but jensen \S+ reads versions up to 1: inst"
    ):
        Evidence.from_json(tmp_path / "kept.json")


def test_bytes_that_are_no_text_and_a_file_that_is_not_there(tmp_path):
    (tmp_path / "kept.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"kept\.json cannot be read"):
        History.from_json(tmp_path / "kept.json")
    with pytest.raises(FileNotFoundError):
        History.from_json(str(tmp_path / "missing.json"))


def test_a_field_with_a_default_may_be_missing():
    text = _changed(lambda d: d["fields"].pop("rate"), History(elbo=[-1.0], rate=[2.0]))
    assert History.from_json(text) == History(elbo=[-1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_results_print_in_columns(measured, kind):
    """No line ends in blanks, and a rule is as wide as what it divides."""
    lines = str(measured[kind]).splitlines()
    assert all(line == line.rstrip() and line for line in lines)
    rules = [i for i, line in enumerate(lines) if set(line) == {"-"}]
    for i in rules:
        assert len(lines[i - 1]) <= len(lines[i])
    assert "nan" not in str(measured[kind])


class _Page(HTMLParser):
    """Tags that open and close in order, cells row by row, and all text."""

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.words, self.styles = [], [], "", ""

    def handle_starttag(self, tag, attrs):
        assert tag in {"div", "p", "table", "thead", "tbody", "tr", "th", "td", "br"}
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag != "br":
            self.open.append(tag)
        self.styles += " ".join(value for _, value in attrs)
        assert {name for name, _ in attrs} <= {"style", "scope", "colspan"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += f" {data}"
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


def _page(result):
    page = _Page()
    page.feed(result._repr_html_())
    page.close()
    assert page.open == []
    return page


@pytest.mark.parametrize("kind", KINDS)
def test_html_holds_the_words_of_the_text_in_the_colours_of_the_page(measured, kind):
    page = _page(measured[kind])
    text = [word for word in str(measured[kind]).split() if set(word) != {"-"} or word == "-"]
    assert sorted(page.words.split()) == sorted(text)
    assert "background" not in page.styles
    assert "color:" not in page.styles.replace("currentColor", "")


def test_html_escapes_the_names_of_users():
    name = '<script>alert("&")</script>'
    table = compare({name: pair("PPCA", "MeanField")[:2]}, pair("PPCA", "MeanField")[2], 30, progress=False)
    assert "<script" not in table._repr_html_()
    page = _page(table)
    assert page.rows[1][0] == name
    assert len(page.rows[0]) == len(page.rows[1]) == 11


def test_digits_are_those_that_the_error_allows():
    cases = {0.12: "1.23 ± 0.12", 0.0123: "1.235 ± 0.012", 3.4: "1.2 ± 3.4", 56.0: "1 ± 56", 1e-9: "1.2346 ± 0.0000"}
    assert {error: with_error(1.23456, error) for error in cases} == cases
    assert with_error(1.23456, 0.0) == "1.235 ± 0.000"
    assert with_error(1.23456, math.nan) == "1.235 ± -"
    assert digits_of(0.5, None, 0.012, math.nan, 0.0, math.inf) == 3
    assert digits_of(None) == 3
    assert [digits_of(data, 0.00012) for data in (None, 75.0, 0.75, 0.0075)] == [4, 1, 3, 4]


def test_evidence_prints_each_mean_with_both_errors_to_the_digits_of_the_smaller():
    text = str(some_evidence(exact=torch.tensor([-5.0, -3.5, -2.0]).double())).splitlines()
    assert text == [
        "3 data points, 100 particles each, nats per data point",
        "                                 mean  ± data  ± Monte Carlo",
        "------------------------------------------------------------",
        "ELBO                           -5.00    0.58           0.12",
        "log p(x), importance-weighted  -4.000   0.577          0.058",
        "log p(x), exact                -3.500   0.866",
        "gap = log p(x) - ELBO           1.50    0.29",
        "effective sample size, mean    20.0 of 100",
        "data points with k-hat > 0.7   0.0 %",
    ]


_WEIGHTED = (
    "elbo elbo_data_error elbo_mc_error log_evidence log_evidence_data_error log_evidence_mc_error "
    "log_evidence_delta log_evidence_delta_mc_error log_evidence_jackknife log_evidence_jackknife_mc_error "
    "log_evidence_smoothed log_evidence_smoothed_mc_error exact exact_data_error baseline baseline_data_error gap "
    "gap_data_error"
)
SUMMARIES = {
    Evidence: f"n particles {_WEIGHTED} ess unreliable zero_weights spent converged",
    Gaps: "n particles gap gap_data_error approximation approximation_data_error approximation_mc_error amortization "
    "amortization_data_error amortization_mc_error gained converged rounds seconds unreliable",
    RateDistortion: "n rate rate_data_error rate_mc_error distortion distortion_data_error distortion_mc_error "
    "active_units features",
    AIS: "n chains temperatures log_evidence log_evidence_data_error log_evidence_mc_error ess reliable acceptance "
    "exact evaluations",
}
FRAMES = {
    Evidence: "elbo elbo_error log_evidence standard_error ess pareto_k exact zero_weights spent baseline gap "
    "log_evidence_delta log_evidence_jackknife log_evidence_smoothed log_evidence_delta_error "
    "log_evidence_jackknife_error log_evidence_smoothed_error",
    Comparison: "n particles elbo elbo_data_error elbo_mc_error log_evidence log_evidence_data_error "
    "log_evidence_mc_error log_evidence_by_guide log_evidence_by_guide_data_error log_evidence_by_guide_mc_error exact "
    "exact_data_error baseline baseline_data_error gap gap_data_error ess unreliable zero_weights spent parameters "
    "seconds log_evidence_delta log_evidence_delta_mc_error log_evidence_jackknife log_evidence_jackknife_mc_error "
    "log_evidence_smoothed log_evidence_smoothed_mc_error",  # two rows share the weights of the exact one
    Gaps: "log_evidence total approximation amortization gained converged",
    Bounds: "mean error",
    RateDistortion: "rate rate_error distortion distortion_error",
    AIS: "log_evidence standard_error ess acceptance",
    Sandwich: "weighted_lower weighted_lower_error weighted_upper weighted_upper_error annealed_lower "
    "annealed_lower_error annealed_upper annealed_upper_error exact",
    ExactEvidence: "log_evidence error evaluations reached",
    GuideDistance: "coordinate mean_error mean_standard_error scale_ratio scale_standard_error energy energy_error",
}


@pytest.mark.parametrize("kind", SUMMARIES)
def test_a_summary_has_these_entries(measured, kind):
    result = next(result for result in measured if type(result) is kind)
    assert list(result.summary()) == SUMMARIES[kind].split()
    assert result.to_dict()["summary"] == result.summary()


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_has_these_columns(measured, kind):
    result = next(result for result in measured if type(result) is kind)
    assert list(result.to_frame()) == FRAMES[kind].split()


def test_values_per_datum_are_those_of_the_frame_but_for_sums_of_others(measured):
    for result in (result for result in measured if type(result) in SUMMARIES):
        frame = result.to_frame()
        per_datum = result.to_dict()["per_datum"]
        assert set(frame) - set(per_datum) == {Evidence: {"gap"}, Gaps: {"total"}}.get(type(result), set())
        assert {name: frame[name].tolist() for name in per_datum} == per_datum


def test_gaps_rates_and_annealed_weights_print_with_both_errors():
    spread, n = torch.linspace(0, 1, 4).double(), torch.ones(4).double()
    split = Gaps(some_evidence(4), some_evidence(4, elbo=-4.5 * n), 0.01 * n, n > 0, 3, 2.5)
    found = RateDistortion(2 + spread, 0.1 * n, 50 + 10 * spread, 0.2 * n, {"z": spread[:2]}, {"z": spread[:2]}, 64)
    annealed = AIS(torch.stack([spread - 1, spread + 1]), 0.5 * n, 12, spread, [0.0, 1.0], torch.rand(1, 4), 2, "prior")
    assert str(split).splitlines()[3:] == [
        "gap = log p(x) - ELBO         1.00    0.00",
        "  approximation (the family)  0.50    0.43           0.11",
        "  amortization (the encoder)  0.50    0.43           0.14",
        "local optimisation converged  100.0 % of the data points; last round gained 0.0100 nats",
    ]
    assert str(found).splitlines() == [
        "4 data points, bits per data point",
        "                     mean  ± data  ± Monte Carlo",
        "------------------------------------------------",
        "rate                3.607   0.310          0.072",
        "distortion         79.35    3.10           0.14",
        "active units of z  1 of 2",
    ]
    assert str(annealed).splitlines() == [
        "4 data points, 2 chains each, 1 temperatures from the prior, nats per data point",
        "                             mean  ± data  ± Monte Carlo",
        "--------------------------------------------------------",
        "log p(x), annealed           0.93    0.22           0.71",
        "log p(x), exact              0.50",
        "effective sample size, mean  1.3 of 2",
        "moves accepted               50.0 %",
        "evaluations per data point   12 of log p(x, z), a gradient counting one more",
        "reliable                     no: too few temperatures, so log p(x) is too low; use more",
    ]


def test_numbers_stand_under_each_other_by_their_decimal_points():
    rows = [["a", "-1.5 ± 0.1"], ["bb", "10.25 ± 0.10"], ["c", "-"], ["d", "1,234"]]
    head, _, *lines = Table("", ("", "x"), rows).grid()
    assert lines == ["a    -1.5 ± 0.1", "bb  10.25 ± 0.10", "c              -", "d       1,234"]
    assert head == "               x"


def test_a_history_prints_few_epochs_and_the_best():
    n = 200
    history = History(elbo=[-float(n - i) for i in range(n)], validation=[-300.0] * n, best_epoch=77, seconds=3.0)
    head, columns, rule, *rows = str(history).splitlines()
    assert head.startswith("200 epochs, 0 steps, 3.0 s: training bound -200.000 -> -1.000 nats per data point")
    assert columns.split() == ["epoch", "elbo", "validation"]
    epochs = [int(row.split()[0]) for row in rows]
    assert len(epochs) == 11
    assert {1, 77, 200} <= set(epochs)
    assert [float(row.split()[1]) for row in rows] == [history.elbo[e - 1] for e in epochs]
    assert repr(history) == f"<History: {head}>"
    assert len(set(map(len, (columns, rule, *rows)))) == 1
    assert str(History()) == "0 epochs, 0 steps, 0.0 s"


def test_bounds_print_from_both_sides():
    b = Bounds([1, 2], torch.tensor([-2.5, -2.25]), torch.tensor([0.1, math.nan]), -2.0, -torch.ones(2), torch.ones(2))
    _, columns, _, one, two, exact = str(b).splitlines()
    assert columns.split() == ["particles", "lower", "bound", "upper", "bound"]
    assert one.split() == ["1", "-2.50", "±", "0.10", "-1.0", "±", "1.0"]
    assert two.split()[:4] == ["2", "-2.250", "±", "-"]
    assert exact.split() == ["log", "p(x),", "exact", "-2.000"]


def test_a_frame_of_evidence_has_a_row_per_datum():
    model, guide, x = pair("PPCA", "MeanField")
    evidence = evaluate(model, guide, x, 50, seed=0, progress=False)
    frame = evidence.to_frame()
    assert frame.index.name == "datum"
    assert len(frame) == len(x)
    for name in ("elbo", "log_evidence", "standard_error", "ess", "pareto_k", "exact", "gap"):
        assert frame[name].tolist() == getattr(evidence, name).tolist()
    assert frame["log_evidence_delta"].tolist() == evidence.corrected["delta"].tolist()
    assert frame["log_evidence_delta_error"].tolist() == evidence.corrected_error["delta"].tolist()
    assert str(frame["spent"].dtype) == "int64"
    assert "exact" not in some_evidence().to_frame()
    frame["elbo"] = 0.0
    assert (evidence.elbo != 0).all()


def test_a_frame_of_a_comparison_has_a_row_per_pair(measured):
    plain, split = (result for result in measured if isinstance(result, Comparison))
    frame = plain.to_frame()
    assert frame.index.tolist() == ["prior", "mean-field", "exact"]
    for name, row in plain.rows.items():
        s = row.evidence.summary()
        assert {key: frame.loc[name, key] for key in s if s[key] is not None} == {
            key: value for key, value in s.items() if value is not None
        }
        assert frame.loc[name, "parameters"] == row.parameters
    assert "approximation" not in frame
    assert split.to_frame().approximation["a"] == split.rows["a"].gaps.summary()["approximation"]
    assert split.to_frame()["approximation"].isna().tolist() == [False, True]


def test_a_frame_of_a_history_has_a_row_per_epoch():
    frame = History(elbo=[-3.0, -2.0], validation=[-4.0], elapsed=[1.0, 2.5]).to_frame()
    assert frame.index.tolist() == [1, 2]
    assert frame.index.name == "epoch"
    assert frame["elbo"].tolist() == [-3.0, -2.0]
    assert frame["validation"].isna().tolist() == [True, False]
    assert frame["seconds"].tolist() == [1.0, 2.5]
    assert list(frame) == ["elbo", "validation", "seconds"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_result_has_a_frame_and_a_dict(measured, kind):
    result = measured[kind]
    frame = result.to_frame()
    assert len(frame) > 0
    assert all(str(dtype) != "object" or name == "coordinate" for name, dtype in frame.dtypes.items())
    assert json.dumps(result.to_dict())


def test_the_kinds_are_all_here(measured):
    kinds = {type(result) for result in measured}
    kept = {Evidence, Comparison, Gaps, Bounds, RateDistortion, History, Calibration, AIS, Sandwich, ExactEvidence}
    assert kinds == kept | {GuideDistance, Imputation, HeldOut, LearningRates}
    assert len(measured) == len(KINDS)


def test_student_t_is_that_of_scipy():
    for freedom in (1, 2, 3, 4, 5, 10, 39, 200, 5001):
        for t in (0.5, 2.0, 4.0, 16.0, 1e4):
            expected = scipy.stats.t.cdf(t, freedom) - scipy.stats.t.cdf(-t, freedom)
            assert within_t(t, freedom) == pytest.approx(expected, abs=1e-12)
