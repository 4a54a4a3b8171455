"""Log p(x) without Monte Carlo: closed form, sums over states, quadrature."""

__all__: list[str] = []
