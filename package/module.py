"""The root of a Pyro pair: a PyroModule under a name of its own.

Pyro keeps parameters in one global store, by name. Two root modules without a name (``model.net`` and ``guide.net``;
two models of one class) collide there: under classic ``SVI.step`` one of them is silently never trained. Every model
and guide of jensen is therefore a :class:`UniqueModule`.
"""

from __future__ import annotations

__all__ = ["UniqueModule"]

import itertools
from typing import Any

from pyro.nn import PyroModule

_count = itertools.count()


class UniqueModule(PyroModule):
    """A ``PyroModule`` whose name in Pyro's parameter store no other module has; copies get a name of their own.

    Example:
        >>> import copy
        >>> a, b = UniqueModule(), UniqueModule()
        >>> len({a._pyro_name, b._pyro_name, copy.deepcopy(a)._pyro_name})
        3
    """

    def __init__(self) -> None:
        super().__init__(name=f"{type(self).__name__}_{next(_count)}")

    def __setstate__(self, state: dict[str, Any]) -> None:  # deepcopy and unpickling come through here
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pyro_name = f"{type(self).__name__}_{next(_count)}"
        for name, part in self.named_modules():
            if name and isinstance(part, PyroModule):
                part._pyro_name = f"{self._pyro_name}.{name}"
