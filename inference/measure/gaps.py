r"""What a guide costs, in two parts: what its family cannot do, and what its encoder does not do.

.. math::
    \log p(x) - \text{ELBO}(q_{\lambda(x)}) =
    \underbrace{\log p(x) - \text{ELBO}(q_{\lambda^*})}_{\text{approximation gap}} +
    \underbrace{\text{ELBO}(q_{\lambda^*}) - \text{ELBO}(q_{\lambda(x)})}_{\text{amortization gap}}, \qquad
    \lambda^* = \arg\max_\lambda \text{ELBO}(q_\lambda)

with parameters lambda* of the same family found for each datum on its own, all data of a batch at once.
"""

from __future__ import annotations

__all__ = ["gaps", "has_local"]

import copy
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from tqdm import tqdm

from jensen.kernel.batches import Data, Device, Transform, as_tensors, placed, running
from jensen.kernel.randomness import private_randomness
from jensen.kernel.weights import Program

from .costs import Gaps
from .evaluate import evaluate
from .evidence import Evidence
from .search import LocalSearch, originals_kept


def gaps(
    model: Program,
    guide: Program,
    data: Data,
    particles: int = 5000,
    *,
    tolerance: float = 0.002,
    rounds: int = 10,
    steps: int = 200,
    lr: float = 0.1,
    draws: int = 8,
    batch_size: int = 250,
    seed: int | None = None,
    batch_transform: Transform | None = None,
    device: Device = None,
    progress: bool = True,
) -> Gaps:
    r"""Split log p(x) - ELBO into the approximation gap of the family and the amortization gap of the encoder.

    For each datum the parameters of the same family are optimised from the encoder's answer on: offsets to what the
    encoder says, and one copy of every other weight of the family (a flow's networks) per datum. A round is ``steps``
    steps of Adam whose learning rate falls to a tenth; its result is the mean of the second half. Each datum keeps the
    better of the parameters before and after, by the ELBO under the same noise. A round that gains less than the
    tolerance on average is followed by rounds with a quarter of its learning rate, and by a sixteenth: when none gains,
    the optimisation is done. The optimum is a local one, and so an upper bound on the approximation gap. Where log q of
    a given value is known and not much dearer than a draw, gradients stick the landing: their noise vanishes as q comes
    close to the posterior.

    References:
        Cremer, Li and Duvenaud (2018), Inference Suboptimality in Variational Autoencoders.
        Roeder, Wu and Duvenaud (2017), Sticking the Landing.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide; one of ours (it has ``local(*data)``), or an AutoGuide, which has no encoder: what is left to
            its optimisation counts as amortization.
        data: a tensor [N, ...], or a tuple of such tensors.
        particles: the number K of draws per datum of the final measurements.
        tolerance: in nats per datum: when the optimisation has converged.
        rounds: the most rounds.
        steps: steps of Adam in a round.
        lr: the learning rate that rounds start with, for parameters that are offsets; a twentieth of it for copies of
            weights.
        draws: draws from the guide per datum and step.
        batch_size: how many data are optimised at once.
        seed: makes everything repeatable and leaves the user's random stream alone; None draws from that stream.
        batch_transform: applied to the first tensor, once.
        device: where to run; modules and data are moved there. None: where they are.
        progress: whether to show progress bars.

    Returns:
        The :class:`Gaps`.

    Raises:
        TypeError: for a guide without ``local``.
        NotImplementedError: for sites without ``rsample``, along whose draws no optimum is found, and for a family that
            ``torch.vmap`` does not run.
        ValueError: for settings that make no sense, joint weights, and on what
            :func:`~jensen.inference.evaluate` names.

    Example:
        >>> from jensen.families import MeanField
        >>> from jensen.guides import amortize
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model = PPCA(5, latent=2)
        >>> guide = amortize(model, mlp(5, [3]), MeanField, context=3)
        >>> found = gaps(model, guide, torch.randn(20, 5), particles=100, seed=0, progress=False)
        >>> bool(found.amortization.mean() > 0.1), found.summary()["converged"] > 0.5
        (True, True)
    """
    if min(rounds, steps, draws, batch_size) < 1 or not tolerance > 0 or not lr > 0:
        raise ValueError("rounds, steps, draws and batch_size are at least 1, tolerance and lr positive")
    if not has_local(guide):
        raise TypeError(
            f"gaps needs a guide that says what its family is, but {type(guide).__name__} has no local(*data); take "
            "amortize(...), or give your guide that method: a guide with parameters of its own for each of these data"
        )
    tensors = as_tensors(data)
    with private_randomness(seed):
        tensors = placed(tensors, device, batch_transform)
    evidence = evaluate(model, guide, tensors, particles, seed=seed, device=device, progress=progress)
    if evidence.joint:
        raise ValueError("the weights of this pair are joint, one number for all data, so there is no gap per datum")
    n, start = len(tensors[0]), time.perf_counter()
    rows = n if isinstance(guide, AutoGuide) else batch_size
    found: list[Evidence] = []
    gain: list[Tensor] = []
    converged: list[Tensor] = []
    most, spent = 0, 0.0
    with (
        tqdm(total=n, disable=not progress, desc="local optimum", unit="datum") as bar,
        originals_kept(model, guide),
        running(model, guide, seed=seed, device=device),
    ):
        for first in range(0, n, rows):
            batch = tuple(x[first : first + rows] for x in tensors)
            local = copy.deepcopy(guide) if isinstance(guide, AutoGuide) else guide.local(*batch)  # type: ignore[attr-defined]
            search = LocalSearch(model, local, batch, draws)
            change, error = torch.zeros(len(batch[0])), torch.zeros(len(batch[0]))
            done, rate = 0, lr
            while search.free and done < rounds and rate > lr / 20:
                change, error = search.round(steps, rate)
                done += 1
                if float(change.clamp_min(0.0).mean()) < tolerance:  # this step size is done
                    rate /= 4
            spent, start = spent + time.perf_counter() - start, time.perf_counter()
            found.append(
                evaluate(model, local, batch, particles, device=device, progress=False)
                if search.free
                else _rows(evidence, slice(first, first + rows))  # nothing to optimise: the same guide
            )
            start = time.perf_counter()
            gain.append(change.clamp_min(0.0).double().cpu())
            converged.append((change.abs() <= tolerance + 2 * error).cpu())
            most = max(most, done)
            bar.update(len(batch[0]))
    return Gaps(evidence, _joined(found), torch.cat(gain), torch.cat(converged), most, spent)


def has_local(guide: Program) -> bool:
    """Whether the gap of a guide can be split."""
    return isinstance(guide, AutoGuide) or callable(getattr(guide, "local", None))


def _rows(evidence: Evidence, rows: slice) -> Evidence:
    """The measurement of some of the data."""
    return Evidence(**{field.name: _cut(getattr(evidence, field.name), rows) for field in fields(Evidence)})


def _cut(value: Any, rows: slice) -> Any:
    if isinstance(value, dict):
        return {name: _cut(part, rows) for name, part in value.items()}
    return value[rows] if isinstance(value, Tensor) else value


def _joined(parts: Sequence[Evidence]) -> Evidence:
    """The measurement of all data, from those of its batches."""
    return Evidence(
        **{field.name: _concatenated([getattr(part, field.name) for part in parts]) for field in fields(Evidence)}
    )


def _concatenated(pieces: list[Any]) -> Any:
    """Tensors one after the other, also inside a dict; of anything else, the first."""
    if isinstance(pieces[0], dict):
        return {name: _concatenated([piece[name] for piece in pieces]) for name in pieces[0]}
    return torch.cat(pieces) if isinstance(pieces[0], Tensor) else pieces[0]
