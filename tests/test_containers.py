"""docker-compose.yml, docker-compose.lanes.yml, Dockerfile and .env.example agree with each other and with the command
line they call.

That docker-compose.yml works is tried by `make test-compose`, with an engine; the file with lanes is held to it here.
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
LANES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.lanes.yml").read_text())
FILES = {"docker-compose.yml": COMPOSE, "docker-compose.lanes.yml": LANES}


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


def test_with_lanes_each_node_has_its_name_port_and_links() -> None:
    services, places = LANES["services"], [(lane, stage) for lane in range(2) for stage in range(2)]
    peers = services["standby"]["environment"]["THINPIPE_PEERS"].split(",")
    assert peers == [f"lane-{lane}-stage-{stage}:{7000 + stage}" for lane, stage in places]
    assert set(services) == {"standby", *(peer.partition(":")[0] for peer in peers)}
    for lane, stage in places:
        found = services[f"lane-{lane}-stage-{stage}"]
        assert found["command"] == ["supervise", "--stage", str(stage), "--lane", str(lane)]
        assert set(found["networks"]) == {f"lane-{lane}-boundary-0-1", f"lateral-{stage}"}
    aliases = {name: network["aliases"] for name, network in services["standby"]["networks"].items()}
    dialled = {f"lane-{lane}-boundary-0-1": [f"lane-{lane}-stage-1"] for lane in range(2)}
    assert aliases == {**dialled, **{f"lateral-{stage}": [f"lane-0-stage-{stage}"] for stage in range(2)}}


def test_the_file_with_lanes_differs_in_nothing_else() -> None:
    one, two = SERVICES["stage-0"], LANES["services"]["lane-0-stage-0"]
    own = {"command", "networks", "environment"}
    assert {key: value for key, value in one.items() if key not in own} == {
        k: v for k, v in two.items() if k not in own
    }
    differing = {"THINPIPE_PEERS", "THINPIPE_LANES", "THINPIPE_AVERAGE"}
    assert {key for key, value in two["environment"].items() if one["environment"].get(key) != value} == differing
    assert set(two["environment"]) == {*one["environment"], *differing}
    assert LANES["volumes"] == COMPOSE["volumes"]


@pytest.mark.parametrize("file", FILES)
def test_networks_are_private_as_plain_text_needs(file: str) -> None:
    assert all(network["internal"] for network in FILES[file]["networks"].values())
    assert not any("ports" in service for service in FILES[file]["services"].values())
    used = {name for service in FILES[file]["services"].values() for name in service["networks"]}
    assert used == set(FILES[file]["networks"])


def test_every_variable_has_its_default_in_the_example() -> None:
    text = "".join((ROOT / file).read_text() for file in FILES)
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
    set_here = {name for name in LANES["services"]["standby"]["environment"] if name != "THINPIPE_CACHE"}
    assert set_here <= known


@pytest.mark.parametrize(("file", "service"), [(file, name) for file in FILES for name in FILES[file]["services"]])
def test_root_has_what_it_needs_for_the_cap_and_no_more(file: str, service: str) -> None:
    found = FILES[file]["services"][service]
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
