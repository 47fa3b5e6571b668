"""The wheel holds the package and nothing else; the console script answers; README's commands exist."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from thinpipe.cli import app
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    source = tmp_path_factory.mktemp("source") / "thinpipe"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


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


def test_readme_uses_only_options_that_exist() -> None:
    helps = {
        command: CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for command in ("up", "node")
    }
    lines = re.findall(r"thinpipe (up|node)((?:[^\n`]|\\\n)*)", (ROOT / "README.md").read_text())
    assert lines
    for command, rest in lines:
        for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
            assert option in helps[command], f"README: thinpipe {command} has no {option}"


def test_readme_names_every_module() -> None:
    tree = (ROOT / "README.md").read_text()
    for room in ("commands", "node", "protocol", "compress", "sim", "benchmarks"):
        for path in (ROOT / room).rglob("*.py"):
            if path.stem not in ("__init__", "stage_pb2"):
                assert path.name in tree, f"README's tree lacks {path.relative_to(ROOT)}"
