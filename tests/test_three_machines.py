"""docs/three-machines.md is carried out as it is written: two lanes on three machines, of which one is lost."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from thinpipe.node.config_file import load_config
from thinpipe.node.one_process import OneProcess

from .lan import Lan, blocks, three_machines
from .real_faults import records
from .real_swarm import end_of

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

RUN = "runs/three-machines"
LOST_AFTER = 12  # steps


@pytest.fixture
def lan(tmp_path: Path, kernel_links: None) -> Iterator[Lan]:
    del kernel_links
    with three_machines(tmp_path) as made:
        yield made


@pytest.mark.long
def test_three_machines_do_what_the_page_says(lan: Lan) -> None:
    (where, settings), *rest = blocks("three-machines.md", 8)
    machine, _, name = where.partition(":")
    (lan.home(machine) / name).write_text(settings)
    printed = ""
    for where, text in rest:
        machine, _, again = where.partition(" ")
        if again:
            lan.until_step(machine, f"{RUN}/lane-1", 0, LOST_AFTER)
            lan.lose(machine, "node")
        if "summary" in text:
            lan.until_nodes_ended()
        for line in text.splitlines():
            if "status" in line:
                for each in ("alpha", "beta", "gamma"):
                    lan.until_said(each, "node", "joins run")
            printed = lan.run(machine, line)
            if line.startswith("thinpipe dht"):
                lan.until_said("alpha", "dht", "--join")
            if "status" in line:
                there = ("alpha.example:7010", "beta.example:7010", "gamma.example:7010", "gamma.example:7020")
                assert all(lan.address(each) in printed for each in there), printed
    assert "40 steps" in printed
    assert "lane 1" in printed

    home = lan.home("alpha") / RUN
    reference = OneProcess(load_config(lan.home("alpha") / "run.toml"))
    reference.train()
    for lane, stage in product(range(2), range(2)):
        own = home / f"lane-{lane}"
        assert end_of(own, stage) == reference.lanes[lane].stages[stage].state_sha256()
        assert bool(records(own, stage, "rollback")) == (lane == 1)
        assert records(own, stage, "end")[-1]["links"][-1]["peer_lane"] == 1 - lane
    homes = [lan.home(machine) / RUN / "lane-0" for machine in ("alpha", "beta")]
    places = [record for each in homes for record in records(each, 0, "start")]
    assert len(places) == 1  # each took the place that its certificate names
