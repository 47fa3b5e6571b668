"""Which layers a stage has: equal, stated and balanced cuts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.node import preparation
from thinpipe.node.config import ConfigError
from thinpipe.node.config_file import merge, parse_config
from thinpipe.node.model import ModelError, partition, resolve_model
from thinpipe.node.model.stage_cut import equal_cut, layer_ranges, stated_cut
from thinpipe.node.preparation import run_digest
from thinpipe.node.stage_costs import operations, stage_layers
from thinpipe.sim.links.stage_work import balanced_cut, least_layers

COSTS = st.floats(0.0, 8.0)
SPEEDS = st.floats(0.1, 4.0)


def slowest_s(counts: tuple[int, ...], of_layer: float, of_ends: list[float], speeds: list[float]) -> float:
    return max((n * of_layer + end) / speed for n, end, speed in zip(counts, of_ends, speeds, strict=True))


@given(data=st.data(), stages=st.integers(1, 4), layers=st.integers(2, 7), last=st.integers(0, 2))
@settings(deadline=None)
def test_no_cut_has_a_faster_slowest_stage(data: st.DataObject, stages: int, layers: int, last: int) -> None:
    """By trying them all."""
    least = least_layers(stages, last=last)
    if sum(least) > layers:
        return
    of_ends, speeds = (data.draw(st.lists(each, min_size=stages, max_size=stages)) for each in (COSTS, SPEEDS))
    found = balanced_cut(layers, of_layer=1.0, of_ends=of_ends, speeds=speeds, least=least)
    assert sum(found) == layers
    assert all(got >= wanted for got, wanted in zip(found, least, strict=True))
    possible = (counts for counts in itertools.product(*(range(n, layers + 1) for n in least)) if sum(counts) == layers)
    best_s = min(slowest_s(counts, 1.0, of_ends, speeds) for counts in possible)
    assert slowest_s(tuple(found), 1.0, of_ends, speeds) == best_s


@given(layers=st.integers(1, 40), stages=st.integers(1, 12))
def test_alike_stages_without_a_head_are_cut_equally(layers: int, stages: int) -> None:
    if layers < stages:
        with pytest.raises(ModelError, match=f"{stages} stages, but the model has {layers} layers"):
            equal_cut(layers, stages)
        return
    found = balanced_cut(
        layers, of_layer=3.0, of_ends=[1.0] * stages, speeds=[2.0] * stages, least=least_layers(stages)
    )
    assert found == equal_cut(layers, stages)
    assert layer_ranges(found) == partition(layers, stages)


@pytest.mark.parametrize(
    ("counts", "fault"),
    [
        ([4, 4], "is for 2 stages, but there are 3"),
        ([4, 3, 0], "has 7 layers, but the model has 8"),
        ([8, 0, 0], "leaves stage 1 without a layer"),
    ],
)
def test_a_stated_cut_has_to_fit(counts: list[int], fault: str) -> None:
    with pytest.raises(ModelError, match=fault):
        stated_cut(counts, 8, 3)
    assert stated_cut([0, 8, 0], 8, 3) == [0, 8, 0]


def cut_of(codec: str = "mapl", **given: Any) -> tuple[list[int], str]:
    """(layers of each stage, the digest that neighbours compare) of the 150m shape."""
    overrides = {"model.preset": "150m", "model.vocab_size": 32768, "data.sequence_length": 1024, "codec.codec": codec}
    config = parse_config(merge({}, overrides | {f"pipeline.{key}": value for key, value in given.items()}))
    architecture = resolve_model(config.model, vocab_size=32768, sequence_length=1024)
    return [len(layers) for layers in stage_layers(config, architecture)], run_digest(config, architecture)


def test_the_head_and_the_machines_decide() -> None:
    """150m: the head is as much work as three of its eight layers."""
    assert cut_of()[0] == [3, 2, 2, 1]  # a narrow boundary has a layer behind it
    assert cut_of("bf16")[0] == cut_of("int4:hadamard=true")[0] == [3, 3, 2, 0]
    assert cut_of(cut="equal")[0] == [2, 2, 2, 2]
    assert cut_of("bf16", speeds="1,1,0.5,0.25")[0] == [4, 3, 1, 0]
    assert cut_of("bf16", speeds=[0.01, 1, 1, 4])[0] == [0, 2, 1, 5]
    assert cut_of(cut=[5, 1, 1, 1])[0] == [5, 1, 1, 1]


def test_a_stage_between_two_others_has_a_layer() -> None:
    """However slow its machine is."""
    assert least_layers(4, last=1) == [0, 1, 1, 1]
    assert least_layers(4) == [0, 1, 1, 0]
    assert least_layers(2, last=2) == [0, 2]
    assert least_layers(1, last=1) == [1]
    assert cut_of("bf16", speeds="1,0.001,1,1")[0][1] == 1


def test_the_digest_has_the_layers_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two releases of this program may find another cut from the same settings."""
    before = cut_of()[1]
    monkeypatch.setattr(preparation, "stage_layers", lambda *_: layer_ranges([2, 3, 2, 1]))
    assert cut_of()[1] != before


def test_neighbours_compare_the_cut() -> None:
    """And the machines of a run and its checkpoints with them: the digest is the run's."""
    digests = {cut_of(cut=cut)[1] for cut in ("auto", "equal", "3,3,1,1")}
    assert len(digests) == 3
    assert cut_of(cut="3, 3, 2, 0") == cut_of(cut=[3, 3, 2, 0])
    assert cut_of(speeds="1,1,1,2")[1] != cut_of()[1]


def test_a_codec_s_free_layers_are_left_to_the_last_stage() -> None:
    settings = {"codec.codec": "ssn:k=16,free=1", "model.preset": "150m", "model.vocab_size": 32768}
    config = parse_config(merge({}, settings))
    architecture = resolve_model(config.model, vocab_size=32768, sequence_length=1024)
    assert [len(layers) for layers in stage_layers(config, architecture)] == [3, 2, 2, 1]


def test_operations_are_those_of_the_shapes() -> None:
    config = parse_config(merge({}, {"codec.codec": "mapl:r=8,context=0", "model.preset": "tiny"}))
    architecture = resolve_model(config.model, vocab_size=512, sequence_length=128)
    costs, width = operations(config, architecture), architecture.hidden_size
    assert costs.head == 2 * 512 * width
    assert costs.layer_weights == 2 * (4 * width**2 + 3 * width * architecture.intermediate_size)
    assert costs.attention == 2 * config.data.sequence_length * width
    assert costs.codec_end == 2 * 8 * width
    assert costs.of_stages([0, 3, 1]) == [
        costs.codec_end,
        3 * costs.layer + 2 * costs.codec_end,
        costs.layer + costs.codec_end + costs.head,
    ]


def test_attention_is_as_wide_as_its_heads() -> None:
    """Which together may be wider than a hidden state."""
    config = parse_config(merge({}, {"codec.codec": "bf16", "model.preset": "tiny"}))
    architecture = resolve_model(config.model, vocab_size=512, sequence_length=128)
    narrow = operations(config, architecture)
    architecture.head_dim = 2 * architecture.hidden_size // architecture.num_attention_heads
    wide = operations(config, architecture)
    assert wide.attention == 2 * narrow.attention
    assert wide.layer_weights - narrow.layer_weights == 2 * 4 * architecture.hidden_size**2
    assert wide.head == narrow.head


def test_speeds_are_numbers_above_zero() -> None:
    for wrong in ("1,0", "1,nan", "1,inf", [1, "x"]):
        with pytest.raises(ConfigError, match=r"pipeline\.speeds"):
            parse_config(merge({}, {"pipeline.stages": 2, "pipeline.speeds": wrong}))
