"""The compiled module, which is optional: where it cannot be built, the package is installed without it."""

import sysconfig
from glob import glob

from setuptools import Extension, setup

MSVC = sysconfig.get_platform().startswith("win")

setup(
    ext_modules=[
        Extension(
            "concurrent_kv._native",
            ["concurrent_kv/_native.c"],
            depends=sorted(glob("concurrent_kv/csrc/*.h")),
            extra_compile_args=["/std:c11"] if MSVC else ["-O3"],
            optional=True,
        )
    ]
)
