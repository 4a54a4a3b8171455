"""``jensen compare``: train and measure guides and models; print tables, write figures and a report."""

from __future__ import annotations

__all__ = ["run"]

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jensen import processes
from jensen.datasets import Dataset
from jensen.families import Bernoulli, Gaussian
from jensen.guides import ExactPosterior, Laplace, PriorGuide, amortize
from jensen.inference import Bounds, Comparison, Evidence, History, compare, fit, likely_reason
from jensen.models import PPCA, VAE
from jensen.networks import mlp
from jensen.progress import named

from .memory import training_memory
from .names import GUIDES, suggestion
from .page import about, curves_of, page_of, shown_by
from .pairs import FAMILIES, encoder_of
from .report import carried, draw_bounds, draw_gaps, draw_images
from .sources import OWN, added_bits, facts, flat, holds_bits, pick, settle
from .terminal import SCHEMA, say, versions, write_json
from .terminal import progress as progress_line
from .terminal import report as deliver

ROWS = {"exact": "exact posterior"}  # rows that are not named like the option
Pair = tuple[nn.Module, nn.Module]
Rows = dict[str, list[Pair]]  # by name: the model and guide of each seed
Histories = dict[str, list[History]]
Blocks = dict[str, Comparison]


def run(options: argparse.Namespace, progress: bool) -> None:
    """Train, measure and report as the options say."""
    guides = _guides(options.guides)
    if options.model != "ppca" and not set(guides) & set(FAMILIES):
        raise ValueError(
            f"--guides needs at least one of {', '.join(FAMILIES)}, because the second block trains its guides, but "
            f"got {options.guides}; --model ppca omits that block"
        )
    job = _Job(options, progress)
    with _folder(options.out) if not processes.rank() else nullcontext():
        _report(job, guides)


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Create the folder of a report; if it was created here and stays empty, remove it."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if made:
            with suppress(OSError):  # something is in it
                out.rmdir()


def _report(job: _Job, guides: list[str]) -> None:
    """Train, measure and print; process 0 draws."""
    options = job.options
    blocks: Blocks = {}
    pairs: dict[str, dict[str, Pair]] = {}  # of each block; in figures stands the first seed
    if options.model in ("ppca", "all"):
        rows, histories = job.one_model(guides)
        note = _WITH_HOLES if job.masked else _ONE_MODEL
        note += " The Gaussian density treats the binary pixels as real numbers." if job.binary else ""
        blocks["one-model"] = job.measure("One model, several guides", note, rows, histories)
        pairs["one-model"] = {name: of[0] for name, of in rows.items()}
    if options.model in ("vae", "all"):
        rows, histories = job.trained_together([name for name in guides if name in FAMILIES])
        blocks["trained-together"] = job.measure("Model and guide trained together", job.note, rows, histories)
        pairs["trained-together"] = {name: of[0] for name, of in rows.items()}
        for name, (model, guide) in pairs["trained-together"].items():
            with processes.apart():
                carried(model, guide, job.test, options.seed, f"{name}: ", "train for longer (--epochs)")
    if not processes.rank():
        with processes.apart():
            _write(job, blocks, pairs)


def _write(job: _Job, blocks: Blocks, pairs: dict[str, dict[str, Pair]]) -> None:
    """Draw figures, and write the reports."""
    options, out = job.options, job.options.out
    settings = {name: v for name, v in vars(options).items() if name not in ("given", "words")} | {"out": str(out)}
    curves: dict[str, dict[str, Bounds]] = {}
    if not options.no_pictures:
        curves = {name: curves_of(of, job.test, options.seed) for name, of in pairs.items()}
        _draw(job, blocks, pairs, curves)
    report = {
        "schema": SCHEMA,
        "settings": settings,
        "epochs": job.epochs,
        "data": {**facts(job.data), "test": len(job.test)},
        "versions": versions(),
        "units": next(iter(blocks.values())).unit,
        "blocks": {name: block.to_dict() for name, block in blocks.items()},
        "histories": {
            f"{name}, seed {seed}" if options.seeds > 1 else name: history.to_dict()
            for name, histories in job.histories.items()
            for seed, history in zip(job.seeds, histories, strict=True)
        },
        "pictures": job.pictures,
    }
    write_json(out / "report.json", report)
    if not options.no_pictures:
        _write_page(job, blocks, pairs, curves, settings)
    made = "" if options.no_pictures else f"{len(job.pictures)} figures, report.html and "
    deliver(f"{made}report.json {'are' if made else 'is'} in {out}/", report, options.json)


def _draw(job: _Job, blocks: Blocks, pairs: dict[str, dict[str, Pair]], curves: dict[str, dict[str, Bounds]]) -> None:
    """Draw the figures of each block."""
    out = job.options.out
    for name, table in blocks.items():
        job.pictures += draw_bounds(out, job.data, len(job.test), name, curves[name], _first_seed(table))
        job.pictures += draw_gaps(out, name, table)
    job.pictures += draw_images(out, job.data, job.test, _shown(pairs), job.labels, job.options.seed)


def _write_page(
    job: _Job,
    blocks: Blocks,
    pairs: dict[str, dict[str, Pair]],
    curves: dict[str, dict[str, Bounds]],
    settings: dict[str, Any],
) -> None:
    """Write report.html."""
    options = job.options
    page = page_of(f"{job.data.name}: models and guides compared", job.data, job.test)
    for name, table in blocks.items():
        page.add(table, title := name.replace("-", " ").capitalize())
        page.bounds(curves[name], _first_seed(table), title)
    name, (model, guide) = list(_shown(pairs).items())[-1]
    last = list(list(blocks.values())[-1].rows.values())[-1]
    shown_by(page, model, guide, job.test, (last.runs or [last.evidence])[0], options.seed, name)
    page.training({name: of[0] for name, of in job.histories.items()})
    about(page, options.words, settings, job.data.citation)
    page.write(options.out / "report.html")


def _first_seed(table: Comparison) -> dict[str, Evidence]:
    """The evidence of each row's first training run, if every row has a model of its own."""
    return {} if table.shared_model else {name: (row.runs or [row.evidence])[0] for name, row in table.rows.items()}


def _shown(pairs: dict[str, dict[str, Pair]]) -> dict[str, Pair]:
    """The models and guides whose images are drawn: those trained together, or the last guide of the one model."""
    return pairs.get("trained-together") or {f"PPCA, {n}": of for n, of in list(pairs["one-model"].items())[-1:]}


_WITH_HOLES = (
    "Probabilistic PCA of the observed values by EM, its W rotated and frozen. The encoder of each guide is a neural "
    "network of the observed values and the mask."
)
_ONE_MODEL = "Probabilistic PCA in closed form, its W rotated and frozen. The parameters of each guide are affine in x."


class _Job:
    """The data, the settings, and the trained models and guides."""

    def __init__(self, options: argparse.Namespace, progress: bool) -> None:
        for name in ("latent", "particles", "test_size", "epochs", "seeds"):
            value = getattr(options, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, but got {value}")
        if not 0 <= options.seed < 2**32:
            raise ValueError(f"--seed must be between 0 and 2^32 - 1, but got {options.seed}")
        self.options, self.progress = options, progress
        binarize = None if options.binarize == "none" else options.binarize
        settings = {"source": options.data, "binarize": binarize, "dequantize": None, "seed": options.seed}
        settings |= {name: getattr(options, name) for name in OWN}
        _, data, indexed = settle(settings, density=True)
        self.data: Dataset = flat(data, "compare")
        self.epochs = options.epochs or max(1, round(3000 * 128 / len(self.data.train)))
        rows = pick(len(self.data.test), options.test_size, options.seed)
        self.test = self.data.test[rows]
        self.labels = self.data.labels["test"][rows] if self.data.labels else None
        self.features = self.data.train.shape[1]
        self.masked, self.hidden = bool(self.data.masks), 128 if self.features < 200 else 400
        if self.features < 2:
            raise ValueError(
                f"--data {self.data.name} has one feature, but PPCA needs at least two: use jensen train --model vae"
            )
        if options.latent >= self.features and "latent" not in options.given:
            options.latent = self.features - 1
            say(f"{self.data.name} has {self.features} features, so --latent is {options.latent}")
        if doubt := likely_reason(self.data.train, not indexed):
            say(f"{self.data.name}: {doubt}")
        self.pictures: list[str] = []
        self.histories: dict[str, list[History]] = {}
        self.seeds = range(options.seed, options.seed + options.seeds)
        self.binary = self.data.levels == 2 or holds_bits(self.data)
        self.note = "PPCA trained by SVI, and VAEs with one learned noise scale. Encoders are neural networks."
        if self.binary:
            self.note = "Bernoulli VAEs only: the density of PPCA cannot be compared with probabilities of binary data."

    def one_model(self, guides: list[str]) -> tuple[Rows, Histories]:
        """PPCA in closed form, its W rotated and frozen, with each guide fitted to it."""
        start, x = PPCA(self.features, self.options.latent), self.data.train
        model = (start.fit_em(x) if self.masked else start.fit_closed_form(x)).rotated(self.options.seed)
        rows: Rows = {}
        histories: Histories = {}
        for name in guides:
            if name in FAMILIES:
                lr = min(5e-2, 0.4 / self.features**0.5)
                make = partial(self._fitted_guide, model, name)
                rows[name], histories[name] = self.train(name, make, lr=lr, freeze=model)
            else:
                makers = {"prior": PriorGuide, "laplace": Laplace, "exact": ExactPosterior}
                rows[ROWS.get(name, name)] = [(model, makers[name](model))]
        return rows, histories

    def _fitted_guide(self, model: PPCA, name: str) -> Pair:
        if not self.masked:
            return model, amortize(model, nn.Identity(), FAMILIES[name], context=self.features)
        encoder = encoder_of(self.features, [self.hidden], masked=True)  # no posterior is affine in x now
        return model, amortize(model, encoder, FAMILIES[name], context=self.hidden)

    def trained_together(self, families: list[str]) -> tuple[Rows, Histories]:
        """PPCA and VAEs, each trained together with its guide."""
        latent, hidden = self.options.latent, self.hidden
        makers: dict[str, tuple[Callable[[], PPCA | VAE], str]] = {}
        if not self.binary:
            best = "full-covariance" if "full-covariance" in families else families[-1]
            makers["PPCA"] = (lambda: PPCA(self.features, latent), best)
        likelihood = Bernoulli if self.binary else partial(Gaussian, scale="shared")
        for name in families:
            makers[f"VAE {name}"] = (
                lambda: VAE(mlp(latent, [hidden]), likelihood(self.features, hidden), latent),
                name,
            )
        rows: Rows = {}
        histories: Histories = {}
        for name, (make, family) in makers.items():

            def pair(make: Callable[[], PPCA | VAE] = make, name: str = name, family: str = family) -> Pair:
                with training_memory(f"{name} with --latent {latent} and {self.features} features"):
                    model = make()
                    encoder = encoder_of(self.features, [hidden], self.masked)
                    return model, amortize(model, encoder, FAMILIES[family], context=hidden)

            rows[name], histories[name] = self.train(name, pair, lr=5e-3)
        return rows, histories

    def train(
        self, name: str, make: Callable[[], Pair], lr: float, freeze: Any = ()
    ) -> tuple[list[Pair], list[History]]:
        """Train a model and guide from each seed, with a cosine learning rate; keep the best validation epoch."""
        pairs: list[Pair] = []
        histories: list[History] = []
        for seed in self.seeds:
            progress_line(f"training {name}: {self.epochs} epochs" + f", seed {seed}" * (len(self.seeds) > 1))
            torch.manual_seed(seed)
            model, guide = make()
            pairs.append((model, guide))
            with named(name + f", seed {seed}" * (len(self.seeds) > 1)):
                history = fit(
                    model,
                    guide,
                    self.data.train,
                    epochs=self.epochs,
                    lr=lr,
                    scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=self.epochs),
                    validation=self.data.validation,
                    patience=self.epochs,  # never stops early; keeps the best epoch
                    freeze=freeze,
                    seed=seed,
                    progress=self.progress,
                )
            histories.append(history)
        self.histories[name] = histories
        return pairs, histories

    def measure(self, title: str, note: str, pairs: Rows, histories: Histories) -> Comparison:
        """Measure the models and guides of a block and print its table."""
        progress_line(f"measuring {', '.join(pairs)}")
        table = compare(
            pairs,
            self.test,
            self.options.particles,
            gaps=self.options.gaps,
            refine=self.options.refine,
            histories=histories,
            train=self.data.train,
            seed=self.options.seed,
            progress=self.progress,
        )
        unit = table.unit
        if self.options.bits:
            unit = "bits per dimension (sign reversed: smaller is better"
            unit += f"; {added_bits(self.data)} is added)" if self.data.bits_offset_of(self.test) else ")"
        if not self.options.json:
            print(f"{title}\n{note}")
            print(f"{self.data.name}: {len(self.test)} test points, {self.options.particles} particles each, {unit}\n")
            print(table.table(bits=self.options.bits, offset=self.data.bits_offset_of(self.test)))
            print(f"\n{table.sentence()}\n", flush=True)
        return table


def _guides(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in GUIDES:
            raise ValueError(f"--guides: there is no guide {name!r}; {suggestion(name, GUIDES)}")
    if not names:
        raise ValueError(f"--guides needs at least one of {', '.join(GUIDES)}, but got none")
    return [name for name in GUIDES if name in names]
