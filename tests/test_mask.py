"""The keyed mask: which channels are drawn, the same at both ends and both ways. The laws of all formats:
test_codecs.py."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.compress.byte_format import CodecError, Direction, Key
from thinpipe.compress.mask import drawn
from thinpipe.compress.registry import parse_format

laws = settings(deadline=None, max_examples=60)
KEY = Key(seed=1, boundary=2, direction=Direction.FORWARD, step=3, microbatch=4)
BACK = dataclasses.replace(KEY, direction=Direction.BACKWARD)
GOLDEN_CHANNELS = [0, 2, 7, 8]


def round_trip(spec, z, k, dtype=torch.float32):
    fmt = parse_format(spec)
    return fmt.unpack(fmt.pack(z, k), shape=tuple(z.shape), dtype=dtype, key=k)


def test_golden_channels_and_bytes():
    """The draw is fixed for good, as the bytes are: two ends of different versions have to agree."""
    assert drawn(KEY, 10, 4).tolist() == GOLDEN_CHANNELS
    z = torch.arange(20.0).view(2, 10)
    payload = parse_format("mask:k=4").pack(z, KEY)
    assert payload.header == {"shape": [2, 10]}
    expected = (z[:, GOLDEN_CHANNELS] * 2.5).to(torch.bfloat16)
    assert payload.body == expected.view(torch.int16).numpy().astype("<i2").tobytes()


@laws
@given(width=st.integers(1, 300), data=st.data(), step=st.integers(0, 2**40), microbatch=st.integers(0, 2**33))
def test_the_gradients_channels_are_the_activations(width, data, step, microbatch):
    k = dataclasses.replace(KEY, step=step, microbatch=microbatch)
    many = data.draw(st.integers(1, width))
    few = data.draw(st.integers(1, many))
    channels = drawn(k, width, many).tolist()
    assert channels == sorted(set(channels))
    assert len(channels) == many
    assert channels[0] >= 0
    assert channels[-1] < width
    other = drawn(dataclasses.replace(k, direction=Direction.BACKWARD), width, few).tolist()
    assert set(other) <= set(channels)


@pytest.mark.parametrize("field", ["seed", "boundary", "step", "microbatch"])
def test_another_key_draws_other_channels(field):
    assert drawn(KEY, 256, 16).tolist() != drawn(dataclasses.replace(KEY, **{field: 9}), 256, 16).tolist()


def test_every_channel_is_drawn_alike_often():
    draws = torch.zeros(12)
    for microbatch in range(3000):
        draws[drawn(dataclasses.replace(KEY, microbatch=microbatch), 12, 3)] += 1
    expected, deviation = 3000 / 4, math.sqrt(3000 * 0.25 * 0.75)
    assert (draws - expected).abs().max() < 5 * deviation


@pytest.mark.parametrize("direction", Direction)
def test_what_arrives_is_what_was_sent_or_zero_and_its_mean_over_keys_is_right(direction):
    z = torch.randn(3, 20, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    total, keys = torch.zeros(3, 20), 600
    for microbatch in range(keys):
        k = dataclasses.replace(KEY, direction=direction, microbatch=microbatch)
        back = round_trip("mask:k=5", z, k)
        kept = drawn(k, 20, 5)
        assert torch.equal(back[:, kept], 4 * z[:, kept])
        assert int((back != 0).sum()) == 15
        total += back
    # a number is 4 z with probability 1/4, or 0: a standard deviation of sqrt(3) |z|
    assert ((total / keys - z).abs() < 5 * math.sqrt(3 / keys) * z.abs() + 1e-6).all()


def test_the_backward_mask_is_the_derivative_of_the_forward_one():
    z = torch.randn(2, 8).requires_grad_()
    weights = torch.linspace(0, 1, 8) > 0.5
    fmt, dz = parse_format("mask:k=4"), torch.where(weights, 1.0, -2.0).expand(2, 8)
    mask_W = torch.zeros(8)
    mask_W[drawn(KEY, 8, 4)] = 2.0
    (z * mask_W * dz).sum().backward()
    assert z.grad is not None
    assert torch.equal(fmt.unpack(fmt.pack(dz, BACK), shape=(2, 8), dtype=torch.float32, key=BACK), z.grad)


def test_all_channels_are_bf16():
    z = torch.randn(4, 16)
    assert torch.equal(round_trip("mask", z, KEY), z.bfloat16().float())
    assert parse_format("mask").body_bytes((4, 16)) == parse_format("bf16").body_bytes((4, 16))
    assert parse_format("mask:k=3").body_bytes((5, 7, 16)) == 2 * 35 * 3


def test_it_cannot_be_unpacked_without_the_key():
    fmt = parse_format("mask:k=4")
    payload = fmt.pack(torch.ones(2, 8), KEY)
    with pytest.raises(CodecError, match=r"'mask' draws from the tensor's key at both ends; unpack it with `key`"):
        fmt.unpack(payload, shape=(2, 8), dtype=torch.float32)


def test_a_k_that_does_not_fit_is_refused():
    with pytest.raises(CodecError, match=r"byte format 'mask': k=0 has to be at least 1"):
        parse_format("mask:k=0")
    fmt = parse_format("mask:k=9")
    for ask in (lambda: fmt.table(8), lambda: fmt.body_bytes((3, 8)), lambda: fmt.pack(torch.ones(3, 8), KEY)):
        with pytest.raises(CodecError, match=r"'mask': k=9 numbers of a token of 8 cannot be kept; say k=8 or less"):
            ask()


def test_what_the_factor_makes_too_large_is_refused():
    z = torch.full((1, 64), 1e38)
    with pytest.raises(CodecError, match=r"at element 0 .* overflows mask"):
        parse_format("mask:k=4").pack(z, KEY)
    assert round_trip("mask:k=32", z, KEY).isfinite().all()
