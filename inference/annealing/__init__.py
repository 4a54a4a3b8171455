"""Log p(x) along a path of densities from a start to the posterior, and back."""

__all__: list[str] = []
