"""Everything but the compiled kernel is in pyproject.toml."""

import os

from setuptools import Extension, setup

# optional: without a compiler the package installs all the same, and runs on its plain torch code.
setup(
    ext_modules=[
        Extension(
            "secateur.kernels._expand",
            sources=["secateur/kernels/_expand.c"],
            extra_compile_args=[] if os.name == "nt" else ["-O3"],
            optional=True,
        )
    ]
)
