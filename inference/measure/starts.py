r"""Coordinates without funnels, and samples of a guide whose density is not used.

If the scale of a normal site depends on other latent values, its values and theirs form a funnel, which no
Gaussian fits. The coordinate z is replaced by (z - loc) / scale, standard normal a priori.

References:
    Papaspiliopoulos, Roberts and Skold (2007), A General Framework for the Parametrization of Hierarchical Models.
    Betancourt and Girolami (2013), Hamiltonian Monte Carlo for Hierarchical Models. https://arxiv.org/abs/1312.0906
"""

from __future__ import annotations

__all__ = ["drawn", "without_funnels"]

from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Normal
from pyro.infer.reparam import LocScaleReparam
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor

from jensen.kernel.coordinates import Coordinates
from jensen.kernel.randomness import forked_rng
from jensen.kernel.sites import base_of, sites_of
from jensen.kernel.weights import Program, model_sites, trace_pair


def without_funnels(model: Program, *data: Tensor) -> tuple[Program, list[str]]:
    """The model in such coordinates, and the sites that have them; the original model if there are none."""
    with forked_rng(), torch.no_grad():
        pairs = zip(model_sites(model, *data), model_sites(model, *data), strict=True)
        names = [s["name"] for s, again in pairs if not s["is_observed"] and _scales_differ(s["fn"], again["fn"])]
    config: dict[str, Reparam] = {name: LocScaleReparam(centered=0.0) for name in names}
    return (poutine.reparam(model, config=config) if names else model), names


def _scales_differ(one: Any, other: Any) -> bool:
    a, b = base_of(one), base_of(other)
    return isinstance(a, Normal) and isinstance(b, Normal) and not torch.equal(a.scale, b.scale)


@torch.no_grad()
def drawn(
    model: Program, guide: Program, data: tuple[Tensor, ...], funnels: list[str], coordinates: Coordinates, count: int
) -> Tensor:
    """Samples of the guide, as coordinates [C, N, F] of the model without its funnels."""
    draws = []
    for _ in range(count):
        of_model, of_guide = ({s["name"]: s for s in sites_of(trace)} for trace in trace_pair(model, guide, data))
        values: dict[str, Any] = {name: site["value"] for name, site in of_guide.items()}
        for name in funnels:
            fn = base_of(of_model[name]["fn"])
            values[f"{name}_decentered"] = (values[name] - fn.loc) / fn.scale
        draws.append(values)
    return coordinates.free({name: torch.stack([draw[name] for draw in draws]) for name in coordinates.pieces})
