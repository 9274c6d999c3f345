"""Everything but the compiled kernels is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import Extension, setup

# optional: without a compiler the package installs all the same, and runs on its plain torch code.
extensions = [
    Extension(
        "secateur.kernels._expand",
        sources=["secateur/kernels/_expand.c"],
        extra_compile_args=[] if os.name == "nt" else ["-O3"],
        optional=True,
    )
]
commands = {}

try:
    # With pip's build isolation there is no torch here: the kernels that need its headers are for --no-build-isolation.
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    pass
else:
    # The name tells for which release of torch it was compiled: it works with no other.
    release = "_".join(torch.__version__.split("+")[0].split(".")[:2])
    sources = sorted(Path("secateur/kernels/cpu").glob("*.cpp"))
    extensions.append(
        CppExtension(
            f"secateur.kernels._cpu_torch{release}",
            sources=[str(source) for source in sources],
            # OpenMP when compiling, not when linking: the threads of at::parallel_for are then torch's own, not a second set.
            extra_compile_args=["/O2", "/openmp"] if os.name == "nt" else ["-O3", "-fopenmp", "-g0"],
            optional=True,
        )
    )
    commands["build_ext"] = BuildExtension.with_options(use_ninja=False)

setup(ext_modules=extensions, cmdclass=commands)
