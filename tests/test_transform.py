"""Transform coding: levels, bits, wire format, what is learned, and when the table changes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.compress.bit_allocation import DISTORTIONS, LEVELS, MOST_BITS, allocated, left_over
from thinpipe.compress.byte_format import CodecError, Direction, Key, Payload
from thinpipe.compress.registry import parse_codec, parse_format
from thinpipe.compress.transform import Transform
from thinpipe.node.boundary.endpoints import BoundaryShape, DownstreamEndpoint, Encoded, UpstreamEndpoint
from thinpipe.protocol.errors import RemoteProtocolError
from thinpipe.protocol.messages import Kind, Message
from thinpipe.sim.reports.summary import read_records

from .conftest import TinyConfig
from .in_memory import run_reference

laws = settings(deadline=None, max_examples=40)


def key(step: int = 0, microbatch: int = 0) -> Key:
    return Key(seed=1, boundary=0, direction=Direction.FORWARD, step=step, microbatch=microbatch)


def tokens(deviations_W: torch.Tensor, count: int = 2048, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    """Normal, with these standard deviations along axes that are nobody's."""
    draw = torch.Generator().manual_seed(seed)
    axes_WW = torch.linalg.qr(torch.randn(len(deviations_W), len(deviations_W), generator=draw))[0]
    x_NW = torch.randn(count, len(deviations_W), generator=torch.Generator().manual_seed(seed + 100))
    return x_NW * deviations_W @ axes_WW.mT + mean


def following(fmt: Transform, *tensors: torch.Tensor) -> Transform:
    """As a node does, with the table shipped each time."""
    for z in tensors:
        fmt.learn(z, key())
        fmt.use_table(fmt.master)
    return fmt


def round_trip(fmt: Transform, z: torch.Tensor) -> torch.Tensor:
    return fmt.unpack(fmt.pack(z, key()), shape=tuple(z.shape), dtype=torch.float32)


def relative_error(fmt: Transform, z: torch.Tensor) -> float:
    return ((round_trip(fmt, z) - z).norm() / z.norm()).item()


# -- bits ----------------------------------------------------------------------------------------------------------


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if x < math.inf else 0.0


def _above(x: float) -> float:
    return 0.5 * math.erfc(x / math.sqrt(2)) if x < math.inf else 0.0


@pytest.mark.parametrize("bits", range(1, MOST_BITS + 1))
def test_levels_are_those_of_the_best_quantiser_of_a_normal_variable(bits: int) -> None:
    """Each is the mean of what is nearest to it (Max, 1960), and D(b) is what that leaves."""
    half = LEVELS[bits]
    assert len(half) == 2 ** (bits - 1)
    edges = [0.0, *((one + other) / 2 for one, other in itertools.pairwise(half)), math.inf]
    shares = [_above(first) - _above(end) for first, end in itertools.pairwise(edges)]
    means = [
        (_density(a) - _density(b)) / share for (a, b), share in zip(itertools.pairwise(edges), shares, strict=True)
    ]
    assert half == pytest.approx(means, abs=2e-6)
    assert DISTORTIONS[bits] == pytest.approx(
        1 - 2 * sum(p * x * x for p, x in zip(shares, half, strict=True)), abs=1e-6
    )


@laws
@given(variances=st.lists(st.floats(0, 1e6), min_size=1, max_size=4), data=st.data())
def test_no_other_allocation_of_as_many_bits_leaves_less(variances: list[float], data: st.DataObject) -> None:
    bits = data.draw(st.integers(0, MOST_BITS * len(variances)))
    found = allocated(np.array(variances), bits)
    assert found.sum() == bits
    every = itertools.product(range(MOST_BITS + 1), repeat=len(variances))
    best = min(left_over(variances, other) for other in every if sum(other) == bits)
    assert left_over(variances, found) == pytest.approx(best, rel=1e-12)


def test_of_equal_gains_the_first_one_counts() -> None:
    assert allocated(np.ones(4), 6).tolist() == [2, 2, 1, 1]
    assert allocated(np.zeros(3), 4).tolist() == [4, 0, 0]
    with pytest.raises(ValueError, match="16 bits for 3 coordinates of at most 5 each"):
        allocated(np.ones(3), 16)


# -- what crosses --------------------------------------------------------------------------------------------------


@laws
@given(
    width=st.integers(1, 12),
    count=st.integers(0, 9),
    scale=st.sampled_from(["bf16", "log8", "log4"]),
    data=st.data(),
)
def test_length_is_known_beforehand(width: int, count: int, scale: Any, data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, MOST_BITS * width))
    fmt = following(Transform(bits=bits, scale=scale), tokens(torch.rand(width), 30))
    z = tokens(torch.ones(width), count)
    payload = fmt.pack(z, key())
    scales = {"bf16": 2 * count, "log8": count + 2, "log4": math.ceil(count / 2) + 2}[scale] if count else 0
    assert len(payload.body) == fmt.body_bytes(tuple(z.shape)) == scales + math.ceil(count * bits / 8)
    assert bool(round_trip(fmt, z).isfinite().all())


def test_golden_bytes() -> None:
    """Fixed for good: whoever changes these needs another format id."""
    fmt = Transform(bits=3, scale="bf16")
    # mean (1, -1, 0); axes: the third number, the first, the second; deviations 2, 1, 0: two bits, one, none
    fmt.use_table(torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, 2], [1, 0, 0, 1], [0, 1, 0, 0]]))
    body = bytes.fromhex("0040" + "803f") + bytes([0b110 | 0b001 << 3])  # scales 2 and 1; codes 2 and 1, then 1 and 0
    payload = Payload(codec="transform", header={"shape": [2, 3]}, body=body)
    back = fmt.unpack(payload, shape=(2, 3), dtype=torch.float32)
    wanted = [[1 + 2 * 0.7978846, -1, 2 * 2 * 0.45278], [1 - 0.7978846, -1, -2 * 0.45278]]
    torch.testing.assert_close(back, torch.tensor(wanted))


@pytest.mark.parametrize("bits", [16, 40, 96])
@pytest.mark.parametrize("fall", [0.0, 0.5, 1.5])
def test_what_is_lost_is_what_the_allocation_says(fall: float, bits: int) -> None:
    deviations = torch.arange(1, 33, dtype=torch.float32) ** -fall
    fmt = following(Transform(bits=bits, scale="bf16"), *(tokens(deviations, 8192) for _ in range(3)))
    variances = deviations.double().square().numpy()
    expected = math.sqrt(left_over(variances, allocated(variances, bits)) / variances.sum())
    # A token is divided by its own length, so what is coded is a little less spread out than normal.
    assert relative_error(fmt, tokens(deviations, 8192)) == pytest.approx(expected, rel=0.12)


def test_the_rank_follows_what_is_sent() -> None:
    """Few coordinates where few matter, at the same bytes; and better than as many bits for each of all."""
    even, steep = (torch.arange(1, 33, dtype=torch.float32) ** -fall for fall in (0.0, 1.5))
    ranks = {}
    for name, deviations in (("even", even), ("steep", steep)):
        fmt = following(Transform(bits=64), tokens(deviations))
        ranks[name] = fmt.measures()["rank"]
        assert fmt.body_bytes((2048, 32)) == 2 + 1024 + 2048 * 8
    assert ranks["even"] == 32
    assert ranks["steep"] < 26
    z = tokens(steep)
    fmt = following(Transform(bits=64, scale="bf16"), z)
    table, chosen = fmt.master.clone(), relative_error(fmt, z)
    table[1:, -1] = 1.0  # two bits each, in steps that suit none
    fmt.use_table(table)
    assert chosen < 0.3 * relative_error(fmt, z)


def test_a_mean_costs_nothing() -> None:
    lost = []
    for mean in (0.0, 30.0, 3000.0):
        z = tokens(torch.ones(16), mean=mean)
        lost.append((round_trip(following(Transform(bits=24), z), z) - z).norm().item())
    assert lost[1:] == pytest.approx(lost[:1] * 2, rel=0.03)


def test_it_follows_what_changes() -> None:
    one, other = tokens(torch.arange(1, 17) ** -1.5), tokens(torch.arange(1, 17) ** -1.5, seed=5)
    fmt = following(Transform(bits=16, decay=0.8), one)
    before = relative_error(fmt, other)
    assert relative_error(following(fmt, *[other] * 30), other) < 0.8 * before
    assert relative_error(fmt, other) == pytest.approx(
        relative_error(following(Transform(bits=16), other), other), rel=0.1
    )


def test_zeros_teach_nothing() -> None:
    fmt = following(Transform(), torch.zeros(8, 6))
    assert not round_trip(fmt, torch.zeros(8, 6)).any()
    z = tokens(torch.rand(6) + 0.1)
    following(fmt, z)
    assert torch.equal(fmt.master, following(Transform(), z).master)
    kept = fmt.state_tensors()
    fmt.learn(torch.zeros(8, 6), key())
    assert fmt.state_tensors() == kept


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_table_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(CodecError, match="wants a table of finite numbers"):
        Transform(bits=2).use_table(torch.tensor([[0.0, 0, 0], [1, 0, bad], [0, 1, 0.5]]))


def test_a_table_that_was_shipped_in_few_bits_may_be_out_of_order() -> None:
    """The same axes with the same deviations, whatever their order; what is below zero gets no bits."""
    z = tokens(torch.tensor([0.2, 3.0, 1.0, 0.0]), 64)
    fmt = following(Transform(bits=7), z)
    in_order, table = fmt.pack(z, key()), fmt.master.clone()
    table[4, -1] = -1.0
    fmt.use_table(torch.cat([table[:1], table[[3, 1, 4, 2]]]))
    assert fmt.pack(z, key()) == in_order


def test_bits_behind_the_last_code_are_refused() -> None:
    fmt, z = following(Transform(bits=3), tokens(torch.ones(2))), tokens(torch.ones(2), 3)
    payload = fmt.pack(z, key())
    body = payload.body[:-1] + bytes([payload.body[-1] | 0x80])
    with pytest.raises(CodecError, match="bits behind its last code"):
        fmt.unpack(replace(payload, body=body), shape=(3, 2), dtype=torch.float32)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("transform:bits=0", "bits=0 has to be at least 1"),
        ("transform:every=0", "every=0 has to be at least 1"),
        ("transform:decay=1", "decay=1 has to be at least 0 and below 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(spec: str, expected: str) -> None:
    with pytest.raises(CodecError, match=expected):
        parse_format(spec)


def test_more_bits_than_numbers_can_take_are_refused() -> None:
    with pytest.raises(CodecError, match="bits=41 are more than 5 for each of 8 numbers; say bits=40 or less"):
        parse_format("transform:bits=41").table(8)


def test_mapl_with_a_rank_that_follows() -> None:
    codec = parse_codec("mapl:r=auto,bits=52")
    assert codec.codec.wire_width(128) == 18
    assert codec.forward.body_bytes((1000, 18)) == codec.backward.body_bytes((1000, 18)) == 2 + 500 + 6500
    codec.codec.check(18)
    with pytest.raises(CodecError, match="r=18 is above the model's width 16; lower bits"):
        codec.codec.check(16)
    assert parse_codec("mapl:r=auto").forward.body_bytes((1000, 32)) == 2 + 500 + 12000
    with pytest.raises(CodecError, match="bits=0 has to be at least 1"):
        parse_codec("mapl:r=auto,bits=0")
    with pytest.raises(CodecError, match="bits=9 has to be left out"):
        parse_codec("mapl:bits=9")


# -- when the table changes ----------------------------------------------------------------------------------------


Ends = tuple[DownstreamEndpoint, UpstreamEndpoint]


def pair(forward: str, backward: str) -> Ends:
    def shape() -> BoundaryShape:
        return BoundaryShape(
            boundary=0,
            seed=1,
            microbatch_size=2,
            sequence_length=16,
            wire_width=8,
            vocab_size=500,
            forward=parse_format(forward),
            backward=parse_format(backward),
            table=None,
            dtype=torch.float32,
            microbatches=2,
        )

    place: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    return DownstreamEndpoint(shape(), **place), UpstreamEndpoint(shape(), **place)


@pytest.fixture
def ends() -> Ends:
    return pair("transform:every=3", "transform:every=2")


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_changes_in_few_bits_of_axes_that_are_about_alike(encoding: str) -> None:
    """Whatever rounding makes of their order, both ends go by what was shipped."""
    down, up = pair(f"transform:every=1,encoding={encoding}", f"transform:every=1,encoding={encoding}")
    for step in range(12):
        z = tokens(torch.ones(8), 32, seed=step).view(2, 16, 8)
        message = down.pack_activation(Encoded(z_BTW=z), np.arange(34), step, 0, Kind.ACTIVATION)
        _, received = up.unpack_activation(message)
        assert ((received.z_BTW - z).norm() / z.norm()).item() < 0.6
        down.unpack_gradient(up.pack_gradient(z, step, 0, 1.0))


def _activation(down: DownstreamEndpoint, step: int, microbatch: int, kind: Kind = Kind.ACTIVATION) -> Message:
    z = tokens(torch.arange(1, 9) ** -1.0, 32, seed=step).view(2, 16, 8)
    return down.pack_activation(Encoded(z_BTW=z), np.arange(34), step, microbatch, kind)


def test_it_changes_with_the_first_tensor_of_a_step_that_is_due(
    ends: Ends,
) -> None:
    down, up = ends
    changed: dict[str, list[tuple[int, int]]] = {"activations": [], "gradients": []}
    for step, microbatch in itertools.product(range(7), range(2)):
        message = _activation(down, step, microbatch)
        _, received = up.unpack_activation(message)
        payload = Payload(codec=message.codec, header=message.codec_header, body=bytes(message.body))
        as_meant = down.shape.forward.unpack(payload, shape=down.shape.z_shape, dtype=torch.float32)
        assert torch.equal(received.z_BTW, as_meant)
        gradient = up.pack_gradient(tokens(torch.ones(8), 32, seed=step).view(2, 16, 8), step, microbatch, 1.0)
        down.unpack_gradient(gradient)
        for name, each in (("activations", message), ("gradients", gradient)):
            if each.dictionary:
                changed[name].append((step, microbatch))
    assert changed == {
        "activations": [(0, 0), (3, 0), (6, 0)],
        "gradients": [(0, 0), (2, 0), (4, 0), (6, 0)],
    }
    up.unpack_activation(_activation(down, 7, 0, Kind.EVALUATION))


def test_a_change_that_is_not_due_is_refused_and_so_is_one_that_is_missing(
    ends: Ends,
) -> None:
    down, up = ends
    first = _activation(down, 0, 0)
    up.unpack_activation(first)
    second = _activation(down, 0, 1)
    with pytest.raises(RemoteProtocolError, match="where none is due"):
        up.unpack_activation(replace(second, dictionary=first.dictionary))
    up.unpack_activation(second)
    for step in (1, 2):
        up.unpack_activation(_activation(down, step, 0))
    due = _activation(down, 3, 0)
    header = {**due.codec_header, "codebook": second.codec_header["codebook"]}
    with pytest.raises(RemoteProtocolError, match="brings no change of 'codebook', where one is due"):
        up.unpack_activation(replace(due, dictionary=b"", codec_header=header))
    up.unpack_activation(due)


def test_records_say_the_rank(tiny: TinyConfig, tmp_path: Path) -> None:
    run_reference(tiny({"pipeline.stages": 2, "codec.codec": "mapl:r=auto,bits=24"}), tmp_path)
    for stage, way in ((0, "activation"), (1, "gradient")):
        *_, last = [r["codec"] for r in read_records(tmp_path / f"stage-{stage}.jsonl") if r["event"] == "step"]
        assert 1 <= last[f"{way}_rank"] <= 24
        assert 1 <= last[f"{way}_most_bits"] <= MOST_BITS
        assert 0 < last[f"{way}_reconstruction_error"] < 1
