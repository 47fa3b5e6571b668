"""A machine is lost with its disk: the stage comes back elsewhere, from the copy that its neighbour kept."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config
from thinpipe.sim.launch.fork_server import Process
from thinpipe.sim.launch.node_launch import free_ports
from thinpipe.sim.reports.summary import read_records

from .conftest import TinyConfig
from .in_memory import run_reference
from .preloaded import start
from .real_node import until

STAGES = 3
SETTINGS = {
    "pipeline.stages": STAGES,
    "run.steps": 40,
    "checkpoint.every": 5,
    "codec.codec": "mapl:r=8,anchors=full,every=2",
    "codec.forward": "int4",
    "codec.backward": "int4",
    "link.link": "20mbit,2ms",
}
END_S = 180.0


@pytest.fixture(scope="module")
def config(tiny: TinyConfig) -> RunConfig:
    return tiny(SETTINGS)


class Machines:
    """One a stage: each node has a directory of its own, and nothing else is shared."""

    def __init__(self, config: RunConfig, root: Path) -> None:
        self.config, self.root = config, root
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(config.pipeline.stages)]
        (root / "run.toml").write_text(dump_config(config))

    def directory(self, stage: int, name: str = "") -> Path:
        return self.root / f"machine-{stage}{name}"

    @contextmanager
    def running(self, stage: int, *options: str, name: str = "") -> Iterator[Process]:
        out = self.directory(stage, name)
        out.mkdir(exist_ok=True)
        arguments = ["node", "--config", str(self.root / "run.toml")]
        arguments += ["--stage", str(stage), "--out", str(out), *options]
        if stage:
            arguments += ["--listen", self.addresses[stage]]
        if stage < self.config.pipeline.stages - 1:
            arguments += ["--next", self.addresses[stage + 1]]
        with (self.root / f"machine-{stage}{name}.log").open("w") as log:
            process = start(arguments, log)
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def records(self, stage: int, event: str, name: str = "") -> list[dict[str, Any]]:
        path = self.directory(stage, name) / f"stage-{stage}.jsonl"
        return [record for record in read_records(path) if record["event"] == event] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("lost", [*(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 1)), 2])
def test_a_stage_comes_back_on_another_machine(config: RunConfig, lost: int, tmp_path: Path) -> None:
    """Stage 0 uses the tokenizer that came with the copy, and makes none of its text."""
    undisturbed = run_reference(config, tmp_path / "reference")
    machines = Machines(config, tmp_path)
    with ExitStack() as stack:
        processes = [stack.enter_context(machines.running(stage)) for stage in range(STAGES)]
        until(lambda: len([each for each in machines.records(lost, "copy") if each["bytes"]]) >= 2, "two copies")
        processes[lost].send_signal(signal.SIGKILL)
        processes[lost].wait()
        copied = machines.records(lost, "copy")[-1]["completed"]
        shutil.rmtree(machines.directory(lost))
        processes[lost] = stack.enter_context(machines.running(lost, "--resume", name=" again"))
        for stage, process in enumerate(processes):
            log = tmp_path / f"machine-{stage}{' again' if stage == lost else ''}.log"
            assert process.wait(END_S) == 0, log.read_text()
    names = ["" if stage != lost else " again" for stage in range(STAGES)]
    ends = [machines.records(stage, "end", names[stage])[-1] for stage in range(STAGES)]
    assert [end["state_sha256"] for end in ends] == undisturbed.state_sha256
    rollbacks = machines.records(lost, "rollback", " again")
    assert rollbacks[0]["source"] == "disk"
    assert rollbacks[0]["completed"] in (copied, copied - 5)
    assert rollbacks[0]["completed"] > 0
    of_stage_0, buddy_s = (machines.directory(stage, names[stage]) / "checkpoints" for stage in (0, 1))
    tokenizers = [of_stage_0 / "stage-0", buddy_s / "copies"]
    kept = [path.read_bytes() for each in tokenizers for path in sorted(each.glob("**/tokenizer*.json"))]
    assert len(kept) == 4
    assert kept[:2] == kept[2:]
    if lost == 0:
        begun, again = ((tmp_path / f"machine-0{name}.log").read_text() for name in ("", " again"))
        assert "documents end with <|endoftext|> (a tokenizer trained on this text)" in begun
        assert "documents end with <|endoftext|> (tokenizer_config.json)" in again
    buddy = lost + 1 if lost < STAGES - 1 else lost - 1
    links = machines.records(buddy, "end", names[buddy])[-1]["links"]
    assert sum(link["sent_bytes"].get("checkpoint_copy", 0) for link in links) > 0  # what came back, at least


@pytest.mark.slow
def test_a_new_machine_goes_on_with_the_others_though_nobody_told_it_that_the_run_has_begun(
    config: RunConfig, tmp_path: Path
) -> None:
    """All machines are started again by services after a power cut, and one of them with another disk: it is started as
    for a new run, and all would begin again with it."""
    undisturbed = run_reference(config, tmp_path / "reference")
    machines = Machines(config, tmp_path)
    with ExitStack() as stack:
        processes = [stack.enter_context(machines.running(stage)) for stage in range(STAGES)]
        until(lambda: len([each for each in machines.records(1, "copy") if each["bytes"]]) >= 2, "two copies")
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
    shutil.rmtree(machines.directory(1))
    with ExitStack() as stack:
        options = [["--resume"], [], ["--resume"]]
        processes = [stack.enter_context(machines.running(stage, *options[stage])) for stage in range(STAGES)]
        for stage, process in enumerate(processes):
            assert process.wait(END_S) == 0, (tmp_path / f"machine-{stage}.log").read_text()
    for stage in range(STAGES):
        assert machines.records(stage, "end")[-1]["state_sha256"] == undisturbed.state_sha256[stage]
        assert [each["completed"] > 0 for each in machines.records(stage, "rollback")] == [True]


@pytest.mark.slow
def test_two_machines_that_are_exchanged_give_each_other_their_states(tiny: TinyConfig, tmp_path: Path) -> None:
    """Neither has a checkpoint of its own, so only what comes says which generations there have been; and a learned
    table may not go back to one before its own."""
    config = tiny({**SETTINGS, "pipeline.stages": 2, "run.steps": 60})
    undisturbed = run_reference(config, tmp_path / "reference")
    machines = Machines(config, tmp_path)
    with ExitStack() as stack:
        processes = [stack.enter_context(machines.running(stage)) for stage in range(2)]
        until(lambda: machines.records(1, "checkpoint"), "a checkpoint")
        processes[1].kill()
        processes[1].wait()
        processes[1] = stack.enter_context(machines.running(1, "--resume"))
        until(lambda: machines.records(1, "rollback"), "a second generation")
        completed = machines.records(1, "rollback")[-1]["completed"]
        for stage in range(2):
            until(lambda of=stage: machines.records(of, "checkpoint")[-1]["completed"] > completed + 5, "two of it")
        for process in processes:
            process.kill()
            process.wait()
    machines.directory(0).rename(tmp_path / "aside")
    machines.directory(1).rename(machines.directory(0))
    (tmp_path / "aside").rename(machines.directory(1))
    with ExitStack() as stack:
        processes = [stack.enter_context(machines.running(stage, "--resume")) for stage in range(2)]
        for stage, process in enumerate(processes):
            assert process.wait(END_S) == 0, (tmp_path / f"machine-{stage}.log").read_text()
    for stage in range(2):
        assert machines.records(stage, "end")[-1]["state_sha256"] == undisturbed.state_sha256[stage]
        (rollback,) = machines.records(stage, "rollback")
        assert rollback["completed"] > completed
        assert rollback["generation"] > 1
