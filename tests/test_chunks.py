"""Chunks: lanes that hold parts of the same sequences compute what one lane with whole sequences does."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thinpipe.compress.byte_format import CodecError
from thinpipe.compress.context_method import ContextShape
from thinpipe.compress.context_registry import parse_context
from thinpipe.compress.full_context import FullContext
from thinpipe.compress.mixture_of_subspaces import MixtureLayer
from thinpipe.compress.principal_components import principal
from thinpipe.node.config import ConfigError
from thinpipe.node.config_file import parse_config
from thinpipe.node.context import segment_attention
from thinpipe.node.context.chunk_layout import ChunkLayout
from thinpipe.node.context.context_exchange import ContextCoder, _key
from thinpipe.node.context.exchange import ContextKey
from thinpipe.node.context.lane_threads import LaneThreads
from thinpipe.node.context.mailbox import Mailbox
from thinpipe.node.data.batches import draw
from thinpipe.node.model import ModelError, StageModel, build_stage
from thinpipe.node.one_process import OneProcess
from thinpipe.node.preparation import check_lanes, prepare, resolve_architecture
from thinpipe.node.run_records import Stopwatch
from thinpipe.protocol.messages import Kind
from thinpipe.sim.reports.lanes import context_link_name
from thinpipe.sim.reports.lanes_summary import summarise_run

STEPS = 3
KEY = ContextKey(step=1, evaluation=False, microbatch=0, layer=2, segment=1)


TEXT: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def text(tiny_settings: dict[str, Any]) -> None:
    """That which other tests have prepared."""
    TEXT.update({key: tiny_settings[f"data.{key}"] for key in ("source", "cache")})


def config(lanes: int, **sections: dict[str, Any]) -> Any:
    tree: dict[str, dict[str, Any]] = {
        "run": {"steps": STEPS},
        "model": {"width": 64, "layers": 2, "vocab_size": 512},
        "data": {"sequence_length": 48, "heldout_sequences": 4, **TEXT},
        "pipeline": {"stages": 2, "batch_size": 4, "microbatches": 2},
        "codec": {"codec": "fp64"},
        "compute": {"dtype": "float64"},
        "lanes": {"count": lanes, "average": "gradients:format=fp64"},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree)


def trained(settings: Any) -> tuple[list[dict[str, torch.Tensor]], float]:
    """The weights of each lane after all steps, by name, and the mean held-out loss of all lanes."""
    run = OneProcess(settings)
    try:
        run.train()
        weights = [
            {name: parameter.detach() for stage in lane.stages for name, parameter in stage.trained}
            for lane in run.lanes
        ]
        evaluated = run._each(lambda lane: lane.evaluate(STEPS), run.lanes)
    finally:
        run.close()
    return weights, sum(evaluated) / len(evaluated)


# -- layout -----------------------------------------------------------------------------------------------------------


@given(chunks=st.integers(1, 9), length=st.integers(1, 6), order=st.sampled_from(["zigzag", "plain"]))
def test_each_token_is_computed_once_and_each_earlier_one_is_there(chunks: int, length: int, order: Any) -> None:
    layout = ChunkLayout(2 * chunks * length, chunks, order)
    held = [layout.lane_positions(lane) for lane in range(chunks)]
    assert sorted(position for each in held for position in each) == list(range(layout.sequence_length))
    assert {len(each) for each in held} == {layout.lane_length}
    for lane in range(chunks):
        there = {*layout.of_lane(lane), *layout.needed_by(lane)}
        assert there >= set(range(layout.of_lane(lane)[-1] + 1))
        assert all(lane in layout.users(segment) for segment in layout.needed_by(lane))
        assert all(layout.owner(segment) == lane for segment in layout.of_lane(lane))


def test_what_is_sent_first_is_looked_at_first() -> None:
    """Each lane sends its early segment before its late one; of either kind the nearest comes first."""
    assert ChunkLayout(64, 4).needed_by(1) == (3, 2, 0, 5, 4)
    assert ChunkLayout(64, 4).needed_by(0) == (3, 2, 1, 6, 5, 4)
    assert ChunkLayout(64, 4).needed_by(3) == (2, 1, 0)
    assert ChunkLayout(64, 4, "plain").needed_by(3) == (2, 1, 0)


@given(chunks=st.integers(2, 9), length=st.integers(1, 4))
def test_zigzag_gives_all_lanes_the_same_number_of_pairs(chunks: int, length: int) -> None:
    layout = ChunkLayout(2 * chunks * length, chunks)
    pairs = {sum(position + 1 for position in layout.lane_positions(lane)) for lane in range(chunks)}
    assert len(pairs) == 1


@given(chunks=st.integers(1, 5), history=st.integers(0, 7), order=st.sampled_from(["zigzag", "plain"]))
def test_what_a_lane_is_given_has_its_inputs_targets_and_what_is_before(chunks: int, history: int, order: Any) -> None:
    layout = ChunkLayout(6 * chunks, chunks, order)
    ids_BS = np.arange(2 * (layout.sequence_length + 1)).reshape(2, -1)
    for lane in range(chunks):
        given_BS = layout.take(ids_BS, lane, history)
        assert given_BS.shape == (2, layout.ids_length(lane, history))
        for segment, part in zip(layout.of_lane(lane), layout.apart(given_BS, lane, history), strict=True):
            own = layout.positions(segment)
            assert np.array_equal(part.inputs_BT, ids_BS[:, own.start : own.stop])
            assert np.array_equal(part.targets_BT, ids_BS[:, own.start + 1 : own.stop + 1])
            assert part.before == min(history, own.start)
            assert np.array_equal(part.known_BT, ids_BS[:, own.start - part.before : own.stop])


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_merged_segments_are_attention_over_all_keys(groups: int, plain: bool, monkeypatch: Any) -> None:
    if plain:
        monkeypatch.setattr(segment_attention, "_has_kernel", lambda _: False)
    made = torch.Generator().manual_seed(groups)
    q, do = (torch.randn(2, 4, 5, 8, dtype=torch.float64, generator=made) for _ in range(2))
    k, v = (torch.randn(2, groups, 12, 8, dtype=torch.float64, generator=made) for _ in range(2))
    parts = [(slice(0, 7), False), (slice(7, 12), True)]
    merged = None
    for part, causal in parts:
        found = segment_attention.forward(q, k[:, :, part], v[:, :, part], causal=causal, scale=0.3)
        merged = segment_attention.merge(merged, found)
    assert merged
    whole = [each.clone().requires_grad_() for each in (q, k, v)]
    wide = [segment_attention.spread(each, 4) for each in whole[1:]]
    seen = torch.ones(5, 12, dtype=torch.bool).tril(7)
    wanted = torch.softmax((whole[0] @ wide[0].mT * 0.3).masked_fill(~seen, float("-inf")), -1) @ wide[1]
    torch.testing.assert_close(merged[0], wanted, rtol=1e-12, atol=1e-12)
    wanted.backward(do)
    dq = torch.zeros_like(q)
    for part, causal in parts:
        keys, values = k[:, :, part], v[:, :, part]
        through, dk, dv = segment_attention.backward(do, q, keys, values, *merged, causal=causal, scale=0.3)
        dq += through
        for mine, theirs in ((dk, whole[1].grad), (dv, whole[2].grad)):
            assert theirs is not None
            torch.testing.assert_close(mine, theirs[:, :, part], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(dq, whole[0].grad, rtol=1e-11, atol=1e-12)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "order", "stages", "schedule"),
    [
        pytest.param(2, "zigzag", 2, "1f1b", marks=pytest.mark.slow),
        (3, "plain", 1, "1f1b"),
        pytest.param(4, "zigzag", 1, "gpipe", marks=pytest.mark.slow),
        (3, "zigzag", 2, "zb"),
    ],
)
def test_chunks_are_one_lane_with_whole_sequences(chunks: int, order: str, stages: int, schedule: str) -> None:
    pipeline = {"stages": stages, "schedule": schedule}
    parts, part_loss = trained(config(chunks, pipeline=pipeline, context={"method": "full", "order": order}))
    (whole,), whole_loss = trained(config(1, pipeline=pipeline))
    assert part_loss == pytest.approx(whole_loss, rel=1e-9)
    for lane in parts:
        for name, weights in whole.items():
            difference = (lane[name] - weights).norm() / weights.norm()
            assert difference <= 1e-8, f"{name}: {difference}"


def test_a_codec_that_looks_at_the_last_tokens_sees_those_of_the_chunk_before() -> None:
    codec = {"codec": "mapl:r=64,projector=fixed,context=4", "forward": "fp64", "backward": "fp64"}
    parts, part_loss = trained(config(2, codec=codec, context={"method": "full"}))
    (whole,), whole_loss = trained(config(1, codec=codec))
    assert part_loss == pytest.approx(whole_loss, rel=1e-9)
    name = next(each for each in whole if "context.embedding" in each)
    assert (parts[1][name] - whole[name]).norm() <= 1e-8 * whole[name].norm()


@pytest.mark.parametrize("mixture", ["learned", "random", "none"])
@pytest.mark.parametrize("order", ["zigzag", "plain"])
def test_gradients_of_mixtures_of_subspaces_are_those_of_one_graph(order: Any, mixture: str) -> None:
    """Angles and what crosses: against ordinary attention over whole sequences whose keys and values are made by the
    same projections, all segments on one node."""
    spec = f"mos:k=0.25,v=0.5,mixture={mixture}"
    settings = config(3, pipeline={"stages": 1}, context={"method": spec, "order": order})
    run = OneProcess(settings)
    try:
        run._each(lambda lane: lane.work(0), run.lanes)
        gradients = [{name: each.grad for name, each in lane.stages[0].trained} for lane in run.lanes]
    finally:
        run.close()
    method, layout = parse_context(spec), settings.chunk_layout
    whole = config(1, pipeline={"stages": 1})

    def attach(model: StageModel) -> None:
        for layer, module in enumerate(model.layer_modules):
            attention: Any = module.self_attn
            shape = ContextShape(
                seed=1,
                layer=layer,
                width=64,
                heads=model.causal.config.num_key_value_heads,
                head_width=attention.head_dim,
                segments=layout.segments,
                segment_length=layout.segment_length,
                dtype=torch.float64,
            )
            method.attach(attention, shape)

    model = build_stage(
        resolve_architecture(whole), stage=0, stages=1, seed=1, dtype=torch.float64, device="cpu", constrain=attach
    )
    for microbatch in range(2):
        ids = torch.from_numpy(draw(run.corpus, whole, Kind.ACTIVATION, 0, microbatch).astype(np.int64))
        logits = model(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for name, parameter in model.full_names():
        assert parameter.grad is not None
        mine = sum(each[name] for each in gradients)
        assert isinstance(mine, torch.Tensor)
        assert (mine - parameter.grad).norm() <= 1e-9 * parameter.grad.norm(), name


def test_subspaces_are_the_principal_components_of_what_all_lanes_saw() -> None:
    run = OneProcess(config(3, context={"method": "mos:k=0.25,v=0.5,warm=1"}))
    try:
        run._step(0)
        for stages in zip(*(lane.stages for lane in run.lanes), strict=True):
            chunks = [stage.chunk for stage in stages if stage.chunk]
            by_lane = [next(iter(chunk._layers.values()))[1].grams() for chunk in chunks]
            for which in range(2):
                total = sum(grams[which] for grams in by_lane)
                assert isinstance(total, torch.Tensor)
                assert all((grams[which] - total).norm() > 0.1 * total.norm() for grams in by_lane)
                for chunk in chunks:
                    _, layer = next(iter(chunk._layers.values()))
                    assert isinstance(layer, MixtureLayer)
                    frame = (layer.keys, layer.values)[which].frame[0]
                    torch.testing.assert_close(frame, principal(total, frame.shape[1]), rtol=0, atol=1e-12)
    finally:
        run.close()


def test_after_a_warm_start_all_lanes_have_the_same_subspaces() -> None:
    method = "mos:k=0.25,v=0.5,warm=1,fold=0.34"
    lanes, loss = trained(config(3, context={"method": method}, pipeline={"schedule": "zb"}))
    frames = [name for name in lanes[0] if name.endswith(".frame")]
    assert len(frames) == 4
    assert np.isfinite(loss)
    cold, _ = trained(config(3, context={"method": "mos:k=0.25,v=0.5"}))
    assert not set(frames) & set(cold[0])
    for lane in lanes[1:]:
        assert all(torch.equal(lane[name], lanes[0][name]) for name in lane)


@pytest.mark.parametrize("order", ["zigzag", "plain"])
def test_what_crosses_in_one_process_is_counted_as_links_would(order: str, tmp_path: Path) -> None:
    """Body bytes exactly: 2 heads of 16 numbers for keys, and for values, in 8 bytes each."""
    settings = config(3, context={"method": "full", "order": order}, data={"sequence_length": 48})
    run = OneProcess(settings, tmp_path)
    try:
        run.train()
    finally:
        run.close()
    layout, heads = settings.chunk_layout, resolve_architecture(settings).num_key_value_heads
    part = 2 * layout.segment_length * 2 * heads * (64 // resolve_architecture(settings).num_attention_heads) * 8
    found = summarise_run(tmp_path, lanes=3, stages=2, width=64, mode="one-process")["context"]
    total = {"context": 0, "context_gradient": 0}
    for lane in run.lanes:
        for stage, rows in enumerate(lane.sent_to_lanes):
            for other in range(3):
                if other == lane.lane:
                    continue
                needs = [
                    sum(layout.owner(segment) == owner for segment in layout.needed_by(user)) * part * 2 * STEPS
                    for user, owner in ((other, lane.lane), (lane.lane, other))
                ]
                row = rows.get(context_link_name(stage, lane.lane, other), {})
                assert [row.get(kind, 0) for kind in total] == needs  # one layer a stage, 2 microbatches
                total["context"] += needs[0] + row.get("framing", 0)
                total["context_gradient"] += needs[1]
    assert {kind: found[kind] for kind in total} == total
    assert found["bytes"] == sum(total.values())


def test_a_window_is_refused_by_name(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = {"model_type": "mistral", **sizes, "num_key_value_heads": 2, "vocab_size": 512, "sliding_window": 16}
    (tmp_path / "config.json").write_text(json.dumps(model), encoding="utf-8")
    settings = config(2, model={"path": str(tmp_path), "width": None, "layers": None}, context={"method": "full"})
    with pytest.raises(ModelError, match=r"architecture 'mistral' cannot be cut into chunks: .* takes sliding_window"):
        trained(settings)


def test_bits_do_not_depend_on_which_thread_is_first() -> None:
    settings = config(2, compute={"dtype": "float32"}, context={"method": "full:format=int8"})
    first, again = trained(settings), trained(settings)
    assert first[1] == again[1]
    assert all(torch.equal(first[0][1][name], tensor) for name, tensor in again[0][1].items())


def test_bfloat16_trains_too() -> None:
    _, loss = trained(config(2, compute={"dtype": "bfloat16"}, context={"method": "full"}, codec={"codec": "bf16"}))
    assert np.isfinite(loss)


# -- parts ------------------------------------------------------------------------------------------------------------


def coder(spec: str) -> ContextCoder:
    shape = ContextShape(
        seed=1, layer=2, width=64, heads=2, head_width=8, segments=1, segment_length=4, dtype=torch.float32
    )
    return ContextCoder(parse_context(spec), shape, batch=3, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("spec", ["full", "full:format=int8", "full:format=int4,backward=bf16"])
def test_parts_have_the_length_that_was_agreed_and_come_out_alike(spec: str) -> None:
    both, z = coder(spec), torch.randn(3, 4, 32)
    body = both.pack(KEY, 7, (z, z.new_empty(3, 0)))
    assert len(body) == both.body_bytes(KEY)
    found, _ = both.unpack(KEY, 7, body, lane=0)
    torch.testing.assert_close(found, z, atol=0.6, rtol=0.1)
    with pytest.raises(CodecError, match=r"lane 3: keys and values of layer 2, segment 1.*bytes"):
        both.unpack(KEY, 7, body[:-1], lane=3)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("ful", "unknown context method 'ful'; the nearest known one is 'full'"),
        ("full:k=1", "has no option 'k'"),
        ("full:format=int9", "unknown byte format 'int9'"),
    ],
)
def test_an_unknown_method_is_named(spec: str, line: str) -> None:
    with pytest.raises(CodecError, match=line):
        parse_context(spec)


def test_no_two_parts_of_a_run_round_with_the_same_numbers() -> None:
    fields = itertools.product(range(2), (False, True), range(2), range(3), range(4), (False, True))
    names = ("step", "evaluation", "microbatch", "layer", "segment", "gradient")
    keys = [ContextKey(**dict(zip(names, each, strict=True))) for each in fields]
    drawn = {tuple(_key(key, seed).generator().random_raw(2)) for key in keys for seed in (1, 2)}
    assert len(drawn) == 2 * len(keys)


def test_a_format_that_learns_is_refused() -> None:
    with pytest.raises(CodecError, match="learns from what it packed before"):
        coder("full:format=rvq")


def test_settings_that_cannot_be_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"not 8 equal segments.*choose a length such as 48"):
        config(4, data={"sequence_length": 50}, context={"method": "full"})
    with pytest.raises(ConfigError, match=r"lanes\.count = 1"):
        config(1, context={"method": "full"})
    with pytest.raises(ConfigError, match="codec 'ssn' does not go with chunks"):
        check_lanes(config(2, codec={"codec": "ssn:k=16"}, context={"method": "full"}))
    with pytest.raises(ConfigError, match=r"warm=3 of 3 steps.*lower warm"):
        check_lanes(config(2, context={"method": "mos:k=0.25,v=0.5,warm=3"}))
    with pytest.raises(ConfigError, match=r"context\.method: unknown context method 'fool'"):
        check_lanes(config(2, context={"method": "fool"}))


def test_a_lane_that_fails_ends_the_waiting_of_the_others() -> None:
    mailbox = Mailbox(deadline_s=60.0)
    threads = LaneThreads(2, mailbox)
    waits = threading.Event()

    def work(lane: int) -> None:
        if lane == 1:
            waits.wait(10.0)
            raise ValueError("lane 1 fails")
        waits.set()
        mailbox.of(0, 0).receive(1, KEY)

    with pytest.raises(ValueError, match="lane 1 fails"):
        threads.each(work, [0, 1])
    threads.close()


def test_a_part_that_does_not_come_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"lane 0 waited 0\.01 s for keys and values of layer 2, segment 1, step 1"):
        Mailbox(deadline_s=0.01).of(0, 0).receive(1, KEY)


def test_waiting_for_a_part_is_no_computing() -> None:
    mailbox, asked = Mailbox(deadline_s=10.0), []

    class Watch(Stopwatch):
        @contextmanager
        def waiting_within(self, activity: Literal["compute", "codec"]) -> Iterator[None]:
            with super().waiting_within(activity):
                mailbox.of(0, 1).send(0, KEY, b"part")  # not before the other lane waits
                asked.append(activity)
                yield

    watch = Watch()
    with watch.measure("compute"):
        assert mailbox.of(0, 0, watch=watch).receive(1, KEY) == b"part"
    spent = watch.take()
    assert asked == ["compute"]
    assert spent["wait_s"] > 0 <= spent["compute_s"]


def test_full_is_as_wide_as_keys_and_values() -> None:
    shape = ContextShape(
        seed=1, layer=0, width=64, heads=2, head_width=8, segments=1, segment_length=4, dtype=torch.float32
    )
    assert (FullContext().wire_width(shape), FullContext().scalars(shape)) == (32, 0)


def test_nodes_compare_what_their_method_generates() -> None:
    """Also those without a layer, and a node whose generator gives other numbers is another run's."""

    def digests(method: str, seed: int = 0) -> set[str]:
        settings = config(2, context={"method": method}, pipeline={"cut": "2,0"}, run={"seed": seed})
        places = itertools.product(range(2), range(2))
        return {prepare(settings, stage, lane)[0].token_table_digest for stage, lane in places}

    (one,), (other,) = digests("mos:k=0.25,v=0.5"), digests("mos:k=0.25,v=0.5", seed=1)
    assert one
    assert one != other
    assert digests("mos:k=0.5,v=0.5") not in ({one}, {other})
    assert digests("full") == {""}
