"""One result of each kind, for suites over all of them."""

import dataclasses
import math

import torch
from members import pair

from jensen.guides import ExactPosterior, PriorGuide
from jensen.inference import (
    AIS,
    Bracket,
    Calibration,
    Comparison,
    Evidence,
    ExactEvidence,
    Gaps,
    GuideDistance,
    History,
    LearningRates,
    Row,
    Sandwich,
    bounds,
    compare,
    evaluate,
    held_out,
    impute,
    rate_distortion,
)


def some_evidence(n=3, **changes):
    """Evidence of data whose values spread by one around their means."""
    spread = torch.linspace(-1, 1, n).double()
    made = Evidence(
        elbo=spread - 5,
        elbo_error=torch.full((n,), 0.2).double(),
        log_evidence=spread - 4,
        standard_error=torch.full((n,), 0.1).double(),
        ess=torch.full((n,), 20.0).double(),
        pareto_k=torch.full((n,), 0.5).double(),
        exact=None,
        particles=100,
        features=4,
    )
    return dataclasses.replace(made, **changes)


def one_of_each():
    """One result of each kind."""
    torch.manual_seed(0)
    model, guide, x = pair("PPCA", "MeanField")
    settings = {"seed": 0, "progress": False}
    pairs = {"prior": (model, PriorGuide(model)), "mean-field": (model, guide), "exact": (model, ExactPosterior(model))}
    one, two = torch.ones(3).double(), torch.zeros(3).double()
    split = Gaps(some_evidence(), some_evidence(elbo=-4.5 * one), 0.01 * one, one > 0, 3, 2.5)
    half = torch.tensor([[0.5, -0.25]]).double()
    holes = x.masked_fill(torch.rand(x.shape) < 0.3, math.nan)
    return [
        evaluate(model, guide, x, 50, **settings),
        evaluate(model, guide, x, tolerance=0.5, max_particles=600, **settings),
        compare(pairs, x, particles=30, **settings),
        Comparison({"a": Row(some_evidence(), 5, 1.5, split), "b": Row(some_evidence(), 7, 2.0)}, True),
        split,
        bounds(model, guide, x, 4, **settings),
        rate_distortion(model, guide, x, 10, **settings),
        History(elbo=[-3.0, -2.0], validation=[-4.0, math.nan], best_epoch=1, steps=7, seconds=0.1, route="eager"),
        Calibration({"z": torch.arange(1000).unsqueeze(-1) % 20}, draws=19),
        AIS(torch.randn(4, 3).double(), one, 12, None, [0.0, 1.0], torch.rand(1, 3), 2, "guide"),
        Sandwich(Bracket(-2 * one, two, -one, two), Bracket(-2 * one, two, -one, two), -one, 9, 8, 7, "prior", False),
        ExactEvidence(one, two, "quadrature", torch.tensor([3, 4, 5]), 1e-6),
        GuideDistance(one[:1], one[:1], half, half.abs(), half.exp(), half.abs(), ("z[0]", "z[1]")),
        impute(model, PriorGuide(model), holes, 50, **settings),
        held_out(model, PriorGuide(model), holes, x, 50, **settings),
        LearningRates(torch.logspace(-3, -1, 12).double(), torch.linspace(3, 1, 12).double(), 12, 128),
    ]
