"""Options that commands share: the same spelling, text, meaning and errors, wherever they are given."""

from __future__ import annotations

import json

import pytest
import typer.main
from thinpipe.cli import app
from thinpipe.commands.options import HELP, SETTING, settings_of, without_auto
from thinpipe.node.codec_words import codec_settings
from thinpipe.node.config import ConfigError
from thinpipe.node.config_file import merge, parse_config
from typer.testing import CliRunner

COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
# Which commands take which of them, each with its own default.
TAKE = {
    "up": {*HELP},
    "chaos": {*HELP},
    "supervise": {"--model", "--data", "--codec", "--link", "--steps", "--schedule", "--seed", "--checkpoint-every"},
    "plan": {"--codec", "--forward", "--backward", "--link", "--schedule", "--microbatches", "--batch-size"}
    | {"--sequence-length", "--cut", "--speeds", "--lanes", "--average"},
    "bench": {"--link", "--microbatches", "--batch-size", "--sequence-length", "--lanes", "--average"},
    "compare": {"--model", "--data", "--link", "--steps", "--schedule", "--eval-every"},
    "node": {"--link"},
}


def options_of(command: str) -> dict[str, str]:
    return {name: option.help or "" for option in COMMANDS[command].params for name in option.opts}


@pytest.mark.parametrize("command", TAKE)
def test_a_shared_option_has_one_text(command: str) -> None:
    found = options_of(command)
    for name in TAKE[command]:
        assert found[name].startswith(HELP[name]), name


def test_json_and_config_are_the_same_everywhere() -> None:
    texts = {name: options_of(name).get("--json") for name in COMMANDS}
    assert {text for text in texts.values() if text} == {"Print only JSON on stdout."}
    assert options_of("chaos")["--config"] == options_of("plan")["--config"] == options_of("up")["--config"]


def test_every_shared_option_is_a_setting() -> None:
    """A misspelt one would be refused here as an unknown setting."""
    assert {f"--{name.replace('_', '-')}" for name in SETTING} == {*HELP} - {
        "--model",
        "--codec",
        "--forward",
        "--backward",
        "--chunks",
    }
    given = settings_of(stages=2, steps=3, seed=4, codec="mapl:r=8 rvq int8", model="150m", checkpoint_every=5)
    config = parse_config(merge({}, given))
    assert (config.pipeline.stages, config.run.steps, config.run.seed, config.checkpoint.every) == (2, 3, 4, 5)
    assert (config.codec.codec, config.codec.forward, config.codec.backward) == ("mapl:r=8", "rvq", "int8")
    assert config.model.preset == "150m"
    assert settings_of() == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None,), []),
        (("bf16",), ["bf16"]),
        (("mapl:r=8  rvq:groups=4,codes=16 int8",), ["mapl:r=8", "rvq:groups=4,codes=16", "int8"]),
        (("mapl", "int8", "int4"), ["mapl", "int8", "int4"]),
        (("mapl int8", None, "int4"), ["mapl", "int8", "int4"]),
        (("mapl int8", "int8"), ["mapl", "int8"]),
    ],
)
def test_a_codec_and_its_formats_in_one_text(given: tuple[str, ...], expected: list[str]) -> None:
    names = ("codec.codec", "codec.forward", "codec.backward")
    assert codec_settings(*given) == dict(zip(names, expected, strict=False))
    assert codec_settings(None, "int8") == {"codec.forward": "int8"}


@pytest.mark.parametrize("said", ["bf16 int8 int8 int8", " "])
@pytest.mark.parametrize(
    "command", [["up"], ["chaos"], ["plan", "--emulate", "150m@4x66tflops"]], ids=lambda command: command[0]
)
def test_a_codec_that_cannot_be_taken_apart_fails_alike(command: list[str], said: str) -> None:
    result = CliRunner().invoke(app, [*command, "--codec", said])
    assert (result.exit_code, result.stdout) == (2, "")
    line = f"thinpipe: error: --codec '{said}' has {len(said.split())} parts; write CODEC, or CODEC FORWARD BACKWARD\n"
    assert result.stderr == line


def test_a_format_that_is_said_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="--codec 'mapl int8' says int8, --forward says int4; leave one of the two"):
        codec_settings("mapl int8", "int4")


def test_a_plan_takes_what_bench_takes() -> None:
    machine = ["plan", "--json", "--emulate", "150m@4x66tflops", "--link", "80mbit"]
    one, three = (
        CliRunner().invoke(app, [*machine, *options])
        for options in (["--codec", "mapl int8 int4"], ["--codec", "mapl", "--forward", "int8", "--backward", "int4"])
    )
    assert (one.exit_code, three.exit_code) == (0, 0)
    assert json.loads(one.stdout) == json.loads(three.stdout)


def test_the_depth_that_is_to_be_found() -> None:
    assert without_auto("zb:rtt_ratio=auto") == ("zb", "zb:rtt_ratio=auto")
    assert without_auto("best:in_flight=8") == ("zb", "best:in_flight=8")
    assert without_auto("zb:rtt_ratio=1.8") == ("zb:rtt_ratio=1.8", None)
    assert without_auto(None) == (None, None)


def test_chaos_trains_what_it_is_told_to(tmp_path, monkeypatch) -> None:
    """Its own defaults give way to --config, and a codec that is given brings its own formats."""
    seen = []

    def run_chaos(config, _, faults, **how):
        seen.append((config, faults, how))
        return {}, True

    monkeypatch.setattr("thinpipe.node.measuring.chaos_run.run_chaos", run_chaos)
    toml = tmp_path / "run.toml"
    toml.write_text("[pipeline]\nstages = 3\n[codec]\ncodec = 'int8'\n")
    calls = [[], ["--codec", "bf16"], ["--config", str(toml)], ["--model", "150m", "--data", "x.txt", "--seed", "7"]]
    calls += [["--schedule", "zb:rtt_ratio=auto", "--batch-size", "4", "--eval-every", "5", "--codec", "mapl rvq int8"]]
    calls += [["--lanes", "3", "--set", "lanes.round_timeout_s=9", "--kinds", "cut,join"]]
    for options in calls:
        result = CliRunner().invoke(app, ["chaos", "--json", "--out", str(tmp_path), *options])
        assert result.exit_code == 0, result.stderr
    plain, bf16, file, named, more, lanes = (config for config, _, _ in seen)
    assert (plain.codec.codec, plain.codec.forward, plain.pipeline.batch_size) == ("mapl:r=16,anchors=full", "int4", 8)
    assert plain.checkpoint.every == 2
    assert (bf16.codec.codec, bf16.codec.forward, bf16.codec.backward) == ("bf16", None, None)
    assert (file.pipeline.stages, file.codec.codec, file.pipeline.batch_size) == (3, "int8", 16)
    assert (named.model.preset, named.data.source, named.run.seed) == ("150m", "x.txt", 7)
    assert (more.codec.codec, more.codec.forward, more.codec.backward) == ("mapl", "rvq", "int8")
    assert (more.pipeline.schedule, more.pipeline.batch_size, more.run.eval_every) == ("zb", 4, 5)
    assert seen[4][2]["schedule"] == "zb:rtt_ratio=auto"
    assert seen[3][1].seed == 7
    assert (plain.lanes.count, lanes.lanes.count, lanes.lanes.average) == (1, 3, "outer:every=5")
    assert (plain.lanes.round_timeout_s, lanes.lanes.round_timeout_s, file.lanes.round_timeout_s) == (3, 9, 120)
    assert (seen[0][1].kinds, seen[5][1].kinds) == (None, ("cut", "join"))


def test_chunks_are_lanes_of_the_same_sequences() -> None:
    config = parse_config(merge({}, settings_of(chunks=4, context="full:format=int8")))
    assert (config.lanes.count, config.lanes.average) == (4, "gradients")
    assert (config.context.method, config.chunk_layout.segments) == ("full:format=int8", 8)
    done = CliRunner().invoke(app, ["up", "--chunks", "2", "--lanes", "2"])
    assert done.exit_code == 2
