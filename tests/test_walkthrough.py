"""docs/walkthrough.md is carried out as it is written: each machine a namespace behind a line of 80 Mb/s."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from thinpipe.node.config_file import load_config
from thinpipe.sim.reports.summary import read_records

from .in_memory import run_reference
from .lan import Lan, blocks, three_machines

# Its link check holds a rate to 10 %, and 20 steps have to be noticed before 60 are over.
pytestmark = [pytest.mark.timeout(300), pytest.mark.alone]

RUN = "runs/walkthrough"
LOST_AFTER = 20  # steps


@pytest.fixture
def lan(tmp_path: Path, kernel_links: None) -> Iterator[Lan]:
    del kernel_links
    with three_machines(tmp_path) as made:
        yield made


@pytest.mark.slow
def test_the_walkthrough_does_what_it_says(lan: Lan) -> None:
    (where, settings), *rest = blocks("walkthrough.md", 8)
    machine, _, name = where.partition(":")
    (lan.home(machine) / name).write_text(settings)
    printed = ""
    for machine, text in rest:
        if machine == "gamma":  # section 4: beta is lost, and then the bootstrap
            lan.until_step("alpha", RUN, 0, LOST_AFTER)
            assert "beta" in {on for on, _, _ in lan.running}
            lan.lose("beta", "node")
            lan.lose("alpha", "dht")
            assert not (lan.home("gamma") / "runs").exists()
        if "summary" in text:
            lan.until_nodes_ended()
        for line in text.splitlines():
            if "status" in line:
                for each in ("alpha", "beta"):  # has said which stage it takes, and builds it
                    lan.until_said(each, "node", "joins run")
            printed = lan.run(machine, line)
            if line.startswith("thinpipe dht"):
                lan.until_said("alpha", "dht", "--join")  # how to join
            if "status" in line:
                assert all(lan.address(f"{each}.example:7010") in printed for each in ("alpha", "beta")), printed
    assert "60 steps" in printed
    assert "unknown" in printed  # what beta sent
    assert "stage 1: its records have" in printed

    home = lan.home("alpha")
    ends = [read_records(home / RUN / f"stage-{stage}.jsonl") for stage in (0, 1)]
    digests = [next(r for r in reversed(records) if r["event"] == "end")["state_sha256"] for records in ends]
    assert any(record["event"] == "rollback" for record in ends[0])
    check = next(record for record in ends[0] if record["event"] == "ready")["link_check"]
    assert [each["configured_bits_per_s"] for each in check] == [80e6]
    assert check[0]["warning"] is None
    assert digests == run_reference(load_config(home / "run.toml"), lan.homes / "reference").state_sha256
    assert load_config(lan.home("gamma") / RUN / "run.toml").run.name == "walkthrough"
