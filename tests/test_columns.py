"""The largest columns: which are chosen, in which bytes, and what is refused. The laws of all formats:
test_codecs.py."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.compress.byte_format import CodecError, Direction, Key
from thinpipe.compress.registry import parse_format

laws = settings(deadline=None, max_examples=60)
KEY = Key(seed=1, boundary=2, direction=Direction.FORWARD, step=3, microbatch=4)
Z = torch.tensor([[0.5, -3.0, 0.0, 1.0, 1.0], [0.25, 4.0, -0.25, 2.0, -2.0]])


def round_trip(spec, z, dtype=torch.float32):
    fmt = parse_format(spec)
    return fmt.unpack(fmt.pack(z, KEY), shape=tuple(z.shape), dtype=dtype)


# The wire format is fixed: whoever changes these bytes needs another format id.
@pytest.mark.parametrize("direction", Direction)
def test_golden_bytes(direction):
    payload = parse_format("columns:k=2").pack(Z, dataclasses.replace(KEY, direction=direction))
    assert payload.header == {"shape": [2, 5]}
    assert payload.body.hex() == "0a" + "40c0803f" + "80400040"  # columns 1 and 3; of equal ones the lower
    assert round_trip("columns:k=2", Z).tolist() == [[0, -3, 0, 1, 0], [0, 4, 0, 2, 0]]


@laws
@given(
    tokens=st.integers(1, 9),
    width=st.integers(3, 70),
    k=st.integers(1, 3),
    coarse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_what_a_stable_sort_of_the_norms_keeps(tokens, width, k, coarse, seed):
    z = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    if coarse:
        z = z.round()  # whole numbers: their squares add up exactly, and many sums are equal
    rounded = z.bfloat16().float()
    norms = [math.fsum(float(value) ** 2 for value in column) for column in rounded.T]
    kept = np.argsort(-np.array(norms), kind="stable")[:k]
    expected = torch.zeros_like(rounded)
    expected[:, kept] = rounded[:, kept]
    assert torch.equal(round_trip(f"columns:k={k}", z), expected)


@pytest.mark.parametrize(("width", "bitmap"), [(16, 2), (17, 3), (256, 32)])
def test_bytes_are_known_beforehand(width, bitmap):
    fmt = parse_format("columns")
    body = fmt.pack(torch.randn(3, 7, width), KEY).body
    assert len(body) == fmt.body_bytes((3, 7, width)) == bitmap + 2 * 21 * 16


@pytest.mark.parametrize("magnitude", [0.0, 1e-44, 1e-39, 1e38, 3.3e38])
def test_the_smallest_and_the_largest_numbers(magnitude):
    z = magnitude * torch.tensor([[0.5, -1.0, 0.25], [0.0, 1.0, 0.5]])
    assert torch.equal(round_trip("columns:k=1", z)[:, 1], z[:, 1].bfloat16().float()) or not magnitude
    assert torch.equal(round_trip("columns:k=3", z), z.bfloat16().float())


def test_a_tensor_without_tokens_is_empty():
    assert parse_format("columns:k=2").pack(torch.ones(0, 4), KEY).body == b""
    assert round_trip("columns:k=2", torch.ones(3, 0, 4)).shape == (3, 0, 4)


@pytest.mark.parametrize(
    ("bitmap", "found"), [("0e", "3 of 5 columns and 0"), ("02", "1 of 5"), ("22", "1 of 5 columns and 1"), ("00", "0")]
)
def test_a_bitmap_that_no_sender_makes_is_refused(bitmap, found):
    fmt = parse_format("columns:k=2")
    payload = fmt.pack(Z, KEY)
    payload = dataclasses.replace(payload, body=bytes.fromhex(bitmap) + payload.body[1:])
    with pytest.raises(CodecError, match=f"bitmap has {found}.* set; it takes 2 and 0"):
        fmt.unpack(payload, shape=(2, 5), dtype=torch.float32)


def test_a_value_that_is_no_number_is_refused_in_its_name():
    fmt = parse_format("columns:k=2")
    payload = fmt.pack(Z, KEY)
    payload = dataclasses.replace(payload, body=payload.body[:3] + b"\x80\x7f" + payload.body[5:])
    with pytest.raises(CodecError, match="columns payload is not finite"):
        fmt.unpack(payload, shape=(2, 5), dtype=torch.float32)


def test_a_k_that_does_not_fit_is_refused():
    with pytest.raises(CodecError, match=r"byte format 'columns': k=0 has to be at least 1"):
        parse_format("columns:k=0")
    fmt = parse_format("columns:k=9")
    for ask in (lambda: fmt.table(8), lambda: fmt.body_bytes((3, 8)), lambda: fmt.pack(torch.ones(3, 8), KEY)):
        with pytest.raises(CodecError, match=r"'columns': k=9 numbers of a token of 8 cannot be kept; say k=8 or less"):
            ask()
