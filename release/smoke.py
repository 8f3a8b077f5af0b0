"""Use an installed `concurrent_kv` as its README does: `python smoke.py README.md`, in any folder but a checkout.

Every block of Python in the page runs by itself, and the examples are written out. The compiled module must be there;
`--without-compiled` says that it must not.
"""

from __future__ import annotations

import argparse
import re
import runpy
import tempfile
from pathlib import Path


def main() -> None:
    """Run the page's examples, and print what `python -m concurrent_kv` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--without-compiled", action="store_true")
    options = parser.parse_args()
    blocks = re.findall(r"^```python\n(.*?)^```", options.page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    if not blocks:
        parser.error(f"{options.page} has no block of Python")
    with tempfile.TemporaryDirectory() as folder:
        for number, block in enumerate(blocks):
            script = Path(folder, f"example_{number}.py")
            script.write_text(block, "utf-8")
            runpy.run_path(str(script), run_name="__main__")
        from concurrent_kv.examples import write

        if not write(Path(folder, "examples")) or not Path(folder, "examples/examples/cartpole/search.py").is_file():
            raise SystemExit("the examples are not there")
    from concurrent_kv.__main__ import main as describe
    from concurrent_kv.native import native

    describe()
    if (native is None) is not options.without_compiled:
        raise SystemExit(f"the compiled module is {'not ' if native is None else ''}there")


if __name__ == "__main__":
    main()
