"""Computing with packed weights: `prepare` one for a backend, and `linear` multiplies by it."""

from secateur.kernels import cpu_backend, dense, plain, semi_structured, triton_decode  # noqa: F401 - they register themselves
from secateur.kernels.backends import AUTO, BACKENDS, Prepared, check_backend, choose, linear, prepare

__all__ = ["AUTO", "BACKENDS", "Prepared", "check_backend", "choose", "linear", "prepare"]
