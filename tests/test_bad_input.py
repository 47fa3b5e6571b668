"""Bad input: one clear line that names fault, offender and remedy; exit code 2; nothing lost, nothing left behind."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from thinpipe.cli import app
from thinpipe.node.config_file import dump_config
from typer.testing import CliRunner

from .conftest import TinyConfig

UP = [
    (["--config", "{dir}/none.toml"], r"no such configuration file: .*none\.toml"),
    (["--config", "{dir}/bad.toml"], r"bad\.toml is not valid TOML: .*line 1"),
    (
        ["--config", "{dir}/unknown.toml"],
        r"'pipeline\.stagess'; the nearest known one is 'pipeline\.stages'",
    ),
    (
        ["--config", "{dir}/section.toml"],
        r"unknown section \[pipelines\]; the nearest known one is 'pipeline'",
    ),
    (["--config", "{dir}/scalar.toml"], r"'pipeline' is a section: write it as a table, \[pipeline\]"),
    (["--config", "{dir}/type.toml"], r"run\.steps: .*valid integer.*'many'"),
    (["--config", "{dir}"], r"cannot read the configuration file .*: .*directory"),
    (["--set", "runn.steps=2"], r"unknown setting 'runn\.steps'; the nearest known one is 'run\.steps'"),
    (["--set", "steps=2"], r"unknown setting 'steps'; the nearest known one is 'run\.steps'"),
    (["--set", "run.steps"], r"--set wants section\.key=value, got 'run\.steps'"),
    (["--set", "run.steps=abc"], r"run\.steps: .*integer.*'abc'"),
    (["--steps", "0"], r"run\.steps: .*greater than or equal to 1 \(got 0\)"),
    (["--data", "{dir}/missing"], r"no such file or directory: .*missing; set data\.source"),
    (["--data", "{dir}/empty.txt"], r"empty\.txt holds no text"),
    (["--data", "{dir}/rows.jsonl"], r"no field 'text' in .*rows\.jsonl, only a; set data\.text_field"),
    (["--stages", "9"], r"9 stages, but the model has 4 layers; set pipeline\.stages = 6 or fewer"),
    (
        ["--stages", "9", "--codec", "mapl:r=8"],  # behind a narrow boundary the last stage keeps a layer
        r"9 stages, but the model has 4 layers; set pipeline\.stages = 5 or fewer, or model\.layers = 8 or more",
    ),
    (
        ["--set", "pipeline.cut=2,1,1"],
        r"pipeline\.cut = 2,1,1 is for 3 stages, but there are 4; set pipeline\.stages = 3",
    ),
    (
        ["--set", "pipeline.cut=1,1,1,0"],
        r"pipeline\.cut = 1,1,1,0 has 3 layers, but the model has 4; set model\.layers = 3",
    ),
    (
        ["--stages", "3", "--set", "pipeline.cut=2,0,2"],
        r"2,0,2 leaves stage 1 without a layer; .* pipeline\.cut = 'auto'",
    ),
    (["--set", "pipeline.cut=half"], r"pipeline\.cut: .*'half' is not a cut; say auto, equal, or the layers"),
    (
        ["--set", "pipeline.speeds=1,2,3"],
        r"pipeline\.speeds = 1,2,3 is for 3 stages, but pipeline\.stages = 4; give one",
    ),
    (["--set", "pipeline.speeds=1,-1,1,1"], r"pipeline\.speeds\.1: .*greater than or equal to"),
    (["--set", "pipeline.speeds=1,fast,1,1"], r"pipeline\.speeds\.1: .*number.*'?fast"),
    (["--microbatches", "5"], r"pipeline\.microbatches = 5 does not divide pipeline\.batch_size = 8; choose a divisor"),
    (["--out", "{dir}/file/below"], r"cannot write in .*below: .*; choose another --out"),
    (["--out", "/proc/thinpipe"], r"cannot write in /proc/thinpipe: .*; choose another --out"),
    (["--out", "{dir}/taken"], r"taken holds a run already; choose another --out, or say --overwrite"),
    (
        ["--codec", "mapl:r=16,lr=4", "--set", "optim.muon_lr=0.01"],
        r"lr=4 moves the projector by 0\.64 in a change .* is the most .*; say lr=1\.[0-9]+ or less",
    ),
    (["--codec", "ssn:k=65"], r"codec 'ssn': k=65 is above the model's width 64; lower k"),
    (["--codec", "ssn:k=0"], r"codec 'ssn': k=0 has to be at least 1"),
    (["--codec", "ssn:free=5"], r"codec 'ssn': free=5 layers, but the last stage has 2 of 4; lower free to 2"),
    (["--codec", "resbm:b=65"], r"codec 'resbm': b=65 is above the model's width 64; lower b"),
    (["--codec", "resbm:mid=some"], r"codec 'resbm': mid=some has to be auto or from 1 to 1048576"),
    (["--codec", "resbm:kind=linear,mid=9"], r"mid=9 beside kind=linear, which has no hidden units; omit it"),
    (["--codec", "resbm:kind=relu"], r"option 'kind' cannot be 'relu'"),
    (["--codec", "mapl:r=10", "--forward", "rvq:groups=8"], r"'rvq': a width of 10 cannot be cut into groups=8; say g"),
    (["--backward", "rvq:groups=3"], r"'rvq': a width of 64 cannot be cut into groups=3; say groups=2"),
    (["--backward", "rvq:codes=70000"], r"byte format 'rvq': codes=70000 has to be from 2 to 65536"),
    (["--codec", "topk:k=65"], r"'topk': k=65 numbers of a token of 64 cannot be kept; say k=64 or less"),
    (["--codec", "topk:k=0"], r"byte format 'topk': k=0 has to be at least 1"),
    (["--codec", "topk:values=int5"], r"'topk': option 'values' cannot be 'int5'; the nearest known one is 'int"),
    (["--backward", "mask:k=65"], r"'mask': k=65 numbers of a token of 64 cannot be kept; say k=64 or less"),
    (["--codec", "mapl:r=8", "--forward", "columns"], r"'columns': k=16 numbers of a token of 8 cannot be kept"),
    (
        ["--codec", "mapl:r=12", "--backward", "int4:hadamard=true"],
        r"'int4': hadamard=true wants a width that 8 divides, not 12; choose 16 or leave the option out",
    ),
    (["--codec", "bf15"], r"unknown codec 'bf15'; the nearest known one is 'bf16'"),
    (["--forward", "int5"], r"unknown byte format 'int5'; the nearest known one is 'int"),
    (["--schedule", "2f2b"], r"pipeline\.schedule: .*unknown schedule '2f2b'; the nearest known one is '1f1b'"),
    (
        ["--schedule", "1f1b:rtt_ratio=25"],
        r"pipeline\.schedule: .*rtt_ratio=25 has to be from 0 \(instant links\) to 24",
    ),
    (
        ["--schedule", "zb:rtt_ratio=25"],
        r"pipeline\.schedule: .*'zb': rtt_ratio=25 has to be from 0 \(instant links\) to 24",
    ),
    (
        ["--schedule", "gpipe:rtt_ratio=auto"],
        r"schedule 'gpipe:rtt_ratio=auto': there is no depth to choose for gpipe; say 1f1b:rtt_ratio=auto",
    ),
    (
        ["--schedule", "{dir}/wait.csv"],
        r"pipeline\.schedule: .*wait\.csv, row 1, column 2: '0B0': deadlock: .* put the forward of 1 first here",
    ),
    (["--schedule", "{dir}/none.csv"], r"cannot read the schedule file .*none\.csv: No such file.*; name a CSV file"),
    (
        ["--schedule", "{dir}/short.csv"],
        r"orders are for pipeline\.stages = 1 and pipeline\.microbatches = 1, but there are 4 and 4",
    ),
    (["--schedule", "2f2b:rtt_ratio=auto"], r"unknown schedule '2f2b'; the nearest known one is '1f1b'"),
    (["--schedule", "best:in_flight=0"], r"schedule 'best:in_flight=0': best has one option, as in best:in_flight=8"),
    (
        ["--set", "pipeline.schedule=best"],
        r"schedule 'best' is found by simulation before a run.*; say it to --schedule",
    ),
    (["--set", "pipeline.schedule=zb:rtt_ratio=auto"], r"'zb:rtt_ratio=auto' is found by simulation before a run"),
    (["--set", "pipeline.delay=2"], r"pipeline\.delay: .*less than or equal to 1 \(got 2\)"),
    (["--set", "pipeline.delay=-1"], r"pipeline\.delay: .*greater than or equal to 0 \(got -1\)"),
    (["--set", "pipeline.delay=1", "--set", "pipeline.predict=adam"], r"pipeline\.predict: .*'none', 'momentum' or"),
    (
        ["--set", "pipeline.predict=orthogonal"],
        r"pipeline\.predict = 'orthogonal' is for gradients that are applied late, and .*; set pipeline\.delay = 1",
    ),
    *(
        (["--set", "pipeline.delay=1", *more], rf"pipeline\.delay = 1 does not go with {what}")
        for more, what in (
            (
                ["--schedule", "order:FFBB/FBFB", "--stages", "2", "--microbatches", "2"],
                "a schedule of written orders;",
            ),
            (["--schedule", "best"], r"schedule 'best': .*; say gpipe, 1f1b or zb"),
            (["--schedule", "best:in_flight=3"], r"schedule 'best:in_flight=3': .*; say gpipe, 1f1b or zb"),
            (["--lanes", "2"], r"lanes\.count = 2; set it to 1"),
            (["--chunks", "2", "--context", "full"], r"chunks \(context\.method\); omit one"),
            (["--set", "optim.clip_norm=global"], r"optim\.clip_norm = 'global', .*; say 'stage'"),
        )
    ),
    (["--schedule", "evaluation"], r"pipeline\.schedule: .*'evaluation' does not train; choose gpipe, 1f1b or zb"),
    (["--link", "300mbitz"], r"unknown unit 'mbitz' .*write it as 300mbit,25ms"),
    (["--set", "data.format=xml"], r"data\.format: .*'text', 'jsonl' or 'parquet' \(got 'xml'\)"),
    (["--set", "optim.clip_norm=all"], r"optim\.clip_norm: .*'stage' or 'global' \(got 'all'\)"),
    (["--set", "link.verify=never"], r"link\.verify: .*'warn' or 'fail' \(got 'never'\)"),
    (["--link", "0mbit"], r"link rate 0.* is not a positive number; write it as"),
    (["--model", "tinny"], r"unknown model\.preset 'tinny'; known: tiny"),
    (["--model", "{dir}"], r"model\.path = .* has no config\.json"),
    (["--set", "compute.device=gpu"], r"compute\.device 'gpu' is unknown; use cpu, cuda or cuda:N"),
    (["--set", "compute.device=cuda:99"], r"compute\.device 'cuda:99' is not on this machine"),
    (
        ["--set", "data.heldout_sequences=100000"],
        r"100000 are wanted; lower data\.heldout_sequences",
    ),
    (
        ["--set", "data.sequence_length=1000000"],
        r"1000001; give more text or lower data\.sequence_length",
    ),
    (["--prometheus", "a..b:9100"], r"watch\.prometheus: 'a\.\.b:9100': no machine can be known as 'a\.\.b'; check"),
    (["--set", "data.cache=/proc/nowhere"], r"cannot write to the cache directory /proc/nowhere"),
    (["--lanes", "0"], r"lanes\.count: .*greater than or equal to 1 \(got 0\)"),
    (
        ["--chunks", "64", "--stages", "17"],
        r"stages x lanes\.count = 17 x 64 = 1088: .* no more than 1024 nodes .*; have fewer of one",
    ),
    (["--chunks", "2", "--lanes", "2"], r"--chunks are lanes of the same sequences, --lanes of different ones; omit"),
    (["--chunks", "2", "--context", ""], r"--chunks 2, but --context names no way .* to cross; say --context full"),
    (["--context", "full"], r"'full' is for several chunks, and lanes\.count = 1; .*--chunks 2 or more"),
    (["--chunks", "3"], r"data\.sequence_length: .* 32 tokens is not 6 equal segments.*; choose a length such as 30"),
    (["--chunks", "2", "--context", "most"], r"unknown context method 'most'; the nearest known one is 'mos'"),
    (["--chunks", "2", "--context", "mos:rank=3"], r"'mos' has no option 'rank'; the nearest known one is 'k'"),
    (["--chunks", "2", "--context", "mos:k=0"], r"k=0 is no share of the keys' width; give one above 0, at most 1"),
    (["--chunks", "2", "--context", "mos:v=1.5"], r"v=1\.5 is no share of the values' width; give one above 0, at mo"),
    (["--chunks", "2", "--context", "mos:k=nan"], r"'mos': option 'k' wants a finite number, got 'nan'"),
    (
        ["--chunks", "2", "--context", "mos:bound=2"],
        r"bound=2 is no bound of a small angle; give one above 0",
    ),
    (["--chunks", "2", "--context", "mos:fold=1"], r"fold=1 is no share of the steps; give one from 0, below 1"),
    (["--chunks", "2", "--context", "full:format=rvq"], r"'full': format 'rvq' learns .*; choose one without that"),
    (["--chunks", "2", "--codec", "ssn:k=8"], r"codec 'ssn' does not go with chunks .*; choose codec 'mapl'"),
    (
        ["--lanes", "2", "--average", "outr"],
        r"lanes\.average: unknown averaging 'outr'; the nearest .* is 'outer'",
    ),
    (
        ["--lanes", "2", "--average", "outer:every=0"],
        r"lanes\.average: averaging 'outer': every=0 has to be at",
    ),
]

NODE = [
    (["--stage", "2"], r"--stage 2: the run has 2 stages, so 0 to 1"),
    (["--stage", "1", "--listen", "127.0.0.1:http"], r"'127\.0\.0\.1:http' is not host:port"),
    (["--stage", "0", "--next", ":7001"], r"':7001' is not host:port"),
    (["--stage", "0", "--next", "[::1]:7001", "--link", "fast"], r"'fast'.*write it as 300mbit,25ms"),
    (["--stage", "0", "--next", "127.0.0.1:1", "--device", "gpu"], r"compute\.device 'gpu' is unknown"),
    (["--stage", "0", "--next", "127.0.0.1:1", "--out", "/proc/thinpipe"], r"cannot write in /proc/thinpipe"),
    (["--stage", "1"], r"stage 1 has a stage above it: say where it listens, --listen host:port"),
    (["--stage", "0"], r"stage 0 has a stage below it: say where that is, --next host:port"),
    (["--stage", "1", "--listen", "nonsense"], r"'nonsense' is not host:port"),
    (
        ["--stage", "1", "--listen", "a..b:7001"],
        r"cannot listen on a\.\.b:7001: no machine is known as 'a\.\.b'; choose",
    ),
    (["--stage", "0", "--next", "127.0.0.1:99999"], r"'127\.0\.0\.1:99999' is not host:port"),
    (["--stage", "1", "--listen", "127.0.0.1:{port}"], r"cannot listen on 127\.0\.0\.1:\d+: it is in use"),
    (["--stage", "0", "--next", "127.0.0.1:1", "--listen", "nonsense"], r"'nonsense' is not host:port"),
    (["--stage", "0", "--next", "127.0.0.1:1", "--run", "other"], r"--run goes with --join host:port"),
    (
        ["--stage", "1", "--listen", "203.0.113.1:7001"],
        r"cannot listen on 203\.0\.113\.1:7001: .*choose another",
    ),
    (["--stage", "0", "--next", "127.0.0.1:1", "--lane", "1"], r"--lane 1: the run has 1 lane, so only 0"),
    (["--stage", "0", "--next", "127.0.0.1:1", "--lateral", "0=127.0.0.1:1"], r"that is lane 0, .* this node's own"),
    (["--stage", "0", "--join", "127.0.0.1:1", "--lateral", "0=a:1"], r"--lateral and --join contradict each other"),
]

OF_THREE_LANES = ["--stage", "0", "--next", "127.0.0.1:1", "--set", "lanes.count=3"]
NODE += [
    ([*OF_THREE_LANES, *more], expected)
    for more, expected in (
        ([], r"the run has 3 lanes: say which one this node is in, --lane N, from 0"),
        (["--lane", "3"], r"--lane 3: the run has 3 lanes, so 0 to 2"),
        (["--lane", "0"], r"stage 0 of lane 0 is dialled by higher lanes: say where it listens, --listen host:port"),
        (["--lane", "1", "--resume", "--data-changed"], r"--data-changed: a run of 3 lanes goes on with the text"),
        (
            ["--lane", "2", *["--lateral", "0=127.0.0.1:1", "--lateral", "1=127.0.0.1:1"], "--set", "lanes.average=o"],
            r"lanes\.average: unknown averaging 'o'",
        ),
        (["--lane", "1", "--lateral", "127.0.0.1:1"], r"'127\.0\.0\.1:1' is not LANE=host:port, such as 0=stage2"),
        (["--lane", "1", "--lateral", "0=127.0.0.1"], r"'127\.0\.0\.1' is not host:port"),
        (["--lane", "1", "--lateral", "3=127.0.0.1:1"], r"--lateral 3=.*: there is no lane 3; the run has 3, from 0"),
        (["--lane", "1", "--lateral", "1=127.0.0.1:1"], r"that is lane 1, which is this node's own; .* below 1 only"),
        (["--lane", "1", "--lateral", "2=127.0.0.1:1"], r"that is lane 2, whose node dials this one"),
        (["--lane", "2", *["--lateral", "0=127.0.0.1:1"] * 2], r"--lateral names lane 0 twice, at .* and .*; omit one"),
        (
            ["--lane", "2", "--lateral", "0=127.0.0.1:1"],
            r"lane 2 dials its stage in every lower lane: say where those of lane 1 listen, --lateral 1=host:port",
        ),
        (
            ["--lane", "2", "--lateral", "0=192.0.2.1:1", "--lateral", "1=127.0.0.1:1"],
            r"--lateral 192.*needs --keys",
        ),
    )
]

PROBE = [
    ([], r"say --to host:port, to measure, or --listen host:port, to be measured"),
    (["--to", "127.0.0.1:1", "--listen", "127.0.0.1:0"], r"say --to host:port, to measure, or --listen"),
    (["--to", "127.0.0.1"], r"'127\.0\.0\.1' is not host:port"),
    (["--to", "127.0.0.1:99999"], r"'127\.0\.0\.1:99999' is not host:port"),
    (["--to", "127.0.0.1:1", "--link", "300mbitz"], r"unknown unit 'mbitz' .*write it as 300mbit,25ms"),
    (["--to", "127.0.0.1:1", "--link", "0mbit,25ms"], r"link rate 0.* is not a positive number; write it as"),
    (["--to", "127.0.0.1:1", "--seconds", "0"], r"--seconds 0 is not between 0\.2 and 10"),
    (["--to", "127.0.0.1:1", "--seconds", "nan"], r"--seconds nan is not between 0\.2 and 10"),
    (["--to", "127.0.0.1:1", "--once"], r"--once does not go with --to"),
    (["--listen", "127.0.0.1:0", "--link", "300mbit"], r"--link does not go with --listen"),
    (["--listen", "nonsense"], r"'nonsense' is not host:port"),
    (["--listen", "127.0.0.1:{port}"], r"cannot listen on 127\.0\.0\.1:\d+: it is in use"),
]


USAGE = [
    (["upp"], r"No such command 'upp'. Did you mean 'up'\?; see thinpipe --help"),
    (["--bogus"], r"No such option: --bogus; see thinpipe --help"),
    (["up", "--bogus"], r"No such option: --bogus.*; see thinpipe up --help"),
    (["up", "--stages", "abc"], r"'--stages': .*integer.*; see thinpipe up --help"),
    (["node"], r"Missing option '--stage'; see thinpipe node --help"),
    (["node", "--config", "run.toml", "--stage", "-1"], r"'--stage': .*; see thinpipe node --help"),
]


def joined(value: list[str] | str) -> str:
    return " ".join(value) if isinstance(value, list) else ""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one file for each way of being wrong."""
    directory = tmp_path_factory.mktemp("scene")
    (directory / "empty.txt").write_text("")
    (directory / "file").write_text("")
    (directory / "rows.jsonl").write_text('{"a": 1}\n')
    (directory / "bad.toml").write_text("x = = 1")
    (directory / "unknown.toml").write_text("[pipeline]\nstagess = 2\n")
    (directory / "section.toml").write_text("[pipelines]\nstages = 2\n")
    (directory / "scalar.toml").write_text("pipeline = 2\n")
    (directory / "type.toml").write_text("[run]\nsteps = 'many'\n")
    (directory / "wait.csv").write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    (directory / "short.csv").write_text("0F0,0B0\n")
    (directory / "taken").mkdir()
    (directory / "taken" / "run.toml").write_text("precious")
    return directory


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def refused(arguments: list[str]) -> str:
    """The one line on stderr."""
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("thinpipe: error: ")
    assert "Traceback" not in result.output
    return line


@pytest.mark.parametrize(("options", "expected"), UP, ids=joined)
def test_up_refuses(options: list[str], expected: str, scene: Path, tiny: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(dump_config(tiny()))
    before = sorted(scene.rglob("*"))
    given = [option.format(dir=scene) for option in options]
    base = [] if "--config" in given else ["--config", str(tmp_path / "run.toml")]
    out = [] if "--out" in given else ["--out", str(scene / "new" / "out")]
    line = refused(["up", *base, *out, *given])
    assert re.search(expected, line), line
    assert sorted(scene.rglob("*")) == before
    assert (scene / "taken" / "run.toml").read_text() == "precious"


@pytest.mark.parametrize(("options", "expected"), NODE, ids=joined)
def test_node_refuses(options: list[str], expected: str, taken_port: int, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[pipeline]\nstages = 2\n")
    given = [option.format(port=taken_port) for option in options]
    line = refused(["node", "--config", str(tmp_path / "run.toml"), *given])
    assert re.search(expected, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.parametrize(("options", "expected"), PROBE, ids=joined)
def test_probe_refuses(options: list[str], expected: str, taken_port: int) -> None:
    line = refused(["probe", *(option.format(port=taken_port) for option in options)])
    assert re.search(expected, line), line


@pytest.mark.parametrize(("arguments", "expected"), USAGE, ids=joined)
def test_wrong_usage_is_one_line_too(arguments: list[str], expected: str) -> None:
    line = refused(arguments)
    assert re.search(expected, line), line


def test_a_run_is_replaced_only_by_one_that_can_start(scene: Path, tiny: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(dump_config(tiny()))
    (tmp_path / "summary.json").write_text("precious")
    given = ["--config", str(tmp_path / "run.toml"), "--out", str(tmp_path), "--overwrite"]
    refused(["up", *given, "--data", str(scene / "missing")])
    assert (tmp_path / "summary.json").read_text() == "precious"
