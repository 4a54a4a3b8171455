"""Training: the same steps as SVI, repeatable, resumable."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from members import CASES, pair
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.optim import Adam
from pyro_pairs import PyroVAE
from torch import nn

from jensen.families import FullCovariance
from jensen.guides import ExactPosterior, PriorGuide, amortize
from jensen.inference import IWAE, History, evaluate, fit, log_weights
from jensen.kernel.randomness import derived_seed
from jensen.models import PPCA
from jensen.module import UniqueModule


def _state(*halves):
    return [copy.deepcopy(half.state_dict()) for half in halves]


def _equal(one, two):
    return all(torch.equal(a[k], b[k]) for a, b in zip(one, two, strict=True) for k in a)


def test_a_step_is_that_of_svi(float64):
    """Whole-batch steps of fit and of SVI with Pyro's Adam, from one seed, end at the same parameters."""
    model, guide, x = pair("VAE, shared scale", "FullCovariance")
    twin_model, twin_guide = copy.deepcopy((model, guide))
    svi = SVI(twin_model, twin_guide, Adam({"lr": 1e-2}), Trace_ELBO())
    torch.manual_seed(3)
    losses = []
    for _ in range(5):
        losses.append(svi.step(x))
    torch.manual_seed(3)
    history = fit(model, guide, x, epochs=5, batch_size=100, lr=1e-2, progress=False)
    for one, two in zip(_state(model, guide), _state(twin_model, twin_guide), strict=True):
        for name in one:
            torch.testing.assert_close(one[name], two[name], msg=name)
    assert history.elbo == pytest.approx([-loss / len(x) for loss in losses])


@pytest.mark.parametrize("frozen", ["model", "guide"])
def test_frozen_halves_stay_as_they_are(frozen):
    model, guide, x = pair("VAE, shared scale", "MeanField")
    halves = {"model": model, "guide": guide}
    before = {name: copy.deepcopy(half.state_dict()) for name, half in halves.items()}
    fit(model, guide, x, epochs=2, freeze=halves[frozen], progress=False)
    for name, half in halves.items():
        same = [torch.equal(value, before[name][key]) for key, value in half.state_dict().items()]
        assert all(same) if name == frozen else not any(same)
    assert all(p.requires_grad for half in halves.values() for p in half.parameters())


def test_two_pairs_of_one_class_train_in_turn_by_svi_and_by_fit():
    """Each learns, without shared parameters."""
    pairs = [pair("VAE, shared scale", "MeanField") for _ in range(2)]
    x = pairs[0][2]
    svis = [SVI(model, guide, Adam({"lr": 2e-2}), Trace_ELBO()) for model, guide, _ in pairs]
    start = [evaluate(m, g, x, 2000, seed=0, progress=False).elbo.mean() for m, g, _ in pairs]
    for _ in range(20):
        for svi, (model, guide, _) in zip(svis, pairs, strict=True):
            others = [half for m, g, _ in pairs for half in (m, g) if half not in (model, guide)]
            before = _state(*others)
            svi.step(x)
            fit(model, guide, x, epochs=1, lr=2e-2, progress=False)
            assert _equal(before, _state(*others))
    end = [evaluate(m, g, x, 2000, seed=0, progress=False).elbo.mean() for m, g, _ in pairs]
    assert all(after > before + 0.3 for before, after in zip(start, end, strict=True))


class _NetModel(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 2)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class _NetGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(1))


def test_fit_trains_a_users_model_and_guide_that_both_call_an_attribute_net():
    model, guide, x = _NetModel(), _NetGuide(), torch.randn(20, 2)
    before = _state(model, guide)
    fit(model, guide, x, epochs=1, progress=False)
    for old, half in zip(before, (model, guide), strict=True):
        for name, value in half.state_dict().items():
            assert not torch.equal(value, old[name]), name


def test_our_model_and_guide_may_both_call_an_attribute_net():
    """Also with Pyro's SVI, where parameter names decide."""
    model, guide, x = pair("VAE, shared scale", "MeanField")
    model.net, guide.net = model.decoder, guide.encoder
    before = _state(model, guide)
    SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO()).step(x)
    assert not any(torch.equal(a[k], b[k]) for a, b in zip(before, _state(model, guide), strict=True) for k in a)


def test_fit_trains_what_pyro_module_and_pyro_param_make():
    vae, x = PyroVAE(), torch.rand(30, 8).round()
    before = _state(vae)
    fit(vae.model, vae.guide, x, epochs=1, progress=False)
    assert not any(torch.equal(a[k], b[k]) for a, b in zip(before, _state(vae), strict=True) for k in a)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        a = pyro.param("a", torch.tensor(0.0))
        s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(a * x, s))

    fit(model, guide, torch.randn(400), epochs=150, lr=3e-2, seed=0, progress=False)
    assert pyro.param("a").item() == pytest.approx(0.5, abs=0.05)  # the exact posterior is N(x / 2, 1 / 2)
    assert pyro.param("s").item() == pytest.approx(0.5**0.5, abs=0.05)


def test_fit_trains_an_auto_guide():
    model = PPCA(5, 2)
    x = model(n=20).detach()
    guide = AutoNormal(model)
    history = fit(model, guide, x, epochs=100, batch_size=20, lr=5e-2, freeze=model, seed=0, progress=False)
    assert history.elbo[-1] > history.elbo[0]


def test_other_objectives_of_pyro_serve():
    model, guide, x = pair("VAE, shared scale", "MeanField")
    history = fit(model, guide, x, TraceMeanField_ELBO(), epochs=2, progress=False)
    assert len(history.elbo) == 2


@config_enumerate
def _mixture(x):
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)


def test_enumerated_sites_are_summed_out_where_no_objective_is_given(float64):
    x = torch.tensor([-3.0, -2.5, 3.0, 2.0])
    guide = AutoNormal(poutine.block(_mixture, hide=["k"]), init_scale=1e-9)
    guide(x)
    svi = SVI(_mixture, guide, Adam({"lr": 1e-2}), TraceEnum_ELBO(max_plate_nesting=1))
    torch.manual_seed(1)
    expected = -svi.evaluate_loss(x) / len(x)
    torch.manual_seed(1)
    history = fit(_mixture, guide, x, validation=x, epochs=1, lr=1e-9, progress=False)
    assert history.elbo == pytest.approx([expected], abs=1e-6)
    assert history.validation == pytest.approx([expected], abs=0.6)  # of other samples


def test_an_objective_that_samples_enumerated_sites_from_the_model_is_warned_about():
    guide = AutoNormal(poutine.block(_mixture, hide=["k"]))
    with (
        pytest.warns(UserWarning, match=r"Trace_ELBO samples \['k'\] from the model, .*max_plate_nesting=1"),
        pytest.warns(UserWarning, match="Found vars in model but not guide"),
    ):
        fit(_mixture, guide, torch.randn(4), Trace_ELBO(), epochs=1, progress=False)


def test_an_exact_guide_has_nothing_to_save_and_trains_the_model():
    model, guide, x = pair("PPCA", "ExactPosterior")
    assert list(guide.parameters()) == []
    before = evaluate(model, guide, x, 1, progress=False).exact.mean()
    fit(model, guide, x, epochs=20, lr=1e-2, progress=False)
    after = evaluate(model, guide, x, 1, progress=False)
    assert after.exact.mean() > before
    torch.testing.assert_close(after.elbo, after.exact, atol=1e-4, rtol=0)


def test_a_seed_repeats_the_run_and_leaves_the_stream_alone():
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        model, guide, x = pair("VAE, shared scale", "MeanField")
        expected = torch.rand(1)
        torch.manual_seed(0)
        pair("VAE, shared scale", "MeanField")
        fit(model, guide, x, epochs=3, batch_size=3, seed=11, progress=False)
        assert torch.equal(torch.rand(1), expected)
        ends.append(_state(model, guide))
    assert _equal(*ends)


def test_patience_keeps_the_best_validation_epoch():
    model, guide, x = pair("VAE, shared scale", "MeanField")
    held_out = x + 3.0  # training moves away from it
    history = fit(model, guide, x, epochs=50, lr=3e-2, validation=held_out, patience=3, seed=0, progress=False)
    best = history.best_epoch
    assert len(history.validation) == best + 3 < 50
    assert history.validation[best - 1] == max(history.validation)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(derived_seed(0, "validation", 0))
        again = log_weights(model, guide, held_out, particles=8).mean().item()
    assert again == pytest.approx(history.validation[best - 1], rel=1e-5)
    assert f"kept epoch {best}" in str(history)


def test_patience_of_an_importance_weighted_run_follows_its_own_bound():
    """A factorized guide at the maximum of the ELBO: the bound of 20 samples prefers it wider, so the ELBO falls."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.3), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.full((2,), 1 / 2.09))  # of the posterior mean
        scale = pyro.param("scale", torch.full((2,), 12.1111**-0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x[:, None], scale).to_event(1))

    torch.manual_seed(0)
    x = 2.09**0.5 * torch.randn(400)
    how = {"validation": x, "patience": 5, "lr": 5e-3, "seed": 0, "progress": False}
    history = fit(model, guide, x, IWAE(20, "dreg"), epochs=40, **how)
    elbos = [-r - d for r, d in zip(history.rate, history.distortion, strict=True)]
    assert history.best_epoch >= 20
    assert history.validation[19] > history.validation[0] + 0.05
    assert elbos[19] < elbos[0] - 0.05
    assert pyro.param("scale").min() > 1.1 * 12.1111**-0.5


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    def run(epochs, **options):
        torch.manual_seed(0)
        model, guide, x = pair("VAE, shared scale", "FullCovariance")
        schedule = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        history = fit(
            model,
            guide,
            x,
            epochs=epochs,
            batch_size=3,
            scheduler=schedule,
            validation=x,
            seed=5,
            progress=False,
            **options,
        )
        return _state(model, guide), history

    file = tmp_path / "run" / "checkpoint.pt"
    whole, history = run(6)
    run(2, checkpoint=file)
    resumed, resumed_history = run(6, checkpoint=file, resume=True)
    assert _equal(whole, resumed)
    assert resumed_history.elbo == history.elbo
    assert resumed_history.validation == history.validation
    assert [p.name for p in file.parent.iterdir()] == ["checkpoint.pt"]  # no incomplete file is left


def test_grey_images_are_binarized_batch_by_batch():
    model, guide, x = pair("VAE, Bernoulli", "MeanField")
    seen = []

    def binarize(batch):
        seen.append(batch.shape)
        return torch.bernoulli(batch)

    grey = torch.rand_like(x)
    fit(model, guide, grey, epochs=2, batch_size=4, batch_transform=binarize, progress=False)
    assert seen[-4:] == [(4, 5), (3, 5), (4, 5), (3, 5)]
    evaluate(model, guide, grey, 10, batch_transform=torch.bernoulli, progress=False)


def test_data_may_be_a_tuple_indexed_together():
    def model(x, y):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    y = torch.arange(10.0)
    x = y + 0.1
    guide = PriorGuide(model)
    fit_guide = AutoNormal(model)
    fit(model, fit_guide, (x, y), epochs=1, batch_size=10, progress=False)
    evidence = evaluate(model, guide, (x, y), 2000, seed=0, progress=False)
    exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(0.1)).double()
    assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error).all()


def test_a_run_that_diverges_stops_and_keeps_the_last_good_epoch(tmp_path):
    model = PPCA(5, 2)
    x = model(n=40).detach()
    guide = amortize(model, nn.Identity(), FullCovariance, context=5)
    schedule = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 3 else 1e30)
    file = tmp_path / "checkpoint.pt"
    found = r"at or after step \d+ \(epoch 4\), and the first .* is .* the guide's site 'z' for rows .* end of epoch 3"
    with pytest.raises(FloatingPointError, match=found):
        fit(model, guide, x, epochs=20, batch_size=10, scheduler=schedule, checkpoint=file, progress=False)
    saved = torch.load(file, weights_only=True)
    assert len(saved["history"]["elbo"]) == 3
    parameters = [*model.parameters(), *guide.parameters()]
    for p, value in zip(parameters, saved["parameters"][-len(parameters) :], strict=True):
        assert torch.equal(p, value)
        assert p.abs().max() < 1e3


def test_a_last_step_that_diverges_is_not_saved(tmp_path):
    """All data in one batch: the failing step is the last of its epoch, and no later loss shows it."""
    model, file = PPCA(5, 2), tmp_path / "c.pt"
    x = model(n=40).detach()
    guide = amortize(model, nn.Identity(), FullCovariance, context=5)
    schedule = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 3 else 1e30)
    with pytest.raises(FloatingPointError, match="those at the end of epoch 3"):
        fit(model, guide, x, epochs=4, batch_size=40, scheduler=schedule, checkpoint=file, progress=False)
    assert all(p.abs().max() < 1e3 for half in (model, guide) for p in half.parameters())
    assert len(torch.load(file, weights_only=True)["history"]["elbo"]) == 3


def test_the_best_epoch_survives_an_interruption(tmp_path):
    """Patience in a resumed run restores the same state as in an uninterrupted one."""

    def run(epochs, **options):
        torch.manual_seed(0)
        model, guide, x = pair("VAE, shared scale", "MeanField")
        options = {"validation": x + 3.0, "patience": 4, "seed": 5, "lr": 3e-2, "progress": False, **options}
        history = fit(model, guide, x, epochs=epochs, **options)
        return _state(model, guide), history

    whole, history = run(30)
    stop = history.best_epoch + 1
    run(stop, checkpoint=tmp_path / "c.pt")
    resumed, again = run(30, checkpoint=tmp_path / "c.pt", resume=True)
    assert len(history.validation) > stop
    assert again.best_epoch == history.best_epoch
    assert _equal(whole, resumed)
    assert again.seconds > 0


def test_a_parameter_that_appears_late_is_trained():
    calls = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        calls.append(1)
        loc = pyro.param("early", torch.tensor(0.0))
        if torch.is_grad_enabled() and len(calls) > 8:
            loc = loc + pyro.param("late", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    fit(model, guide, torch.randn(20) + 3, epochs=20, lr=1e-2, progress=False)
    assert pyro.param("late").item() > 0.05


@pytest.mark.parametrize("batch_size", [10, 100])
def test_a_gradient_that_is_not_finite_changes_nothing(batch_size, tmp_path):
    """Sqrt at 0: the loss is finite, its gradient is not."""

    class Kinked(UniqueModule):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z + self.w.square().sum().sqrt(), 1.0), obs=x)

    model, file = Kinked(), tmp_path / "c.pt"
    with pytest.raises(FloatingPointError, match="those at the end of epoch 0"):
        fit(model, PriorGuide(model), torch.randn(20), epochs=1, batch_size=batch_size, checkpoint=file, progress=False)
    assert model.w.tolist() == [0, 0]
    assert not file.exists()


@pytest.mark.filterwarnings("ignore:Laplace")
def test_svi_and_fit_know_the_same_parameters():
    for model_name, guide_name in CASES:
        model, guide, x = pair(model_name, guide_name)
        pyro.clear_param_store()
        SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO()).step(x)
        stored = {id(p) for p in dict(pyro.get_param_store().named_parameters()).values()}
        assert stored == {id(p) for half in (model, guide) for p in half.parameters()}


def test_history_prints_and_converts():
    history = History(elbo=[-2.0, -1.0], validation=[-3.0, -2.5], best_epoch=2, steps=4, seconds=1.25)
    assert str(history).splitlines()[0] == (
        "2 epochs, 4 steps, 1.2 s: training bound -2.000 -> -1.000 nats per data point, validation -2.500, "
        "kept epoch 2 at -2.500"
    )
    assert history.to_dict()["best_epoch"] == 2


def test_the_exact_posterior_follows_the_model(float64):
    model, guide, x = pair("PPCA", "ExactPosterior")
    fit(model, amortize(model, nn.Identity(), FullCovariance, 5), x, epochs=3, lr=1e-1, progress=False)
    torch.testing.assert_close(log_weights(model, ExactPosterior(model), x)[0], model.log_evidence(x))
    torch.testing.assert_close(log_weights(model, guide, x)[0], model.log_evidence(x))


@pytest.mark.parametrize("before", ["nothing", "evaluate"])
@pytest.mark.parametrize("compile", [False, True])
def test_parameters_that_require_no_gradient_stay_as_they_are(before, compile):
    """Pyro requires a gradient of every parameter that it puts into its store."""
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    model = PPCA(5, latent=2)
    model.log_noise.requires_grad_(False).fill_(-0.5)
    guide = ExactPosterior(model)
    if before == "evaluate":
        evaluate(model, guide, x, 10, progress=False)
    weight = model.weight.detach().clone()
    fit(model, guide, x, epochs=3, lr=0.01, batch_size=100, compile=compile, seed=0, progress=False)
    assert float(model.log_noise) == -0.5
    assert not model.log_noise.requires_grad
    assert not torch.equal(model.weight, weight)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train: .* require no gradient"):
        fit(model, guide, x, epochs=1, progress=False)
