"""`python -m concurrent_kv.examples [FOLDER]`: writes the examples into a folder, to be read, changed and run.

They are part of the wheel, and of a checkout. What they need beside this package is an extra of its own, `play`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .device.graphs import keep_out_of_graphs

__all__ = ["main", "write"]

PACKAGE = Path(__file__).resolve().parent
FOLDERS = ("examples", "reporting")  # the second is what the first prints with
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*")
NEXT = """\
wrote {count} files to {folder}; there

    pip install 'concurrent-kv[play]'      what examples.cartpole needs
    python -m examples.cartpole            CartPole, by a tree search over the cache
    python -m examples.threads_and_loops   threads and event loops on one pool

    pip install 'concurrent-kv[play,transformers]'
    python -m examples.text_tree           puzzles, by a language model and a search

Each says with --help what else it does; examples/cartpole/search.py is the search."""


def write(folder: Path) -> int:
    """Write the examples into a folder that is not there yet, or empty; returns how many files.

    Raises:
        FileExistsError: there is something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} must be a new folder or an empty one, and there is something in it")
    # In a checkout they stand beside the package.
    source = PACKAGE / "_examples" if (PACKAGE / "_examples").is_dir() else PACKAGE.parent
    if not all((source / name).is_dir() for name in FOLDERS):
        raise FileNotFoundError(f"the examples are not part of this installation: {source} has none")
    for name in FOLDERS:
        shutil.copytree(source / name, folder / name, ignore=LEFT_OUT)
    return sum(path.is_file() for path in folder.rglob("*"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write them, and say what comes next."""
    parser = argparse.ArgumentParser(
        prog="python -m concurrent_kv.examples", description="Write the examples into a folder."
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("concurrent_kv_examples"), help="new, or empty (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        count = write(options.folder)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    print(NEXT.format(count=count, folder=options.folder))
    return 0


keep_out_of_graphs(__name__)

if __name__ == "__main__":
    sys.exit(main())
