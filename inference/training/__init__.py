"""Training of parameters: ``fit``, its steps, objectives, callbacks, and the run with its checkpoint."""

__all__: list[str] = []
