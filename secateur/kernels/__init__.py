"""Computing with packed weights: `prepare` one for a backend, and `linear` multiplies by it."""

from secateur.kernels import dense_backend as dense  # noqa: F401 - they register themselves
from secateur.kernels import plain  # noqa: F401 - they register themselves
from secateur.kernels.backends import AUTO, BACKENDS, Prepared, check_backend, choose, linear, prepare
from secateur.kernels.cpu import cpu_backend  # noqa: F401 - they register themselves
from secateur.kernels.cuda24 import semi_structured  # noqa: F401 - they register themselves
from secateur.kernels.triton import triton_backend as triton_decode  # noqa: F401 - they register themselves

__all__ = ["AUTO", "BACKENDS", "Prepared", "check_backend", "choose", "linear", "prepare"]
