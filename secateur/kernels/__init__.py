"""Computing with packed weights: `prepare` one for a backend, and `linear` multiplies by it."""

from secateur.kernels import dense, plain  # noqa: F401 - they register themselves
from secateur.kernels.backends import AUTO, BACKENDS, Prepared, check_backend, choose, linear, prepare

__all__ = ["AUTO", "BACKENDS", "Prepared", "check_backend", "choose", "linear", "prepare"]
