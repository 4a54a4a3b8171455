"""Unusual but legal models and guides, some silently wrong in Pyro: the values of each module count."""

import copy
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from members import pair
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from pyro_pairs import PyroVAE
from torch import nn

from jensen.families import Bernoulli, FullCovariance, MeanField
from jensen.families.gaussian import RememberingNormal
from jensen.guides import ExactPosterior, PriorGuide, amortize
from jensen.inference import bounds, compare, evaluate, fit, log_joint, log_weights, terms
from jensen.kernel.randomness import derived_seed
from jensen.models import PPCA
from jensen.module import UniqueModule
from jensen.networks import mlp


class Shifted(PyroModule):
    """A nameless module with a constrained parameter: z ~ N(w, 1), x ~ N(z, 1)."""

    def __init__(self, w):
        super().__init__()
        self.w = PyroParam(torch.tensor(w), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_nameless_modules_keep_their_own_constrained_parameters():
    a, b, x = Shifted(0.1), Shifted(5.0), torch.zeros(3)
    with pytest.warns(UserWarning, match=r"held other values under the names \['w'\]"):
        table = compare({"a": (a, PriorGuide(a)), "b": (b, PriorGuide(b))}, x, 4000, seed=0, progress=False)
    for name, w in (("a", 0.1), ("b", 5.0)):
        evidence = table.rows[name].evidence
        exact = dist.Normal(w, 2**0.5).log_prob(torch.tensor(0.0))
        assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error).all()
    assert (a.w.item(), b.w.item()) == (pytest.approx(0.1), pytest.approx(5.0))


def test_two_auto_guides_of_one_class_are_two_guides():
    model = PPCA(5, 2)
    x = model(n=12).detach()
    guides = [AutoNormal(model) for _ in range(2)]
    for seed, guide in enumerate(guides):
        pyro.clear_param_store()
        fit(model, guide, x, epochs=30 * (1 + 5 * seed), lr=5e-2, freeze=model, seed=seed, progress=False)
    alone = []
    for guide in guides:
        pyro.clear_param_store()
        alone.append(evaluate(model, guide, x, 50, seed=0, progress=False).elbo)
    with pytest.warns(UserWarning, match="AutoNormal.locs.z"):
        table = compare({"a": (model, guides[0]), "b": (model, guides[1])}, x, 50, seed=0, progress=False)
    assert torch.equal(table.rows["a"].evidence.elbo, alone[0])
    assert torch.equal(table.rows["b"].evidence.elbo, alone[1])
    assert not torch.allclose(*alone)


def test_a_constrained_name_in_both_halves_is_refused():
    model, guide = Shifted(1.0), Shifted(2.0)
    with pytest.raises(ValueError, match="both have a constrained parameter named 'w'"):
        log_weights(model, guide, torch.zeros(3))


def test_fit_does_not_train_the_parameters_of_another_module_of_the_name():
    x = torch.zeros(3)
    a, b = Shifted(1.0), Shifted(5.0)
    fit(a, PriorGuide(a), x, epochs=1, progress=False)
    before = a.w_unconstrained.clone()
    with pytest.warns(UserWarning, match="held other values"):
        fit(b, PriorGuide(b), x, epochs=5, lr=0.1, progress=False)
    assert torch.equal(a.w_unconstrained, before)
    assert b.w.item() < 5.0


def test_an_auto_guide_is_fitted_on_all_data_in_their_order():
    """As by SVI on full batches: the values belong to their data points."""
    torch.manual_seed(1)
    model = PPCA(5, 2)
    x = model(n=40).detach()
    guide, twin = AutoNormal(model), AutoNormal(model)
    fit(model, guide, x, epochs=600, lr=3e-2, freeze=model, seed=0, progress=False)
    pyro.clear_param_store()
    svi = SVI(model, twin, Adam({"lr": 3e-2}), Trace_ELBO())
    frozen = copy.deepcopy(model.state_dict())
    for _ in range(600):
        svi.step(x)
        model.load_state_dict(frozen)
    theirs = evaluate(model, twin, x, 500, seed=0, progress=False)
    assert bounds(model, twin, x, 4, progress=False).mean.isfinite().all()
    with pytest.warns(UserWarning, match="held other values"):
        ours = evaluate(model, guide, x, 500, seed=0, progress=False)
    assert ours.elbo.shape == (40,)
    assert abs(ours.elbo.mean() - theirs.elbo.mean()) < 0.05
    assert ours.gap.mean() < 0.5


def test_an_auto_guide_in_batches_is_refused():
    model = PPCA(5, 2)
    x = model(n=40).detach()
    with pytest.raises(
        ValueError, match=r"run on 20 rows but not on 19 or 21: the AutoNormal .* each of 20 data points .*=40"
    ):
        fit(model, AutoNormal(model), x, epochs=1, batch_size=20, progress=False)


def test_joint_weights_stand_beside_the_joint_exact_value(float64):
    model = PPCA(5, 2)
    x = torch.randn(12, 5)
    guide = AutoMultivariateNormal(model)
    evidence = evaluate(model, guide, x, 50, progress=False)
    assert evidence.joint
    torch.testing.assert_close(evidence.exact, model.log_evidence(x).sum().unsqueeze(0))
    assert evidence.elbo.shape == evidence.gap.shape == (1,)
    per_datum = evaluate(model, ExactPosterior(model), x, 1, progress=False)
    assert evidence.bits_per_dimension() == pytest.approx(per_datum.bits_per_dimension())
    assert str(evidence).startswith("all data jointly, 50 particles, nats in total\n")
    with pytest.raises(ValueError, match=r"the weights of \['a'\] are joint"):
        compare({"a": (model, guide), "b": (model, ExactPosterior(model))}, x, 10, progress=False)


def test_a_guide_that_draws_another_event_is_refused():
    model, _, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match="samples site 'z' with 2 event dimensions, but the model's site has 1"):
        log_weights(model, lambda x: pyro.sample("z", dist.Normal(torch.zeros(7, 2), 1.0).to_event(2)), x)


def test_a_guide_with_another_support_is_refused():
    model, _, x = pair("PPCA", "MeanField")
    guide = amortize(model, nn.Identity(), Bernoulli, context=5)
    with pytest.raises(
        ValueError, match="samples site 'z' from Bernoulli, whose support differs from that of the model's Normal"
    ):
        evaluate(model, guide, x, 10, progress=False)


def test_a_point_estimate_has_no_evidence():
    model, _, x = pair("PPCA", "MeanField")
    guide = AutoDelta(model)
    fit(model, guide, x, epochs=2, freeze=model, progress=False)  # which is MAP, and legal
    with pytest.raises(ValueError, match=r"the guide is a point estimate at \['z'\] \(Delta\): it has no density"):
        evaluate(model, guide, x, 10, progress=False)


def test_a_global_latent_in_batches_is_warned_about():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.1))

    with pytest.warns(UserWarning, match="each batch is scored against its whole prior: use batch_size=20"):
        fit(model, guide, torch.randn(20), epochs=1, batch_size=10, progress=False)


def test_data_of_another_precision_are_named():
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match=r"is torch.float64, but the parameters of model and guide are torch.float32"):
        evaluate(model, guide, x.double(), 10, progress=False)
    with pytest.raises(ValueError, match=r"convert model and guide \(model.double\(\), .*, or standardize"):
        evaluate(model, guide, x.double() + 1e7, 10, progress=False)  # float32 has steps of 1 there


@pytest.mark.parametrize(("latent", "scale"), [(16, 1.0), (40, 1.0), (8, 255.0)])
def test_a_full_covariance_guide_stays_below_log_p_however_ill_conditioned(digits, latent, scale):
    """In float32, at a learning rate that throws its Cholesky factor about."""
    x = (digits.train * scale).float()
    model = PPCA(64, latent).fit_closed_form(x).rotated(seed=0)
    guide = amortize(model, nn.Identity(), FullCovariance, context=64)
    history = fit(model, guide, x, epochs=40, lr=5e-2, freeze=model, seed=0, progress=False)
    exact = model.log_evidence(x).mean().item()
    assert max(history.elbo) < exact + 1
    evidence = evaluate(model, guide, x[:200], 500, seed=0, progress=False)
    assert (evidence.elbo < evidence.exact + 6 * evidence.elbo_error + 1e-2 * evidence.exact.abs()).all()


def test_an_elbo_above_the_exact_value_is_doubted(float64):
    model, guide, x = pair("PPCA", "ExactPosterior")
    model.log_evidence = lambda x: torch.full((len(x),), -100.0)
    with pytest.warns(UserWarning, match="nats above the exact log p"):
        evaluate(model, guide, x, 10, progress=False)


def test_validation_of_joint_weights_does_not_depend_on_the_batch_size(float64):
    x = torch.randn(40, 5)

    def forgetful(x):
        pyro.sample("shift", dist.Normal(pyro.param("a", torch.tensor(0.1)), 1.0))

    def shifted(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(shift.unsqueeze(-1) + torch.zeros(5), 1.0).to_event(1), obs=x)

    with pytest.warns(UserWarning, match="whole prior"):
        history = fit(shifted, forgetful, x, epochs=1, batch_size=10, lr=1e-9, validation=x, progress=False)
    torch.manual_seed(derived_seed(0, "validation", 0))
    whole = log_weights(shifted, forgetful, x, particles=8, max_plate_nesting=1).mean().item() / 40
    assert history.validation[0] == pytest.approx(whole)


def test_a_new_auto_guide_does_not_wake_up_as_an_old_one():
    model = PPCA(5, 2)
    x = model(n=12).detach()
    old = AutoNormal(model)
    fit(model, old, x, epochs=50, lr=0.1, freeze=model, progress=False)
    new = AutoNormal(model)
    with pytest.warns(UserWarning, match="AutoNormal.locs.z"):
        log_weights(model, new, x)
    assert not torch.allclose(new.locs.z_unconstrained, old.locs.z_unconstrained, atol=0.05)


def test_masked_observations_may_lie_outside_the_support():
    model, guide, x = pair("VAE, Bernoulli", "MeanField")
    x[2] = 0.5
    seen = torch.tensor([n != 2 for n in range(7)])
    with pyro.validation_enabled(False):
        masked = log_weights(pyro.poutine.mask(model, mask=seen), guide, x, particles=3)
    assert masked.isfinite().all()


def test_the_history_of_a_subsampling_model_is_per_datum():
    x = torch.randn(100)

    def model(batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, subsample_size=len(batch)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=batch)

    def guide(batch):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("mu", dist.Normal(loc, 0.1))

    history = fit(model, guide, x, epochs=20, batch_size=10, lr=1e-2, validation=x, seed=0, progress=False)
    exact = dist.MultivariateNormal(torch.zeros(100), torch.eye(100) + 1.0).log_prob(x).item() / 100
    assert history.elbo[-1] == pytest.approx(exact, abs=0.1)
    assert history.validation[-1] == pytest.approx(exact, abs=0.1)


def test_sequential_subsampled_plates_are_scaled_up_without_blame(float64):
    x = torch.randn(10)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", 10, subsample=torch.arange(5)):
            pyro.sample(f"x{i}", dist.Normal(mu, 1.0), obs=x[i])

    def guide():
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    t = terms(model, guide, particles=3)
    by_hand = dist.Normal(t.values["mu"], 1.0).log_prob(x[2]) * 2
    torch.testing.assert_close(t.log_p["x2"], by_hand)


def test_a_scale_on_the_models_latent_alone_is_warned_about():
    model, guide, x = pair("PPCA", "MeanField")

    def annealed(x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.poutine.scale(scale=0.1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ model.weight.T, 1.0).to_event(1), obs=x)

    with pytest.warns(UserWarning, match=r"under a poutine.scale: 'z' \(0.1\)"):
        log_weights(annealed, guide, x)


def test_a_dimension_in_no_plate_is_refused():
    """The usual [N, N] mistake: to_event(1) is missing."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.5**0.5))

    with pytest.raises(ValueError, match=r"site 'x' has batch shape \(64, 64\), but dimension -2 belongs to no plate"):
        evaluate(model, guide, torch.randn(64, 1), 64, progress=False)


def test_a_plate_of_something_else_is_not_taken_for_the_data():
    def model(x):
        with pyro.plate("dims", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    with pytest.raises(ValueError, match=r"sizes \(3,\), but the model was given 64 data"):
        evaluate(model, PriorGuide(model), torch.randn(100, 3), 10, progress=False)


def test_stopped_gradients_keep_the_entropy_of_uncentred_guides(float64):
    """A Delta with a log-density is not a normalised density: its derivative in the parameters is kept."""
    mu, log_scale = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    x = torch.tensor([1.0, -2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0).expand([len(x)]), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(mu + log_scale.exp() * u, log_density=-log_scale.expand(u.shape)))

    t = terms(model, guide, x, particles=20_000, stopped=True)
    stopped = sum(t.log_p.values()) - sum(t.log_q_stopped.values())
    (gradient,) = torch.autograd.grad(stopped.mean(0).sum(), log_scale)
    torch.testing.assert_close(gradient, torch.tensor([-1.0, -1.0]), atol=0.1, rtol=0)  # 1 - 2 s^2 at s = 1


def test_dropout_between_the_sites_of_a_guide_is_refused_by_stopped_terms():
    model = PPCA(5, 2)
    noisy = nn.Dropout(0.5)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(noisy(x)[:, :2], 0.1).to_event(1))

    with pytest.raises(ValueError, match=r"log q of site 'z' changes when the guide is run again"):
        terms(model, guide, torch.randn(6, 5) + 3, particles=2, stopped=True)
    encoder = nn.Sequential(mlp(5, [32]), nn.Dropout(0.5))  # before the first sample: repeated exactly
    t = terms(model, amortize(model, encoder, MeanField, 32), torch.randn(6, 5), particles=2, stopped=True)
    torch.testing.assert_close(t.log_q["z"], t.log_q_stopped["z"])


def test_modes_of_every_submodule_are_restored():
    model = PPCA(5, 2)
    encoder = nn.Sequential(mlp(5, [8]), nn.Dropout(0.5))
    guide = amortize(model, encoder, MeanField, context=8)
    x = torch.randn(6, 5)
    seen = []
    encoder.register_forward_pre_hook(lambda m, a: seen.append(m.training) if torch.is_grad_enabled() else None)
    fit(model, guide, x, epochs=3, freeze=encoder, validation=x, progress=False)
    assert not any(seen)
    assert len(seen) >= 3
    assert encoder.training
    encoder.eval()
    evaluate(model, guide, x, 20, progress=False)
    assert not encoder.training
    assert guide.training


def test_bound_methods_are_evaluated_in_evaluation_mode():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def model(self, x):
            seen.append(self.drop.training)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.drop(x), 1.0))

    seen = []
    owner = Owner()
    evaluate(owner.model, owner.guide, torch.randn(4), 10, progress=False)
    assert not any(seen)
    assert owner.drop.training


def test_nested_pyro_modules_are_copied_under_names_of_their_own():
    class Outer(UniqueModule):
        def __init__(self):
            super().__init__()
            self.inner = Shifted(1.0)

        def forward(self, x):
            return self.inner(x)

    one = Outer()
    log_weights(one, PriorGuide(one), torch.zeros(3))
    two = copy.deepcopy(one)
    assert one.inner._pyro_name != two.inner._pyro_name
    fit(two, PriorGuide(two), torch.zeros(3), epochs=3, lr=0.1, progress=False)
    assert one.inner.w.item() == pytest.approx(1.0)
    assert two.inner.w.item() < 1.0


def test_log_joint_takes_values_as_terms_gives_them_and_checks_their_shape(float64):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x = torch.randn(4)
    t = terms(model, PriorGuide(model), x, particles=4)
    joint = t.log_p["mu"] + t.log_p["x"]
    torch.testing.assert_close(log_joint(model, {"mu": t.values["mu"]}, x), joint)
    torch.testing.assert_close(log_joint(model, {"mu": t.values["mu"].flatten()}, x), joint)
    ppca = PPCA(5, 2)
    with pytest.raises(ValueError, match=r"values of shape \[K, 4, 2\] at site 'z', but got \[4, 2\]"):
        log_joint(ppca, {"z": torch.zeros(4, 2)}, torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"agree in their first dimension K, but got \[2, 3\]"):
        log_joint(_two_latents, {"a": torch.zeros(2), "b": torch.zeros(3)})


def _two_latents():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("run", [evaluate, bounds])
def test_a_device_is_taken(run):
    model, guide, x = pair("VAE, shared scale", "MeanField")
    run(model, guide, x, 8, device="cpu", progress=False)
    fit(model, guide, x, epochs=1, device="cpu", validation=x, progress=False)


def test_evidence_of_a_pair_with_covariates(float64):
    """Tuple data: the exact value is computed with the same arguments as the model."""

    class Conditional:
        def __call__(self, x, y):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(y, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def log_evidence(self, x, y):
            return dist.Normal(y, math.sqrt(2.0)).log_prob(x)

    model, y = Conditional(), torch.randn(9)
    x = y + torch.randn(9)
    evidence = evaluate(model, PriorGuide(model), (x, y), 3000, seed=0, progress=False)
    torch.testing.assert_close(evidence.exact, model.log_evidence(x, y))
    assert ((evidence.log_evidence - evidence.exact).abs() < 5 * evidence.standard_error).all()


def test_a_second_instance_of_pyros_vae_example_is_trained():
    x = torch.rand(30, 8).round()
    one, two = PyroVAE(), PyroVAE()
    for vae in (one, two):
        before = copy.deepcopy(vae.state_dict())
        said = pytest.warns(UserWarning, match=r"held other values under the names \['decoder', 'encoder'\]")
        with nullcontext() if vae is one else said:
            fit(vae.model, vae.guide, x, epochs=2, progress=False)
        assert not any(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    with pytest.warns(UserWarning, match="held other values"):
        table = compare({"one": (one.model, one.guide), "two": (two.model, two.guide)}, x, 20, progress=False)
    assert len({row.parameters for row in table.rows.values()}) == 1


def test_enumeration_trains():
    mu = torch.tensor([-1.0, 1.0])
    x = torch.cat([torch.randn(50) - 2, torch.randn(50) + 2])

    def mixture(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(pyro.param("mu", mu)[c], 1.0), obs=x)

    fit(mixture, lambda x: None, x, TraceEnum_ELBO(max_plate_nesting=1), epochs=60, lr=0.05, progress=False)
    assert (pyro.param("mu") - torch.tensor([-2.0, 2.0])).abs().max() < 0.6


def test_full_covariance_has_the_gradients_of_a_plain_gaussian(float64):
    loc, lower = torch.randn(7, 3, requires_grad=True), torch.randn(7, 3, 3, requires_grad=True)
    scale = lower.tril(-1) + torch.diag_embed(lower.diagonal(dim1=-2, dim2=-1).exp())
    ours, plain = RememberingNormal(loc, scale_tril=scale), dist.MultivariateNormal(loc, scale_tril=scale)
    for draw in (ours.expand([5, 7]).rsample, ours.rsample, ours.sample):
        value = draw()
        inputs = (loc, lower, value) if value.requires_grad else (loc, lower)
        remembered = torch.autograd.grad(draw.__self__.log_prob(value).sum(), inputs, retain_graph=True)
        solved = torch.autograd.grad(plain.log_prob(value).sum(), inputs, retain_graph=True)
        for one, two in zip(remembered, solved, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
