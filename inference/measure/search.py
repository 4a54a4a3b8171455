"""The local optimisation of the gaps: each row of a guide's parameters maximises the ELBO of its data point."""

from __future__ import annotations

__all__ = ["LocalSearch", "originals_kept"]

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from jensen.graphs.capture import Outputs
from jensen.graphs.compile import Compile
from jensen.graphs.draws import LogWeights
from jensen.graphs.routes import Function, Routes, weights_of
from jensen.kernel.batches import nested
from jensen.kernel.parameters import claim_parameters, tensors_of
from jensen.kernel.plain import PlainState
from jensen.kernel.randomness import forked_rng
from jensen.kernel.weights import Pair, Program, check_pair
from jensen.missing import same_values

from .gaussians import MOST, Gaussians, Landscape

_GAUSSIAN = 3  # rounds of the Gaussian search
_STEPS = 6  # per round
_SHARE = 0.7  # of a Newton step, in the first round
_MANY = 50  # coordinates
_AT_REST = 0.8  # share of converged data points at which no other round is needed
_DEAREST = 12.0  # maximal relative cost of a step with sticking the landing
_LEAST = 100  # steps
_DRAWS = 128  # of a check whether a round gained
_CHECKS = 4  # per batch, roughly


class LocalSearch:
    """A guide with separate parameters for each data point of a batch, and their optimisation.

    Args:
        model: any Pyro model.
        guide: a guide whose trainable parameters have one row per data point.
        batch: the data.
        draws: samples from the guide per data point and step.
        mode: ``"auto"``, ``True`` or ``False``, as for :func:`~jensen.inference.gaps`.
        ahead: the approximate number of future steps.
        max_plate_nesting: as for :func:`~jensen.inference.evaluate`.

        land: log p(x, u) of any data of the model; None: not available.
        chunk: how many samples are weighted at once, as in the measurement that follows; None: 16, without its graph.

    Attributes:
        route: how steps run.
    """

    def __init__(
        self,
        model: Program,
        guide: Any,
        batch: tuple[Tensor, ...],
        draws: int,
        mode: Compile,
        ahead: int,
        max_plate_nesting: int | None = None,
        land: Landscape | None = None,
        chunk: int | None = None,
    ) -> None:
        self.model, self.guide, self.batch, self.draws = model, guide, batch, draws
        self.mode, self.ahead, self.land, self.chunk = mode, ahead, land, chunk
        self.pair = Pair(model, guide, nested(check_pair(model, guide, *batch), max_plate_nesting))
        named = {name: p for name, p in guide.named_parameters() if p.requires_grad}
        self.free = list(named.values())
        self.copies = [p for name, p in named.items() if ".copies." in name]
        self.by_row = all(p.shape[:1] == (len(batch[0]),) for p in self.free)
        self.noise = int(torch.randint(2**62, ()))
        self.weights = LogWeights(self.pair, mode)
        self.route = "eager: nothing has run yet"
        self._routed: Function | None = None
        self._gaussians: Gaussians | None = None
        self.draws_of_a_check = _DRAWS
        if self.free:
            self._check_gradients()
            if self._has_gaussians():  # their rounds are few, so checks are a large part of the work
                self.draws_of_a_check = _DRAWS // 2
            self.value = self._log_weights()

    def take(self, guide: Any, batch: tuple[Tensor, ...]) -> bool:
        """Continue with other data and their guide in the same tensors and graphs; returns whether they fit."""
        ours, theirs = (dict([*g.named_parameters(), *g.named_buffers()]) for g in (self.guide, guide))
        if any(x.shape != old.shape for x, old in zip(batch, self.batch, strict=True)) or ours.keys() != theirs.keys():
            return False
        if any(t.shape != theirs[name].shape or t.dtype != theirs[name].dtype for name, t in ours.items()):
            return False
        if not _same_but_for_tensors(self.guide, guide):
            return False
        for name, t in ours.items():
            t.data.copy_(theirs[name])
        for old, x in zip(self.batch, batch, strict=True):
            old.copy_(x)
        self.weights.forget()
        self._gaussians = None
        self.noise = int(torch.randint(2**62, ()))
        if self.free:
            self.value = self._log_weights()
        return True

    def run(self, rounds: int, steps: int, lr: float, tolerance: float) -> tuple[Tensor, Tensor, int]:
        """Optimise until there is no further gain.

        Returns:
            The gain of each data point in the last round, its Monte Carlo error, [N] each, and the number of rounds.
        """
        change = error = torch.zeros(len(self.batch[0]))
        if not self.free:
            return change, error, 0
        done, rate = 0, lr
        if self._has_gaussians():
            nearest = self.guide.reaches != "near"  # else it is only a start
            met = torch.zeros(len(self.batch[0]), dtype=torch.bool, device=self.batch[0].device)
            for done in range(1, min(rounds, _GAUSSIAN if nearest else 1) + 1):
                change, error, better = self.gaussian_round(done - 1)
                met |= better | (change.abs() <= tolerance + 2 * error)
                if done > 1 and float(change.clamp_min(0.0).mean()) < tolerance:
                    break
            at_rest = change.abs() <= tolerance + 2 * error
            if nearest and bool(met.all()) and float(at_rest.double().mean()) >= _AT_REST:
                return change, error, done
            rate = lr / 4  # the optimum is near
        while done < rounds and rate > lr / 20:
            change, error = self.round(steps, rate)
            done += 1
            if float(change.clamp_min(0.0).mean()) < tolerance:  # this step size has converged
                rate /= 4
        return change, error, done

    def _has_gaussians(self) -> bool:
        """Whether the guide's family contains Gaussians, and the model has coordinates for them."""
        reaches = getattr(self.guide, "reaches", "")
        if not reaches or self.land is None or not self.by_row:
            return False
        try:
            coordinates = self.land.coordinates(self.batch)
        except ValueError:
            return False
        return coordinates.features <= MOST

    def gaussian_round(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Steps towards the optimal Gaussian of each data point, with more samples in each round.

        Returns:
            The change of each data point, its Monte Carlo error, and whether it is kept: [N].
        """
        assert self.land is not None
        if self._gaussians is None:
            drawn = self.pair.terms(self.batch, self.draws).values
            start = self.land.coordinates(self.batch).free(drawn).mean(0)
            self._gaussians = Gaussians(self.land, self.batch, start, self.guide.reaches == "diagonal")
        before, old = self._gaussians.state(), [p.detach().clone() for p in self.free]
        few = max(1, min(8, _MANY // self._gaussians.loc.shape[-1]))  # with few coordinates, samples are cheap
        draws = few * self.draws * 2**number
        self._gaussians.move(_STEPS, draws, max(2, draws // 2), _SHARE / 2**number)
        self.guide.move_to(*self._gaussians.distribution())
        gained, error, better = self._kept_if_better(old)
        if number:
            self._gaussians.return_to(before, ~better)
        return gained, error, better

    def round(self, steps: int, lr: float) -> tuple[Tensor, Tensor]:
        """Optimise and keep improvements; the change of each data point and its Monte Carlo error: [N]."""
        before = [p.detach().clone() for p in self.free]
        mean = [torch.zeros_like(p) for p in self.free]
        slow = {id(p) for p in self.copies}
        groups = [
            {"params": [p for p in self.free if id(p) not in slow], "lr": lr},
            {"params": self.copies, "lr": lr / 20},
        ]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=lr / 10)
        for step in range(steps):
            for p, slope in zip(self.free, self._slopes(), strict=True):
                p.grad = slope
            optimizer.step()
            scheduler.step()
            if step >= steps // 2:  # the mean of the second half has less noise than the last step
                for total, p in zip(mean, self.free, strict=True):
                    total += p.detach() / (steps - steps // 2)
        for total, p in zip(mean, self.free, strict=True):
            p.data.copy_(total)
            p.grad = None
        return self._kept_if_better(before)[:2]

    def _kept_if_better(self, before: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Undo losses: the change of each data point, its Monte Carlo error, and whether it is kept: [N]."""
        after = self._log_weights()
        change = after - self.value  # [K, N], under the same noise
        gained, error = change.mean(0), change.std(0) / math.sqrt(len(change))
        better = gained > 0 if self.by_row else (gained.mean() > 0).expand_as(gained)
        for p, old in zip(self.free, before, strict=True):
            keep = better.view(-1, *(1,) * (p.dim() - 1)) if self.by_row else better[0]
            p.data.copy_(torch.where(keep, p, old))
        self.value = torch.where(better, after, self.value)
        return gained.nan_to_num(-math.inf), error.nan_to_num(0.0), better

    @property
    def step(self) -> Function:
        """The gradients of a step, by the fastest route, which is determined at the first step."""
        if self._routed is None:
            routes = Routes(self.mode, _LEAST, "gaps does not compile this search; its steps run")
            products = weights_of(self.model) * len(self.batch[0]) + sum(p.numel() for p in self.copies)
            step = self._landing if self.landing else self._plain
            held = tensors_of(self.model, self.guide)
            how: Any = {"ahead": self.ahead, "state": PlainState(self.model, self.guide), "trial": self._elsewhere}
            self._routed = routes(step, held, self.batch, 6 * self.draws * products, **how)
            self.route = routes.sentence
        return self._routed

    @cached_property
    def landing(self) -> bool:
        """Whether steps use sticking the landing."""
        return self._can_land()

    def _check_gradients(self) -> None:
        with torch.no_grad(), forked_rng():
            q = self.pair.terms(self.batch, 1).q
        if stuck := [site for site, fn in q.items() if not fn.has_rsample]:
            raise NotImplementedError(
                f"the local optimum follows gradients of samples, but those of {stuck} have none: use a family with "
                "rsample"
            )

    def _slopes(self) -> Outputs:
        """The gradients of minus the ELBO, with sticking the landing if possible."""
        step = self.step
        if not self.landing:
            return step(*self.batch)
        try:
            repeated, *slopes = step(*self.batch)
        except ValueError:  # float32 is too coarse for the inverse of one of these samples: this step does without
            return self._plain(*self.batch)
        return tuple(slopes) if bool(repeated) else self._plain(*self.batch)

    @torch.enable_grad()
    def _plain(self, *batch: Tensor) -> Outputs:
        """The gradients of minus the ELBO."""
        return self._uphill(self._weights(self.draws, batch).mean(0))

    @torch.enable_grad()
    def _landing(self, *batch: Tensor) -> Outputs:
        """Whether a second run gave the same log q, and the gradients of minus the ELBO with sticking the landing."""
        t = self.pair.terms(batch, self.draws, stopped=True)
        assert t.log_q_stopped is not None
        assert t.repeated is not None
        total: Tensor = sum(t.log_p.values()) - sum(t.log_q_stopped.values())  # type: ignore[assignment]
        return (t.repeated, *self._uphill(total.mean(0)))

    def _uphill(self, elbo: Tensor) -> Outputs:
        loss = -torch.where(elbo.isfinite(), elbo, 0.0).sum()
        slopes = torch.autograd.grad(loss, self.free, allow_unused=True, materialize_grads=True)
        return tuple(slope.nan_to_num(0.0, 0.0, 0.0) for slope in slopes)

    def _elsewhere(self, run: Function) -> Outputs:
        """The result of a step at other parameters than the present ones."""
        before = [p.detach().clone() for p in self.free]
        try:
            for p in self.free:
                p.data.mul_(1.01).add_(0.01)
            return run(*self.batch)
        finally:
            for p, old in zip(self.free, before, strict=True):
                p.data.copy_(old)

    def _can_land(self) -> bool:
        """Whether log q of a given value is known, and a step with it costs not much more than one without."""
        with forked_rng():
            with _Elements() as plain:
                self._plain(*self.batch)
            try:
                with _Elements() as landing:
                    self._landing(*self.batch)
            except NotImplementedError:
                return False
            except ValueError:
                return True
        return bool(landing.count <= _DEAREST * plain.count)

    def _weights(self, particles: int, batch: tuple[Tensor, ...]) -> Tensor:
        return self.pair.log_weights(batch, particles)

    @torch.no_grad()
    def _log_weights(self) -> Tensor:
        """Log weights per data point, 64 or 128 or a few more, with the same noise at every call: [K, N], float64."""
        with forked_rng():
            torch.manual_seed(self.noise)
            size = self.chunk or 16
            calls = -(-self.draws_of_a_check // size)
            if self.chunk is None:
                return torch.cat([self._weights(size, self.batch).double() for _ in range(calls)])
            ahead = _CHECKS * calls
            return torch.cat([self.weights(self.batch, self.chunk, ahead).double() for _ in range(calls)])


def _same_but_for_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Whether two guides differ only in parameters and buffers."""
    pairs = list(zip(one.modules(), other.modules(), strict=False))
    if len(pairs) != len(list(one.modules())) or len(pairs) != len(list(other.modules())):
        return False
    return all(type(a) is type(b) and _alike(_plain(a), _plain(b)) for a, b in pairs)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The state of a module without parameters, buffers, modules, its mode and its name in Pyro."""
    known = ("_parameters", "_buffers", "_modules", "training")  # a measurement sets the mode
    return {key: value for key, value in vars(module).items() if key not in known and not key.startswith("_pyro")}


def _alike(a: Any, b: Any) -> bool:
    """Whether values are the same object, or equal numbers, strings and collections of these."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_alike(value, b[key]) for key, value in a.items())
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.device == b.device and same_values(a, b)
    return isinstance(a, bool | int | float | str | slice | set | frozenset) and bool(a == b)


class _Elements(TorchDispatchMode):
    """Counts the elements that operations write: a measure of work that is equal on every machine."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += sum(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor))
        return out


@contextmanager
def originals_kept(model: Program, guide: Program) -> Iterator[None]:
    """Let a copied AutoGuide replace its original in Pyro's parameter store, without a warning, and undo this."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Pyro's parameter store held other values")
        try:
            yield
        finally:
            claim_parameters(model, guide)
