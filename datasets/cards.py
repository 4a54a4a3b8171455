"""Data set cards: description, source, licence, and published results of each data set."""

from __future__ import annotations

__all__ = ["Card", "Result", "cards"]

from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Any

from jensen.checked import checked


@dataclass(frozen=True)
class Result:
    """A published result on the test split of a data set.

    Attributes:
        model: the model, with relevant details of its training.
        value: the reported value, in ``unit``.
        unit: ``"nats"`` per data point or ``"bits/dim"``, of minus log p(x): lower is better.
        source: authors, year and address of the publication that reports it.

    Example:
        >>> print(cards()["mnist"].results[0])
        86.76 nats  VAE, 1 stochastic layer  (Burda et al. 2016, https://arxiv.org/abs/1509.00519)
    """

    model: str
    value: float
    unit: str
    source: str

    def __str__(self) -> str:
        return f"{self.value:.2f} {self.unit}  {self.model}  ({self.source})"


@dataclass(frozen=True)
class Card:
    """The description of a data set, available without loading it.

    Attributes:
        name: its name for :func:`load`.
        summary: a one-line description.
        splits: number of data points by split name; shares, if the total is an argument.
        shape: shape of a data point before it is flattened to X features: (28, 28), (3, 32, 32), (12,).
        value_range: the smallest and largest value after loading, if bounded.
        levels: grey levels of the raw images; 2 for binary ones; None for measurements.
        classes: number of classes; 0 if there are no labels.
        licence: the licence as its distributor states it, or "none stated".
        citation: the publication to cite.
        address: where it is published; empty for synthetic data.
        access: how to get the data: "embedded", "synthetic", "downloaded", or "put in place" by the user.
        note: remarks needed to interpret results.
        results: published results with their sources.

    Example:
        >>> print(cards()["oil_flow"])
        oil_flow: three-phase oil flow in a pipe, measured by twelve gamma-ray densitometers
          data      1000 train, 1000 validation, 1000 test; shape 12; unbounded; 3 classes
          access    put in place
          licence   none stated
          citation  Bishop and James (1993), Analysis of Multiphase Flows Using Dual-Energy Gamma Densitometry
                    and Neural Networks
          address   https://inverseprobability.com/3PhaseData
          note      There is no download with a known checksum: put the file in place; the error of load names
                    the folder.
    """

    name: str
    summary: str
    splits: dict[str, int]
    shape: tuple[int, ...]
    value_range: tuple[float, float] | None
    levels: int | None
    classes: int
    licence: str
    citation: str
    address: str
    access: str
    note: str = ""
    results: tuple[Result, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.summary}"]
        for key, text in self._rows():
            first, *rest = wrap(text, 100, break_long_words=False, break_on_hyphens=False)
            lines += [f"  {key:<10}{first}", *(f"{'':12}{line}" for line in rest)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left;vertical-align:top'>{escape(key)}</th>"
            f"<td style='text-align:left'>{_linked(text)}</td></tr>"
            for key, text in self._rows()
        )
        return f"<table><caption><b>{escape(self.name)}</b>: {escape(self.summary)}</caption>{rows}</table>"

    def to_dict(self) -> dict[str, Any]:
        """The card as JSON-compatible values.

        Returns:
            Its attributes by name; tuples as lists, results as dicts.
        """
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        return plain | {"splits": dict(self.splits), "results": [dict(vars(result)) for result in self.results]}

    def _rows(self) -> list[tuple[str, str]]:
        sizes = ", ".join(f"{size} {split}" for split, size in self.splits.items())
        span = "unbounded" if self.value_range is None else f"values {self.value_range[0]:g} to {self.value_range[1]:g}"
        facts = [sizes, f"shape {' x '.join(map(str, self.shape))}", span]
        facts += [f"{self.levels} levels"] if self.levels else []
        facts += [f"{self.classes} classes"] if self.classes else []
        rows = [("data", "; ".join(facts)), ("access", self.access), ("licence", self.licence)]
        rows += [(key, text) for key in ("citation", "address", "note") if (text := getattr(self, key))]
        return rows + [("published" if not i else "", str(result)) for i, result in enumerate(self.results)]


@checked
def cards() -> dict[str, Card]:
    """The cards of all data sets, by their names for :func:`load`.

    Returns:
        Name to :class:`Card`: real data first, then synthetic ones.

    Example:
        >>> cards()["digits"].splits
        {'train': 1197, 'validation': 200, 'test': 400}
    """
    from .catalogue import CARDS

    return {card.name: card for card in CARDS}


def _linked(text: str) -> str:
    """Escape text and turn its addresses into links."""
    words = []
    for word in escape(text).split(" "):
        address = word.rstrip(").,;")
        if address.startswith(("http://", "https://")):
            word = f'<a href="{address}">{address}</a>{word[len(address) :]}'
        words.append(word)
    return " ".join(words)
