"""`python release/tag.py v1.2.3`: refuse a tag that is not the version of the source, or that the changelog lacks."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version_of(source: str) -> str:
    """`__version__` as the source says it; nothing is imported."""
    for statement in ast.parse(source).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="__version__")], value=ast.Constant(value=str(version))):
                return version
    raise SystemExit("the source has no __version__")


def why_not(tag: str, version: str, changelog: str, citation: str) -> str | None:
    """What is wrong with a release of that tag; None if it is right."""
    if tag != f"v{version}":
        return f"the tag is {tag}, and the version {version}: v{version} would do"
    if not re.search(rf"^## {re.escape(version)}\b", changelog, re.MULTILINE):
        return f"CHANGELOG.md has no section '## {version}'"
    if not re.search(rf"^version: {re.escape(version)}$", citation, re.MULTILINE):
        return f"CITATION.cff does not say 'version: {version}'"
    return None


def main() -> None:
    """Check the tag that is the only argument."""
    (tag,) = sys.argv[1:]
    texts = [(ROOT / name).read_text("utf-8") for name in ("concurrent_kv/__init__.py", "CHANGELOG.md", "CITATION.cff")]
    wrong = why_not(tag, version_of(texts[0]), texts[1], texts[2])
    if wrong:
        raise SystemExit(wrong)


if __name__ == "__main__":
    main()
