r"""Model and guide as they are measured: on all data, and without factors that are not densities.

If a latent site is outside of it, a subsampled plate gives an unbiased estimate of the ELBO, but not of log p(x):

.. math:: \log \int p(z) \exp \Big( \frac{N}{B} \sum_{n \in B} \log p(x_n \mid z) \Big) dz \ne \log p(x)

for a batch B of the N data, also on average. Such a plate is run in full.

A guide's samples do not depend on its ``pyro.factor``. A penalty there changes training, but it is not part of
log q(z | x): counted as such, it would shift every log weight, and the ELBO could exceed log p(x).
"""

from __future__ import annotations

__all__ = ["in_full", "without_penalties"]

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from jensen.missing import same_values

from .randomness import forked_rng
from .sites import Site, plates_of, sites_of
from .supports import log_density
from .weights import Program, trace_pair


def in_full(model: Program, guide: Program, *data: Tensor) -> tuple[Program, Program]:
    """A model and guide that run their subsampled plates on all data.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: all data.

    Returns:
        The model and the guide, in which a subsampled ``pyro.plate`` yields every index, in order.

    Raises:
        ValueError: naming plate and site, if the model's observations do not follow the index of the plate: another
            order of the indices must give the same values and log-densities in that order.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> of = dist.Normal(0.0, 1.0)
        >>> model = lambda x: [pyro.sample(f"x_{i}", of, obs=x[i]) for i in pyro.plate("data", len(x), 2)]
        >>> whole, guide = in_full(model, lambda x: None, torch.arange(5.0))
        >>> len(model(torch.arange(5.0))), len(whole(torch.arange(5.0)))
        (2, 5)
    """
    with torch.no_grad(), forked_rng():
        p, q = trace_pair(model, guide, data)
        frames = {frame for s in sites_of(p) + sites_of(q) for frame in s["cond_indep_stack"]}
        sizes = {frame.name: (frame.size, frame.full_size) for frame in frames if frame.size != frame.full_size}
        whole, of_guide = (_under(_InFull(set(sizes)), program) for program in (model, guide))
        try:
            p, q = trace_pair(whole, of_guide, data)
            back = _InFull(set(sizes), backwards=True)
            again, _ = trace_pair(back(model), poutine.replay(back(guide), trace=_reversed(q, set(sizes))), data)
            others = {s["name"]: s for s in sites_of(again)}
        except (IndexError, RuntimeError, ValueError) as error:
            raise ValueError(_refusal(sizes)) from error
    for site in sites_of(p):
        if site["name"] not in others or not _follows(site, others[site["name"]], set(sizes)):
            raise ValueError(_refusal(sizes, site["name"]))
    return whole, of_guide


def without_penalties(guide: Program, penalties: tuple[str, ...]) -> Program:
    """A guide whose ``pyro.factor`` sites of these names are ignored."""
    return _under(BlockMessenger(hide=list(penalties)), guide) if penalties else guide


class _InFull(Messenger):
    """A handler under which plates of these names yield all indices, in order or reversed."""

    def __init__(self, names: set[str], backwards: bool = False) -> None:
        super().__init__()
        self.names, self.backwards = names, backwards
        self.outer: list[Any] = []

    def __enter__(self) -> Any:
        subsample = SubsampleMessenger._subsample

        def whole(
            name: str, size: Any = None, some: Any = None, rows: Any = None, cuda: Any = None, on: Any = None
        ) -> Any:
            if name not in self.names:
                return subsample(name, size, some, rows, cuda, on)
            index = torch.arange(size, device=on)
            return subsample(name, size, None, index.flip(0) if self.backwards else index, cuda, on)

        self.outer.append(subsample)
        SubsampleMessenger._subsample = staticmethod(whole)  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *args: Any) -> Any:
        SubsampleMessenger._subsample = staticmethod(self.outer.pop())  # type: ignore[method-assign]
        return super().__exit__(*args)

    def _pyro_post_subsample(self, msg: Any) -> None:
        if self.backwards:  # pyro.subsample keeps the order of whole data
            dims = [
                frame.dim for frame in msg["cond_indep_stack"] if frame.name in self.names and frame.dim is not None
            ]
            msg["value"] = _flipped(msg["value"], [dim - msg["kwargs"]["event_dim"] for dim in dims])

    def _pyro_post_param(self, msg: Any) -> None:
        if msg["kwargs"].get("event_dim") is not None:
            self._pyro_post_subsample(msg)


def _under(handler: Messenger, program: Program) -> Program:
    """A program under a handler that remains a method of its module, so that its mode and parameters are found."""
    wrapped: Any = handler(program)
    owner = getattr(program, "__self__", program)
    if isinstance(owner, nn.Module):
        wrapped.__self__ = owner
    return wrapped  # type: ignore[no-any-return]


def _reversed(trace: Trace, names: set[str]) -> Trace:
    """A trace with the values inside these plates, and their indices, in reversed order."""
    turned = trace.copy()
    nodes: Any = turned.nodes
    for name, site in list(nodes.items()):
        if site["type"] == "sample" and site_is_subsample(site) and name in names:
            nodes[name] = {**site, "value": site["value"].flip(0)}
        elif site["type"] == "sample" and not site_is_subsample(site):
            nodes[name] = {**site, "value": _turned(site, site["value"], names, site["fn"].event_dim)}
    return turned


def _turned(site: Site, value: Tensor, names: set[str], event_dim: int) -> Tensor:
    """A tensor of a site in reversed order along these plates."""
    dims = [frame.dim for frame in plates_of(site) if frame.name in names and frame.dim is not None]
    return _flipped(value, [dim - event_dim for dim in dims])


def _flipped(value: Tensor, dims: list[int]) -> Tensor:
    return value.flip([dim for dim in dims if value.dim() >= -dim])


def _follows(site: Site, other: Site, names: set[str]) -> bool:
    """Whether a site has a value for each index, and its values and log-densities follow the index."""
    event_dim = site["fn"].event_dim
    for frame in plates_of(site):
        if frame.name in names and frame.dim is not None and site["is_observed"]:
            dim = frame.dim - event_dim
            if site["value"].dim() < -dim or site["value"].shape[dim] != frame.size:
                return False
    if any(frame.name in names and frame.size != frame.full_size for frame in site["cond_indep_stack"]):
        return False
    if not same_values(_turned(site, site["value"], names, event_dim), other["value"]):
        return False
    mine, theirs = _turned(site, log_density(site), names, 0), log_density(other)
    return torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)


def _refusal(sizes: dict[str, tuple[int, Any]], name: str | None = None) -> str:
    """The error for a subsampled plate that cannot be measured."""
    listed = ", ".join(f"'{plate}' ({size} of {full})" for plate, (size, full) in sorted(sizes.items()))
    what = "model and guide do not run on all of them" if name is None else f"site '{name}' does not follow its index"
    return (
        f"an estimate of log p(x) needs all data, but the model subsamples its plate {listed} with sites outside of "
        f"it, and {what}: create the plate inside the model, index the data by it (with pyro.plate(...) as rows: ... "
        "obs=x[rows]), and give all data; or measure a model without subsampling"
    )
