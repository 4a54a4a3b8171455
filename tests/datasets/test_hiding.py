"""Holes for experiments: their share, what it depends on, and errors."""

import pytest
import torch

from jensen.datasets import bars, hide, linear_gaussian, load
from jensen.datasets.preparation import SPLITS


def _x(n=4000, features=9):
    mix = torch.randn(features, features, generator=torch.Generator().manual_seed(1))
    return torch.randn(n, features, generator=torch.Generator().manual_seed(0)) @ mix + 3


@pytest.mark.parametrize("mechanism", ["mcar", "mar"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_the_share_of_missing_values(mechanism, rate):
    x = _x()
    holed = hide(x, rate, mechanism, seed=3)
    gone = holed.isnan()
    assert abs(gone.double().mean() - rate) <= 4 * (rate * (1 - rate) / x.numel()) ** 0.5
    assert torch.equal(holed[~gone], x[~gone]) and not x.isnan().any()
    again = hide(x, rate, mechanism, seed=3).isnan()
    assert torch.equal(again, gone) and (rate == 0) == torch.equal(hide(x, rate, mechanism, seed=4).isnan(), gone)


def test_mcar_holes_are_independent_of_the_values():
    x = _x()
    gone = hide(x, 0.5).isnan().double()
    z = torch.corrcoef(torch.cat([x.double(), gone], 1).T)[:9, 9:] * len(x) ** 0.5  # [9, 9]
    assert z.abs().max() < 4.5


def test_mar_holes_depend_on_the_observed_features_alone():
    x = _x(20_000)
    gone = hide(x, 0.4, "mar").isnan()
    kept = ~gone.any(0)
    assert kept.sum() == 3
    means = gone.double().mean(0)[~kept]
    torch.testing.assert_close(means, torch.full_like(means, 0.4 * 9 / 6), rtol=0, atol=4 * (0.24 / len(x)) ** 0.5)
    a = torch.cat([x[:, kept], torch.ones(len(x), 1)], 1).double()
    residual = x[:, ~kept].double() - a @ torch.linalg.lstsq(a, x[:, ~kept].double()).solution
    for j, mask in enumerate(gone[:, ~kept].T.double()):
        beta = torch.zeros(4, dtype=torch.float64)
        for _ in range(20):  # logistic regression of the mask on A, by Newton's method
            p = (a @ beta).sigmoid()
            hessian = (a * (p * (1 - p))[:, None]).T @ a
            beta = beta + torch.linalg.solve(hessian, a.T @ (mask - p))
        score = a @ beta
        assert abs(score.std() - 1) < 0.1
        left = (mask - score.sigmoid()) * residual[:, j]  # what the value itself adds, given A
        assert abs(left.mean() / left.std()) * len(x) ** 0.5 < 4


def test_a_data_set_gets_holes_in_every_split():
    data = load("digits")
    for mechanism in ("mcar", "mar"):
        holed = hide(data, 0.3, mechanism)
        for part in SPLITS:
            x, gone = getattr(data, part), holed.masks[part]
            assert abs(gone.double().mean() - 0.3) < 0.02
            assert torch.equal(getattr(holed, part)[~gone], x[~gone])
        observed = ~torch.cat(list(holed.masks.values())).any(0)
        assert int(observed.sum()) == (21 if mechanism == "mar" else 0)
        assert torch.equal(holed.labels["test"], data.labels["test"]) and holed.levels == data.levels
    assert hide(linear_gaussian(), 0.3).log_density is None


def test_whole_numbers_sequences_and_earlier_holes():
    counts = torch.arange(40).reshape(10, 2, 2)
    holed = hide(counts, 0.5)
    assert holed.dtype == torch.get_default_dtype() and holed.shape == counts.shape and holed.isnan().any()
    x = _x(500).double()
    x[::3, :7] = torch.nan
    twice = hide(x, 0.2, "mar")
    assert twice.dtype == torch.float64 and twice.isnan()[::3, :7].all()
    assert (~twice.isnan().any(0)).nonzero().flatten().tolist() == [7, 8]  # the only complete features
    assert hide(x[:0], 0.5).shape == (0, 9) and len(hide(bars(n=20, split=(20, 0, 0)), 0.1, "mar").test) == 0


@pytest.mark.parametrize(
    ("x", "how", "error", "text"),
    [
        (_x(9), {"rate": 1.0}, ValueError, r"rate must be at least 0 and below 1, but got 1"),
        (_x(9), {"rate": -0.1}, ValueError, r"rate must be at least 0"),
        (
            _x(9),
            {"rate": 0.7, "mechanism": "mar"},
            ValueError,
            "so rate must be below 0.667",
        ),
        (_x(9), {"rate": 0.1, "mechanism": "mnar"}, ValueError, "mechanism must be 'mcar' or 'mar'"),
        (_x(9)[:, :1], {"rate": 0.1, "mechanism": "mar"}, ValueError, "needs at least two features"),
        (
            torch.ones(9, 3),
            {"rate": 0.1, "mechanism": "mar"},
            ValueError,
            "needs a feature without missing",
        ),
        (torch.tensor(1.0), {"rate": 0.1}, ValueError, r"x must have the shape \[N, ...\]"),
        (_x(9).numpy(), {"rate": 0.1}, TypeError, "x must be a tensor or a Dataset, but got an array"),
        (
            bars(n=4, split=(4, 0, 0)),
            {"rate": 0.9},
            ValueError,
            r"rate=0.9 leaves \d+ of the 16 features of bars without",
        ),
    ],
)
def test_errors_of_hide(x, how, error, text):
    with pytest.raises(error, match=text):
        hide(x, **how)
