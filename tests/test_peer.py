"""The peer of benchmarks/peer.py trains: torch.distributed.pipelining over gloo has the losses of one process."""

import subprocess
import sys
from pathlib import Path

import pytest
from thinpipe.node.config_file import dump_config
from thinpipe.node.one_process import OneProcess
from thinpipe.sim.launch.node_launch import free_ports, node_environment
from thinpipe.sim.reports.summary import read_records

from .conftest import TinyConfig

PEER = Path(__file__).resolve().parent.parent / "benchmarks" / "peer_torch.py"


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_the_peer_has_the_losses_of_one_process(tiny: TinyConfig, tmp_path: Path, wire: str) -> None:
    config = tiny({"pipeline.stages": 2, "codec.codec": wire, "run.steps": 4, "optim.warmup_steps": 1})
    (tmp_path / "run.toml").write_text(dump_config(config))
    command = [sys.executable, str(PEER), "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path)]
    command += ["--master", f"127.0.0.1:{free_ports(1)[0]}", "--stage"]
    environment = {**node_environment(), "GLOO_SOCKET_IFNAME": "lo"}
    above = subprocess.Popen([*command, "0"], env=environment)
    try:
        subprocess.run([*command, "1"], env=environment, check=True, timeout=200)
        assert above.wait(20) == 0
    finally:
        above.kill()
        above.wait()
    losses = [record["loss"] for record in read_records(tmp_path / "stage-1.jsonl") if record["event"] == "step"]
    one, _ = OneProcess(config).train()
    assert losses == pytest.approx(one, rel=1e-6)
    assert losses[-1] < losses[0]
