"""Summed states against explicit sums over single runs of every joint state."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList, AutoNormal
from pyro.poutine.messenger import Messenger
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from jensen.kernel.enumeration import Summed, at_state, check_states, enumerated, is_enumerated, state_counts
from jensen.kernel.sites import enclosing_plates, facts_of, folded, in_plate, padded, score, sites_of

PARALLEL = {"enumerate": "parallel"}
BITS, THREE = torch.tensor([0.0, 1.0]), torch.arange(3)


class Drawn(Messenger):
    """Sites take the given values."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


def site_log_prob(site, keep, nesting):
    """The log-density of a site, summed to particles and the plates that are kept: [K or 1, ...]."""
    return folded(padded(score(site), nesting + 1), facts_of(site), keep)


def run(model, guide, *data, nesting=1, particles=None):
    """One enumerated run, with or without K particles: its sites, and the result after the states are summed out."""
    if particles is not None:
        model, guide = in_plate(model, particles, nesting), in_plate(guide, particles, nesting)
    q = sites_of(poutine.trace(enumerated(guide, nesting)).get_trace(*data))
    with Drawn({site["name"]: site["value"] for site in q}):
        model = enumerated(model, nesting, {site["name"]: site["infer"] for site in q})
        p = sites_of(poutine.trace(model).get_trace(*data))
    return Result(Summed(p, q), enclosing_plates([*p, *q]), nesting), p, q


class Result:
    """The terms summed over the data: log-densities by site, [K or 1, *plates]."""

    def __init__(self, summed, keep, nesting):
        fold = lambda sites: {site["name"]: site_log_prob(site, keep, nesting) for site in sites}
        self.log_p, self.log_q = fold(summed.p), fold(summed.q)
        self.log_weights = sum(self.log_p.values()) - sum(self.log_q.values())
        self.elbo = lambda: sum(site_log_prob(site, keep, nesting) for site in summed.elbo())


def no_guide(*data):
    pass


def joint(model, values, *data, free=()):
    """Log p at these values, unscaled, each site under its mask but for the free ones: a tensor for each site."""
    trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*data)
    total = {}
    for site in sites_of(trace):
        log_prob = site["fn"].log_prob(site["value"])
        mask = None if site["name"] in free else site["mask"]
        total[site["name"]] = log_prob if mask is None else log_prob.where(torch.as_tensor(mask), 0.0)
    return total


def brute(model, states, n, *data, given=None, kept=(-1,)):
    """Log of the sum of p over every joint state: ``states`` has the shape and the states of each site.

    A last dimension of 1 stands for the plate of the n data: they are independent, so that all are in one state at
    once. Elements of the other plates have a state each.
    """
    sums = []
    for chosen in itertools.product(*(itertools.product(list(v), repeat=math.prod(s)) for s, v in states.values())):
        values = {}
        for (name, (shape, _)), numbers in zip(states.items(), chosen, strict=True):
            value = torch.stack(numbers).reshape(shape)
            values[name] = value.expand(*shape[:-1], n) if shape[-1:] == (1,) else value
        logs = joint(model, {**values, **(given or {})}, *data, free=states)
        total = 0.0
        for log in logs.values():
            out = [d for d in range(-log.dim(), 0) if d not in kept]
            total = total + (log.sum(out) if out else log)
        sums.append(total)
    return torch.stack(sums).logsumexp(0)


def pyros(model, guide, *data, nesting=1, seed=3):
    torch.manual_seed(seed)
    return -TraceEnum_ELBO(max_plate_nesting=nesting, strict_enumeration_warning=False).loss(model, guide, *data)


def close(a, b, **kwargs):
    torch.testing.assert_close(a, b, **{"rtol": 1e-10, "atol": 1e-10, **kwargs})


# Programs: K states, N data.


@config_enumerate
def gmm(x):
    weights = pyro.param("weights", torch.tensor([0.2, 0.5, 0.3]), constraint=constraints.simplex)
    locs = pyro.param("locs", torch.tensor([-2.0, 0.0, 3.0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[z], 1.5), obs=x)


def test_a_mixture(float64):
    x = torch.randn(7)
    summed, *_ = run(gmm, no_guide, x)
    parts = dist.Normal(torch.tensor([-2.0, 0.0, 3.0]), 1.5).log_prob(x[:, None]) + torch.tensor([0.2, 0.5, 0.3]).log()
    assert list(summed.log_p) == ["z+x"]
    close(summed.log_weights, parts.logsumexp(1)[None])
    close(summed.elbo(), summed.log_weights)
    close(summed.log_weights[0], brute(gmm, {"z": ((1,), THREE)}, 7, x))
    assert summed.elbo().sum().item() == pytest.approx(pyros(gmm, no_guide, x), rel=1e-10)


def bayesian(x):
    odds = pyro.sample("odds", dist.Normal(0.0, 1.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=torch.stack([odds, -odds])), infer=PARALLEL)
        pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)


def bayesian_guide(x):
    pyro.sample("odds", dist.Normal(0.2, 0.5))
    with pyro.plate("components", 2):
        pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 0.3))


def test_a_mixture_with_global_latents(float64):
    x = torch.randn(4)
    torch.manual_seed(3)
    summed, _, q = run(bayesian, bayesian_guide, x)
    values = {site["name"]: site["value"] for site in q}
    log_q = sum(site["fn"].log_prob(site["value"]).sum() for site in q)
    expected = brute(bayesian, {"z": ((4,), torch.arange(2))}, 4, x, given=values, kept=())
    assert summed.log_weights.shape == (1,)
    close(summed.log_weights[0], expected - log_q)
    assert sorted(summed.log_p) == ["locs", "odds", "z+x"]
    assert sorted(summed.log_q) == ["locs", "odds"]
    assert summed.elbo().item() == pytest.approx(pyros(bayesian, bayesian_guide, x), rel=1e-10)


def hmm(x, lengths):  # x [N, T]
    start = torch.tensor([0.6, 0.3, 0.1])
    move = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.05, 0.05, 0.9]])
    probs = torch.tensor([0.1, 0.5, 0.8])
    with pyro.plate("sequences", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(start if z is None else move[z]), infer=PARALLEL)
                pyro.sample(f"x_{t}", dist.Bernoulli(probs[z]), obs=x[:, t])


def forward_algorithm(x, length):
    start, move = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.05, 0.05, 0.9]])
    alpha = start
    for t in range(length):
        alpha = (alpha if t == 0 else alpha @ move) * dist.Bernoulli(torch.tensor([0.1, 0.5, 0.8])).log_prob(x[t]).exp()
    return alpha.sum().log()


@pytest.mark.parametrize("lengths", [[9, 9, 9, 9], [9, 1, 4, 7]])
def test_sequences_under_a_mask(lengths, float64):
    x = torch.bernoulli(torch.full((4, 9), 0.5))
    summed, *_ = run(hmm, no_guide, x, torch.tensor(lengths))
    expected = torch.stack([forward_algorithm(row, n) for row, n in zip(x, lengths, strict=True)])
    close(summed.log_weights, expected[None])
    assert len(summed.log_p) == 1
    assert summed.elbo().sum().item() == pytest.approx(pyros(hmm, no_guide, x, torch.tensor(lengths)), rel=1e-10)


def topics(words):  # words [W, N]: documents side by side, their words below one another
    with pyro.plate("topics", 2, dim=-1):
        topic = pyro.sample("topic", dist.Dirichlet(torch.ones(5)))
    with pyro.plate("documents", words.shape[1], dim=-1):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("words", words.shape[0], dim=-2):
            z = pyro.sample("z", dist.Categorical(share), infer=PARALLEL)
            pyro.sample("word", dist.Categorical(topic[z]), obs=words)


def topics_guide(words):
    with pyro.plate("topics", 2, dim=-1):
        pyro.sample("topic", dist.Dirichlet(torch.full((5,), 2.0)))
    with pyro.plate("documents", words.shape[1], dim=-1):
        pyro.sample("share", dist.Dirichlet(torch.full((2,), 2.0)))


def documents(words):
    """The same with topics that are given: weights per document."""
    topic = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.3, 0.4]])
    with pyro.plate("documents", words.shape[1], dim=-1):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("words", words.shape[0], dim=-2):
            z = pyro.sample("z", dist.Categorical(share), infer=PARALLEL)
            pyro.sample("word", dist.Categorical(topic[z]), obs=words)


def documents_guide(words):
    with pyro.plate("documents", words.shape[1], dim=-1):
        pyro.sample("share", dist.Dirichlet(torch.full((2,), 2.0)))


@pytest.mark.parametrize(("model", "guide", "kept"), [(topics, topics_guide, ()), (documents, documents_guide, (-1,))])
def test_topics_of_words_in_documents(model, guide, kept, float64):
    words = torch.randint(0, 5, (4, 2))
    torch.manual_seed(3)
    summed, _, q = run(model, guide, words, nesting=2)
    given = {site["name"]: site["value"] for site in q}
    states = {"z": ((4, 1 if kept else 2), torch.arange(2))}
    log_q = [s["fn"].log_prob(s["value"]) for s in q]
    log_q = sum(log_q) if kept else sum(log.sum() for log in log_q)
    close(summed.log_weights[0], brute(model, states, 2, words, given=given, kept=kept) - log_q)
    assert summed.elbo().sum().item() == pytest.approx(pyros(model, guide, words, nesting=2), rel=1e-10)


@config_enumerate
def factorial(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Bernoulli(0.3))
        b = pyro.sample("b", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        c = pyro.sample("c", dist.Categorical(logits=torch.stack(torch.broadcast_tensors(a, b - 1.0), -1)))
        pyro.sample("x", dist.Normal(a - 2.0 * b + c, 1.0), obs=x)
        pyro.sample("apart", dist.Normal(0.0, 1.0), obs=x)


def coupled(x):  # x [M, N]: M members in each of N groups
    with pyro.plate("groups", x.shape[1], dim=-1):
        kind = pyro.sample("kind", dist.Bernoulli(0.4), infer=PARALLEL)
        with pyro.plate("members", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.Categorical(logits=torch.stack([kind, 1 - kind], -1)), infer=PARALLEL)
            pyro.sample("x", dist.Normal(2.0 * z + kind, 1.0), obs=x)


def switch(x):
    up = pyro.sample("up", dist.Bernoulli(0.25), infer=PARALLEL)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.2 + 0.6 * up), infer=PARALLEL)
        pyro.sample("x", dist.Normal(z + up, 1.0), obs=x)


def pairs(x):  # x [N, 3]: a chain whose states are Bernoulli and Categorical in turn
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Bernoulli(0.3), infer={"enumerate": "sequential"})
        b = pyro.sample(
            "b", dist.Categorical(torch.tensor([[0.2, 0.8, 0.0], [0.5, 0.1, 0.4]])[a.long()]), infer=PARALLEL
        )
        c = pyro.sample("c", dist.Bernoulli(torch.tensor([0.1, 0.5, 0.9])[b]), infer={**PARALLEL, "expand": True})
        for i, z in enumerate((a, b, c)):
            pyro.sample(f"x_{i}", dist.Normal(1.0 * z, 1.0), obs=x[:, i])


@pytest.mark.parametrize(
    ("model", "states", "shape", "nesting", "kept", "names"),
    [
        (
            factorial,
            {"a": ((1,), BITS), "b": ((1,), THREE), "c": ((1,), THREE[:2])},
            (5,),
            1,
            (-1,),
            ["apart", "a+b+c+x"],
        ),
        (coupled, {"kind": ((1,), BITS), "z": ((3, 1), THREE[:2])}, (3, 4), 2, (-1,), ["kind+z+x"]),
        (switch, {"up": ((), BITS), "z": ((4,), BITS)}, (4,), 1, (), ["up+z+x"]),
        (pairs, {"a": ((1,), BITS), "b": ((1,), THREE), "c": ((1,), BITS)}, (4, 3), 1, (-1,), ["a+b+c+x_0+x_1+x_2"]),
    ],
    ids=["factorial", "coupled", "switch", "pairs"],
)
def test_sites_that_hang_together(model, states, shape, nesting, kept, names, float64):
    x = torch.randn(shape)
    states = {
        name: (plates, values.to(x.dtype) if values is BITS else values) for name, (plates, values) in states.items()
    }
    summed, *_ = run(model, no_guide, x, nesting=nesting)
    assert list(summed.log_p) == names
    n = shape[-1] if model is coupled else shape[0]
    if model is coupled:  # the states of the members of a group are tied by its kind, and groups are independent
        expected = torch.stack([brute(model, states, 1, x[:, i : i + 1], kept=()) for i in range(n)])
    else:
        expected = brute(model, states, n, x, kept=kept)
    close(summed.log_weights[0], expected)
    if model is not pairs:  # Pyro does not take a sequential site of the model
        assert summed.elbo().sum().item() == pytest.approx(pyros(model, no_guide, x, nesting=nesting), rel=1e-10)


# States of the guide.


def labelled(x):  # z given y, x given both
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        z = pyro.sample("z", dist.Normal(y - 1.0, 1.0))
        pyro.sample("x", dist.Normal(z * (1.0 + y), 1.0), obs=x)


def labelling(x, how="parallel"):
    with pyro.plate("data", len(x)):
        y = pyro.sample(
            "y", dist.Categorical(logits=x[:, None] * torch.tensor([1.0, 0.0, -1.0])), infer={"enumerate": how}
        )
        pyro.sample("z", dist.Normal(y - 1.0 + 0.1 * x, 0.7))


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_states_of_the_guide_and_a_draw_for_each(how, float64):
    x = torch.randn(5)
    torch.manual_seed(3)
    summed, _, q = run(labelled, lambda x: labelling(x, how), x)
    assert q[1]["value"].shape == (3, 1, 5)
    z = q[1]["value"].squeeze(1)
    log_p, log_q_y, log_q_z = [], [], []
    for y in range(3):
        q_y = dist.Categorical(logits=x[:, None] * torch.tensor([1.0, 0.0, -1.0]))
        log_p.append(sum(joint(labelled, {"y": torch.tensor(y), "z": z[y]}, x).values()))
        log_q_y.append(q_y.log_prob(torch.tensor(y)))
        log_q_z.append(dist.Normal(y - 1.0 + 0.1 * x, 0.7).log_prob(z[y]))
    log_p, log_q_y, log_q_z = torch.stack(log_p), torch.stack(log_q_y), torch.stack(log_q_z)
    close(summed.log_weights, (log_p - log_q_z).logsumexp(0)[None])
    close(summed.elbo(), (log_q_y.exp() * (log_p - log_q_z - log_q_y)).sum(0)[None])
    assert summed.log_q == {}
    assert list(summed.log_p) == ["y+z+x"]
    if how == "parallel":
        assert summed.elbo().sum().item() == pytest.approx(pyros(labelled, labelling, x), rel=1e-10)


def test_weights_with_states_in_the_guide_average_to_the_evidence(float64):
    x = torch.randn(3)
    log_w = run(labelled, labelling, x, particles=20000)[0].log_weights
    exact = torch.stack(
        [
            math.log(w) + dist.Normal((y - 1.0) * (1 + y), math.sqrt((1 + y) ** 2 + 1)).log_prob(x)
            for y, w in enumerate([0.2, 0.3, 0.5])
        ]
    ).logsumexp(0)
    w = (log_w - exact).exp()
    assert ((w.mean(0) - 1) / (w.std(0) / math.sqrt(len(w)))).abs().max() < 4


def both(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(0.3))
        c = pyro.sample("c", dist.Categorical(logits=torch.stack([y, 0 * y, 1 - y], -1)), infer=PARALLEL)
        z = pyro.sample("z", dist.Normal(y + c, 1.0))
        pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)


def half(x):
    with pyro.plate("data", len(x)):
        first = pyro.sample("first", dist.Normal(0.1 * x, 1.0), infer={"is_auxiliary": True})
        y = pyro.sample("y", dist.Bernoulli(logits=first), infer=PARALLEL)
        pyro.sample("z", dist.Normal(y + 0.2 * x, 0.7))


def test_states_of_both(float64):
    x = torch.randn(5)
    torch.manual_seed(3)
    summed, _, q = run(both, half, x)
    first, _, z = (site["value"] for site in q)
    per_y, elbo = [], 0.0
    log_q_first = dist.Normal(0.1 * x, 1.0).log_prob(first)
    for y in (0.0, 1.0):
        z_y = z.reshape(2, 5)[int(y)]
        values = [{"y": torch.tensor(y), "c": torch.tensor(c), "z": z_y} for c in range(3)]
        inner = torch.stack([sum(joint(both, v, x).values()) for v in values]).logsumexp(0)
        inner = inner - dist.Normal(y + 0.2 * x, 0.7).log_prob(z_y)
        log_q_y = dist.Bernoulli(logits=first).log_prob(torch.tensor(y))
        per_y.append(inner)
        elbo = elbo + log_q_y.exp() * (inner - log_q_y)
    close(summed.log_weights, (torch.stack(per_y).logsumexp(0) - log_q_first)[None])
    close(summed.elbo(), (elbo - log_q_first)[None])
    assert list(summed.log_q) == ["first"]
    assert summed.elbo().sum().item() == pytest.approx(pyros(both, half, x), rel=1e-10)


def chain_guide(x, lengths):
    with pyro.plate("sequences", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                logits = x[:, t, None] * torch.tensor([-1.0, 0.0, 1.0]) + (0 if z is None else 0.3 * z[..., None])
                z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits), infer=PARALLEL)


def test_a_chain_of_states_in_the_guide(float64):
    x, lengths = torch.bernoulli(torch.full((3, 6), 0.5)), torch.tensor([6, 2, 4])
    summed, *_ = run(hmm, chain_guide, x, lengths)
    expected = torch.stack([forward_algorithm(row, n) for row, n in zip(x, lengths.tolist(), strict=True)])
    close(summed.log_weights, expected[None])
    assert (summed.elbo() < summed.log_weights).all()
    assert summed.elbo().sum().item() == pytest.approx(pyros(hmm, chain_guide, x, lengths), rel=1e-10)


def test_an_auxiliary_state_of_the_guide(float64):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            side = pyro.sample("side", dist.Bernoulli(0.3), infer={**PARALLEL, "is_auxiliary": True})
            pyro.sample("z", dist.Normal(x / 2 + side, 0.9))

    x = torch.randn(4)
    summed, *_ = run(model, guide, x, particles=20000)
    w = (summed.log_weights - dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)).exp()
    assert ((w.mean(0) - 1) / (w.std(0) / math.sqrt(len(w)))).abs().max() < 4


def test_an_autoguide_with_a_discrete_part(float64):
    guide = AutoGuideList(bayesian)
    guide.append(AutoNormal(poutine.block(bayesian, hide=["z"])))
    guide.append(AutoDiscreteParallel(poutine.block(bayesian, expose=["z"])))
    x = torch.randn(6)
    guide(x)
    torch.manual_seed(3)
    summed, *_ = run(bayesian, guide, x)
    assert summed.elbo().item() == pytest.approx(pyros(bayesian, guide, x), rel=1e-10)
    assert summed.log_weights.item() >= summed.elbo().item()


# Lifts.


PROGRAMS = [
    pytest.param(gmm, no_guide, (6,), 1, id="mixture"),
    pytest.param(documents, documents_guide, (3, 4), 2, id="topics"),
    pytest.param(coupled, no_guide, (3, 4), 2, id="coupled"),
    pytest.param(labelled, labelling, (6,), 1, id="states of the guide"),
    pytest.param(both, half, (6,), 1, id="states of both"),
]


def _data(shape, model):
    return torch.randint(0, 5, shape) if model is documents else torch.randn(shape)


@pytest.mark.parametrize(("model", "guide", "shape", "nesting"), PROGRAMS)
def test_particles_in_a_plate_are_plain_runs_side_by_side(model, guide, shape, nesting, float64):
    """For each particle and joint state, the enumerated sites equal those of a plain run."""
    x = _data(shape, model)
    summed, p, q = run(model, guide, x, nesting=nesting, particles=4)
    shape = summed.log_weights.shape
    assert shape == (4, x.shape[-1] if nesting == 2 else len(x))
    assert summed.elbo().shape == shape
    counts, by_name = state_counts([*p, *q]), {site["name"]: site for site in [*q, *p]}
    for states in itertools.product(*map(range, counts.values())):
        at = {name: at_state(s, dict(zip(counts, states, strict=True))) for name, s in by_name.items()}
        for k in range(4):
            given = {}
            for name, site in by_name.items():
                value, event = at[name][0], site["fn"].event_dim
                deep = value.dim() - event == nesting + 1
                given[name] = value[k if len(value) > 1 else 0] if deep else value
            trace = poutine.trace(
                poutine.condition(model, data={n: v for n, v in given.items() if n != "x"})
            ).get_trace(x)
            for site in sites_of(trace):
                expected, got = site["fn"].log_prob(site["value"]), at[site["name"]][1]
                close(got[k if len(got) > 1 else 0].expand(expected.shape), expected)


class OutOfPlace(TorchFunctionMode):
    """Samples written into a new tensor, which torch.vmap treats as one sample, become separate samples."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "normal_":
            return torch.randn(args[0].shape, dtype=args[0].dtype)
        return function(*args, **(kwargs or {}))


def lifted(model, guide, x, nesting, particles):
    def one(_, x):
        with pyro.validation_enabled(False), OutOfPlace():
            summed, _, q = run(model, guide, x, nesting=nesting)
        return summed.log_weights[0], summed.elbo()[0], {s["name"]: s["value"] for s in q if not is_enumerated(s)}

    return torch.vmap(one, (0, None), randomness="different")(torch.arange(particles), x)


LIFTED = [
    *(p for p in PROGRAMS if p.id != "topics"),
    pytest.param(bayesian, bayesian_guide, (6,), 1, id="global latents, chosen by index"),
]


@pytest.mark.parametrize(("model", "guide", "shape", "nesting"), LIFTED)
def test_particles_under_vmap_are_runs_of_one(model, guide, shape, nesting, float64):
    x = torch.randn(shape)
    run(model, guide, x, nesting=nesting)  # parameters are made
    log_w, elbo, values = lifted(model, guide, x, nesting, 3)
    for k in range(3):
        alone = run(model, Drawn({name: v[k] for name, v in values.items()})(guide), x, nesting=nesting)[0]
        close(log_w[k], alone.log_weights[0])
        close(elbo[k], alone.elbo()[0])
    assert guide is no_guide or not torch.equal(log_w[0], log_w[1])


@pytest.mark.parametrize(("model", "guide", "shape", "nesting"), LIFTED)
def test_a_lifted_run_is_captured(model, guide, shape, nesting, float64):
    x = torch.randn(shape)
    run(model, guide, x, nesting=nesting)
    with torch.no_grad():
        graph = make_fx(lambda x: lifted(model, guide, x, nesting, 3))(x)
    again = torch.randn(shape)
    log_w, elbo, values = graph(again)
    for k in range(3):
        alone = run(model, Drawn({name: v[k] for name, v in values.items()})(guide), again, nesting=nesting)[0]
        close(log_w[k], alone.log_weights[0])
        close(elbo[k], alone.elbo()[0])


@pytest.mark.parametrize(("model", "guide", "shape", "nesting"), PROGRAMS)
def test_a_run_in_a_plate_is_captured(model, guide, shape, nesting, float64):
    """At data other than those of the trace; samples are the same, because none are rejected."""
    x, again = _data(shape, model), _data(shape, model)

    def both_of(x):
        with pyro.validation_enabled(False):
            summed, *_sites = run(model, guide, x, nesting=nesting, particles=3)
        return summed.log_weights, summed.elbo()

    both_of(x)
    with torch.no_grad():
        graph = make_fx(both_of)(x)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = both_of(again)
        torch.manual_seed(seed)
        for got, value in zip(graph(again), expected, strict=True):
            close(got, value)


# Gradients, and sums where exponentials would overflow.


def weighted(x, means, odds):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(logits=odds))
        z = pyro.sample("z", dist.Normal(means[y], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def weighted_guide(x, means, odds):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(logits=odds * x[:, None]), infer=PARALLEL)
        pyro.sample("z", dist.Normal(0.5 * (means[y] + x), 0.7))


def test_the_gradient_of_the_elbo_is_pyros(float64):
    x, means, odds = torch.randn(5), torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    torch.manual_seed(3)
    elbo = run(weighted, weighted_guide, x, means, odds)[0].elbo()
    torch.manual_seed(3)
    pyros = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(weighted, weighted_guide, x, means, odds)
    for got, expected in zip(
        torch.autograd.grad(elbo.sum(), (means, odds)), torch.autograd.grad(-pyros, (means, odds)), strict=True
    ):
        close(got, expected)


def test_gradients_of_weights_are_those_of_differences(float64):
    x = torch.randn(2, 4)

    def log_w(logits, locs):
        def model(x):
            with pyro.plate("data", len(x)):
                z = None
                for t in pyro.markov(range(4)):
                    z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits[0 if z is None else z]), infer=PARALLEL)
                    pyro.sample(f"x_{t}", dist.Normal(locs[z], 1.0), obs=x[:, t])

        return run(model, no_guide, x)[0].log_weights

    assert torch.autograd.gradcheck(log_w, (torch.randn(3, 3, requires_grad=True), torch.randn(3, requires_grad=True)))


def test_states_that_cannot_be_have_no_gradient_of_nan(float64):
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8], [0.0, 0.0, 1.0]])  # left to right
    locs = torch.randn(3, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = None
            for t in pyro.markov(range(4)):
                move = dist.Categorical(probs[0] if z is None else probs[z])
                z = pyro.sample(f"z_{t}", move, infer=PARALLEL)
                pyro.sample(f"x_{t}", dist.Normal(locs[z], 1.0), obs=x[:, t])

    log_w = run(model, no_guide, torch.randn(2, 4))[0].log_weights
    assert log_w.isfinite().all()
    assert torch.autograd.grad(log_w.sum(), locs)[0].isfinite().all()


def test_neighbours_that_disagree_by_more_than_single_precision_holds():
    """Pyro's sum of products of exponentials is zero here: no state is likely under both factors."""
    x = torch.zeros(1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=torch.tensor([0.0, -200.0])), infer=PARALLEL)
            pyro.sample("x", dist.Normal(x[0], 1.0).mask(False), obs=x)
            pyro.factor("f", torch.tensor([-200.0, 0.0])[z])

    assert run(model, no_guide, x)[0].log_weights.item() == pytest.approx(-200 + math.log(2))
    assert pyros(model, no_guide, x) < -250


def test_inner_plates_that_are_subsampled_multiply_their_sites(float64):
    """A plate of words with 3 of 12 observed, as in Pyro: the sum over states is inside."""
    words = torch.randint(0, 5, (3, 2))

    def model(words):
        topic = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.3, 0.4]])
        with pyro.plate("documents", 2, dim=-1):
            share = pyro.sample("share", dist.Beta(2.0, 3.0))
            with pyro.plate("words", 12, subsample=torch.arange(3), dim=-2):
                z = pyro.sample("z", dist.Bernoulli(share), infer=PARALLEL)
                pyro.sample("word", dist.Categorical(topic[z.long()]), obs=words)

    def guide(words):
        with pyro.plate("documents", 2, dim=-1):
            pyro.sample("share", dist.Beta(2.0, 2.0))

    torch.manual_seed(3)
    summed, *_ = run(model, guide, words, nesting=2)
    assert summed.log_weights.shape == (1, 2)
    assert summed.elbo().sum().item() == pytest.approx(pyros(model, guide, words, nesting=2), rel=1e-10)


# Errors.


def _group_switch(x):
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Bernoulli(0.3), infer=PARALLEL)
        with pyro.plate("members", 9, subsample=torch.arange(3), dim=-2):
            pyro.sample("x", dist.Normal(kind, 1.0), obs=x.expand(3, -1))


def _several(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0), infer={**PARALLEL, "num_samples": 5})


def _poisson(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Poisson(1.0), infer=PARALLEL)


def _vector(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1), infer=PARALLEL)


def _counts(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Binomial(torch.arange(4.0), 0.5), infer=PARALLEL)


def _stacked_on_the_left(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=PARALLEL)
        pyro.sample("x", dist.Normal(torch.stack([z, z])[0] + torch.zeros(3, 1, 1, 1, 1), 1.0), obs=x)


def _total(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=PARALLEL)
    pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x.sum())


def _crossing(x):
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", len(x), dim=-1)
    with rows:
        a = pyro.sample("a", dist.Bernoulli(0.3), infer=PARALLEL)
    with columns:
        b = pyro.sample("b", dist.Bernoulli(0.3), infer=PARALLEL)
    with rows, columns:
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x.expand(3, -1))


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (
            _group_switch,
            NotImplementedError,
            r"the states of sites \['kind', 'x'\] .* not all of these sites are in the subsampled plates",
        ),
        (_stacked_on_the_left, ValueError, r"site 'x' has a log-density of shape"),
        (_total, NotImplementedError, r"site 'x' depends on the states of a site in a plate"),
        (_crossing, NotImplementedError, r"the plates of sites \['a', 'b', 'x'\] cross"),
    ],
)
def test_what_cannot_be_summed_is_named(model, error, match):
    with pytest.raises(error, match=match):
        run(model, no_guide, torch.randn(4), nesting=2)


def test_a_state_of_the_model_around_states_of_the_guide_has_weights_and_no_elbo(float64):
    def model(x):
        up = pyro.sample("up", dist.Bernoulli(0.3), infer=PARALLEL)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.2 + 0.5 * up))
            pyro.sample("x", dist.Normal(z + up, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5), infer=PARALLEL)

    x = torch.randn(4)
    summed, *_ = run(model, guide, x)
    close(summed.log_weights[0], brute(model, {"up": ((), BITS.double()), "z": ((4,), BITS.double())}, 4, x, kept=()))
    with pytest.raises(NotImplementedError, match="'up'"):
        summed.elbo()


@pytest.mark.parametrize("model", [_several, _poisson, _vector, _counts])
def test_sites_that_do_not_list_their_states_are_drawn(model):
    _, (site,), _ = run(model, no_guide, torch.randn(4))
    assert site["name"] == "z"
    assert not is_enumerated(site)
    assert site["value"].shape[0] == 4


def test_a_site_drawn_from_the_model_is_its_own_proposal(float64):
    """A count for each state: the weights are p(x | c, count), and average to log p(x)."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer=PARALLEL)
            count = pyro.sample("count", dist.Poisson(1.0 + c), infer=PARALLEL)
            pyro.sample("x", dist.Normal(count, 1.0), obs=x)

    x = torch.randn(3)
    log_w = run(model, no_guide, x, particles=20000)[0].log_weights
    counts = torch.arange(50.0)[:, None]
    given = [(dist.Poisson(r).log_prob(counts) + dist.Normal(counts, 1.0).log_prob(x)).logsumexp(0) for r in (1.0, 2.0)]
    w = (log_w - torch.logaddexp(math.log(0.7) + given[0], math.log(0.3) + given[1])).exp()
    assert ((w.mean(0) - 1) / (w.std(0) / math.sqrt(len(w)))).abs().max() < 4


def test_what_a_handler_gives_is_not_enumerated_and_takes_no_dimension(float64):
    """As many sites as no tensor has dimensions; the guide samples all marks except the last."""

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            total = 0.0
            for i in range(80):
                total = total + pyro.sample(f"z_{i}", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(total, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            for i in range(79):
                pyro.sample(f"z_{i}", dist.Bernoulli(0.4))

    x = torch.randn(4)
    summed, _, q = run(model, guide, x)
    total = sum(site["value"] for site in q)
    ends = torch.stack([dist.Normal(total + z, 1.0).log_prob(x) + math.log(p) for z, p in ((0, 0.7), (1, 0.3))])
    close(summed.log_p["z_79+x"][0], ends.logsumexp(0))


def test_a_guides_mark_on_a_site_without_states_is_a_draw(float64):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)), infer=PARALLEL)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0), infer=PARALLEL)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(4)
    close(run(model, guide, x)[0].log_weights[0], dist.Normal(0.0, math.sqrt(2.0)).log_prob(x))


# A program at all its states at once, and at one of them.


def _rows_mixed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=PARALLEL)
        pyro.sample("x", dist.Normal(z - z.mean(), 1.0), obs=x)


def _counted_from_the_left(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.3, 0.7])), infer=PARALLEL)
        pyro.sample("x", dist.Normal(z.softmax(0).sum(-1), 1.0), obs=x)


def _first_row(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), infer=PARALLEL)
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0, 2.0])[z[0]] + 0.0 * z, 1.0), obs=x)


@pytest.mark.parametrize("model", [_rows_mixed, _counted_from_the_left, _first_row])
def test_a_program_that_all_states_at_once_change_is_refused(model, float64):
    x = torch.randn(4)
    _, p, _ = run(model, no_guide, x)
    plain = lambda values: sites_of(poutine.trace(Drawn(values)(model)).get_trace(x))
    with pytest.raises(ValueError, match=r"the log-density of site 'x' with all states of \['z'\] at once"):
        check_states(p, plain)


@pytest.mark.parametrize(("model", "guide", "shape", "nesting"), [*PROGRAMS, *LIFTED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_programs_at_all_states_at_once_are_what_they_are_at_one(model, guide, shape, nesting, dtype, float64):
    x = _data(shape, model)
    x = x if model is documents else x.to(dtype)
    _, p, q = run(model, guide, x, nesting=nesting)
    check_states(p, lambda values: sites_of(poutine.trace(Drawn(values)(model)).get_trace(x)))
    check_states(q, lambda values: sites_of(poutine.trace(Drawn(values)(guide)).get_trace(x)))


def test_a_masked_chain_at_all_states_at_once_is_what_it_is_at_one(float64):
    x, lengths = torch.bernoulli(torch.full((4, 9), 0.5)), torch.tensor([9, 1, 4, 7])
    _, p, _ = run(hmm, no_guide, x, lengths)
    check_states(p, lambda values: sites_of(poutine.trace(Drawn(values)(hmm)).get_trace(x, lengths)))


@pytest.mark.parametrize("top", [0.7, 1.5, 3.0])
def test_a_support_that_moves_with_a_latent_and_a_state(top, float64):
    """Data from Uniform(0, theta) or Uniform(0, theta / 2): an impossible state adds nothing to the sum."""
    x, prior = torch.tensor([0.3, 1.2, 0.8]), dist.Gamma(20.0, 10.0)

    def model(x):
        theta = pyro.sample("theta", prior)
        with pyro.plate("data", len(x)):
            half = pyro.sample("half", dist.Bernoulli(0.3), infer=PARALLEL)
            pyro.sample("x", dist.Uniform(0.0 * theta, torch.where(half == 1, theta / 2, theta)), obs=x)

    got = run(model, lambda x: pyro.sample("theta", dist.Delta(torch.tensor(top))), x)[0].log_weights
    density = 0.7 * (x < top) / top + 0.3 * (x < top / 2) / (top / 2)
    close(got.squeeze(), density.log().sum() + prior.log_prob(torch.tensor(top)))
    assert got.isfinite() == (top > 1.2)
