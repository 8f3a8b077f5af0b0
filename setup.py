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
            # Windows has one pyconfig.h for both kinds of interpreter, which does not say which one this is.
            define_macros=[("Py_GIL_DISABLED", "1")] if MSVC and sysconfig.get_config_var("Py_GIL_DISABLED") else [],
            extra_compile_args=["/std:c11"] if MSVC else ["-O3"],
            optional=True,
        )
    ]
)
