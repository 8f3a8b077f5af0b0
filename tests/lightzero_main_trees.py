"""The main branch's own search trees, compiled: `python -m tests.lightzero_main_trees`, where LIGHTZERO is a checkout.

Those of 0.2.0 take other arguments than its searches give, so that its policies cannot collect with them. Compiled are
the trees that its UniZero policies search with, once for each commit, into a folder of the environment; nothing is
written into the checkout.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.lightzero_checkout import CHECKOUT, commit_of, trees_of

__all__ = ["compile_trees"]

TREES = ("lzero.mcts.ctree.ctree_muzero.mz_tree", "lzero.mcts.ctree.ctree_sampled_muzero.smz_tree")


def compile_trees(checkout: str) -> Path:
    """The folder with the compiled trees of a checkout, which is made where it is not there yet.

    Changes the working directory: what is compiled includes its headers by paths from there.
    """
    made = trees_of(checkout)
    if made.is_dir():
        return made
    import numpy as np
    from Cython.Build import cythonize
    from setuptools import Extension, setup

    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as name:
        os.chdir(name)
        for package in ("lzero", "lzero/mcts"):
            Path(package).mkdir()
            Path(package, "__init__.py").touch()
        shutil.copytree(Path(checkout, "lzero/mcts/ctree"), "lzero/mcts/ctree")
        options = {"language": "c++", "include_dirs": [np.get_include()], "extra_compile_args": ["-std=c++11", "-w"]}
        trees = [Extension(tree, [tree.replace(".", "/") + ".pyx"], **options) for tree in TREES]
        setup(
            name="trees",
            ext_modules=cythonize(trees, language_level=3, quiet=True),
            script_args=["-q", "build_ext", "--build-lib", "compiled"],
        )
        # All at once: another process finds all of them or none.
        Path("compiled").rename(made)
        os.chdir(made)
    return made


def main() -> None:
    if CHECKOUT is None:
        sys.exit("LIGHTZERO must be the folder of a checkout of LightZero, and is not set")
    if shutil.which("c++") is None:
        print("skipped: without a C++ compiler nothing trains on the main branch here")
        return
    compile_trees(CHECKOUT)
    print(f"the trees of LightZero at commit {commit_of(CHECKOUT)} are compiled")


if __name__ == "__main__":
    main()
