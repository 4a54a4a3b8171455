"""Improper priors, which have no draws: where a model is only looked at, their sites take the mode."""

from __future__ import annotations

__all__ = ["AtMode"]

from typing import Any

from pyro.distributions import ImproperUniform
from pyro.poutine.messenger import Messenger


class AtMode(Messenger):
    """A handler under which a site with an improper prior takes its mode, in the place of a draw that there is not."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and isinstance(msg["fn"], ImproperUniform):
            msg["value"], msg["done"] = msg["fn"].mode, True
