"""The base class of models and guides: a PyroModule with a unique name.

Pyro keeps all parameters in one global store, by name. Two modules without a name (``model.net`` and ``guide.net``, or
two models of one class) share entries of this store, and ``SVI.step`` then trains only one of them, without a warning.
Therefore every model and guide of jensen is a :class:`UniqueModule`.
"""

from __future__ import annotations

__all__ = ["UniqueModule"]

import itertools
from typing import Any

from pyro.nn import PyroModule

_count = itertools.count()


class UniqueModule(PyroModule):
    """A ``PyroModule`` with a unique name in Pyro's parameter store; each copy gets a new name.

    Example:
        >>> import copy
        >>> a, b = UniqueModule(), UniqueModule()
        >>> len({a._pyro_name, b._pyro_name, copy.deepcopy(a)._pyro_name})
        3
    """

    def __init__(self) -> None:
        super().__init__(name=f"{type(self).__name__}_{next(_count)}")

    def __setstate__(self, state: dict[str, Any]) -> None:  # called by deepcopy and unpickling
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pyro_name = f"{type(self).__name__}_{next(_count)}"
        for name, part in self.named_modules():
            if name and isinstance(part, PyroModule):
                part._pyro_name = f"{self._pyro_name}.{name}"
