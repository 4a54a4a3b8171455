"""The ways to run particles: which one is selected or rejected, and equal numbers for all."""

import copy
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from members import pair
from torch import nn

from jensen.families import Sylvester
from jensen.graphs.draws import LogWeights
from jensen.guides import amortize
from jensen.inference import ELBO, IWAE, ais, bounds, evaluate, exact_log_evidence, fit, log_joint, log_weights, terms
from jensen.kernel.lifts import ALONE, LOOP, PLATE, VMAP, Lifted
from jensen.kernel.weights import Pair
from jensen.models import PPCA
from jensen.networks import mlp


class Linear(nn.Module):
    """z ~ N(0, I), x ~ N(z W, 1), with z used in one of three styles; log p(x) is that of a Gaussian."""

    def __init__(self, style):
        super().__init__()
        self.style = style
        self.weight = nn.Parameter(torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.8, -1.0]]))
        self.loc, self.raw = nn.Linear(3, 2), nn.Parameter(torch.tensor(-0.5))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            if self.style == VMAP:
                mean = torch.stack([z[:, 0], z[:, 1]], 1) @ self.weight
            else:
                mean = z @ self.weight + (0.0 * z[0, 0].item() if self.style == LOOP else 0.0)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc(x), self.raw.exp()).to_event(1))

    def exact(self, x):
        return dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + self.weight.T @ self.weight).log_prob(x)


def linear(style):
    torch.manual_seed(0)
    return Linear(style)


quiet = pytest.mark.filterwarnings("ignore:the model runs one particle after the other")
styles = pytest.mark.parametrize("style", [PLATE, VMAP, pytest.param(LOOP, marks=quiet)])


@styles
def test_every_way_gives_the_same_terms(style, float64):
    """Log-densities, their gradients, closed forms and means, at the same values."""
    one, x = linear(style), torch.randn(5, 3)
    t = terms(one.model, one.guide, x, particles=4, stopped=True)
    z, w = t.values["z"], one.weight
    by_hand = dist.Normal(z @ w, 1.0).log_prob(x).sum(-1)
    q = dist.Normal(one.loc(x), one.raw.exp())
    torch.testing.assert_close(t.log_p["x"], by_hand)
    torch.testing.assert_close(t.log_q["z"], q.log_prob(z).sum(-1))
    torch.testing.assert_close(t.log_q_stopped["z"], t.log_q["z"])
    kl = torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0))  # [N, D]
    torch.testing.assert_close(t.kl("z"), kl.sum(-1).expand(4, 5))
    torch.testing.assert_close(torch.stack(t.kl_per_dimension("z"), -1), kl.expand(4, 5, 2))
    torch.testing.assert_close(t.mean_p("x"), z @ w)
    torch.testing.assert_close(t.mean_q("z"), q.mean.expand(4, 5, 2))
    parameters = [w, one.raw, one.loc.weight]
    ours = torch.autograd.grad(t.log_weights.sum(), parameters, retain_graph=True)
    total = by_hand + dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
    for a, b in zip(ours, torch.autograd.grad(total.sum(), parameters, retain_graph=True), strict=True):
        torch.testing.assert_close(a, b)
    (slope,) = torch.autograd.grad(t.log_q_stopped["z"].sum(), one.raw, retain_graph=True)
    detached = dist.Normal(one.loc(x).detach(), one.raw.detach().exp()).log_prob(z).sum()
    torch.testing.assert_close(slope, torch.autograd.grad(detached, one.raw)[0])


@styles
def test_every_function_takes_every_way(style, float64):
    one, x = linear(style), torch.randn(4, 3)
    exact = one.exact(x).detach()
    evidence = evaluate(one.model, one.guide, x, 500, seed=0, progress=False)
    assert evidence.route.startswith(style)
    assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error).all()
    known = exact_log_evidence(one.model, x, progress=False)
    assert known.route == style
    torch.testing.assert_close(known.log_evidence, exact, rtol=0, atol=1e-5)
    annealed = ais(one.model, None, x, chains=20, temperatures=20, seed=0, progress=False)
    assert annealed.route == style
    assert ((annealed.log_evidence - exact).abs() < 6 * annealed.standard_error + 0.05).all()
    assert bounds(one.model, one.guide, x, 8, seed=0, progress=False).route == style
    z = torch.randn(6, 4, 2)
    joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(z @ one.weight, 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(log_joint(one.model, {"z": z}, x), joint)


@styles
@pytest.mark.parametrize(
    "objective",
    [ELBO(3, analytic_kl=True), ELBO(3, gradient="stl"), IWAE(4, gradient="dreg")],
    ids=["kl", "stl", "dreg"],
)
def test_objectives_train_by_every_way(style, objective, float64):
    """The same parameters as by the outer plate: gradients of the same samples up to their order."""
    x = torch.randn(6, 3)
    one = linear(style)
    history = fit(one.model, one.guide, x, objective, epochs=150, lr=3e-2, seed=0, compile=False, progress=False)
    assert abs(max(history.elbo[-20:]) - float(one.exact(x).detach().mean())) < 0.5
    assert history.route == "eager: compile=False" + ("" if style == PLATE else f" (particles: {style})")


def test_weights_of_a_mapped_pair_are_captured_and_those_of_a_loop_by_particle(float64):
    x = torch.randn(5, 3)
    for style in (VMAP, PLATE):
        one = linear(style)
        fast = LogWeights(Pair(one.model, one.guide), True)
        with torch.no_grad():
            for _ in range(3):
                torch.manual_seed(2)
                found = fast((x,), 6)
                torch.manual_seed(2)
                torch.testing.assert_close(found, log_weights(one.model, one.guide, x, particles=6))
        assert fast.route == "traced and compiled"


def test_particles_of_a_loop_are_runs_of_one_graph(float64):
    """A way that is rejected only for the shape of its data, so that a single run can be traced."""
    one, x = linear(PLATE), torch.randn(5, 3)
    slow = Pair(one.model, one.guide, 1)
    fast = LogWeights(slow, True)
    with torch.no_grad():
        fast((x,), 6)
        for half in slow._lifted:
            half._proofs = {key: proof._replace(way=LOOP) for key, proof in half._proofs.items()}
        torch.manual_seed(2)
        found = fast((x,), 6)
        torch.manual_seed(2)
        alone = torch.cat([log_weights(one.model, one.guide, x) for _ in range(6)])
    torch.testing.assert_close(found, alone)


def test_one_particle_is_the_program_itself():
    seen = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            seen.append(z.shape)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    x = torch.randn(3, 2)
    one = Pair(model, guide, 1)
    assert one.log_weights((x,), 1).shape == (1, 3)
    assert one.way == ALONE
    assert set(seen) == {(3, 2)}


def test_a_program_that_fits_by_chance_is_not_believed():
    """As many particles as data: [K, N, 1] broadcasts to [K, N]. Another number raises. Both are detected."""
    x = torch.randn(50, 1)

    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=x[:, 0])

    lifted = Lifted(model, 1)
    with torch.no_grad():
        for K in (50, 7):
            w = torch.randn(K, 1, 1)
            run = lifted((x,), K, {"w": w}, {"w": 1})
            by_hand = dist.Normal(w * x[:, 0], 1.0).log_prob(x[:, 0])  # [K, 1, N]
            torch.testing.assert_close(run.sites["y"].log_prob, by_hand.squeeze(1))
    assert lifted.way == VMAP
    assert lifted.reasons[PLATE]


def test_a_branch_that_three_particles_take_alike_by_chance_is_not_believed():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z if z.sum() > 0 else 2 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.1 * x, 1.0))

    x, ways = torch.randn(4), set()
    for seed in range(12):  # three of a kind come in one of four
        torch.manual_seed(seed)
        pair = Pair(model, guide, 1)
        with pytest.warns(UserWarning, match="one particle after the other") as caught:
            pair.log_weights((x,), 20)
        ways.add((pair.way, "under outer plate: it reads values" in str(caught[0].message)))
    assert ways == {(LOOP, True), (LOOP, False)}


def test_values_of_the_data_may_be_read():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z * x.max().item() if (x > 0).any() else z, 1.0), obs=x)

    pair = Pair(model, lambda x: pyro.plate("data", len(x))(pyro.sample)("z", dist.Normal(0.1 * x, 1.0)), 1)
    pair.log_weights((torch.arange(4.0),), 20)
    assert pair.way == PLATE


def test_a_guide_without_log_q_of_given_values_is_proved_by_its_noise():
    model, x = PPCA(5, 2), torch.randn(4, 5)
    guide = amortize(model, mlp(5, [8]), Sylvester, context=8)
    proved = Pair(model, guide)
    with torch.no_grad():
        proved.log_weights((x,), 20)
    assert proved.way == PLATE


def test_noise_that_a_guide_draws_for_itself_differs_between_particles(float64):
    """With an outer plate it would be the same for all: K samples would be one."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        noise = torch.randn(len(x))
        z = x / 2 + math.sqrt(0.5) * noise
        with pyro.plate("data", len(x)):
            log_q = dist.Normal(0.0, 1.0).log_prob(noise) - math.log(math.sqrt(0.5))
            pyro.sample("z", dist.Delta(z, log_q))

    x = torch.randn(5)
    proved = Pair(model, guide)
    with torch.no_grad():
        t = proved.terms((x,), 200)
    assert proved.way == VMAP
    assert t.values["z"].unique(dim=0).shape == (200, 5)
    torch.testing.assert_close(
        t.log_weights, dist.Normal(0.0, 2**0.5).log_prob(x).expand(200, 5)
    )  # the exact posterior


def test_an_ill_conditioned_decoder_is_not_refused_for_rounding():
    """A sharp likelihood of many features far from the data: log p is some 1e7, in single precision."""
    torch.manual_seed(0)
    decoder = nn.Linear(4, 3072)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.01).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[..., :4], 1.0).to_event(1))

    proved = Pair(model, guide)
    with torch.no_grad():
        log_w = proved.log_weights((torch.randn(8, 3072),), 16)
    assert proved.way == PLATE
    assert log_w.abs().max() > 1e7


def test_batch_norm_of_latents_in_training_is_one_batch_per_particle(float64):
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

        def model(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))

    torch.manual_seed(0)
    owner, x = Owner(), torch.randn(6, 3)
    proved = Pair(owner.model, owner.guide)
    with pytest.warns(UserWarning, match=r"the model runs one particle after the other.*put it into evaluation mode"):
        t = proved.terms((x,), 3)
    for k in range(3):
        mean = owner.decoder(t.values["z"][k])
        torch.testing.assert_close(t.log_p["x"][k], dist.Normal(mean, 1.0).log_prob(x).sum(-1))
    owner.eval()
    again = Pair(owner.model, owner.guide)
    with torch.no_grad():
        again.log_weights((x,), 3)
    assert again.way == VMAP


def test_all_particles_see_the_same_subsample(float64):
    x = torch.randn(20, 2)

    def model(x):
        with pyro.plate("data", 20, subsample_size=6) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(6, 2), 1.0).to_event(1))
            mean = torch.stack([z[:, 0], z[:, 1]], 1)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x[rows])

    def guide(x):
        with pyro.plate("data", 20, subsample_size=6) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, math.sqrt(0.5)).to_event(1))  # the exact posterior

    proved = Pair(model, guide, 1)
    with torch.no_grad():
        log_w = proved.log_weights((x,), 9)
    assert proved.way == VMAP
    torch.testing.assert_close(log_w, log_w[0].expand(9, 6))
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1)
    assert all((exact - value).abs().min() < 1e-10 for value in log_w[0])


def test_the_last_batch_is_proved_for_itself():
    """``squeeze`` fails only for a single data point."""
    w = torch.tensor([[1.0, -1.0, 0.5]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            mean = (z.squeeze().unsqueeze(-1) * w).reshape(*z.shape[:-1], 3)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[..., :1], 1.0).to_event(1))

    x = torch.randn(3, 3)
    whole = Pair(model, guide)
    with torch.no_grad():
        for rows in (3, 1):
            t = whole.terms((x[:rows],), 4)
            by_hand = dist.Normal(t.values["z"] * w, 1.0).log_prob(x[:rows]).sum(-1)
            torch.testing.assert_close(t.log_p["x"], by_hand)


def test_models_of_ours_stay_behind_an_outer_plate():
    for model_name, guide_name in (("VAE, Bernoulli", "FullCovariance"), ("PPCA", "IAF"), ("Ring", "MeanField")):
        model, guide, x = pair(model_name, guide_name)
        assert evaluate(model, guide, x, 30, progress=False).route.startswith(PLATE)


def _standard(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def _noisy_location(x):
    loc = x / 2 + torch.randn(len(x), 2)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.3).to_event(1))


def _partly_noisy(x):
    noise = torch.randn(len(x), 1)
    with pyro.plate("data", len(x)):
        own = pyro.sample("own", dist.Normal(torch.zeros(len(x)), 1.0), infer={"is_auxiliary": True}).unsqueeze(-1)
        log_q = dist.Normal(0.0, 1.0).log_prob(noise).squeeze(-1)
        pyro.sample("z", dist.Delta(torch.cat([noise.expand(own.shape), own], -1), log_q, event_dim=1))


@pytest.mark.parametrize("guide", [_noisy_location, _partly_noisy])
def test_noise_beside_draws_of_its_own_is_each_particles_too(guide, float64):
    """Particles that share a part of their noise are different, but not independent."""
    x = torch.zeros(5, 2)
    proved = Pair(_standard, guide)
    with torch.no_grad():
        z = proved.terms((x,), 1000).values["z"]
        alone = torch.cat([Pair(_standard, guide, 1).terms((x,), 1).values["z"] for _ in range(1000)])
    assert proved.way == VMAP
    torch.testing.assert_close(z.std(0), alone.std(0), rtol=0.15, atol=0)


def test_a_proof_holds_for_the_mode_of_modules(float64):
    """Batch norm acts on each data point in evaluation, and on the particle's batch in training."""

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.norm(z), 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    owner, x = Owner().eval(), torch.randn(6, 2)
    proved = Pair(owner.model, owner.guide)
    for training in (False, True, False):
        owner.train(training)
        with pytest.warns(UserWarning, match="one particle after the other") if training else nullcontext():
            t = proved.terms((x,), 4)
        assert proved.way_for((x,), 4) == (LOOP if training else VMAP)
        fresh = copy.deepcopy(owner.norm)
        mean = torch.stack([fresh(z) for z in t.values["z"]])
        torch.testing.assert_close(t.log_p["x"], dist.Normal(mean, 1.0).log_prob(x).sum(-1))


class Trained(nn.Module):
    """A program that differs in training mode."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.loss(z) if self.training else z, 1.0).to_event(1), obs=x)


def _given(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))


def test_what_runs_in_training_mode_alone_is_proved_in_training_mode(float64):
    model, x = Trained(lambda z: torch.stack([z[:, 0], 2 * z[:, 1]], 1)), torch.randn(2, 2)
    t = Pair(model, _given).terms((x,), 4)
    mean = t.values["z"] * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(t.log_p["x"], dist.Normal(mean, 1.0).log_prob(x).sum(-1))


def test_dropout_is_each_particles_own_and_no_reason_to_refuse_an_outer_plate(float64):
    model, x = Trained(nn.Dropout(0.5)), torch.randn(5, 2)
    t = (proved := Pair(model, _given)).terms((x,), 50)
    assert proved.way == PLATE
    each = dist.Normal(torch.stack([0 * t.values["z"], 2 * t.values["z"]]), 1.0).log_prob(x)  # dropped, kept
    whole = torch.stack([each[i, ..., 0] + each[j, ..., 1] for i in range(2) for j in range(2)])
    near = (whole - t.log_p["x"]).abs() < 1e-10  # [4, K, N]
    assert near.any(0).all()
    assert near.any(1).all()


def test_each_size_of_data_has_a_proof_of_its_own(float64):
    """A program that writes into zeros needs another form of torch.vmap than one that stacks."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            if len(x) == 3:
                mean = torch.zeros(3, 2)
                mean[:, 0], mean[:, 1] = z[:, 0], z[:, 1]
            else:
                mean = torch.stack([z[:, 0], z[:, 1]], 1)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    proved = Pair(model, _given)
    with torch.no_grad():
        for rows in (3, 5, 3, 5):
            x = torch.randn(rows, 2)
            t = proved.terms((x,), 4)
            torch.testing.assert_close(t.log_p["x"], dist.Normal(t.values["z"], 1.0).log_prob(x).sum(-1))
    assert proved.way == VMAP


def test_a_proof_draws_nothing_from_the_users_stream(float64):
    """The same seed gives the same weights before and after the way is selected."""
    proved, x = Pair(_standard, _noisy_location), torch.randn(5, 2)
    found = []
    with torch.no_grad():
        for _ in range(2):
            torch.manual_seed(0)
            found.append(torch.cat([proved.log_weights((x,), 4).flatten(), torch.rand(1)]))
    assert proved.way == VMAP
    assert torch.equal(*found)


def test_noise_is_not_taken_for_rounding(float64):
    """A model with extra noise, smaller than rounding errors unless the noise is the same."""

    def model(x):
        noise = 1e-4 * torch.randn(len(x), 2)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + noise, 1.0).to_event(1), obs=x)

    proved = Pair(model, _given)
    with torch.no_grad():
        proved.log_weights((torch.randn(5, 2),), 4)
    assert proved.way == VMAP
