"""Scales of tokens: what comes back is what was coded with, whatever the kind, and nothing else is taken."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from thinpipe.compress.byte_format import CodecError
from thinpipe.compress.token_scales import ScaleKind, token_scales

KINDS = get_args(ScaleKind)
STEP = {"bf16": 2**-8, "log8": 2 ** (1 / 16) - 1, "log4": 2**0.25 - 1}  # largest relative error within the depth
DEPTH = {"bf16": 2.0**-100, "log8": 2.0**-31.75, "log4": 2.0**-7}

root_mean_squares = hypothesis_numpy.arrays(
    np.float32,
    st.integers(0, 40),
    elements=st.one_of(st.just(0.0), st.floats(2.0**-126, 2.0**127, width=32), st.floats(0.5, 2, width=32)),
)


@pytest.mark.parametrize("kind", KINDS)
@given(values=root_mean_squares)
def test_scales_come_back(kind, values):
    scales, rms = token_scales(kind), torch.from_numpy(values)
    rounded = scales.rounded(rms)
    octets = scales.pack(rounded)
    assert len(octets) == scales.byte_count(len(values))
    assert torch.equal(scales.unpack(octets, len(values)), rounded)
    assert torch.equal(rounded == 0, rms == 0)
    assert bool((rounded[rounded != 0] >= 2.0**-126).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", [1.0, 3.0e-20, 7.7e18])
def test_how_far_off_they_are(kind, top):
    rms = top * torch.logspace(0, float(np.log10(DEPTH[kind])), 1000).clamp(min=2.0**-126 / top)
    error = (token_scales(kind).rounded(rms) / rms - 1).abs().max().item()
    assert 0.5 * STEP[kind] < error < 1.01 * STEP[kind] + 2**-8  # the largest is rounded to bf16 too


@pytest.mark.parametrize("kind", ["log8", "log4"])
def test_what_is_deeper_takes_the_deepest(kind):
    rms = torch.tensor([1.0, DEPTH[kind] / 1000, 0.0])
    assert token_scales(kind).rounded(rms).tolist() == pytest.approx([1, DEPTH[kind], 0], rel=0.1)


def test_bytes_by_hand():
    rms = torch.tensor([4.0, 2.0, 0.0, 4 * 2**-0.5, 4.0])
    word = (0x4080).to_bytes(2, "little")  # 4.0
    assert token_scales("log8").pack(rms) == word + bytes([0, 8, 255, 4, 0])
    assert token_scales("log4").pack(rms) == word + bytes([0 | 2 << 4, 15 | 1 << 4, 0])
    assert token_scales("bf16").pack(rms)[:4] == word + (0x4000).to_bytes(2, "little")


@pytest.mark.parametrize(
    ("kind", "octets", "tokens", "message"),
    [
        ("bf16", b"\x80\xff", 1, "scale of token 0 is nan|scale of token 0 is -"),
        ("log8", b"\x80\xff\x00", 1, "largest scale is"),
        ("log8", b"\x00\x00\x00", 1, r"largest scale is 0\.0"),
        ("log4", b"\x80\x7f\x00", 2, "largest scale is inf"),
        ("log4", b"\x80\x3f\x10", 1, "step 1 after its 1 scales"),
    ],
)
def test_what_nobody_packs_is_refused(kind, octets, tokens, message):
    with pytest.raises(CodecError, match=message):
        token_scales(kind).unpack(octets, tokens)


def test_any_bytes_are_scales_or_refused():
    for kind, high, low in itertools.product(KINDS, range(256), range(0, 256, 15)):
        try:
            found = token_scales(kind).unpack(bytes([low, high, low, high]), 2)
        except CodecError:
            continue
        assert bool(found.isfinite().all())
        assert bool((found >= 0).all())
