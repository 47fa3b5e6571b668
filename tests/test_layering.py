"""Imports point one way: cli -> node -> {sim, compress, protocol}, sim -> protocol; protocol stays sans-IO."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("node", "protocol", "compress", "sim")
MAY_IMPORT = {
    "cli": {"node", "sim", "compress", "protocol"},
    "node": {"node", "sim", "compress", "protocol"},
    "sim": {"sim", "protocol"},
    "compress": {"compress"},
    "protocol": {"protocol"},
}
SANS_IO = {"torch", "asyncio", "grpc", "socket", "time", "random", "secrets", "threading", "subprocess"}
FOREIGN = {
    "protocol": SANS_IO,
    "compress": {"asyncio", "grpc", "socket", "time", "random", "secrets", "threading", "transformers"},
    "sim": {"torch", "grpc", "transformers"},
}


def modules() -> list[Path]:
    found = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in found if not path.name.endswith("_pb2.py")] + [ROOT / "cli.py", ROOT / "__init__.py"]


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(path: Path, source: str | None = None) -> Iterator[tuple[str, str]]:
    """("inside", room) for imports within thinpipe, ("outside", top-level name) for others."""
    package = ("thinpipe", *path.relative_to(ROOT).parts[:-1])
    for statement in ast.walk(ast.parse(source or path.read_text())):
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


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    for where, name in imported(path):
        if where == "inside" and name in ROOMS:
            assert name in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {name}"
        if where == "outside":
            assert name not in FOREIGN.get(room, set()), f"{path.relative_to(ROOT)} imports {name}"


def test_the_check_sees_forbidden_imports() -> None:
    inside = ROOT / "protocol" / "session.py"
    assert ("inside", "node") in set(imported(inside, "from ..node.link import Link"))
    assert ("inside", "sim") in set(imported(inside, "from .. import sim"))
    assert ("inside", "node") in set(imported(inside, "import thinpipe.node.link"))
    assert ("outside", "torch") in set(imported(inside, "def f():\n    import torch.nn"))


def test_only_two_python_files_at_the_root() -> None:
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "cli.py"]


def test_package_list_names_every_package() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")}
    expected = {"thinpipe", *(".".join(["thinpipe", *path.parts]) for path in packages)}
    assert set(listed) == expected


def test_no_pickle_of_anything() -> None:
    for path in modules():
        names = {name for where, name in imported(path) if where == "outside"}
        assert not names & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, path
        assert "torch.load(" not in path.read_text(), path
