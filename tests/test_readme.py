"""Every code block of the README does what it says: Python runs as it stands, commands name what exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token

from concurrent_kv import KVCacheManager, cluster, errors
from tests.compiling import why_no_inductor
from tests.support import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent
SHELL = {"sh", "bash", "shell", "console"}
DATA = {"json", "text", "toml"}


def blocks_of(page: str) -> list[Token]:
    return [token for token in MarkdownIt().parse((ROOT / page).read_text("utf-8")) if token.type == "fence"]


README = "README.md"
# Every block of Python in them is a program; of the pages in PRINTED, what stands below one is what it prints.
PRINTED = [f"docs/{name}.md" for name in ("windows", "sizing", "concepts", "faq", "reference/statistics")]
PAGES = [
    README,
    *PRINTED,
    *(f"docs/{name}.md" for name in ("operations", "parallel", "snapshots", "tasks", "tiers", "weights")),
]
BLOCKS = blocks_of(README)
# Their programs need something of their own, or go on from each other: tests of these pages run them.
ELSEWHERE = [
    f"docs/{name}.md"
    for name in (
        "errors",
        "lightzero",
        "lightzero-details",
        "metrics",
        "ray",
        "streams",
        "transformers",
        "tutorial",
        "tutorial.zh",
    )
]


def language_of(block: Token) -> str:
    return (block.info.split() or [""])[0]


def blocks_in(*languages: str, page: str = README) -> list[object]:
    """A page's blocks in these languages as pytest parameters, named by the line on which they open."""
    return [
        pytest.param(block.content, id=f"{page}, line {block.map[0] + 1}")
        for block in blocks_of(page)
        if block.map is not None and language_of(block) in languages
    ]


def commands_of(block: str) -> list[str]:
    """The commands of a shell block, without prompts, comments and what a console shows in answer."""
    lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
    prompted = [line[2:] for line in lines if line.startswith(("$ ", "% "))]
    return [command for line in prompted or lines if (command := line.split(" #")[0].strip()).strip("#")]


def test_every_block_names_a_language_that_is_checked_here() -> None:
    assert BLOCKS, "the README has no code block"
    unknown = [language_of(block) for block in BLOCKS if language_of(block) not in {"python", *SHELL, *DATA}]
    assert not unknown


def test_every_page_with_a_program_is_among_those_that_are_run() -> None:
    pages = [str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")]
    with_programs = {page for page in pages if blocks_in("python", page=page)}
    assert with_programs <= {*PAGES, *ELSEWHERE}


def test_the_readme_shows_python_and_both_commands_of_the_setup() -> None:
    assert blocks_in("python")
    commands = [command for block in BLOCKS if language_of(block) in SHELL for command in commands_of(block.content)]
    assert any(re.match(r"make play\b", command) for command in commands)
    assert any(re.match(r"make test\b", command) for command in commands)


@pytest.mark.parametrize("code", [block for page in PAGES for block in blocks_in("python", page=page)])
def test_a_python_block_runs_as_it_stands(code: str, tmp_path: Path) -> None:
    if "torch.compile(" in code and (reason := why_no_inductor()):
        pytest.skip(reason)
    script = tmp_path / "readme_block.py"
    script.write_text(code, "utf-8")
    result = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make gpu")
@pytest.mark.parametrize("code", blocks_in("python", page="docs/streams.md"))
def test_a_program_about_streams_runs_on_a_gpu(code: str) -> None:
    exec(code, {})


@pytest.mark.parametrize("page", PRINTED)
def test_what_a_page_says_is_printed_is_printed(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = blocks_of(page)
    shown = [pair for pair in pairwise(blocks) if [language_of(block) for block in pair] == ["python", "text"]]
    assert shown
    for code, output in shown:
        exec(code.content, {})
        assert capsys.readouterr().out == output.content


def test_the_page_of_errors_shows_what_each_says(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}  # its examples go on from each other
    blocks, checked = blocks_of("docs/errors.md"), 0
    for block, after in pairwise([*blocks, blocks[0]]):
        if language_of(block) == "python":
            exec(block.content, names)
            printed = capsys.readouterr().out
            if language_of(after) == "text":
                assert printed == after.content
                checked += 1
            else:
                assert not printed
    assert checked >= 14
    manager = names["manager"]
    assert isinstance(manager, KVCacheManager)
    manager.check_integrity()
    manager.close()


def test_the_page_of_errors_has_each_with_what_to_do() -> None:
    page = (ROOT / "docs/errors.md").read_text("utf-8")
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type):
            assert f"\n## {name}\n" in page
            builtin = kind.__bases__[-1].__name__
            assert f"| [{name}](#{name.lower()}) | {builtin} |" in page
    for name, kind in vars(cluster).items():
        if isinstance(kind, type) and issubclass(kind, errors.KVCacheError):
            assert f"\n| `{name}` | {kind.__bases__[-1].__name__} |" in page


@pytest.mark.parametrize("block", blocks_in(*SHELL))
def test_a_command_of_a_shell_block_names_make_targets_that_exist(block: str) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    for command in commands_of(block):
        if re.match(r"make\b", command):
            words = re.sub(r"\w+=(\"[^\"]*\"|'[^']*'|\S*)", "", command).split()[1:]
            missing = {word for word in words if not word.startswith("-")} - targets
            assert not missing, f"`{command}` names targets the Makefile does not have"


def test_every_json_block_is_valid() -> None:
    for block in BLOCKS:
        if language_of(block) == "json":
            json.loads(block.content)
