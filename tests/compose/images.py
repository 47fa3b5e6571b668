"""The base image and the wheels, without a registry of images: what `docker build` needs where nothing can be pulled.

The base that the Dockerfile names is made by debootstrap, from Debian's packages, and imported under that very tag.
Wheels are fetched here, by this machine's pip, and put into the build's context.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from .engine import NoEngine, docker

ROOT = Path(__file__).resolve().parent.parent.parent
BASE, SUITE, PYTHON = "python:3.11-slim-bookworm", "bookworm", (3, 11)
INCLUDE = "python3,python3-venv,iproute2,ca-certificates"
MIRROR = "http://deb.debian.org/debian"


def import_base(host: str, directory: Path) -> None:
    """The base image, made once. Raises NoEngine."""
    if docker(host, "images", "-q", BASE).stdout.strip():
        return
    tree, archive = directory / "base", directory / "base.tar"
    if not archive.exists():
        print(f"making {BASE} with debootstrap", flush=True)
        shutil.rmtree(tree, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", f"--include={INCLUDE}", SUITE, str(tree), MIRROR]
        with (directory / "debootstrap.log").open("wb") as log:
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
                raise NoEngine(f"debootstrap failed, see {log.name}")
        for cache in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
            shutil.rmtree(tree / cache, ignore_errors=True)
        aside = directory / "base.tar.aside"
        subprocess.run(["tar", "-C", str(tree), "-cf", str(aside), "."], check=True)
        os.replace(aside, archive)
        shutil.rmtree(tree)
    docker(host, "import", str(archive), BASE)


def fetch_wheels(directory: Path) -> Path:
    """Wheels of all that thinpipe needs, fetched once for each pyproject.toml. Raises NoEngine."""
    if sys.version_info[:2] != PYTHON:
        raise NoEngine(
            f"wheels for the image are fetched with Python {PYTHON[0]}.{PYTHON[1]}, and this is {sys.version}"
        )
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wheels, stamp = directory / "wheels", directory / "wheels.txt"
    pinned = (ROOT / "constraints.txt").read_text().splitlines()[-1]
    want = "\n".join([pinned, *needed, "setuptools>=77"])
    if not stamp.exists() or stamp.read_text() != want:
        print("fetching wheels", flush=True)
        shutil.rmtree(wheels, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "wheel", "-q", "-w", str(wheels), "-c", str(ROOT / "constraints.txt")]
        if subprocess.run([*command, *want.splitlines()], stderr=subprocess.DEVNULL, check=False).returncode:
            raise NoEngine(f"pip could not fetch the wheels: {' '.join(command)} ...")
        stamp.write_text(want)
    return wheels


def context(directory: Path, wheels: Path) -> Path:
    """A copy of what is under version control here, or could be, with the wheels."""
    to = directory / "context"
    shutil.rmtree(to, ignore_errors=True)
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    for wheel in wheels.glob("*.whl"):
        os.link(wheel, to / "docker" / "wheels" / wheel.name)
    return to
