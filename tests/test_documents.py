"""What README and docs say exists: every command and option, every link, every path, every module."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from thinpipe.cli import app
from typer.core import TyperGroup

ROOT = Path(__file__).resolve().parent.parent
README_LINES_MAX = 150
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
# What typer raises for wrong usage, of which it does not export the name, and what the program makes of it.
WRONG: tuple[type[BaseException], ...] = (typer.BadParameter.__mro__[1], typer.Exit, SystemExit)
ROOMS = ("commands", "node", "protocol", "compress", "sim", "benchmarks")
_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ASIDE = re.compile(r"\s*(\s#\s|[;&|]|\s\d?>|\.\.\.).*$")  # comments, pipes and what else is the shell's
_BEFORE = re.compile(r"^(\$ |sudo |\S*/bin/(?=thinpipe)|[A-Z_]+=\S+ )*")  # prompt, sudo, path, environment
_ON_THE_WIRE = {"thinpipe knock"}  # what a message says, and no command
_ROOTS = ("benchmarks", "commands", "compress", "docker", "docs", "node", "packaging", "protocol", "sim", "tests")
_PATH = re.compile(rf"`((?:{'|'.join(_ROOTS)})/[\w./@-]+\.(?:py|md|png|json|proto|service))\b")


def written(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(text: str) -> str:
    """All code between fences, without the breaks of continued lines."""
    return "\n".join(_FENCE.findall(text)).replace("\\\n", " ")


def commands(text: str) -> Iterator[str]:
    """Every line between fences that begins with `thinpipe`, as the program gets it."""
    for line in blocks(text).splitlines():
        line = _BEFORE.sub("", line)
        if line.startswith("thinpipe "):
            yield _ASIDE.sub("", line)


def mentions(text: str) -> Iterator[str]:
    """Every `thinpipe ...` in running text."""
    for span in re.findall(r"`(thinpipe [^`]+)`", _FENCE.sub("", text)):
        if (line := " ".join(span.split())) not in _ON_THE_WIRE:
            yield line


@cache
def program() -> Any:
    return typer.main.get_command(app)


def parse(line: str) -> None:
    """Resolve the command and read its options, without running it. Raises one of WRONG."""
    command = program()
    words = shlex.split(line)
    context = None
    while True:
        made = command.make_context(words[0], words[1:], parent=context)
        if not isinstance(command, TyperGroup):
            return
        context = made
        name, found, rest = command.resolve_command(made, [*made._protected_args, *made.args])
        assert found is not None
        command, words = found, [name or "", *rest]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_line_is_one_that_the_program_takes(path: Path) -> None:
    for line in commands(written(path)):
        try:
            parse(line)
        except WRONG as error:
            if line.split()[-1] in ("--version", "--help"):
                continue
            pytest.fail(f"{path.name}: {line}: {error!r}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_the_text_mentions_is_there(path: Path) -> None:
    for span in mentions(written(path)):
        words = re.split(r"[ ,]+", span)[1:]
        command = program()
        while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
            names = words.pop(0).split("|")
            assert set(names) <= set(command.commands), f"{path.name}: `{span}`: no command {names}"
            command = command.commands[names[0]]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for word in words:
            option = word.partition("=")[0].rstrip(".:;)")
            assert not option.startswith("--") or option in known, f"{path.name}: `{span}`: no option {option}"


def test_the_documents_have_commands() -> None:
    assert sum(len(list(commands(written(path)))) for path in DOCUMENTS) >= 60


@pytest.mark.parametrize(
    "line", ["thinpipe up --stepps 3", "thinpipe upp", "thinpipe up --steps many", "thinpipe keys"]
)
def test_a_line_that_the_program_does_not_take_is_noticed(line: str) -> None:
    assert list(commands(f"```sh\n$ sudo {line}  # so\n```\n")) == [line]
    with pytest.raises(WRONG):
        parse(line)


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", re.sub(r"`|\*", "", head)).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", written(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"{path.name} links to {target}"
        assert there.is_relative_to(ROOT), f"{path.name} links out of the repository: {target}"
        assert not anchor or anchor in anchors(written(there)), f"{path.name}: {name or path.name} has no #{anchor}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_is_named_is_there(path: Path) -> None:
    for name in _PATH.findall(written(path)):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_the_readme_is_one_page() -> None:
    assert len(written(ROOT / "README.md").splitlines()) <= README_LINES_MAX


def test_the_index_names_every_document_once() -> None:
    named = re.findall(r"^(?:\||-).*?\]\(([\w-]+\.md)\)", written(ROOT / "docs" / "README.md"), re.MULTILINE)
    assert Counter(named) == Counter(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")


def test_the_results_name_every_page_of_theirs_in_their_table() -> None:
    named = re.findall(r"^\| \[[^]]*\]\(results/([\w-]+\.md)\)", written(ROOT / "docs" / "results.md"), re.MULTILINE)
    assert Counter(named) == Counter(path.name for path in (ROOT / "docs" / "results").glob("*.md"))


def named_modules(text: str) -> list[str]:
    """`node/local.py` for each item `local.py` of the list under the heading that ends in `node/`."""
    found, room = [], None
    for line in text.splitlines():
        if line.startswith("#"):
            match = re.match(r"#+ .*?`([\w/]+)/`", line)
            room = match and match[1]
        elif room and (match := re.match(r"- ((?:`\w+\.py`,? ?)+)", line)):
            found += [f"{room}/{name}" for name in re.findall(r"`(\w+\.py)`", match[1])]
    return found


def test_the_architecture_names_every_module_once() -> None:
    modules = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"]
    wanted = {str(path.relative_to(ROOT)) for path in modules if path.name != "stage_pb2.py"}
    found = Counter(named_modules(written(ARCHITECTURE)))
    assert sorted(wanted - set(found)) == [], "not in docs/architecture.md"
    assert sorted(set(found) - wanted) == [], "in docs/architecture.md, and gone"
    assert [name for name, count in found.items() if count > 1] == []


def test_a_module_that_is_missing_or_there_twice_is_noticed() -> None:
    text = (
        "## Node: `node/`\n- `stage.py`, `local.py` — both\n- `stage.py` — again, not `other.py`\n## Other\n- `x.py`\n"
    )
    assert named_modules(text) == ["node/stage.py", "node/local.py", "node/stage.py"]


def test_the_architecture_names_functions_that_are_there() -> None:
    """Of an activation's way: `node/stage.py` `Stage.forward`."""
    named = re.findall(r"`((?:node|compress|protocol|sim)/[\w/]+\.py)` `([\w.]+)`", written(ARCHITECTURE))
    assert len(named) >= 20
    for path, function in named:
        source = written(ROOT / path)
        for part in function.split("."):
            assert re.search(rf"^\s*(async )?(def|class) {part}\b", source, re.MULTILINE), f"no {function} in {path}"
