"""Imports point one way: cli -> commands -> node -> {sim, compress, protocol}, sim -> protocol; protocol is sans-IO."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("commands", "node", "protocol", "compress", "sim")
MAY_IMPORT = {
    "cli": {"commands"},
    "commands": {"commands", "node", "sim", "compress", "protocol"},
    "node": {"node", "sim", "compress", "protocol"},
    "sim": {"sim", "protocol"},
    "compress": {"compress"},
    "protocol": {"protocol"},
}
# Rooms of node: which other rooms of node each may import. All may import the modules that lie in node itself.
MAY_IMPORT_IN_NODE: dict[str, set[str]] = {
    "averaging": {"boundary"},
    "boundary": set(),
    "checkpoints": set(),
    "data": set(),
    "model": set(),
    "security": set(),
    "watching": set(),
    "links": {"checkpoints", "security"},
    "context": {"averaging", "links", "model"},
    "lanes": {"averaging", "checkpoints", "links", "security"},
    "measuring": {"averaging", "boundary", "context", "data", "links", "model"},
    "comparing": {"data", "measuring"},
    "probing": {"links", "measuring", "model", "security"},
    "discovery": {"links", "probing", "security"},
    "export": {"checkpoints", "data", "model"},
    "evaluating": {"boundary", "checkpoints", "data", "export", "model"},
}
# And rooms of sim, in which nothing lies outside of a room.
MAY_IMPORT_IN_SIM: dict[str, set[str]] = {
    "links": set(),
    "reports": {"links"},
    "launch": {"links", "reports"},
}
SANS_IO = {"torch", "asyncio", "grpc", "socket", "time", "random", "secrets", "threading", "subprocess"}
FOREIGN = {
    "protocol": SANS_IO,
    "compress": {"asyncio", "grpc", "socket", "time", "random", "secrets", "threading", "transformers"},
    "sim": {"torch", "grpc", "transformers"},
}


@functools.cache
def parsed(source: str) -> ast.Module:
    """Many tests look at one file."""
    return ast.parse(source)


def modules() -> list[Path]:
    found = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in found if not path.name.endswith("_pb2.py")] + [ROOT / "cli.py", ROOT / "__init__.py"]


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(path: Path, source: str | None = None) -> Iterator[tuple[str, str]]:
    """("inside", room) for imports within thinpipe, ("outside", top-level name) for others."""
    package = ("thinpipe", *path.relative_to(ROOT).parts[:-1])
    for statement in ast.walk(parsed(source or path.read_text())):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom) and statement.level:
            base = ".".join([*package[: len(package) - statement.level + 1], *filter(None, [statement.module])])
            names = [f"{base}.{alias.name}" for alias in statement.names] if base.count(".") == 0 else [base]
        elif isinstance(statement, ast.ImportFrom):
            names = [statement.module or ""]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            yield ("inside", rest.partition(".")[0]) if top == "thinpipe" else ("outside", top)


def test_imports_point_one_way() -> None:
    for path in modules():
        room = room_of(path)
        for where, name in imported(path):
            if where == "inside" and name in ROOMS:
                assert name in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {name}"
            if where == "outside":
                assert name not in FOREIGN.get(room, set()), f"{path.relative_to(ROOT)} imports {name}"


def imported_in_room(path: Path, source: str | None = None) -> Iterator[str]:
    """Rooms and modules of node, or of sim, that a module in one of its rooms imports from beside its own room."""
    for statement in ast.walk(parsed(source or path.read_text())):
        if isinstance(statement, ast.ImportFrom) and statement.level == 2:
            yield from [statement.module.split(".")[0]] if statement.module else [each.name for each in statement.names]


@pytest.mark.parametrize(("package", "rules"), [("node", MAY_IMPORT_IN_NODE), ("sim", MAY_IMPORT_IN_SIM)])
def test_rooms_are_entered_in_one_direction(package: str, rules: dict[str, set[str]]) -> None:
    rooms = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert set(rules) == rooms
    for room, may in rules.items():
        for path in (ROOT / package / room).glob("*.py"):
            found = set(imported_in_room(path)) & rooms
            assert found <= may, f"{path.relative_to(ROOT)} imports {found - may}"
    order: list[str] = []
    while left := {room: may for room, may in rules.items() if room not in order}:
        free = [room for room, may in left.items() if may <= set(order)]
        assert free, f"{sorted(left)} import each other"
        order += free


def test_the_check_sees_forbidden_imports() -> None:
    inside = ROOT / "protocol" / "session.py"
    assert ("inside", "node") in set(imported(inside, "from ..node.links.link import Link"))
    assert ("inside", "sim") in set(imported(inside, "from .. import sim"))
    assert ("inside", "node") in set(imported(inside, "import thinpipe.node.links.link"))
    assert set(imported_in_room(inside, "from ..links.link import Link\nfrom .. import flow")) == {"links", "flow"}
    assert ("outside", "torch") in set(imported(inside, "def f():\n    import torch.nn"))


def test_only_two_python_files_at_the_root() -> None:
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "cli.py"]


def test_package_list_names_every_package() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")}
    expected = {"thinpipe", *(".".join(["thinpipe", *path.parts]) for path in packages)}
    assert set(listed) == expected


# Modules whose readers run what they read, and calls that do, by their full names.
RUNS_ITS_INPUT = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "pickletools"}
RUNS_ITS_ARGUMENT = {"eval", "exec", "__import__", "torch.load", "torch.save", "torch.jit.load"}
RUNS_ITS_ARGUMENT |= {
    "torch.hub.load",
    "torch.package.PackageImporter",
    "pandas.read_pickle",
    "pandas.DataFrame.to_pickle",
}
RUNS_ITS_ARGUMENT |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "unsafe_load_all")}
MAY_PICKLE = {"numpy.load", "numpy.save", "numpy.savez", "numpy.lib.format.read_array"}  # unless they are told not to


def dangers(source: str) -> Iterator[str]:
    """What in a module could run code that comes with its data: imports and uses, whatever they are called there."""
    tree = parsed(source)
    known: dict[str, str] = {}  # name here -> full name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                known[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    yield from (name for name in known.values() if name.partition(".")[0] in RUNS_ITS_INPUT)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and (name := full_name(node, known)) in RUNS_ITS_ARGUMENT:
            yield name
        elif isinstance(node, ast.Call) and (name := full_name(node.func, known)) in MAY_PICKLE:
            told = [each.value for each in node.keywords if each.arg == "allow_pickle"]
            if not (told and isinstance(told[0], ast.Constant) and told[0].value is False):
                yield name


def full_name(node: ast.expr, known: dict[str, str]) -> str:
    """`numpy.load` of `np.load`; "" for what is no dotted name."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = full_name(node.value, known)
        return f"{before}.{node.attr}" if before else ""
    return ""


def test_no_pickle_of_anything() -> None:
    found = {str(path.relative_to(ROOT)): list(dangers(path.read_text())) for path in modules()}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, cloudpickle as fine",
        "from dill import loads",
        "def f():\n    from marshal import loads as read",
        "import joblib.numpy_pickle",
        "import shelve",
        "import torch\ntorch.load(path)",
        "import torch as t\nread = t.load",
        "from torch import load as read\nread(path)",
        "from torch import jit\njit.load(path)",
        "import torch\ntorch.save({}, path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "from numpy import load\nload(path)",
        "import numpy\nnumpy.load(path, allow_pickle=flag)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "eval(text)",
        "list(map(eval, texts))",
        "exec(text)",
        "__import__(name)",
    ],
)
def test_the_check_sees_what_runs_its_input(source: str) -> None:
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "model.eval()",
        "import re\nre.compile(text)",
        "import torch\ntorch.compile(model)",
        "import json\njson.load(file)",
        "from .pickle import cucumber",
    ],
)
def test_the_check_lets_pass_what_does_not(source: str) -> None:
    assert not list(dangers(source))
