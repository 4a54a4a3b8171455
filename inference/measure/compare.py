r"""Several pairs measured on the same data."""

from __future__ import annotations

__all__ = ["compare"]

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from jensen.kernel.batches import Data, Transform, as_tensors, placed
from jensen.kernel.randomness import private_randomness
from jensen.kernel.weights import Program, parameters_of

from ..training.history import History
from .comparison import Comparison, Row
from .evaluate import evaluate
from .gaps import gaps as split
from .gaps import has_local


def compare(
    pairs: Mapping[str, tuple[Program, Program]],
    data: Data,
    particles: int = 5000,
    *,
    gaps: bool = False,
    tolerance: float | None = None,
    max_particles: int = 100_000,
    histories: Mapping[str, History] | None = None,
    seed: int | None = None,
    batch_transform: Transform | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure several pairs on the same data. It never trains.

    Args:
        pairs: (model, guide) by name, in the order of the table's rows.
        data: a tensor [N, ...], or a tuple of such tensors.
        particles: the number K of draws per datum.
        gaps: whether to split every gap into approximation and amortization, by :func:`~jensen.inference.gaps` with its
            defaults; the gap is then taken from the better of its two estimates of log p(x). Guides that cannot be
            taken apart get a dash.
        tolerance: as in :func:`~jensen.inference.evaluate`; not together with ``gaps``.
        max_particles: as in :func:`~jensen.inference.evaluate`.
        histories: what :func:`~jensen.inference.fit` returned for some of the pairs: its time is added to theirs.
        seed: makes the draws repeatable, the same stream for every pair; None draws from the user's stream.
        batch_transform: applied to the first tensor, once, before all pairs: every pair sees the same data.
        device: where to run; modules and data are moved there. None: where they are.
        progress: whether to show progress bars.

    Returns:
        The :class:`Comparison`.

    Raises:
        ValueError: without pairs, for a history of no pair, a tolerance with gaps, joint weights beside weights per
            datum, and on what :func:`~jensen.inference.evaluate` names.
        FloatingPointError: if a log weight is NaN or plus infinity.

    Example:
        >>> from jensen.guides import ExactPosterior
        >>> from jensen.models import PPCA
        >>> model = PPCA(5, latent=2)
        >>> table = compare({"exact": (model, ExactPosterior(model))}, torch.randn(20, 5), particles=50, progress=False)
        >>> list(table.rows), table.rows["exact"].parameters
        (['exact'], 16)
    """
    histories = histories or {}
    if not pairs or set(histories) - set(pairs):
        raise ValueError(
            f"compare needs at least one pair, and histories only of its pairs, but got pairs {list(pairs)} and "
            f"histories {list(histories)}"
        )
    if gaps and tolerance is not None:
        raise ValueError("gaps are measured with the same particles for all data: leave tolerance out, or gaps")
    tensors = as_tensors(data)
    with private_randomness(seed):
        tensors = placed(tensors, None, batch_transform)
    models = [model for model, _ in pairs.values()]
    shared = all(model == models[0] for model in models) and len(models) > 1
    settings: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
    needs: dict[str, Any] = {"tolerance": tolerance, "max_particles": max_particles}
    rows = {}
    for name, (model, guide) in pairs.items():
        start = time.perf_counter()
        found = None
        try:
            if gaps and has_local(guide):
                with suppress(NotImplementedError):  # a guide that cannot be taken apart: a dash in the table
                    found = split(model, guide, tensors, particles, **settings)
            evidence = found.evidence if found else evaluate(model, guide, tensors, particles, **needs, **settings)
        except Exception as error:
            error.add_note(f"in compare, at the pair '{name}'")
            raise
        seconds = time.perf_counter() - start + (histories[name].seconds if name in histories else 0.0)
        rows[name] = Row(evidence, _count(model, guide, tensors, device, shared), seconds, found)
    if len({row.evidence.joint for row in rows.values()}) > 1:
        joint = [name for name, row in rows.items() if row.evidence.joint]
        raise ValueError(
            f"the weights of {joint} are joint (one number for all data), those of the other pairs per datum: they "
            "do not compare; is a plate missing around a site of the guide?"
        )
    return Comparison(rows, shared)


def _count(model: Program, guide: Program, data: Sequence[torch.Tensor], device: Any, shared: bool) -> int:
    """Trainable parameters of the pair; of the guide alone where the model is shared."""
    of_model, of_guide = parameters_of(model, guide, *(x.to(device or x.device) for x in data))
    return sum(p.numel() for p in (of_guide if shared else [*of_model, *of_guide]))
