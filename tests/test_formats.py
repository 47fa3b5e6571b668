"""What is particular to a byte format: golden bytes, rounding statistics, extremes; and bit packing."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from thinpipe.compress.bit_packing import bit_width, pack_bits, packed_bytes, unpack_bits
from thinpipe.compress.byte_format import CodecError, Direction, Key, Payload
from thinpipe.compress.hadamard import rotate, rotate_back
from thinpipe.compress.registry import parse_format

laws = settings(deadline=None, max_examples=100)
F32_MAX = torch.finfo(torch.float32).max
BF16_MAX = torch.finfo(torch.bfloat16).max
PEAKS = {"int8": 127, "int4": 0x1F, "int3": 0b00_001_111, "int2": 0b10_10_01_11}  # the first byte of (peak, -peak)
BLOCKWISE = [("int8", 127), ("int4", 7), ("int3", 3), ("int2", 1)]


def key(direction, microbatch=0):
    return Key(seed=1, boundary=2, direction=direction, step=3, microbatch=microbatch)


FORWARD, BACKWARD = key(Direction.FORWARD), key(Direction.BACKWARD)


def round_trip(name, z, k, dtype=torch.float32):
    fmt = parse_format(name)
    return fmt.unpack(fmt.pack(z, k), shape=tuple(z.shape), dtype=dtype, key=k)


def unpack(name, body, count, dtype=torch.float32):
    payload = Payload(codec=name, header={"shape": [count]}, body=body)
    return parse_format(name).unpack(payload, shape=(count,), dtype=dtype)


# The wire format is fixed: whoever changes these bytes needs another format id.
FP64_BYTES = (
    "0000000000000000000000000000f03f000000000000f0bf000000000000e03f000000000000d0bf"
    "00000000000008400000000000001cc00000000000001a409a9999999999b93f"
)
FP32_BYTES = "000000000000803f000080bf0000003f000080be000040400000e0c00000d040cdcccc3d"
BF16_BYTES = "0000803f80bf003f80be4040e0c0d040cd3d"


@pytest.mark.parametrize(
    ("name", "k", "body"),
    [
        ("fp64", FORWARD, FP64_BYTES),
        ("fp64", BACKWARD, FP64_BYTES),
        ("fp32", FORWARD, FP32_BYTES),
        ("fp32", BACKWARD, FP32_BYTES),
        ("bf16", FORWARD, BF16_BYTES),
        ("bf16", BACKWARD, BF16_BYTES),
        ("int8", FORWARD, "623d" + "0012ee09fb36817602"),
        ("int8", BACKWARD, "623d" + "0012ee09fc37827602"),
        ("int4", FORWARD, "803f" + "9887b8e188"),
        ("int4", BACKWARD, "803f" + "9897b8e188"),
        ("int3", FORWARD, "1540" + "24c9e6" + "244992"),
        ("int3", BACKWARD, "1640" + "e4c8e6" + "244992"),
        ("int2", FORWARD, "e040" + "aada" + "aa"),
        ("int2", BACKWARD, "e040" + "aade" + "aa"),
    ],
)
def test_golden_bytes(name, k, body):
    z = torch.tensor([0.0, 1.0, -1.0, 0.5, -0.25, 3.0, -7.0, 6.5, 0.1], dtype=torch.float64)
    payload = parse_format(name).pack(z, k)
    assert payload.header == {"shape": [9]}
    assert payload.body.hex() == body


def test_golden_bytes_are_what_the_text_says():
    """Decoded by hand from the description, not by the code under test."""
    assert unpack("int8", bytes.fromhex("003f" + "7f" + "81" + "02"), 3).tolist() == [63.5, -63.5, 1.0]  # s = 0.5
    assert unpack("int4", bytes.fromhex("003f" + "1f" + "8a"), 3).tolist() == [3.5, -3.5, 1.0]
    eight = sum((code + 4) << 3 * i for i, code in enumerate([3, -3, 2, 0, 1, -1, -2, 3])).to_bytes(3, "little")
    ninth = (0o4444_4440 + 1 + 4).to_bytes(3, "little")
    assert unpack("int3", bytes.fromhex("003f") + eight, 8).tolist() == [1.5, -1.5, 1.0, 0.0, 0.5, -0.5, -1.0, 1.5]
    assert unpack("int3", bytes.fromhex("003f") + eight + ninth, 9)[8].item() == 0.5
    assert unpack("int2", bytes.fromhex("003f" + "6d" + "ab"), 5).tolist() == [-0.5, 0.5, 0.0, -0.5, 0.5]
    two_blocks = bytes.fromhex("003f" + "0040") + bytes([1] * 128 + [3])  # scales first: 0.5, 2
    assert unpack("int8", two_blocks, 129).tolist() == [0.5] * 128 + [6.0]
    assert unpack("bf16", bytes.fromhex("803f"), 1).tolist() == [1.0]


@pytest.mark.parametrize("count", [128, 129, 1000, 65536])
def test_int4_is_half_of_int8_and_int3_three_quarters_of_int4(count):
    z = torch.randn(count)
    three, four, eight = (len(parse_format(name).pack(z, FORWARD).body) for name in ("int3", "int4", "int8"))
    assert three <= 0.8 * four  # 0.758 from many blocks on
    assert four <= 0.52 * eight
    assert eight <= 1.04 * count


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 127, 128, 129, 135, 136, 1000])
def test_int3_takes_three_bytes_for_eight_values(count):
    body = parse_format("int3").pack(torch.randn(count), FORWARD).body
    assert (
        len(body) == parse_format("int3").body_bytes((count,)) == 2 * math.ceil(count / 128) + 3 * math.ceil(count / 8)
    )


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 127, 128, 129, 1000])
def test_int2_takes_a_byte_for_four_values(count):
    body = parse_format("int2").pack(torch.randn(count), FORWARD).body
    assert len(body) == parse_format("int2").body_bytes((count,)) == 2 * math.ceil(count / 128) + math.ceil(count / 4)


@pytest.mark.parametrize(("name", "least_db"), [("int8", 43.5), ("int4", 18.4), ("int3", 11.1), ("int2", 2.2)])
def test_signal_to_noise_of_gaussian_values(name, least_db):
    z = torch.randn(1 << 17, generator=torch.Generator().manual_seed(0))
    error = round_trip(name, z, FORWARD) - z
    assert 10 * math.log10(float(z.var() / error.square().mean())) > least_db


@pytest.mark.parametrize(("name", "peak"), BLOCKWISE)
class TestBlockwise:
    def test_stochastic_rounding_is_unbiased(self, name, peak):
        keys = 500
        z = torch.linspace(-1, 1, 128, dtype=torch.float64)  # all fractions of a step; the peak at both ends
        total, squares = torch.zeros(128, dtype=torch.float64), torch.zeros(128, dtype=torch.float64)
        for microbatch in range(keys):
            back = round_trip(name, z, key(Direction.BACKWARD, microbatch), torch.float64)
            total += back - z
            squares += (back - z).square()
        mean = total / keys
        step = (1 / peak) * (1 + 2**-7)
        # variance of a rounding to two neighbours is at most step² / 4; 128 values, so 5 standard errors
        assert mean.abs().max() < 5 * step / 2 / math.sqrt(keys)
        assert mean.mean().abs() < 4 * (squares.mean() / (keys * 128)).sqrt()
        assert squares.mean() > step**2 / 10  # a nearest rounding would have step² / 12; about step² / 6 is expected

    def test_nearest_rounding_is_biased_where_stochastic_is_not(self, name, peak):
        z = torch.cat([torch.ones(1), torch.full((127,), 0.2 / peak)]).repeat(100, 1)
        assert (round_trip(name, z, FORWARD)[:, 1:] == 0).all()
        mean = round_trip(name, z, BACKWARD)[:, 1:].mean().item() * peak
        assert abs(mean - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 12_700)

    def test_stochastic_rounding_follows_its_key(self, name, peak):
        del peak
        fmt, z = parse_format(name), torch.randn(300)
        base = {"seed": 1, "boundary": 2, "direction": Direction.BACKWARD, "step": 3, "microbatch": 4}
        body = fmt.pack(z, Key(**base)).body
        assert fmt.pack(z, Key(**base)).body == body
        for name in ("seed", "boundary", "step", "microbatch"):
            assert fmt.pack(z, Key(**{**base, name: 9})).body != body
            nearest = fmt.pack(z, Key(**{**base, "direction": Direction.FORWARD})).body
            assert fmt.pack(z, Key(**{**base, "direction": Direction.FORWARD, name: 9})).body == nearest

    @laws
    @given(peak_value=st.floats(2.0**-100, F32_MAX, width=32))
    def test_scales_are_rounded_as_the_direction_wants(self, name, peak, peak_value):
        assume(peak_value <= BF16_MAX * peak)  # int2 alone has peaks that its scale cannot reach
        z = torch.tensor([peak_value, -peak_value])
        fmt = parse_format(name)
        for k in (FORWARD, BACKWARD):
            bits = int.from_bytes(fmt.pack(z, k).body[:2], "little")
            scale = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).item()
            ratio = scale * peak / peak_value
            if k is BACKWARD:
                assert 1 <= ratio < 1 + 2**-7 + 2**-20
            else:
                assert abs(ratio - 1) <= 2**-8 + 2**-20
                first_byte = fmt.pack(z, k).body[2]
                assert first_byte == PEAKS[name]  # the peak, less the peak

    @pytest.mark.parametrize("k", [FORWARD, BACKWARD])
    def test_whole_steps_survive_exactly(self, name, peak, k):
        for mantissa in range(128, 256):  # every scale that bf16 holds
            z = torch.arange(-peak, peak + 1).to(torch.float32) * mantissa
            assert torch.equal(round_trip(name, z, k), z)

    def test_whole_steps_survive_every_draw(self, name, peak):
        z = torch.full((4096, 128), 1.0)  # 2**19 draws: a noise that reached -1/2 would lose about 8 of them
        z[:, 0] = peak
        assert torch.equal(round_trip(name, z, BACKWARD), z)

    def test_a_scale_rounded_up_reaches_the_peak_by_one_last_bit(self, name, peak):
        fmt = parse_format(name)
        for mantissa in range(128, 256):
            over = np.nextafter(np.float32(mantissa * peak), np.float32(np.inf))
            bits = int.from_bytes(fmt.pack(torch.tensor([float(over)]), BACKWARD).body[:2], "little")
            scale = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).item()
            assert mantissa < scale <= mantissa + 2

    @pytest.mark.parametrize("k", [FORWARD, BACKWARD])
    def test_zeros_are_exact(self, name, peak, k):
        del peak
        z = torch.zeros(3, 100)
        assert torch.equal(round_trip(name, z, k), z)
        z[2, 99] = 5.0  # the two other blocks stay zero
        assert torch.equal(round_trip(name, z, k)[:2], torch.zeros(2, 100))
        assert (round_trip(name, -z, k) == 0).sum() == 299

    @pytest.mark.parametrize("k", [FORWARD, BACKWARD])
    @pytest.mark.parametrize("tiny", [1e-45, 1e-40, 2.0**-127, 2.0**-126, 1e-37])
    def test_tiny_values_are_safe(self, name, peak, k, tiny):
        z = torch.tensor([tiny, -tiny, tiny / 2, 0.0])
        error = (round_trip(name, z, k) - z).abs().max().item()
        assert error <= 2.0**-126 + tiny * 1.01 / peak

    @pytest.mark.parametrize("k", [FORWARD, BACKWARD])
    @pytest.mark.parametrize(
        ("huge", "dtype"), [(F32_MAX, torch.float32), (BF16_MAX, torch.bfloat16), (65504.0, torch.float16)]
    )
    def test_huge_values_are_safe(self, name, peak, k, huge, dtype):
        for part in (1.0, 0.999, 0.995, 0.99):
            z = torch.tensor([huge * part, -huge * part, huge / 3]).to(dtype)
            back = round_trip(name, z, k, dtype)
            assert bool(back.isfinite().all())
            assert ((back.double() - z.double()).abs() / huge).max() <= 1.01 / peak + torch.finfo(dtype).eps

    @pytest.mark.parametrize("scale", ["807f", "c07f", "80ff", "0000", "7f00", "80bf"])
    def test_refuses_a_scale_that_no_sender_makes(self, name, peak, scale):
        del peak
        size = parse_format(name).body_bytes((200,)) - 4
        codes = bytes([0x11]) * size
        with pytest.raises(CodecError, match="scale of block 1 is"):
            unpack(name, bytes.fromhex("803f" + scale) + codes, 200)

    def test_refuses_a_scale_beyond_the_dtype(self, name, peak):
        dtype = torch.float16 if peak == 1 else torch.float32  # times 1 the largest scale is a float32
        body = bytes.fromhex("7f7f") + bytes(parse_format(name).body_bytes((2,)) - 2)
        with pytest.raises(CodecError, match="scale of block 0 reaches"):
            unpack(name, body, 2, dtype)


def test_a_peak_that_no_scale_of_int2_reaches_is_clipped():
    z = torch.tensor([F32_MAX, -F32_MAX, BF16_MAX, 1e38])
    for k in (FORWARD, BACKWARD):
        assert round_trip("int2", z, k)[:3].tolist() == [BF16_MAX, -BF16_MAX, BF16_MAX]


def test_codes_that_no_value_has_are_refused():
    with pytest.raises(CodecError, match="code -128 at element 1"):
        unpack("int8", bytes.fromhex("803f" + "01" + "80"), 2)
    with pytest.raises(CodecError, match="code -8 at element 2"):
        unpack("int4", bytes.fromhex("803f" + "11" + "80"), 3)
    with pytest.raises(CodecError, match="code 1 at element 3 of 3; 0 fills it up"):
        unpack("int4", bytes.fromhex("803f" + "11" + "91"), 3)


@pytest.mark.parametrize("at", range(8))
def test_int3_refuses_the_pattern_that_it_has_to_spare_and_a_padding_that_is_not_zero(at):
    def body(code):
        return bytes.fromhex("803f") + (0o4444_4444 + (code << 3 * at)).to_bytes(3, "little")

    with pytest.raises(CodecError, match=f"int3 payload has code -4 at element {at}, below -3"):
        unpack("int3", body(-4), 8)
    unpack("int3", body(-1), 8)
    for count in range(1, at + 1):
        with pytest.raises(CodecError, match=f"int3 payload has code -1 at element {at} of {count}; 0 fills it up"):
            unpack("int3", body(-1), count)


@pytest.mark.parametrize("at", range(4))
def test_int2_refuses_the_pattern_that_it_has_to_spare_and_a_padding_that_is_not_zero(at):
    def body(code):
        return bytes.fromhex("803f") + bytes([0b10_10_10_10 + (code << 2 * at)])

    with pytest.raises(CodecError, match=f"int2 payload has code -2 at element {at}, below -1"):
        unpack("int2", body(-2), 4)
    unpack("int2", body(-1), 4)
    for count in range(1, at + 1):
        with pytest.raises(CodecError, match=f"int2 payload has code -1 at element {at} of {count}; 0 fills it up"):
            unpack("int2", body(-1), count)


@pytest.mark.parametrize(
    ("name", "body"), [("bf16", "803f807f"), ("fp32", "00000000" + "0000c07f"), ("fp64", "00" * 8 + "000000000000f0ff")]
)
def test_values_that_are_not_finite_are_refused(name, body):
    with pytest.raises(CodecError, match=r"not finite in torch\.float32 at element 1"):
        unpack(name, bytes.fromhex(body), 2)


# --- bit packing


@laws
@given(width=st.integers(1, 32), count=st.integers(0, 70), data=st.data())
def test_bits_round_trip(width, count, data):
    values = np.array(data.draw(st.lists(st.integers(0, 2**width - 1), min_size=count, max_size=count)), np.int64)
    packed = pack_bits(values, width)
    assert len(packed) == packed_bytes(count, width) == math.ceil(count * width / 8)
    # the definition, with Python's own big integers
    assert int.from_bytes(packed, "little") == sum(int(v) << (i * width) for i, v in enumerate(values))
    back = unpack_bits(packed, width, count, 2**width)
    assert back.dtype == np.int64
    assert np.array_equal(back, values)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_bits_of_a_batch_of_token_ids(dtype):
    ids_BT = np.arange(24, dtype=dtype).reshape(4, 6).T
    assert not ids_BT.flags.c_contiguous
    packed = pack_bits(ids_BT, bit_width(5000))
    assert np.array_equal(unpack_bits(packed, 13, 24, 5000).reshape(6, 4), ids_BT)


def test_golden_bits():
    assert pack_bits(np.array([1, 2, 3, 4095, 0, 8191]), 13).hex() == "0140000c80ff0700fe3f"
    assert pack_bits(np.array([5, 0, 7]), 3) == bytes([0b11_000_101, 0b1])


def test_bit_width():
    assert [bit_width(limit) for limit in (1, 2, 3, 256, 257, 2**20)] == [1, 1, 2, 8, 9, 20]


@pytest.mark.parametrize(("values", "width"), [([0, 8, 0], 3), ([0, -1], 3), ([0, 2**32], 32), ([1, 2**63 - 1], 31)])
def test_values_that_do_not_fit_are_refused(values, width):
    with pytest.raises(CodecError, match=f"value {values[1]} at index 1 does not fit {width} bits"):
        pack_bits(np.array(values), width)


def test_unsigned_64_bit_values_are_checked_too():
    assert pack_bits(np.array([3, 1], np.uint64), 2) == bytes([0b0111])
    with pytest.raises(CodecError, match=f"value {2**64 - 1} at index 0"):
        pack_bits(np.array([2**64 - 1], np.uint64), 32)
    with pytest.raises(CodecError, match="float64"):
        pack_bits(np.array([1.0]), 2)
    with pytest.raises(ValueError, match="width"):
        pack_bits(np.array([1]), 33)


def test_malformed_bits_are_refused():
    packed = pack_bits(np.array([5, 0, 6]), 3)
    for data in (b"", packed[:-1], packed + b"\0"):
        with pytest.raises(CodecError, match=f"take 2 bytes, got {len(data)}"):
            unpack_bits(data, 3, 3, 8)
    with pytest.raises(CodecError, match="take 125000000000 bytes"):  # nothing of that size is allocated
        unpack_bits(packed, 1, 10**12, 2)
    for spare in range(1, 8):
        with pytest.raises(CodecError, match="padding bits"):
            unpack_bits(bytes([packed[0], packed[1] | 1 << spare]), 3, 3, 8)
    with pytest.raises(CodecError, match="value 6 at index 2 is not below the limit of 6"):
        unpack_bits(packed, 3, 3, 6)
    assert unpack_bits(packed, 3, 3, 7).tolist() == [5, 0, 6]


@laws
@given(data=st.binary(max_size=40), width=st.integers(1, 32), count=st.integers(0, 40), limit=st.integers(1, 2**32))
def test_any_bits_raise_nothing_but_codec_error(data, width, count, limit):
    try:
        values = unpack_bits(data, width, count, limit)
    except CodecError:
        return
    assert values.shape == (count,)
    assert ((values >= 0) & (values < limit)).all()
    assert pack_bits(values, width) == data  # one encoding for each list


# --- about the mean ------------------------------------------------------------------------------------------------


def tokens_with_a_mean(width: int = 16) -> torch.Tensor:
    draws = torch.Generator().manual_seed(3)
    return torch.randn(4, 32, width, generator=draws) + 3 * torch.randn(width, generator=draws)


@pytest.mark.parametrize("name", [name for name, _ in BLOCKWISE])
class TestCentred:
    def test_what_is_left_of_the_mean_costs_no_precision(self, name):
        z = tokens_with_a_mean()
        plain, centred = (round_trip(spec, z, FORWARD) - z for spec in (name, f"{name}:centre=true"))
        assert centred.square().mean() < 0.5 * plain.square().mean()

    def test_it_takes_two_bytes_a_number_of_a_token(self, name):
        plain, centred = parse_format(name), parse_format(f"{name}:centre=true")
        for shape in ((4, 32, 16), (1, 7), (5,), (130, 3)):
            payload = centred.pack(torch.ones(shape), FORWARD)
            assert len(payload.body) == centred.body_bytes(shape) == plain.body_bytes(shape) + 2 * shape[-1]
        for empty in ((0, 4), (4, 0)):
            payload = centred.pack(torch.ones(empty), FORWARD)
            assert centred.unpack(payload, shape=empty, dtype=torch.float32).equal(torch.ones(empty))

    def test_tokens_that_are_all_alike_are_exact(self, name):
        z = torch.tensor([1.0, -2.5, 0.0, 96.0]).expand(3, 5, 4)
        assert round_trip(f"{name}:centre=true", z, FORWARD).equal(z)

    def test_the_largest_numbers_stay_finite_or_are_refused(self, name):
        largest = torch.finfo(torch.float32).max
        fmt = parse_format(f"{name}:centre=true")
        same = torch.full((3, 4), largest)
        assert round_trip(f"{name}:centre=true", same, FORWARD).isfinite().all()
        apart = torch.tensor([[largest], [largest], [-largest]])
        with pytest.raises(CodecError, match=r"element 2 of .* overflows"):
            fmt.pack(apart, FORWARD)
        with pytest.raises(CodecError, match=r"element 1 of .* is not finite"):
            fmt.pack(torch.tensor([[1.0], [math.nan], [2.0]]), FORWARD)

    def test_a_mean_that_is_no_number_is_refused(self, name):
        fmt, z = parse_format(f"{name}:centre=true"), tokens_with_a_mean()
        body = bytearray(fmt.pack(z, FORWARD).body)
        body[6:8] = b"\x80\x7f"  # infinity
        payload = Payload(codec=name, header={"shape": list(z.shape)}, body=bytes(body))
        with pytest.raises(CodecError, match="mean of number 3 is inf"):
            fmt.unpack(payload, shape=tuple(z.shape), dtype=z.dtype)

    def test_a_plain_one_is_not_taken_for_it(self, name):
        z = tokens_with_a_mean()
        with pytest.raises(CodecError, match="bytes, expected"):
            parse_format(f"{name}:centre=true").unpack(
                parse_format(name).pack(z, FORWARD), shape=tuple(z.shape), dtype=z.dtype
            )


# --- rotated -------------------------------------------------------------------------------------------------------

widths = st.sampled_from([8, 16, 24, 40, 64, 256])
ROTATED = [f"{name}:hadamard=true{more}" for name, _ in BLOCKWISE for more in ("", ",centre=true")]


def textbook_rotation(x_NW: torch.Tensor, k: Key) -> torch.Tensor:
    """Signs, blocks times Sylvester's matrix over its root, and signs, in float64."""
    tokens, width = x_NW.shape
    words = [int(word) for word in k.generator(0x5349474E).random_raw(-(-tokens * width // 32))]
    bits = [words[i // 64] >> i % 64 & 1 for i in range(2 * tokens * width)]
    before_NW, behind_NW = 1 - 2 * np.array(bits, np.float64).reshape(2, tokens, width)
    block = next(2**power for power in range(20, -1, -1) if width % 2**power == 0)
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    blocks = (x_NW.double().numpy() * before_NW).reshape(-1, block)
    return torch.from_numpy((blocks @ matrix / math.sqrt(block)).reshape(-1, width) * behind_NW)


@laws
@given(width=widths, tokens=st.integers(0, 9), seed=st.integers(0, 9), microbatch=st.integers(0, 3))
def test_a_rotation_is_the_textbooks_and_its_own_inverse(width, tokens, seed, microbatch):
    k = key(Direction.BACKWARD, microbatch)
    x_NW = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    y_NW = rotate(x_NW, k)
    assert torch.allclose(y_NW.double(), textbook_rotation(x_NW, k), atol=1e-5)
    assert torch.allclose(rotate_back(y_NW, k), x_NW, atol=1e-5)


def test_golden_rotation():
    """Bits, which no device may change: exact sums, times 1/4 (B = 16), and one rounding for B = 8."""
    ones = rotate(torch.ones(1, 16), FORWARD).mul(4)
    assert ones.tolist() == [[0, 0, 8, 0, 0, -8, 0, 0, -4, 4, -4, -4, -4, -4, -4, 4]]
    first = rotate(torch.eye(8)[:1], FORWARD)
    assert first.abs().view(torch.int32).tolist() == [[0x3EB504F3] * 8]  # float32(8 ** -0.5)


@pytest.mark.parametrize("spec", ROTATED)
class TestRotated:
    def test_an_outlier_costs_the_others_less(self, spec):
        """To nearest, a grid as coarse as int3's keeps the outliers alone, which by squares is better still."""
        name = spec.partition(":")[0]
        z = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
        z[:, ::100] *= 40
        for k in (FORWARD, BACKWARD) if name in ("int8", "int4") else (BACKWARD,):
            plain, rotated = (round_trip(each, z, k) - z for each in (name, spec))
            assert rotated.square().mean() < 0.5 * plain.square().mean()

    def test_it_takes_no_byte_and_the_key_that_packed(self, spec):
        fmt, bare = parse_format(spec), parse_format(spec.replace("hadamard=true,", "").replace(":hadamard=true", ""))
        z = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
        payload = fmt.pack(z, FORWARD)
        assert len(payload.body) == fmt.body_bytes((5, 24)) == bare.body_bytes((5, 24))
        place = {"shape": (5, 24), "dtype": torch.float32}
        right, wrong = (fmt.unpack(payload, **place, key=key(Direction.FORWARD, n)) for n in (0, 1))
        assert (right - z).square().mean() < (wrong - z).square().mean()
        with pytest.raises(CodecError, match=r"draws from the tensor's key .* unpack it with `key`"):
            fmt.unpack(payload, **place)

    def test_gradients_are_unbiased(self, spec):
        z = torch.linspace(-1, 1, 64, dtype=torch.float64).view(4, 16)
        runs = [round_trip(spec, z, key(Direction.BACKWARD, n), torch.float64) - z for n in range(400)]
        errors = torch.stack(runs)
        assert (errors.mean(dim=0).abs() < 5 * errors.std(dim=0) / math.sqrt(400) + 0.004).all()  # bf16 of the mean

    @pytest.mark.parametrize("empty", [(0, 8), (3, 0, 16)])
    def test_empty_tensors_are_empty(self, spec, empty):
        assert round_trip(spec, torch.ones(empty), FORWARD).equal(torch.ones(empty))
        assert parse_format(spec).body_bytes(empty) == 0

    def test_zeros_are_exact(self, spec):
        assert round_trip(spec, torch.zeros(3, 24), BACKWARD).equal(torch.zeros(3, 24))

    @pytest.mark.parametrize(("width", "choose"), [(0, 8), (1, 8), (12, 16), (70, 72), (252, 256)])
    def test_a_width_without_a_power_of_two_is_refused(self, spec, width, choose):
        fmt = parse_format(spec)
        for ask in (
            lambda: fmt.table(width),
            lambda: fmt.body_bytes((3, width)),
            lambda: fmt.pack(torch.ones(3, width), FORWARD),
        ):
            with pytest.raises(CodecError, match=rf"width that 8 divides, not {width}; choose {choose} or leave"):
                ask()
        with pytest.raises(CodecError, match="not 1;"):
            fmt.pack(torch.tensor(1.0), FORWARD)

    def test_what_overflows_is_refused_by_its_own_name(self, spec):
        fmt = parse_format(spec)
        z = torch.full((1, 64), 3.0)
        z[0, 20] = F32_MAX
        z[0, 21:40] = 0.9 * F32_MAX
        if "centre" in spec:
            z = torch.cat((z, torch.zeros(20, 64)))
        name = rf"at element 20 of FORWARD tensor of boundary 2, step 3, microbatch \d+ overflows {fmt.id};"
        refused = 0
        for microbatch in range(40):  # with some signs all sums stay small
            k = key(Direction.FORWARD, microbatch)
            try:
                payload = fmt.pack(z, k)
            except CodecError as error:
                refused += bool(re.search(name, str(error)))
                continue
            try:
                back = fmt.unpack(payload, shape=tuple(z.shape), dtype=torch.float32, key=k)
            except CodecError as error:  # coding may have made them larger
                assert "rotated back" in str(error)  # noqa: PT017
            else:
                assert back.isfinite().all()
        assert refused
        for bad in (math.nan, math.inf):
            z[0, 30] = bad
            with pytest.raises(CodecError, match=r"at element 30 of .* is not finite"):
                fmt.pack(z, FORWARD)

    @laws
    @given(seed=st.integers(0, 2**32), plausible=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float16]))
    def test_garbage_gives_finite_values_or_a_codec_error(self, spec, seed, plausible, dtype):
        fmt, shape = parse_format(spec), (9, 16)
        body = torch.randint(
            0, 256, (fmt.body_bytes(shape),), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
        )
        if plausible:
            body = body.clamp_(0x20, 0x7E)
        payload = Payload(codec=fmt.id, header={"shape": list(shape)}, body=body.numpy().tobytes())
        try:
            values = fmt.unpack(payload, shape=shape, dtype=dtype, key=FORWARD)
        except CodecError:
            return
        assert values.isfinite().all()
