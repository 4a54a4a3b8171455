"""The table: paired differences, shared work, counted evaluations."""

import math
import time
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from members import pair
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from scipy import stats
from torch import nn

from jensen.families import Gaussian, MeanField
from jensen.guides import ExactPosterior, PriorGuide, amortize
from jensen.inference import Comparison, Evidence, Gaps, History, Row, compare, evaluate, exact_log_evidence, fit
from jensen.inference.measure.compare import _pooled
from jensen.models import PPCA, VAE
from jensen.networks import mlp
from jensen.results.standard_errors import significant


@pytest.fixture
def shared():
    model = PPCA(5, 2).double()
    guide = amortize(model, nn.Identity(), MeanField, context=5).double()
    with torch.no_grad():
        x = model(n=30)
    pairs = {
        "prior": (model, PriorGuide(model)),
        "mean-field": (model, guide),
        "exact": (model, ExactPosterior(model)),
    }
    return pairs, x


def test_rows_are_what_evaluate_measures(shared):
    pairs, x = shared
    table = compare(pairs, x, particles=100, refine=False, seed=3, progress=False)
    for name, (model, guide) in pairs.items():
        alone = evaluate(model, guide, x, 100, refine=False, seed=3, progress=False)
        assert torch.equal(table.rows[name].evidence.log_evidence, alone.log_evidence)


def test_differences_are_paired_by_datum(shared):
    pairs, x = shared
    table = compare(pairs, x, particles=100, seed=3, progress=False)
    delta = table.rows["exact"].evidence.elbo - table.rows["prior"].evidence.elbo
    mean, error = table.difference("exact", "prior")
    assert mean == pytest.approx(delta.mean().item())
    assert error == pytest.approx(delta.std().item() / math.sqrt(30))
    assert table.difference("exact", "prior", "log_evidence") == (
        0.0,
        0.0,
    )  # one model: the exact value is shared


def test_parameters_of_a_shared_model_are_not_a_guides(shared):
    pairs, x = shared
    table = compare(pairs, x, particles=10, progress=False)
    assert {name: row.parameters for name, row in table.rows.items()} == {
        "prior": 0,
        "mean-field": 24,
        "exact": 0,
    }
    alone = compare({"mean-field": pairs["mean-field"]}, x, particles=10, progress=False)
    assert alone.rows["mean-field"].parameters == 24 + 5 * 2 + 5 + 1


def test_pairs_with_their_own_models_are_not_read_as_guides():
    one, two = pair("PPCA", "MeanField"), pair("PPCA", "FullCovariance")
    table = compare({"a": one[:2], "b": two[:2]}, one[2], particles=10, progress=False)
    assert not table.shared_model
    assert table.sentence().startswith("Each row is a different model: compare log p(x), not the ELBO. ")
    assert table.sentence().endswith("Test-set error only, one training run: other seeds may differ by more.")
    assert table.rows["a"].parameters > 16


def test_training_time_counts(shared):
    pairs, x = shared
    model, guide = pairs["mean-field"]
    history = fit(model, guide, x, epochs=1, progress=False, freeze=model)
    history.seconds = 1000.0
    table = compare(pairs, x, particles=10, histories={"mean-field": history}, progress=False)
    assert table.rows["mean-field"].seconds > 1000
    assert table.rows["prior"].seconds < 1000


def test_the_table_is_aligned_and_says_what_it_shows(shared):
    pairs, x = shared
    table = compare(pairs, x, particles=100, seed=0, progress=False)
    head, columns, rule, *rows, baseline, own, sentence = str(table).splitlines()
    shares = [f"{n} {100 * table.rows[n].evidence.by_guide.unreliable:.1f} %" for n in ("prior", "mean-field")]
    assert own.split("  ")[0] == "k>0.7, guide samples only"
    assert own.endswith(", ".join(shares))
    lowest = table.rows["prior"].evidence.baseline.mean()
    assert baseline.startswith("Gaussian per feature, fitted here  log p(x) -")
    assert float(baseline.split()[-1]) == pytest.approx(float(lowest), abs=0.01)
    assert head == "30 data points, 100 particles each, nats per data point"
    assert len({len(line) for line in (columns, rule, *rows)}) == 1
    assert [row.split()[0] for row in rows] == ["prior", "mean-field", "exact"]
    assert sentence.startswith(
        "All rows share one model, so ELBO differences measure the guides. ELBO below `exact` (paired over test "
        "points, nats): "
    )
    assert sentence in table._repr_html_()


def _made(exact=None, k=0.1, **means):
    """Evidence of three data points with values of spread one around their means."""
    spread = torch.tensor([-1.0, 0.0, 1.0]).double()
    return Evidence(
        elbo=means["elbo"] + spread,
        elbo_error=torch.full((3,), 0.3).double(),
        log_evidence=means["log_evidence"] + spread,
        standard_error=torch.tensor([0.3, 0.0, 0.4]).double(),
        ess=torch.tensor([10.0, 20.0, 30.0]).double(),
        pareto_k=torch.tensor([0.1, 0.2, k]).double(),
        exact=None if exact is None else exact + spread,
        particles=100,
        features=4,
    )


def test_the_summary_is_the_formulas():
    s = _made(elbo=-5.0, log_evidence=-4.0, exact=-3.5, k=0.9).summary()
    assert (s["elbo"], s["log_evidence"], s["exact"], s["gap"]) == (-5.0, -4.0, -3.5, 1.5)
    assert s["elbo_data_error"] == s["log_evidence_data_error"] == pytest.approx(1 / math.sqrt(3))
    assert s["gap_data_error"] == 0
    assert s["log_evidence_mc_error"] == pytest.approx(0.5 / 3)
    assert s["ess"] == 20
    assert s["unreliable"] == pytest.approx(1 / 3)
    assert _made(elbo=-5.0, log_evidence=-4.0, k=math.nan).summary()["unreliable"] == pytest.approx(1 / 3)


def test_every_number_stands_in_its_column():
    table = Comparison({"a": Row(_made(elbo=-5.0, log_evidence=-4.0, exact=-3.5, k=0.9), 1234, 5.6)}, False)
    columns, _, row = table.table().splitlines()
    assert columns.split() == [
        "ELBO",
        "log",
        "p(x)",
        "±",
        "data",
        "±",
        "MC",
        "exact",
        "gap",
        "ESS",
        "k>0.7",
        "params",
        "seconds",
    ]
    assert row.split() == [
        "a",
        "-5.00",
        "-4.00",
        "0.58",
        "0.17",
        "-3.50",
        "1.50",
        "20.0",
        "33.3",
        "%",
        "1,234",
        "5.6",
    ]
    bits = table.table(bits=True, offset=3.0).splitlines()[2].split()
    nat = 1 / (4 * math.log(2))
    assert bits[1:5] == [f"{v:.3f}" for v in (3 + 5 * nat, 3 + 4 * nat, nat / math.sqrt(3), nat / 6)]
    assert bits[6] == f"{1.5 * nat:.3f}"


def test_the_sentence_says_the_difference_and_its_error():
    spread = torch.tensor([0.0, 0.1, 0.2]).double()
    a, b = _made(elbo=-5.0, log_evidence=-4.0, k=0.9), _made(elbo=-6.0, log_evidence=-4.5)
    b = replace(b, log_evidence=a.log_evidence - 0.5 - spread)
    sentence = Comparison({"a": Row(a, 1, 1.0), "b": Row(b, 1, 1.0)}, False).sentence()
    assert (
        "`a` is 10.4 standard errors above `b`; log p(x) below `a` (paired over test points, nats): b 0.600" in sentence
    )
    assert "b 0.600 ± 0.058." in sentence
    assert "The log p(x) of a is probably too low: k-hat > 0.7 for more than 10 % of the test points." in sentence


def _one(elbo, k=0.1, joint=True, **values):
    """Evidence of all data points at once, or of one."""
    return Evidence(
        elbo=torch.tensor([elbo]).double(),
        elbo_error=torch.tensor([0.3]).double(),
        log_evidence=torch.tensor([elbo + 1]).double(),
        standard_error=torch.tensor([0.4]).double(),
        ess=torch.tensor([20.0]).double(),
        pareto_k=torch.tensor([k]).double(),
        exact=None,
        particles=100,
        features=60,
        joint=joint,
        **values,
    )


@pytest.mark.parametrize("joint", [True, False])
def test_one_number_for_each_pair_has_a_monte_carlo_error(joint):
    rows = {"a": Row(_one(-70.0, joint=joint), 1, 1.0), "b": Row(_one(-75.0, joint=joint), 1, 1.0)}
    table = Comparison(rows, True)
    assert table.difference("a", "b") == (5.0, pytest.approx(0.3 * 2**0.5))
    assert table.difference("a", "b", "log_evidence") == (5.0, pytest.approx(0.4 * 2**0.5))
    known = replace(rows["a"].evidence, exact=torch.tensor([-69.0]).double())
    exact = Comparison(rows | {"a": Row(known, 1, 1.0)}, True)
    assert exact.difference("a", "b", "log_evidence") == (5.0, pytest.approx(0.4))
    unit = "nats in total" if joint else "nats per data point"
    assert f"ELBO below `a` ({unit}, ± Monte Carlo error): b 5.00 ± 0.42." in table.sentence()
    other = Comparison(rows, False).sentence()
    assert "`a` is 8.8 standard errors above `b`" in other
    assert other.endswith("Monte Carlo error only, one training run: other seeds may differ by more.")


def test_joint_weights_speak_of_all_data_and_of_no_datum():
    rows = {"a": Row(_one(-70.0, k=0.9), 1, 1.0), "b": Row(_one(-75.0, k=0.9), 1, 1.0)}
    text = str(Comparison(rows, True))
    assert text.startswith("all data jointly, 100 particles, nats in total\n")
    assert "k-hat" in text.splitlines()[1]
    assert text.splitlines()[3].split()[-3:] == ["0.90", "1", "1.0"]
    assert text.endswith("The log p(x) of a, b is probably too low: k-hat > 0.7.")
    spent = _one(-70.0, spent=torch.tensor([768]), converged=torch.tensor([False]), zero_weights=torch.tensor([3]))
    for said in (text, str(spent)):
        assert "datum" not in said
        assert "data with" not in said
        assert "test points" not in said
    facts = {line.split("  ")[0].strip(): line.split()[-1] for line in str(spent).splitlines()[-5:]}
    assert facts["tolerance reached"] == "no"
    assert facts["particles spent"] == facts["effective sample size"] == "768"
    assert facts["k-hat"] == "0.10"


def test_guides_of_global_latents_are_compared_also_where_gaps_are_asked_for():
    x = torch.rand(60)
    y = 1 - x + 0.5 * torch.randn(60)

    def model(x, y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)

    pairs = {"normal": (model, AutoNormal(model)), "full": (model, AutoMultivariateNormal(model))}
    table = compare(pairs, (x, y), 200, gaps=True, seed=0, progress=False)
    assert table.joint
    assert all(row.gaps is None for row in table.rows.values())
    mean, error = table.difference("normal", "full")
    again = compare(pairs, (x, y), 20000, seed=1, progress=False).difference("normal", "full")
    assert abs(mean - again[0]) < 4 * error
    assert 0 < again[1] < error


def test_pairs_that_hold_their_data_are_compared():
    x = torch.randn(30)

    def joint(n=30):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide():
        with pyro.plate("data", 30):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    def prior(n=30):
        with pyro.plate("data", n):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    model = pyro.condition(joint, data={"x": x})
    table = compare({"exact": (model, guide), "prior": (model, prior)}, (), 50, seed=0, progress=False)
    log_p = dist.Normal(0.0, 2**0.5).log_prob(x).double()
    torch.testing.assert_close(table.rows["exact"].evidence.log_evidence, log_p, atol=1e-5, rtol=1e-5)
    assert str(table).startswith("30 data points, 50 particles each, nats per data point")
    fewer = pyro.condition(lambda: joint(7), data={"x": x[:7]}), lambda: prior(7)
    with pytest.raises(ValueError, match=r"hold different numbers of data points, {'exact': 30, 'fewer': 7}"):
        compare({"exact": (model, guide), "fewer": fewer}, (), 50, progress=False)


def test_models_that_cannot_be_told_apart_are_not_ranked():
    a, b = _made(elbo=-5.0, log_evidence=-4.0), _made(elbo=-6.0, log_evidence=-4.5)
    b = replace(b, log_evidence=a.log_evidence + torch.tensor([-1.0, 0.0, 0.9]).double())
    sentence = Comparison({"a": Row(a, 1, 1.0), "b": Row(b, 1, 1.0)}, False).sentence()
    assert "`a` and `b` do not differ significantly (Student's t, 2.0 degrees of freedom)" in sentence


def test_one_datum_is_ranked_as_one():
    one = torch.zeros(1).double()
    rows = {
        name: Row(Evidence(one, one, one, one, one + 9, one, one - i, particles=100, features=4), 1, 1.0)
        for i, name in enumerate("ab")
    }
    assert "`a` is above `b` at this test point" in Comparison(rows, False).sentence()
    model = PPCA(4, 2)
    with pytest.raises(TypeError, match=r"pairs must be a dictionary .*, but got the name 1 \(an int\)"):
        compare({1: (model, PriorGuide(model))}, torch.randn(5, 4))


def test_exact_values_ranked_against_estimates_are_said_to_be_that():
    a, b = _made(elbo=-5.0, log_evidence=-4.0), _made(elbo=-6.0, log_evidence=-4.5)
    known = replace(b, exact=b.log_evidence)
    both = Comparison({"a": Row(a, 1, 1.0), "b": Row(known, 1, 1.0)}, False).sentence()
    assert "log p(x) is exact for b and estimated for a; an estimate is below log p(x) in expectation" in both
    for one, other in ((a, b), (replace(a, exact=a.log_evidence), known)):
        assert "exact for" not in Comparison({"a": Row(one, 1, 1.0), "b": Row(other, 1, 1.0)}, False).sentence()


def test_a_gap_whose_optimization_did_not_converge_is_an_upper_bound():
    one = torch.ones(3).double()
    evidence = _made(elbo=-5.0, log_evidence=-4.0)
    split = Gaps(evidence, evidence, one, one > 1, 3, 2.5)
    sentence = Comparison({"a": Row(evidence, 1, 1.0, split), "b": Row(evidence, 1, 1.0)}, True).sentence()
    assert sentence.endswith(
        "The approximation gap of a is an upper bound: local optimization did not converge for more than 10 % of the "
        "test points."
    )


def test_bits(shared):
    pairs, x = shared
    table = compare(pairs, x, particles=100, seed=0, progress=False)
    bits = table.rows["exact"].evidence.bits_per_dimension(offset=3.0)
    assert f"{bits:.4f}" in table.table(bits=True, offset=3.0)


def test_one_draw_of_a_random_transform_serves_all_pairs():
    model, guide, x = pair("VAE, Bernoulli", "MeanField")
    calls = []

    def binarize(batch):
        calls.append(1)
        return torch.bernoulli(batch)

    compare(
        {"a": (model, guide), "b": (model, PriorGuide(model))},
        torch.rand_like(x),
        10,
        batch_transform=binarize,
        progress=False,
    )
    assert calls == [1]


def test_a_seed_repeats_a_random_transform_too():
    model, guide, _ = pair("VAE, Bernoulli", "MeanField")
    grey = torch.rand(7, 5)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    options = {"batch_transform": torch.bernoulli, "seed": 1, "progress": False}
    runs = [compare({"a": (model, guide)}, grey, 20, **options).rows["a"].evidence.elbo for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(torch.rand(1), expected)


class _Watched(nn.BatchNorm1d):
    """Batch normalisation that records its number of rows."""

    def __init__(self, features):
        super().__init__(features)
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return super().forward(x)


def test_parameters_are_counted_on_a_part_of_the_data_and_nothing_moves():
    model, norm = PPCA(5, 2), _Watched(5)
    guide = amortize(model, norm, MeanField, context=5)
    with torch.no_grad():
        x = 3 + model(n=3000)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    table = compare({"normalised": (model, guide)}, x, particles=2, progress=False)
    assert table.rows["normalised"].parameters == sum(p.numel() for p in [*model.parameters(), *guide.parameters()])
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert max(norm.rows) <= 512
    assert norm.training


def test_pairs_beside_an_exact_guide_share_its_constant_weights(shared):
    pairs, x = shared
    table = compare(pairs, x, particles=400, seed=3, progress=False)
    evidence, alone = table.rows["mean-field"].evidence, evaluate(*pairs["mean-field"], x, 400, refine=False, seed=3)
    assert torch.equal(evidence.log_evidence, table.rows["exact"].evidence.log_evidence)
    assert torch.equal(evidence.by_guide.log_evidence, alone.log_evidence)
    assert torch.equal(evidence.elbo, alone.elbo)
    assert "weights of 'exact'" in str(evidence)


def _with_runs(means, data=1e-3):
    """A row of training runs with given mean log p(x); test points differ little."""
    spread = data * torch.linspace(-1, 1, 200).double()
    made = [
        Evidence(
            elbo=mean - 1 + spread,
            elbo_error=torch.full((200,), 1e-6).double(),
            log_evidence=mean + spread,
            standard_error=torch.full((200,), 1e-6).double(),
            ess=torch.full((200,), 9.0).double(),
            pareto_k=torch.full((200,), 0.1).double(),
            exact=None,
            particles=100,
            features=4,
        )
        for mean in means
    ]
    return Row(_pooled(made), 1, 1.0, runs=made if len(made) > 1 else [])


def test_the_variance_of_training_runs_is_in_the_verdict():
    a, b = [-3.0, -1.0, -2.0], [-4.0, -2.5, -2.5]
    table = Comparison({"a": _with_runs(a), "b": _with_runs(b)}, False)
    mean, error = table.difference("a", "b", "log_evidence")
    exact = stats.ttest_ind(a, b, equal_var=False)
    assert (mean, mean / error) == (pytest.approx(1.0), pytest.approx(float(exact.statistic), rel=1e-4))
    _, _, freedom = table._difference("a", "b", "log_evidence")
    assert freedom == pytest.approx(float(exact.df), rel=1e-3)
    assert "`a` and `b` do not differ significantly (Student's t, 3.9 degrees of freedom)" in table.sentence()
    assert table.sentence().endswith("Errors cover test points and training runs (3 of each row).")
    one = Comparison({"a": _with_runs(a[2:]), "b": _with_runs(b[2:])}, False).sentence()
    assert "standard errors above `b`" in one or "the same amount at every test point above `b`" in one
    assert one.endswith("Test-set error only, one training run: other seeds may differ by more.")
    mixed = Comparison({"a": _with_runs(a), "b": _with_runs(b[:1])}, False).sentence()
    assert mixed.endswith("training runs; b, one training run, assumed to vary like the other rows.")
    pooled = Comparison({"a": _with_runs(a), "b": _with_runs(b[:1])}, False).difference("a", "b", "log_evidence")
    assert pooled[1] == pytest.approx(float(torch.tensor(a).var() * (1 / 3 + 1)) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_a_verdict_on_few_data_is_wrong_as_seldom_as_it_says(n):
    generator = torch.Generator().manual_seed(n)
    one, wrong, tries = torch.full((n,), 0.1).double(), 0, 1500
    for _ in range(tries):
        rows = {
            name: Row(Evidence(x, one, x, one, 90 * one, one, None, particles=100, features=4), 1, 1.0)
            for name, x in zip("ab", torch.randn(2, n, generator=generator).double(), strict=True)
        }
        wrong += "standard errors above" in Comparison(rows, False).sentence()
    assert 0.02 < wrong / tries < 0.0455 + 3 * math.sqrt(0.0455 * 0.9545 / tries)


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_a_verdict_over_runs_is_wrong_as_seldom_as_it_says(runs):
    generator = torch.Generator().manual_seed(runs)
    wrong, tries = 0, 1500
    for _ in range(tries):
        a, b = torch.randn(2, runs, generator=generator, dtype=torch.float64).tolist()
        table = Comparison({"a": _with_runs(a), "b": _with_runs(b)}, False)
        mean, error, freedom = table._difference("a", "b", "log_evidence")
        wrong += significant(abs(mean), error, freedom)
    assert wrong / tries < 0.0455 + 3 * math.sqrt(0.0455 * 0.9545 / tries)
    assert wrong / tries > 0.004  # but it has a result


def test_a_list_of_pairs_is_one_row_of_training_runs():
    x = torch.randn(40, 5).double()
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = PPCA(5, 2).double()
        made.append((model, amortize(model, nn.Identity(), MeanField, context=5).double()))
    with pytest.raises(ValueError, match="the list of training runs of \\['a'\\] is empty"):
        compare({"a": []}, x, progress=False)
    with pytest.raises(ValueError, match="'a' has one pair more than once"):
        compare({"a": [made[0], made[0]]}, x, progress=False)
    with pytest.raises(ValueError, match="'a' has 3 training runs, but 1 histories"):
        compare({"a": made}, x, 50, histories={"a": History()}, progress=False)
    table = compare({"a": made, "b": made[0]}, x, 50, refine=False, seed=0, progress=False)
    alone = [evaluate(*pair, x, 50, refine=False, seed=0, progress=False) for pair in made]
    row = table.rows["a"]
    assert len(row.runs) == 3 and not table.rows["b"].runs and not table.shared_model
    torch.testing.assert_close(row.evidence.elbo, torch.stack([e.elbo for e in alone]).mean(0))
    noise = torch.stack([e.standard_error for e in alone]).square().sum(0).sqrt() / 3
    torch.testing.assert_close(row.evidence.standard_error, noise)
    columns = str(table).splitlines()[1].split("  ")
    assert "± runs" in [name.strip() for name in columns]
    means = [float(e.best.mean()) for e in alone]
    frame = table.to_frame()
    assert frame.loc["a", "training_error"] == pytest.approx(float(torch.tensor(means).std()) / 3**0.5, rel=1e-5)
    again = Comparison.from_json(table.to_json())
    assert again.sentence() == table.sentence() and str(again) == str(table)


def test_guides_of_one_model_have_training_runs_too(shared):
    pairs, x = shared
    model = pairs["prior"][0]
    runs = [(model, amortize(model, nn.Identity(), MeanField, context=5).double()) for _ in range(2)]
    table = compare({"mean-field": runs, "exact": pairs["exact"]}, x, 50, seed=0, progress=False)
    assert table.shared_model and len(table.rows["mean-field"].runs) == 2
    assert table.sentence().startswith("All rows share one model")


def test_seconds_hold_the_training_of_this_process(shared):
    pairs, x = shared
    model, guide = pairs["mean-field"]
    before = compare(pairs, x, particles=10, progress=False).rows["mean-field"].seconds
    history = fit(model, guide, x, epochs=30, progress=False, freeze=model)
    slow = fit(model, guide, x, epochs=1, callbacks=_Slow(), progress=False, freeze=model)
    table = compare(pairs, x, particles=10, progress=False)
    assert table.rows["mean-field"].seconds > history.seconds + slow.seconds > 2 > before / 10
    assert table.rows["prior"].seconds < 2


class _Slow:
    def after_epoch(self, history, model, guide):
        time.sleep(2.0)

    def close(self):
        pass


def test_pairs_have_names():
    model = PPCA(5, 2)
    with pytest.raises(TypeError, match=r"pairs must be a dictionary .* but got a list of 1"):
        compare([(model, PriorGuide(model))], torch.randn(9, 5))


def test_exact_values_are_taken_where_a_sum_or_an_integral_gives_them(float64):
    torch.manual_seed(0)
    model = VAE(mlp(2, [8]), Gaussian(3, 8), latent=2)
    guides = {name: (model, amortize(model, mlp(3, [8]), MeanField)) for name in ("a", "b")}
    x = torch.randn(12, 3)
    alone = evaluate(*guides["a"], x, 20, seed=0, progress=False)
    assert alone.exact is None  # not worth it for 20 particles
    table = compare(guides, x, 20, seed=0, progress=False)
    exact = exact_log_evidence(model, x, progress=False)
    for row in table.rows.values():
        torch.testing.assert_close(row.evidence.exact, exact.log_evidence, atol=2e-4, rtol=0)
    assert "-" not in str(table).splitlines()[3].split()[5:7]
    wide = VAE(mlp(5, [8]), Gaussian(3, 8), latent=5)
    assert compare({"wide": (wide, PriorGuide(wide))}, x, 20, progress=False).rows["wide"].evidence.exact is None


def test_a_row_below_the_baseline_is_named_with_the_reason(float64):
    model = PPCA(4, 2)
    x = torch.randn(100, 4) * torch.tensor([1.0, 1.0, 1.0, 300.0])
    fitted = PPCA(4, 2).fit_closed_form(x)
    pairs = {"new": (model, ExactPosterior(model)), "fitted": (fitted, ExactPosterior(fitted))}
    table = compare(pairs, x, 20, train=x, seed=0, progress=False)
    assert "Below one Gaussian per feature: new by " in table.sentence()
    assert "features differ in scale" in table.sentence() and "fitted by" not in table.sentence()
