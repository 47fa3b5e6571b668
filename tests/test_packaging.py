"""The wheel holds the package and nothing else; the console script answers."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from thinpipe import __version__
from thinpipe.cli import app
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source = tmp_path_factory.mktemp("source") / "thinpipe"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (made,) = out.glob("*.whl")
    return zipfile.ZipFile(made)


@pytest.fixture(scope="module")
def wheel_names(wheel: zipfile.ZipFile) -> set[str]:
    return set(wheel.namelist())


@pytest.fixture(scope="module")
def wheel_metadata(wheel: zipfile.ZipFile) -> str:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return wheel.read(name).decode()


@pytest.mark.slow
def test_wheel_holds_every_module_and_no_test(wheel_names: set[str]) -> None:
    rooms = ("commands", "node", "protocol", "compress", "sim")
    modules = {path.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py")}
    expected = {f"thinpipe/{path}" for path in [*modules, Path("cli.py"), Path("__init__.py")]}
    held = {name for name in wheel_names if name.endswith(".py")}
    assert held == expected
    assert "thinpipe/protocol/stage.proto" in wheel_names
    assert not [name for name in wheel_names if "test" in name.lower() or "benchmark" in name]


def test_wheel_names_the_console_script(wheel_names: set[str]) -> None:
    assert any(name.endswith("entry_points.txt") for name in wheel_names)


def test_help_names_every_command() -> None:
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    for command in ("up", "node"):
        assert command in shown.output


def test_the_console_script_tells_its_version() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"thinpipe {__version__}\n")
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_the_readme_is_the_packages_description(wheel_metadata: str) -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in wheel_metadata
    assert f"\nVersion: {__version__}\n" in wheel_metadata
