"""The compiled module, which is optional: where it cannot be built, the package is installed without it. And the
examples, which a wheel has inside the package: `python -m concurrent_kv.examples`."""

import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

MSVC = sysconfig.get_platform().startswith("win")
EXAMPLES = ("examples", "reporting")


class BuildWithExamples(build_py):
    """Copies the examples beside the package's modules; where it is installed with -e they are found where they are."""

    def run(self):
        """Build as ever, then copy."""
        super().run()
        if self.editable_mode:
            return
        for name in EXAMPLES:
            for path in sorted(Path(name).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    target = Path(self.build_lib, "concurrent_kv", "_examples", path)
                    self.mkpath(str(target.parent))
                    self.copy_file(str(path), str(target))


setup(
    cmdclass={"build_py": BuildWithExamples},
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
    ],
)
