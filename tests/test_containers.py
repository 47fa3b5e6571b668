"""docker-compose.yml, Dockerfile and .env.example agree with each other and with the command line they call.

That they work is tried by `make test-compose`, with an engine.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from thinpipe.cli import app
from typer.main import get_command

ROOT = Path(__file__).resolve().parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
STAGES = [name for name in SERVICES if name.startswith("stage-")]


def test_each_stage_has_its_name_port_and_boundaries() -> None:
    peers = SERVICES["stage-0"]["environment"]["THINPIPE_PEERS"].split(",")
    assert peers == [f"stage-{index}:{7000 + index}" for index in range(len(STAGES))]
    for index, name in enumerate(STAGES):
        assert SERVICES[name]["command"] == ["supervise", "--stage", str(index)]
        ends = {f"boundary-{above}-{above + 1}" for above in (index - 1, index) if 0 <= above < len(STAGES) - 1}
        assert set(SERVICES[name]["networks"]) == ends


def test_the_standby_is_found_under_every_stages_name_where_that_is_dialled() -> None:
    aliases = {name: network["aliases"] for name, network in SERVICES["standby"]["networks"].items()}
    assert aliases == {f"boundary-{below - 1}-{below}": [f"stage-{below}"] for below in range(1, len(STAGES))}


def test_networks_are_private_as_plain_text_needs() -> None:
    assert all(network["internal"] for network in COMPOSE["networks"].values())
    assert not any("ports" in service for service in SERVICES.values())


def test_every_variable_has_its_default_in_the_example() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    used = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", text))
    example = dict(
        re.match(r"([A-Z_]+)=(\S*)", line).groups()  # pyright: ignore[reportOptionalMemberAccess]
        for line in (ROOT / ".env.example").read_text().splitlines()
        if re.match(r"[A-Z_]+=", line)
    )
    for building in ("BASE", "TORCH_INDEX", "PIP_NO_INDEX"):
        used.pop(building)
    assert example == used


def test_every_setting_is_an_option_of_keep() -> None:
    keep = get_command(app).commands["supervise"]  # pyright: ignore[reportAttributeAccessIssue]
    known = {option.envvar for option in keep.params if option.envvar}
    set_here = {name for name in SERVICES["stage-0"]["environment"] if name != "THINPIPE_CACHE"}
    assert set_here <= known


@pytest.mark.parametrize("service", SERVICES)
def test_root_has_what_it_needs_for_the_cap_and_no_more(service: str) -> None:
    found = SERVICES[service]
    assert found["cap_drop"] == ["ALL"]
    assert found["cap_add"] == ["NET_ADMIN", "SETUID", "SETGID"]
    assert found["environment"]["THINPIPE_USER"] == "thinpipe"


def test_the_image_has_the_torch_of_the_constraints_and_every_package() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "-r constraints.txt" in dockerfile
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for room in ("commands", "node", "protocol", "compress", "sim"):
        assert f"COPY {room} {room}\n" in dockerfile
        assert f"!{room}" in allowed
