"""Written orders: what cannot run is refused where it is wrong, torch reads the file, and any order has the same bits.

That they obey the laws of all schedules is in `test_schedules`.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.cli import app
from thinpipe.node.config import ConfigError
from thinpipe.node.config_file import dump_config, load_config
from thinpipe.node.discovery.shared_config import differences, shareable, verified
from thinpipe.protocol.node_record import RunRecord
from thinpipe.protocol.schedule import ScheduleError, StageOrders, get_schedule, interleave
from thinpipe.protocol.schedule_csv import read_csv, write_csv
from thinpipe.protocol.stage_orders import OrderError, check_orders
from typer.testing import CliRunner

from .conftest import TinyConfig
from .in_memory import Outcome, run_in_memory, run_reference
from .real_up import Up, ended
from .test_schedules import GPipe, written_orders

GOOD = "0F0,0F1,,0B0,,0B1\n,1F0,1B0,1F1,1B1\n"

WRONG = {
    "nothing": ("\n\n", r"there is no action in it; a row is a rank, a cell such as 0F0"),
    "no CSV": ('0F0,"0B0\n', r"not a CSV file: .*; a row is a rank"),
    "a word": (GOOD.replace("1B0", "idle"), r"row 2, column 3: 'idle' is no action; write .* as in 1F0"),
    "no microbatch": (GOOD.replace("1B0", "1B"), r"row 2, column 3: '1B' is no action"),
    "a transfer": (GOOD.replace(",,0B0", ",0SEND_F1,0B0"), r"column 3: '0SEND_F1' is no compute; .* as compute_only"),
    "a reduction": (GOOD.replace("1B1", "1B1,1REDUCE_GRAD"), r"row 2, column 6: '1REDUCE_GRAD' is no compute"),
    "two at once": (GOOD.replace("1B0", "(1F1;1B0)OVERLAP_F_B"), r"'\(1F1;1B0\)OVERLAP_F_B' is two actions at once"),
    "several stages": (
        "0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n",
        r"row 1 has stages 0, 3, and a node has one; give each its own",
    ),
    "another stage": ("1F0,1B0\n0F0,0B0\n", r"row 1, column 1: '1F0': this row is of stage 0; put the rows in order"),
    "a gap": ("0F0,0B0\n,\n2F0,2B0\n", r"row 2 is empty; rank 1 has to do something"),
    "out of order": (GOOD.replace("0F0,0F1", "0F1,0F0"), r"row 1, column 1: '0F1' comes before 0F0; .* renumber"),
    "twice": (GOOD.replace("1F1", "1F0"), r"row 2, column 4: '1F0' comes a second time; each kind takes every"),
    "both": (GOOD.replace("1B0", "1B0,1I0"), r"row 2, column 4: '1I0' comes a second time"),
    "lost": (
        GOOD.replace(",1B1", ""),
        r"row 2, at its end: no backward of microbatch 1; each goes forward once and back",
    ),
    "half": (
        GOOD.replace("1B0", "1I0"),
        r"row 2, column 5: '1B1': the whole backward of microbatch 1 before the weight",
    ),
    "owed": (GOOD.replace("1B1", "1I1"), r"row 2, at its end: no weight gradient of microbatch 1"),
    "too early": (GOOD.replace(",1F0,1B0", ",1B0,1F0"), r"row 2, column 2: '1B0': the backward of microbatch 0 before"),
    "weights first": ("0F0,0W0,0I0\n", r"row 1, column 2: '0W0': the weight gradient of microbatch 0 before its input"),
    "more here": (
        GOOD + "2F0,2B0\n",
        r"row 3, at its end: its microbatches are 1, and stage 0 has 2; give every",
    ),
    "deadlock": (
        "0F0,,,0B0,0F1,,0B1\n,1F0,1F1,1B0,1B1\n",
        r"row 1, column 4: '0B0': deadlock: it waits for the gradient of microbatch 0, before which stage 1 waits for "
        r"microbatch 1; put the forward of 1 first here, or later there",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_file_that_cannot_be_run_is_refused_where_it_is_wrong(fault: str, tmp_path: Path) -> None:
    text, expected = WRONG[fault]
    with pytest.raises(ScheduleError, match=expected) as found:
        read_csv(text)
    assert "\n" not in str(found.value)
    (tmp_path / "wrong.csv").write_text(text)
    told = CliRunner().invoke(app, ["plan", "--emulate", "tiny@2x1tflops", "--schedule", str(tmp_path / "wrong.csv")])
    assert told.exit_code == 2
    (line,) = told.stderr.strip().splitlines()
    assert line.startswith("thinpipe: error: pipeline.schedule: ")
    assert "wrong.csv, " in line


def test_the_same_orders_are_read_from_any_spelling_of_them() -> None:
    orders = read_csv(GOOD)
    assert orders.spec == "order:FFBB/FBFB"
    spellings = ("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1", '"0F0", 0F01,,,0B0,0B1,,\r\n1F0,1B0,1F1,1B1,,\r\n\r\n,,\r\n')
    assert {read_csv(text).spec for text in spellings} == {orders.spec}
    # A stage that splits makes all of them split: what is sent up is one kind of message.
    assert get_schedule("order:FFBB/FIWFIW").spec == "order:FFIWIW/FIWFIW"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("order:", r"'order:\.\.\.': stage 0, at its end: its microbatches are 0"),
        ("order:FXB", r"stage 0, action 2: 'X' is no action; say F, B, I or W"),
        ("order:FB//FB", r"stage 1, at its end: its microbatches are 0, and stage 0 has 1"),
        ("order:FB/BF", r"stage 1, action 1: the backward of microbatch 0 before its forward"),
    ],
)
def test_words_that_cannot_be_run_are_refused(spec: str, expected: str) -> None:
    with pytest.raises(ScheduleError, match=expected):
        get_schedule(spec)


class Unchecked(GPipe):
    """Whatever the words say."""

    def __init__(self, rows: tuple[str, ...]) -> None:
        self._rows = rows

    def _order(self, stage: int, stages: int, microbatches: int) -> Iterator[Any]:
        return StageOrders._order(self, stage, stages, microbatches)  # type: ignore[arg-type]


@given(data=st.data())
@settings(deadline=None)
def test_exactly_what_deadlocks_is_refused(data: st.DataObject) -> None:
    """Words that are right stage by stage: all can be walked in some global order, or they are refused."""
    stages, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    alone = written_orders(stages=1, microbatches=count).filter(lambda orders: not orders.splits)
    rows = tuple(data.draw(alone).rows[0] for _ in range(stages))
    unchecked = Unchecked(rows)
    unchecked.rows = rows  # type: ignore[attr-defined]
    try:
        list(interleave(unchecked, stages, count))
    except ScheduleError:
        with pytest.raises(OrderError, match="deadlock"):
            check_orders(rows)
    else:
        check_orders(rows)


@given(orders=written_orders(), data=st.data())
@settings(deadline=None)
def test_a_changed_file_is_refused_or_can_be_run(orders: StageOrders, data: st.DataObject) -> None:
    """Cells swapped, lost, doubled, or with another number: no walk of it can hang."""
    text = write_csv(orders, len(orders.rows), orders.microbatches)
    assert read_csv(text).spec == orders.spec
    rows = [line.split(",") for line in text.splitlines()]
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.sampled_from(rows))
        places = st.integers(0, len(row) - 1)
        one, other = data.draw(places), data.draw(places)
        match data.draw(st.sampled_from(["swap", "lose", "double", "renumber"])):
            case "swap":
                row[one], row[other] = row[other], row[one]
            case "lose":
                row[one] = ""
            case "double":
                row.insert(other, row[one])
            case _:
                row[one] = row[one][:2] + str(data.draw(st.integers(0, 11)))
    try:
        changed = read_csv("\n".join(map(",".join, rows)))
    except ScheduleError:
        return
    assert list(interleave(changed, len(changed.rows), changed.microbatches))


# -- torch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_ranks() -> Iterator[int]:
    """torch believes that this process is rank 0 of 3, with nobody behind the others: enough to make its schedules."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    yield 3
    torch.distributed.destroy_process_group()


def stages_of_torch(*indices: int, stages: int) -> list[Any]:
    from torch.distributed.pipelining import PipelineStage

    return [PipelineStage(torch.nn.Linear(2, 2), index, stages, torch.device("cpu")) for index in indices]


def no_loss(*_: Any) -> None:
    """torch wants to know that there is one."""


UNEVEN = "order:FFFIFIIWWIWW/FFIFIWFIIWWW/FIWFIWFIWFIW"


@pytest.mark.parametrize("spec", ["gpipe", "1f1b", "1f1b:rtt_ratio=1.5", "zb", "zb:rtt_ratio=2", UNEVEN])
def test_torch_reads_what_is_written(spec: str, torch_ranks: int, tmp_path: Path) -> None:
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    schedule = get_schedule(spec)
    orders = StageOrders.of(schedule, torch_ranks, 4)
    (tmp_path / "orders.csv").write_text(write_csv(schedule, torch_ranks, 4))
    theirs = _PipelineScheduleRuntime(stages_of_torch(0, stages=3), 4, loss_fn=no_loss)
    theirs._load_csv(str(tmp_path / "orders.csv"))
    cells = {
        rank: "".join(cell.computation_type.value for cell in row if cell)
        for rank, row in theirs.pipeline_order.items()
    }
    assert tuple(cells.values()) == orders.rows
    sent = [sum("SEND" in str(action) for action in row) for row in theirs.pipeline_order_with_comms.values()]
    assert sent == [4, 8, 4]  # the transfers that it derives: a microbatch goes down and comes back
    theirs._dump_csv(str(tmp_path / "theirs.csv"), format="compute_only")
    assert read_csv((tmp_path / "theirs.csv").read_text()).spec == orders.spec


@pytest.mark.usefixtures("torch_ranks")
def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    """With a stage a rank. Its zero bubble of depth P is ours; its interleaved 1F1B runs further ahead than ours."""
    from torch.distributed.pipelining import schedules

    def written(kind: str, indices: tuple[int, ...], stages: int) -> str:
        made = getattr(schedules, kind)(stages_of_torch(*indices, stages=stages), 6, loss_fn=no_loss)
        made._dump_csv(str(tmp_path / "theirs.csv"), format="compute_only")
        return (tmp_path / "theirs.csv").read_text()

    zero_bubble = read_csv(written("ScheduleInterleavedZeroBubble", (0,), 3))
    assert zero_bubble.rows == ("FFFIWFIWFIWFIWIWIW", "FFIFIWFIWFIWFIWIWW", "FIFIFIWFIWFIWFIWWW")
    ahead = read_csv(written("ScheduleInterleaved1F1B", (0,), 3))
    assert ahead.rows[0].startswith("FFFFF")
    assert ahead.rows[2] == "FB" * 6
    with pytest.raises(ScheduleError, match=r"row 1 has stages 0, 5, and a node has one; .* V-shaped schedules"):
        read_csv(written("ScheduleZBVZeroBubble", (0, 5), 6))
    # What torch 2.13 prints of its Schedule1F1B is not what it runs: the last rank counts from 1.
    printed = schedules.Schedule1F1B(stages_of_torch(0, stages=3)[0], 6, loss_fn=no_loss)._get_pipeline_order()
    assert printed
    rows = [[str(cell or "") for cell in row if "REDUCE" not in str(cell)] for row in printed.values()]
    with pytest.raises(ScheduleError, match=r"row 3, column \d+: '2F1' comes before 2F0"):
        read_csv("\n".join(map(",".join, rows)))
    rows[2] = [cell.replace(f"F{cell[2:]}", f"F{int(cell[2:]) - 1}") if "F" in cell else cell for cell in rows[2]]
    assert read_csv("\n".join(map(",".join, rows))).spec == StageOrders.of(get_schedule("1f1b"), 3, 6).spec


# -- runs ------------------------------------------------------------------------------------------------------------

SHAPE = {"pipeline.stages": 3, "pipeline.microbatches": 4, "run.steps": 2}


@pytest.fixture(scope="module")
def plain(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What all orders of that shape come to."""
    settings = {**SHAPE, "codec.codec": "int4:feedback=true", "pipeline.schedule": "gpipe"}
    return run_reference(tiny(settings), tmp_path_factory.mktemp("gpipe"))


@given(orders=written_orders(stages=3, microbatches=4))
@settings(deadline=None, max_examples=5)
def test_any_order_trains_to_the_same_bits(
    orders: StageOrders, plain: Outcome, tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = {**SHAPE, "codec.codec": "int4:feedback=true", "pipeline.schedule": orders.spec}
    assert run_reference(tiny(settings), tmp_path_factory.mktemp("orders")) == plain


@pytest.mark.pairwise(1)
@pytest.mark.parametrize("norm", ["stage", "global"])
@pytest.mark.parametrize("drawn", range(4))
def test_nodes_run_any_order_to_the_same_bits(drawn: int, norm: str, tiny: TinyConfig, tmp_path: Path) -> None:
    settings = {**SHAPE, "codec.codec": "mapl:r=8,context=0,every=1", "optim.clip_norm": norm}
    orders = some_orders(random.Random(drawn), split=drawn % 2 == 0)
    mine = run_in_memory(tiny({**settings, "pipeline.schedule": orders}), tmp_path / "swarm")
    assert mine == run_reference(tiny({**settings, "pipeline.schedule": "1f1b"}), tmp_path / "1f1b")


def some_orders(draw: random.Random, *, split: bool, stages: int = 3, count: int = 4) -> str:
    """As `written_orders`, of one seed."""
    least, rows = list(range(1, count + 1)), []
    for _ in range(stages):
        least = list(itertools.accumulate((draw.randint(at, count) for at in least), max))
        row = "".join("F" * (at - before) + "B" for before, at in itertools.pairwise([0, *least]))
        rows.insert(0, row.replace("B", "I") + "W" * count if split else row)
    return "order:" + "/".join(rows)


# -- settings --------------------------------------------------------------------------------------------------------


def test_a_run_has_the_orders_and_not_the_files_name(tiny: TinyConfig, tmp_path: Path) -> None:
    shape = {"pipeline.stages": 2, "pipeline.microbatches": 2}
    (tmp_path / "here.csv").write_text(GOOD)
    (tmp_path / "there.CSV").write_text(GOOD.replace(",,", ",").replace("\n,", "\n"))
    here, there = (tiny({**shape, "pipeline.schedule": str(tmp_path / name)}) for name in ("here.csv", "there.CSV"))
    assert here.pipeline.schedule == "order:FFBB/FBFB"
    assert here.digest() == there.digest()
    other = tiny({**shape, "pipeline.schedule": "order:FFBB/FFBB"})
    assert other.digest() != here.digest()
    said = differences(here, other)
    assert said.startswith("pipeline.schedule is 'orders of 2 stages, 2 microbatches (")
    (tmp_path / "run.toml").write_text(dump_config(here))
    (tmp_path / "here.csv").unlink()
    assert load_config(tmp_path / "run.toml").digest() == here.digest()


def test_a_file_is_read_for_its_owner_only(tiny: TinyConfig, tmp_path: Path) -> None:
    """Others send the orders; a name from them would be that of a file here."""
    (tmp_path / "mine.csv").write_text("secret")
    record = shareable(tiny({"pipeline.stages": 2, "pipeline.microbatches": 2, "pipeline.schedule": "order:FFBB/FBFB"}))
    assert verified(record, "them").pipeline.schedule == "order:FFBB/FBFB"
    toml = record.toml.replace("order:FFBB/FBFB", str(tmp_path / "mine.csv"))
    with pytest.raises(ConfigError, match=r"from them names a file of this machine, .*mine\.csv: not accepted") as told:
        verified(RunRecord(run=record.run, configuration=record.configuration, toml=toml), "them")
    assert "secret" not in str(told.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"pipeline.stages": 3},
            r"orders are for pipeline\.stages = 2 and pipeline\.microbatches = 2, but there are 3 and 2; set",
        ),
        ({"pipeline.microbatches": 4}, r"but there are 2 and 4"),
        ({"pipeline.schedule": "nowhere.csv"}, r"cannot read the schedule file nowhere\.csv: No such file"),
        ({"pipeline.schedule": "{dir}"}, r"the schedule file .* is no file; name a CSV file"),
        ({"pipeline.schedule": "{latin}"}, r"cannot read the schedule file .*: it is not UTF-8 text"),
        ({"pipeline.schedule": "{huge}"}, r"has 16,777,217 bytes, and 16,777,216 are read; it is no schedule"),
        (
            {"pipeline.schedule": "order:" + "F" * 500},
            r"stage 0, at its end: no backward .*\(got 'order:F+\.\.\. \(508",
        ),
    ],
)
def test_settings_that_do_not_go_with_orders_are_refused(
    settings: dict[str, Any], expected: str, tiny: TinyConfig, tmp_path: Path
) -> None:
    (tmp_path / "directory.csv").mkdir()
    (tmp_path / "latin.csv").write_bytes(b"0F0,\xe9")
    with (tmp_path / "huge.csv").open("wb") as huge:
        huge.truncate(2**24 + 1)
    names = {"dir": "directory.csv", "latin": "latin.csv", "huge": "huge.csv"}
    paths = {name: str(tmp_path / file) for name, file in names.items()}
    shape = {"pipeline.stages": 2, "pipeline.microbatches": 2, "pipeline.schedule": "order:FFBB/FBFB"}
    wrong = {name: value.format(**paths) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises(ConfigError, match=expected):
        tiny({**shape, **wrong})


PLAN = ["plan", "--emulate", "150m@4x66tflops", "--link", "300mbit,25ms", "--microbatches", "16", "--batch-size", "16"]


@pytest.mark.parametrize("spec", ["gpipe", "1f1b", "zb:rtt_ratio=auto"])
def test_a_plan_writes_what_it_simulated(spec: str, tmp_path: Path) -> None:
    path = str(tmp_path / "orders.csv")
    told = CliRunner().invoke(app, [*PLAN, "--schedule", spec, "--json", "--write-schedule", path])
    assert told.exit_code == 0, told.output
    again = CliRunner().invoke(app, [*PLAN, "--schedule", path, "--json"])
    assert again.exit_code == 0, again.output
    named, written = json.loads(told.stdout), json.loads(again.stdout)
    assert written.pop("schedule").startswith("order:")
    del named["schedule"]
    assert written == named


def test_a_plan_says_where_it_cannot_write(tmp_path: Path) -> None:
    for name, expected in (
        ("orders.txt", r"say .*orders\.txt\.csv"),
        ("none/orders.csv", "cannot write .*No such file"),
    ):
        told = CliRunner().invoke(app, [*PLAN, "--write-schedule", str(tmp_path / name)])
        assert told.exit_code == 2
        (line,) = told.stderr.strip().splitlines()
        assert line.startswith("thinpipe: error: --write-schedule")
        assert re.search(expected, line), line


@pytest.mark.slow
def test_real_nodes_run_a_file_and_go_on_without_it(tiny: TinyConfig, up: Up, tmp_path: Path) -> None:
    """Stage 0 runs three ahead, the last splits its backward; then the file is gone, and two steps more are made."""
    path = tmp_path / "orders.csv"
    path.write_text("0F0,0F1,0F2,0F3,0B0,0B1,0B2,0B3\n1F0,1I0,1F1,1I1,1W0,1F2,1W1,1I2,1F3,1I3,1W2,1W3\n")
    (tmp_path / "run.toml").write_text(dump_config(tiny({"pipeline.stages": 2, "checkpoint.every": 1, "run.steps": 2})))
    out = str(tmp_path / "out")
    ended(up("--config", str(tmp_path / "run.toml"), "--schedule", str(path), "--out", out))
    path.unlink()
    swarm = ended(up("--resume", out, "--steps", "4"))
    own = load_config(Path(out) / "run.toml")
    assert own.pipeline.schedule == "order:FFFFIWIWIWIW/FIFIWFWIFIWW"
    whole = tiny({"pipeline.stages": 2, "run.steps": 4, "pipeline.schedule": "1f1b", "run.extended": [[2, 2]]})
    plain = run_reference(whole, tmp_path / "1f1b")
    assert [stage["state_sha256"] for stage in swarm["stages"]] == plain.state_sha256
