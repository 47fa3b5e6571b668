"""Two microbatches in flight: the bits of one after the other, whatever waits for what."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.node.config import ConfigError
from thinpipe.node.config_file import parse_config
from thinpipe.node.context.exchange import ContextKey
from thinpipe.node.context.mailbox import LaneMailbox
from thinpipe.node.context.turns import OtherFailed, Turns
from thinpipe.node.one_process import OneProcess
from thinpipe.node.paired_work import computed
from thinpipe.node.run_records import Stopwatch, Tracer
from thinpipe.node.stage import Stage
from thinpipe.node.worker_thread import Worker
from thinpipe.protocol.global_norm import WithGlobalNorm
from thinpipe.protocol.paired import Paired, computed_now, partner
from thinpipe.protocol.schedule import (
    Backward,
    Forward,
    InputGradient,
    Step,
    WeightGradient,
    get_schedule,
    interleave,
    messages_ahead,
)

from .test_chunks import config

# -- turns ------------------------------------------------------------------------------------------------------------


def counted(turns: Turns, said: list[str], name: str, times: int, failing_at: int | None = None) -> int:
    for number in range(times):
        said.append(f"{name}{number}")
        if number == failing_at:
            raise ValueError(f"{name} fails")
        turns.hand_over()
    return times


def test_turns_are_strict_and_who_is_done_leaves_the_rest_to_the_other() -> None:
    turns, said, told = Turns(), list[str](), list[Any]()
    first = partial(counted, turns, said, "a", 2)
    found = turns.both(first, partial(counted, turns, said, "b", 4), lambda of: told.append((of, list(said))))
    assert found == (2, 4)
    assert said == ["a0", "b0", "a1", "b1", "b2", "b3"]
    assert told == [(2, said[:4])]
    turns.hand_over()  # nothing is under way
    said.clear()
    assert turns.both(partial(counted, turns, said, "a", 3), partial(counted, turns, said, "b", 1)) == (3, 1)
    assert said == ["a0", "b0", "a1", "a2"]


@pytest.mark.parametrize("failing", ["a", "b"])
def test_one_that_fails_ends_the_other(failing: str) -> None:
    turns, said, others = Turns(), list[str](), list[BaseException]()

    def work(name: str) -> int:
        try:
            return counted(turns, said, name, 3, 1 if name == failing else None)
        except OtherFailed as error:
            others.append(error)
            raise

    with pytest.raises(ValueError, match=f"{failing} fails"):
        turns.both(partial(work, "a"), partial(work, "b"))
    assert len(others) == 1
    assert said == (["a0", "b0", "a1"] if failing == "a" else ["a0", "b0", "a1", "b1"])
    assert turns.both(lambda: 1, lambda: 2) == (1, 2)


def test_the_second_computes_with_as_many_threads() -> None:
    turns = Turns()
    idents = turns.both(threading.get_ident, threading.get_ident)
    assert idents[0] == threading.get_ident() != idents[1]
    assert len(set(turns.both(torch.get_num_threads, torch.get_num_threads))) == 1


def test_what_the_first_gives_leaves_while_the_second_computes() -> None:
    """On the event loop: the second one ends only when the first one's result was passed on."""

    class TwoInTurns(Stage):
        chunk: Any = None

        def __init__(self) -> None:  # not super's: no model
            self.chunk = self  # what has the turns
            self.turns = Turns()

    async def job() -> list[tuple[int, str]]:
        sent, left = list[tuple[int, str]](), threading.Event()
        watch = Stopwatch()
        compute = Worker("compute", watch, Tracer(stage=0, enabled=False))

        def second() -> str:
            assert left.wait(20)
            return "second"

        async def then(place: int, result: str) -> None:
            sent.append((place, result))
            left.set()

        try:
            given = {"stage": TwoInTurns(), "compute": compute, "watch": watch}
            await computed("both", [lambda: "first", second], then, **given)
            await computed("one", [lambda: "alone"], then, **given)
            with pytest.raises(ValueError, match="second fails"):
                await computed("both", [lambda: "first", partial(fail, "second fails")], then, **given)
            with pytest.raises(ValueError, match="first fails"):
                await computed("both", [partial(fail, "first fails"), second], then, **given)
        finally:
            compute.close()
            compute.join(10)
        return sent

    assert asyncio.run(job()) == [(0, "first"), (1, "second"), (0, "alone"), (0, "first")]


def fail(line: str) -> str:
    raise ValueError(line)


# -- schedules --------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    spec=st.sampled_from(["gpipe", "1f1b", "1f1b:rtt_ratio=1.5", "zb", "zb:rtt_ratio=2"]),
    stages=st.integers(1, 5),
    microbatches=st.integers(1, 9),
    norm=st.booleans(),
)
def test_a_schedule_of_pairs_is_the_schedule_of_half_as_many(
    spec: str, stages: int, microbatches: int, norm: bool
) -> None:
    plain = get_schedule(spec)
    schedule = WithGlobalNorm(Paired(plain)) if norm else Paired(plain)
    done: dict[int, list[Any]] = {stage: [] for stage in range(stages)}
    for stage, action in interleave(schedule, stages, microbatches):
        done[stage].append(action)
    kinds = (Forward, InputGradient, WeightGradient) if plain.splits else (Forward, Backward)
    for stage, actions in done.items():
        assert isinstance(actions[-1], Step)
        for kind in kinds:
            assert [each.microbatch for each in actions if isinstance(each, kind)] == list(range(microbatches))
        here = peak = 0
        for action, after in itertools.pairwise(actions):
            here += isinstance(action, Forward) - isinstance(action, WeightGradient if plain.splits else Backward)
            peak = max(peak, here)
            if isinstance(action, Forward | Backward | InputGradient):
                other = partner(schedule, action, microbatches)
                computed = computed_now(schedule, action, microbatches)
                if other is None:
                    assert action.microbatch == microbatches - 1
                    assert computed == (action.microbatch,)
                elif action.microbatch % 2:
                    assert computed == (action.microbatch - 1, action.microbatch)
                else:
                    assert (after, computed) == (other, ())  # they are neighbours
        assert peak == schedule.peak_in_flight(stage, stages, microbatches)
    assert messages_ahead(schedule, stages, microbatches) <= 2 * max(
        1, messages_ahead(plain, stages, (microbatches + 1) // 2)
    )
    assert partner(plain, Forward(microbatch=0), microbatches) is None


# -- training ---------------------------------------------------------------------------------------------------------


def digests(settings: Any) -> list[list[str]]:
    run = OneProcess(settings)
    try:
        run.train()
        return [[stage.state_sha256() for stage in lane.stages] for lane in run.lanes]
    finally:
        run.close()


Settings = dict[str, dict[str, Any]]
SMALL: Settings = {
    "run": {"steps": 3},
    "model": {"width": 64, "layers": 2, "vocab_size": 512},
    "data": {"sequence_length": 48, "heldout_sequences": 4},
    "pipeline": {"stages": 2},
    "codec": {"codec": "fp32"},
    "lanes": {"count": 2, "average": "gradients"},
    "context": {},
}


@pytest.fixture(scope="module")
def small(tiny_settings: dict[str, Any]) -> Settings:
    """These, of a text that other tests have prepared."""
    text = {key: tiny_settings[f"data.{key}"] for key in ("source", "cache")}
    return {**SMALL, "data": {**SMALL["data"], **text}}


CASES: dict[str, Settings] = {
    "full, plain order, an odd last one": {
        "context": {"method": "full", "order": "plain"},
        "pipeline": {"batch_size": 3, "microbatches": 3, "stages": 1},
        "lanes": {"count": 3},
    },
    "mos, warm, folded, int4, mapl, zb": {
        "context": {"method": "mos:k=0.25,v=0.5,warm=1,fold=0.34,format=int4,backward=int4"},
        "pipeline": {"batch_size": 4, "microbatches": 4, "schedule": "zb"},
        "codec": {"codec": "mapl:r=8,every=2,context=4,pairs=64"},
        "run": {"steps": 4},
    },
    "bfloat16, global norm, 1f1b, a stage without layers": {
        "context": {"method": "full:format=int8"},
        "pipeline": {"batch_size": 5, "microbatches": 5, "stages": 3, "schedule": "1f1b", "cut": "1,1,0"},
        "optim": {"clip_norm": "global"},
        "compute": {"dtype": "bfloat16"},
        "codec": {"codec": "bf16"},
    },
    "mos in bfloat16, outer rounds, gpipe": {
        "context": {"method": "mos:k=0.25,v=0.5,head=first"},
        "pipeline": {"batch_size": 4, "microbatches": 4, "schedule": "gpipe"},
        "lanes": {"average": "outer:every=2"},
        "compute": {"dtype": "bfloat16"},
        "codec": {"codec": "resbm"},
    },
}


@pytest.mark.pairwise(2)
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_one_after_the_other(small: Settings, case: str) -> None:
    tree = {name: {**small.get(name, {}), **CASES[case].get(name, {})} for name in {*small, *CASES[case]}}
    found: list[list[list[str]]] = []
    for in_flight in (1, 2):
        tree["context"]["in_flight"] = in_flight
        chosen = parse_config(tree)
        assert chosen.in_flight == in_flight
        found.append(digests(chosen))
    assert found[0] == found[1]


def test_tied_embeddings_get_one_gradient_of_each_microbatch(small: Settings, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = {"model_type": "qwen2", **sizes, "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(model), encoding="utf-8")
    tree = {
        **small,
        "model": {"path": str(tmp_path), "vocab_size": 512},
        "pipeline": {"stages": 1, "batch_size": 4, "microbatches": 4},
    }
    found = [digests(parse_config({**tree, "context": {"method": "full", "in_flight": count}})) for count in (1, 2)]
    assert found[0] == found[1]


def test_they_are_a_layer_apart(small: Settings) -> None:
    """What a lane sends, in order: (backward, layer, microbatch)."""
    pipeline = {"stages": 1, "batch_size": 3, "microbatches": 3}
    run = OneProcess(parse_config({**small, "pipeline": pipeline, "context": {"method": "full"}}))
    sent: list[tuple[bool, int, int]] = []
    chunk = run.lanes[0].stages[0].chunk
    assert chunk
    send = chunk._choice._transport.send  # pyright: ignore[reportOptionalMemberAccess]
    mailbox = run._threads._mailbox  # pyright: ignore[reportOptionalMemberAccess]

    class Noting:
        def send(self, lane: int, key: ContextKey, body: bytes) -> None:
            sent.append((key.gradient, key.layer, key.microbatch))
            send(lane, key, body)

        def receive(self, lane: int, key: ContextKey) -> bytes:
            return mailbox.of(0, 0).receive(lane, key)

    chunk.connect(Noting())
    try:
        run._each(lambda lane: lane.work(0), run.lanes)
    finally:
        run.close()
    one_way = [list(dict.fromkeys(each for each in sent if each[0] == gradient)) for gradient in (False, True)]
    assert one_way[0] == [(False, *each) for each in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2)]]
    assert one_way[1] == [(True, *each) for each in [(1, 0), (1, 1), (0, 0), (0, 1), (1, 2), (0, 2)]]


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("microbatch", [0, 1])
def test_a_lane_that_fails_in_either_ends_all(
    small: Settings, way: str, microbatch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = {"stages": 1, "batch_size": 2, "microbatches": 2}
    run = OneProcess(parse_config({**small, "pipeline": pipeline, "context": {"method": "full"}}))
    receive = LaneMailbox.receive

    def failing(self: LaneMailbox, lane: int, key: ContextKey) -> bytes:
        if (self.lane, key.microbatch, key.gradient, key.layer) == (1, microbatch, way == "backward", 1):
            raise ValueError(f"lane 1 fails at {key}")
        return receive(self, lane, key)

    monkeypatch.setattr(LaneMailbox, "receive", failing)
    try:
        with pytest.raises(ValueError, match=f"lane 1 fails at .*layer 1, .*microbatch {microbatch}"):
            run.train()
    finally:
        run.close()


def test_where_two_are_in_flight() -> None:
    full = {"method": "full"}
    assert config(2, context=full, pipeline={"stages": 1}).in_flight == 2
    assert config(2, context=full, pipeline={"stages": 1, "microbatches": 1}).in_flight == 1
    assert config(2, context=full).in_flight == 1  # stages that wait for one another have other work meanwhile
    assert config(2).in_flight == 1
    written = {"stages": 1, "microbatches": 2, "schedule": "order:FFBB"}
    assert config(2, context=full, pipeline=written).in_flight == 1
    assert config(2, context=full).digest() != config(2, context={**full, "in_flight": 2}).digest()


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({}, r"context\.in_flight = 2: lanes that hold sequences of their own do not wait"),
        ({"context": {"method": "full"}, "pipeline": {"microbatches": 1}}, r"= 2: a step has one microbatch"),
        (
            {"context": {"method": "full"}, "pipeline": {"stages": 1, "schedule": "order:FFBB"}},
            r"= 2: written orders are of single microbatches; .* gpipe, 1f1b or zb",
        ),
        ({"context": {"method": "full", "in_flight": 3}}, r"context\.in_flight"),
    ],
)
def test_where_two_cannot_be(sections: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        config(2, **{**sections, "context": {"in_flight": 2, **sections.get("context", {})}})
