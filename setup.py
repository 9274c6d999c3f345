"""Everything but the compiled code is in pyproject.toml."""

import os
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

# What is compiled works in every Python from 3.10 on, but for those without the global lock, which have no stable ABI.
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")
# The oldest torch that the kernels work with, once they are compiled, by any torch since: 2.10.
TORCH_TARGET, TORCH_TARGET_VERSION = (2, 10), "0x020a000000000000"

# optional: without a compiler the package installs all the same, and runs on its plain torch code.
extensions = [
    Extension(
        f"secateur.{name}",
        sources=[f"secateur/{name.replace('.', '/')}.c"],
        define_macros=[("Py_LIMITED_API", "0x030a0000")] if STABLE else [],
        py_limited_api=STABLE,
        extra_compile_args=[] if os.name == "nt" else ["-O3"],
        optional=True,
    )
    for name in ("kernels._expand", "solvers._viterbi")
]

try:
    # With pip's build isolation there is no torch here: the kernels that need its headers are for --no-build-isolation.
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths
except ImportError:
    pass
else:
    if tuple(map(int, torch.__version__.split(".")[:2])) >= TORCH_TARGET:
        # No module of Python's, but operators that torch loads. Threads are torch's own: nothing here needs OpenMP.
        extensions.append(
            Extension(
                "secateur.kernels._cpu",
                sources=[str(source) for source in sorted(Path("secateur/kernels/cpu").glob("*.cpp"))],
                depends=[str(header) for header in sorted(Path("secateur/kernels/cpu").glob("*.[hi]*"))],
                define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
                include_dirs=include_paths(),
                library_dirs=library_paths(),
                libraries=["torch_cpu"],
                language="c++",
                py_limited_api=STABLE,
                extra_compile_args=["/O2", "/std:c++20"] if os.name == "nt" else ["-O3", "-g0", "-std=c++20"],
                optional=True,
            )
        )

setup(ext_modules=extensions, options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE else {})
