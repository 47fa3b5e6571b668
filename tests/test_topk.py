"""Top-k: which numbers are kept, in which bytes, and what is refused. The laws of all formats: test_codecs.py."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.compress.bit_packing import bit_width
from thinpipe.compress.byte_format import CodecError, Direction, Key
from thinpipe.compress.registry import parse_format

laws = settings(deadline=None, max_examples=60)


def key(direction=Direction.FORWARD, microbatch=0):
    return Key(seed=1, boundary=2, direction=direction, step=3, microbatch=microbatch)


def round_trip(spec, z, k=None, dtype=torch.float32):
    fmt, k = parse_format(spec), k or key()
    return fmt.unpack(fmt.pack(z, k), shape=tuple(z.shape), dtype=dtype, key=k)


def draw(tokens, width, seed=0):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


# The wire format is fixed: whoever changes these bytes needs another format id.
Z = torch.tensor([[0.5, -3.0, 0.0, 1.0, -1.0], [7.0, 0.25, -0.25, 0.25, -8.0]])


@pytest.mark.parametrize(
    ("spec", "k", "body"),
    [
        # -3, 1 | 7, -8 in bf16, then places 1, 3, 0, 4 in three bits each: 0b100_000_011_001
        ("topk:k=2", key(), "40c0803f" + "e04000c1" + "1908"),
        ("topk:k=2", key(Direction.BACKWARD), "40c0803f" + "e04000c1" + "1908"),
        # scale 8/127 in bf16, codes -48, 16, 111, -127
        ("topk:k=2,values=int8", key(), "813d" + "d0106f81" + "1908"),
    ],
)
def test_golden_bytes(spec, k, body):
    payload = parse_format(spec).pack(Z, k)
    assert payload.codec == "topk"
    assert payload.header == {"shape": [2, 5]}
    assert payload.body.hex() == body


def test_what_is_not_kept_is_zero_and_of_equals_the_first_is_kept():
    assert round_trip("topk:k=2", Z).tolist() == [[0, -3, 0, 1, 0], [7, 0, 0, 0, -8]]
    assert round_trip("topk:k=3", Z).tolist() == [[0, -3, 0, 1, -1], [7, 0.25, 0, 0, -8]]
    assert round_trip("topk:k=2", torch.ones(3, 9)).tolist() == [[1, 1] + [0] * 7] * 3


@laws
@given(
    tokens=st.integers(0, 7),
    width=st.integers(3, 70),
    k=st.integers(1, 3),
    coarse=st.booleans(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_it_is_what_a_stable_sort_of_the_rounded_numbers_keeps(tokens, width, k, coarse, seed, dtype):
    z = draw(tokens, width, seed).to(dtype)
    if coarse:
        z = z.mul(2).round()  # many that are equal
    rounded = z.float().bfloat16().float()
    order = np.argsort(-rounded.abs().numpy(), axis=1, kind="stable")[:, :k]
    expected = torch.zeros_like(rounded)
    for token, places in enumerate(order):
        expected[token, places] = rounded[token, places]
    assert torch.equal(round_trip(f"topk:k={k}", z), expected)


@pytest.mark.parametrize(("values", "value_bytes"), [("bf16", 2 * 21 * 16), ("int8", 336 + 6), ("int4", 168 + 6)])
@pytest.mark.parametrize("width", [16, 17, 100, 256])
def test_bytes_are_known_beforehand(values, value_bytes, width):
    fmt = parse_format(f"topk:values={values}")  # k=16
    body = fmt.pack(draw(21, width).view(3, 7, width), key()).body
    assert len(body) == fmt.body_bytes((3, 7, width)) == value_bytes + (336 * bit_width(width) + 7) // 8


def test_all_of_a_token_may_be_kept():
    z = draw(4, 16)
    assert torch.equal(round_trip("topk:k=16", z), z.bfloat16().float())
    assert torch.equal(round_trip("topk:k=1", z[:, :1]), z[:, :1].bfloat16().float())


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_coded_values_are_those_of_the_format_and_unbiased_backward(values):
    z = draw(16, 32)
    fmt, inner = parse_format(f"topk:k=4,values={values}"), parse_format(values)
    kept = z.gather(1, z.abs().topk(4, dim=1).indices.sort(dim=1).values).reshape(-1)
    for k in (key(), key(Direction.BACKWARD)):
        back = fmt.unpack(fmt.pack(z, k), shape=(16, 32), dtype=torch.float32)
        expected = inner.unpack(inner.pack(kept, k), shape=(64,), dtype=torch.float32)
        assert torch.equal(back[back != 0], expected[expected != 0])
    mean = torch.stack([round_trip(f"topk:k=4,values={values}", z, key(Direction.BACKWARD, n)) for n in range(200)])
    whole = round_trip("topk:k=4", z)
    step = float(z.abs().max()) / {"int8": 127, "int4": 7}[values]
    assert (mean.mean(dim=0) - whole).abs().max() < 5 * step / 2 / 200**0.5 + 2**-8 * float(z.abs().max())


@pytest.mark.parametrize("bad", ["k=0", "k=-3"])
def test_a_k_that_keeps_nothing_is_refused(bad):
    with pytest.raises(CodecError, match=rf"byte format 'topk': {bad} has to be at least 1"):
        parse_format(f"topk:{bad}")


def test_a_k_beyond_the_width_is_refused():
    fmt = parse_format("topk:k=9")
    for ask in (lambda: fmt.table(8), lambda: fmt.body_bytes((3, 8)), lambda: fmt.pack(draw(3, 8), key())):
        with pytest.raises(CodecError, match=r"k=9 numbers of a token of 8 cannot be kept; say k=8 or less"):
            ask()
    with pytest.raises(CodecError, match="choose a width above 0"):
        fmt.pack(torch.ones(3, 0), key())
    with pytest.raises(CodecError, match="not a number alone"):
        fmt.pack(torch.tensor(1.0), key())
    with pytest.raises(CodecError, match="'values' cannot be 'int3'"):
        parse_format("topk:values=int3")


@pytest.mark.parametrize(
    ("places", "fault"),
    [
        ("1900", "places of token 1 do not ascend: 0, then 0"),  # 1, 3, 0, 0
        ("0b08", "places of token 0 do not ascend: 3, then 1"),  # 3, 1
        ("190a", "topk payload's places: value 5 at index 3 is not below the limit of 5"),
        ("1918", "topk payload's places: the 4 padding bits"),
    ],
)
def test_places_that_no_sender_makes_are_refused(places, fault):
    fmt = parse_format("topk:k=2")
    payload = fmt.pack(Z, key())
    payload = dataclasses.replace(payload, body=payload.body[:-2] + bytes.fromhex(places))
    with pytest.raises(CodecError, match=fault):
        fmt.unpack(payload, shape=(2, 5), dtype=torch.float32)


def test_values_that_no_sender_makes_are_refused_in_its_name():
    fmt = parse_format("topk:k=2")
    payload = fmt.pack(Z, key())
    with pytest.raises(CodecError, match="topk payload is not finite"):
        fmt.unpack(dataclasses.replace(payload, body=b"\x80\x7f" + payload.body[2:]), shape=(2, 5), dtype=torch.float32)
    coded = parse_format("topk:k=2,values=int8")
    payload = coded.pack(Z, key())
    with pytest.raises(CodecError, match="topk payload's scale of block 0"):
        coded.unpack(
            dataclasses.replace(payload, body=b"\x80\xff" + payload.body[2:]), shape=(2, 5), dtype=torch.float32
        )


def test_a_number_that_is_dropped_is_refused_too_if_it_is_not_finite():
    z = Z.clone().double()
    z[0, 2] = 1e39
    for values in ("bf16", "int8"):
        with pytest.raises(CodecError, match=r"1e\+39 at element 2 .* overflows topk"):
            parse_format(f"topk:k=2,values={values}").pack(z, key())
