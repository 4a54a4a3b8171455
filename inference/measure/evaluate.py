r"""The measurement: streams the weights of a pair and reduces them, per datum.

.. math::
    \text{ELBO}_n = \frac{1}{K} \sum_k \log w_{kn}, \qquad
    \widehat{\log p}(x_n) = \log \frac{1}{K} \sum_k w_{kn}, \qquad
    \text{gap}_n = \log p(x_n) - \text{ELBO}_n
"""

from __future__ import annotations

__all__ = ["evaluate"]

import warnings

import torch
from torch import Tensor
from tqdm import tqdm

from jensen.graphs.compile import Compile, check_compile
from jensen.graphs.draws import LogWeights
from jensen.graphs.products import product_route
from jensen.kernel.batches import Data, Transform, as_tensors, expect_rows, in_cache, placed, plan, running
from jensen.kernel.weights import Program, check_pair

from ..exact.log_evidence import cheap_evidence
from .adaptive import as_needed, block_of, check_settings, equally, in_parts
from .diagnostics import CORRECTIONS
from .evidence import Evidence


def evaluate(
    model: Program,
    guide: Program,
    data: Data,
    particles: int = 5000,
    *,
    tolerance: float | None = None,
    max_particles: int = 100_000,
    seed: int | None = None,
    batch_transform: Transform | None = None,
    chunk_size: int | None = None,
    compile: Compile = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Evidence:
    r"""Measure a pair: per datum, the ELBO, an importance-weighted estimate of log p(x), and whether to trust it.

    Weights are streamed in chunks of data and particles and reduced in float64. Memory does not grow with K, but for
    the 3 sqrt(K) largest weights of the data in hand, nor with N, but for the results. (Joint weights, and guides that
    hold a value for each datum, are run on all data at once.) Parameters are not touched; modules are in evaluation
    mode meanwhile.

    With a ``tolerance``, particles go where they are needed: a pilot of 256 says for each datum how many its error
    takes, with k-hat above 0.5 many more (four times at 0.7); fresh draws make the estimate, and are asked the same
    once more. What no draw meets at all, such as a far second mode, no rule of this kind can know. Joint weights, and
    guides that hold a value for each datum, go on until all are done.

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders.
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto Smoothed Importance Sampling.
        Nowozin (2018), Debiasing Evidence Approximations: the delta-method and jackknife corrections.
        Stein (1945), A Two-Sample Test for a Linear Hypothesis: the sample size from a pilot.

    Args:
        model: any Pyro model, called as ``model(*data)``.
        guide: its guide, called with the same data.
        data: a tensor [N, ...], or a tuple of such tensors.
        particles: the number K of draws per datum; not used with a tolerance.
        tolerance: the Monte Carlo standard error of log p(x), in nats, to reach for each datum. None: K draws for all.
        max_particles: with a tolerance, the most draws of one datum, at least 512. Where it is met first, the datum is
            not ``converged``.
        seed: makes the draws repeatable and leaves the user's random stream alone; None draws from that stream.
        batch_transform: applied to the first tensor, once: ``torch.bernoulli`` binarizes grey images at random.
        chunk_size: how many (datum, particle) pairs are run at once; None: as many as a processor's cache takes well.
        compile: whether the pair is captured once as a graph and compiled: ``"auto"`` where that pays, ``True``
            wherever it can be done (else a warning says why not), ``False`` never. The draws are the same.
        device: where to run; modules and data are moved there. None: where they are.
        progress: whether to show a progress bar.

    Returns:
        The :class:`Evidence`.

    Raises:
        ValueError: for ``particles`` less than 1, a tolerance that is not positive, ``max_particles`` below 512, data
            that are empty or not finite, and on what :func:`~jensen.inference.log_weights` names.
        FloatingPointError: if a log weight is NaN or plus infinity.

    Example:
        >>> from jensen.families import MeanField
        >>> from jensen.guides import amortize
        >>> from jensen.models import PPCA
        >>> from jensen.networks import mlp
        >>> model = PPCA(5, latent=2)
        >>> guide = amortize(model, mlp(5, [16]), MeanField, context=16)
        >>> evidence = evaluate(model, guide, torch.randn(20, 5), particles=100, progress=False)
        >>> evidence.elbo.shape, evidence.summary()["particles"]
        (torch.Size([20]), 100)
        >>> evidence = evaluate(model, guide, torch.randn(20, 5), tolerance=0.1, progress=False)
        >>> evidence.spent.shape, bool(evidence.converged.all())
        (torch.Size([20]), True)
    """
    check_settings(particles, tolerance, max_particles)
    check_compile(compile)
    tensors = as_tensors(data)
    n = len(tensors[0])
    chunk_size = in_cache(tensors) if chunk_size is None else chunk_size
    where = tensors[0].device if device is None else torch.device(device)
    with running(model, guide, seed=seed, device=device), product_route(where):
        tensors = placed(tensors, device, batch_transform)
        at_first = particles if tolerance is None else 64
        separate, rows = plan(model, guide, tensors, min(64, max(1, chunk_size // min(at_first, 64))))
        parts: list[dict[str, Tensor]] = []
        if separate:
            rows = -(-n // -(-n // rows))  # batches of about the same size
        checked = rows * max(1, _CHECKED // rows)  # data that the pair is checked on at once
        weights: LogWeights | None = None
        total = n * particles if tolerance is None else None
        with tqdm(total=total, disable=not progress, desc="evaluate", unit_scale=True) as bar:
            for start in range(0, n, rows):
                batch = tuple(x[start : start + rows] for x in tensors)
                if start % checked == 0:
                    some = tuple(x[start : start + checked] for x in tensors)
                    layout = check_pair(model, guide, *some)
                    if separate:
                        expect_rows(layout, len(some[0]))
                weights = LogWeights(model, guide, layout.nesting, compile) if weights is None else weights
                left = (n - start) // rows if tolerance is None else None

                def draw(
                    positions: Tensor | None,
                    k: int,
                    batch: tuple[Tensor, ...] = batch,
                    weights: LogWeights = weights,
                    left: int | None = left,
                ) -> Tensor:
                    some = batch if positions is None else tuple(x[positions.to(x.device)] for x in batch)
                    log_w = weights(some, k, None if left is None else max(1, left * (particles // k)))
                    bar.update(k * len(some[0]))
                    return log_w if separate else log_w.unsqueeze(-1)

                numbers = torch.arange(start, start + len(batch[0])) if separate else torch.zeros(1).long()
                if tolerance is None:
                    part = equally(draw, particles, block_of(particles, chunk_size // rows), numbers)
                else:
                    divisible = separate and in_parts(model, guide, batch, proven=rows < n)
                    part = as_needed(draw, tolerance, max_particles, chunk_size, numbers, divisible)
                parts.append({name: values.cpu() for name, values in part.items()})
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        budget = int(joined["spent"].double().mean())
        known = cheap_evidence(model, tensors, budget=budget, rows=rows, joint=not separate)
    corrected = {name: joined.pop(name) for name in CORRECTIONS}
    errors = {name: joined.pop(f"{name}_error") for name in CORRECTIONS}
    evidence = Evidence(
        **joined,
        exact=known,
        particles=int(joined["spent"].max()),
        features=tensors[0][0].numel() * (1 if separate else n),
        joint=not separate,
        corrected=corrected,
        corrected_error=errors,
    )
    _doubt(evidence)
    return evidence


_CHECKED = 512


def _doubt(evidence: Evidence) -> None:
    """Warn of an ELBO above the exact log p(x) by more than its error and rounding: a number that cannot be right."""
    if evidence.exact is None or evidence.particles < 10:
        return
    excess = float((evidence.elbo - evidence.exact).mean())
    error = float(evidence.elbo_error.square().sum().sqrt()) / len(evidence.elbo)
    if excess > 6 * error + 1e-4 * (1 + float(evidence.exact.abs().mean())):
        warnings.warn(
            f"the ELBO lies {excess:.3g} nats above the exact log p(x), which no guide can do: numbers are lost to "
            "rounding; measure in float64 (model.double(), guide.double())",
            stacklevel=3,
        )
