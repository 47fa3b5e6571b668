"""Residual vector quantisation: its wire format, its search, what it learns, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.compress import rvq
from thinpipe.compress.bit_packing import bit_width
from thinpipe.compress.byte_format import CodecError, Direction, Key, Payload
from thinpipe.compress.kmeans import DEAD
from thinpipe.compress.registry import parse_codec, parse_format
from thinpipe.compress.residual_codebooks import Codebooks, CodebookShape
from thinpipe.compress.rvq import Rvq
from thinpipe.node.boundary.learned_tables import dictionary_of
from thinpipe.protocol import dictionary_selection
from thinpipe.protocol.dictionary import Publisher, Replica
from thinpipe.protocol.dictionary_delta import DictionarySpec, decode_delta, encode_delta

laws = settings(deadline=None, max_examples=30)


def key(microbatch=0, step=3, direction=Direction.FORWARD, seed=1):
    return Key(seed=seed, boundary=2, direction=direction, step=step, microbatch=microbatch)


def gaussian(shape, seed=0, rho=0.0):
    """Neighbours along the last axis correlate by `rho`."""
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for i in range(1, shape[-1] if rho else 0):
        z[..., i] = rho * z[..., i - 1] + math.sqrt(1 - rho**2) * z[..., i]
    return z


def started(fmt, z, k=None):
    fmt.learn(z, k or key())
    fmt.use_table(fmt.master)
    return fmt


def train(fmt, tensors, first=0):
    """As a node does, with the whole codebook shipped each time."""
    for microbatch, z in enumerate(tensors, start=first):
        fmt.pack(z, key(microbatch))
        fmt.learn(z, key(microbatch))
        fmt.use_table(fmt.master)


def round_trip(fmt, z, k=None):
    return fmt.unpack(fmt.pack(z, k or key()), shape=tuple(z.shape), dtype=z.dtype)


def relative_error(fmt, z):
    return float((round_trip(fmt, z) - z).norm() / z.norm())


def state_of(fmt):
    return {name: tensor.clone() for name, tensor in fmt.state_tensors().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestWire:
    @laws
    @given(
        groups=st.sampled_from([1, 2, 3, 8]),
        codes=st.sampled_from([2, 3, 5, 16, 200, 256, 257]),
        levels=st.integers(1, 3),
        tokens=st.integers(0, 9),
        scale=st.sampled_from(["bf16", "log8", "log4"]),
    )
    def test_length_is_exact(self, groups, codes, levels, tokens, scale):
        fmt = Rvq(groups=groups, codes=codes, levels=levels, scale=scale)
        fmt.use_table(gaussian((levels * groups * codes, 4)))
        z = gaussian((tokens, 4 * groups))
        payload = fmt.pack(z, key())
        bits = math.ceil(math.log2(codes))
        scales = {"bf16": 2 * tokens, "log8": tokens + 2, "log4": math.ceil(tokens / 2) + 2}[scale] if tokens else 0
        wanted = scales + math.ceil(tokens * groups * levels * bits / 8)
        assert len(payload.body) == fmt.body_bytes((tokens, 4 * groups)) == wanted
        back = fmt.unpack(payload, shape=(tokens, 4 * groups), dtype=torch.float64)
        assert back.shape == z.shape
        assert bool(back.isfinite().all())

    def test_golden_bytes(self):
        """Fixed for good: whoever changes these needs another format id."""
        fmt = Rvq(groups=2, codes=3, levels=2)
        first = [[[1, 0], [0, 1], [-1, 0]], [[1, 1], [-1, -1], [0, 2]]]
        second = [[[0, 0], [0.25, 0], [0, 0.25]], [[0, 0], [0, -0.25], [0.5, 0]]]
        fmt.use_table(torch.tensor([first, second], dtype=torch.float32).view(12, 2))
        # scales 2, 0, 1 by hand; codes by (level, token, group), two bits each, the first lowest
        body = bytes.fromhex("0040" + "0000" + "803f")
        codes = [[2, 1, 0, 0, 1, 2], [0, 2, 0, 0, 1, 1]]
        number = sum(code << 2 * i for i, code in enumerate(codes[0] + codes[1]))
        body += number.to_bytes(3, "little")
        payload = Payload(codec="rvq", header={"shape": [3, 4]}, body=body)
        back = fmt.unpack(payload, shape=(3, 4), dtype=torch.float32)
        assert back.tolist() == [[-2.0, 0.0, -1.0, -2.0], [0, 0, 0, 0], [0.25, 1.0, 0.0, 1.75]]
        again = fmt.pack(torch.tensor([[-2.0, 0.1, -2.1, -2.0], [0, 0, 0, 0], [0.2, 1.0, 0.0, 1.75]]), key())
        assert again.body[:2] != again.body[2:4] == bytes(2)

    def test_decoding_is_a_sum_of_rows_in_the_order_of_levels_times_the_scale(self):
        fmt, z = Rvq(groups=2, codes=16, levels=3), gaussian((40, 8))
        started(fmt, z)
        table = fmt.master.numpy().reshape(3, 2, 16, 4)
        body = fmt.pack(z, key()).body
        scales = torch.frombuffer(bytearray(body[:80]), dtype=torch.bfloat16).float().numpy()
        nibbles = np.frombuffer(body[80:], np.uint8)
        codes = np.stack([nibbles & 15, nibbles >> 4], axis=1).reshape(3, 40, 2)
        wanted = np.empty((40, 2, 4), np.float32)
        for token in range(40):
            for group in range(2):
                rows = [table[level, group, codes[level, token, group]] for level in range(3)]
                wanted[token, group] = ((rows[0] + rows[1]) + rows[2]) * scales[token]
        assert np.array_equal(round_trip(fmt, z).numpy(), wanted.reshape(40, 8))

    def test_each_level_takes_the_nearest_row(self):
        fmt, z = Rvq(groups=4, codes=32, levels=2), gaussian((50, 16))
        started(fmt, z)
        x = gaussian((50, 4, 4), seed=1)
        coded = Codebooks(fmt.master, fmt.grid).encode(x)
        rows, left = fmt.master.view(2, 4, 32, 4), x
        for level in range(2):
            distance = (left.unsqueeze(2) - rows[level]).square().sum(dim=3)
            taken = distance.gather(2, coded.codes_LNG[level].unsqueeze(2)).squeeze(2)
            assert bool((taken <= distance.amin(dim=2) + 1e-5).all())
            assert torch.equal(coded.given[level], left)
            left = left - rows[level][torch.arange(4), coded.codes_LNG[level]]
        assert torch.equal(coded.left_NGD, left)

    def test_blocks_of_tokens_do_not_change_the_search(self):
        grid = CodebookShape(levels=1, groups=64, codes=256)  # 16 tokens a block
        books, x = Codebooks(gaussian((grid.entries, 2)), grid), gaussian((100, 64, 2), seed=1)
        whole = books.encode(x).codes_LNG
        parts = [books.encode(x[start : start + 7]).codes_LNG for start in range(0, 100, 7)]
        assert torch.equal(whole, torch.cat(parts, dim=1))

    def test_of_two_equal_rows_the_first_is_taken(self):
        fmt = Rvq(groups=1, codes=4, levels=1)
        fmt.use_table(torch.tensor([[5.0], [1.0], [1.0], [1.0]]))
        assert fmt.pack(torch.ones(4, 1), key()).body[8:] == bytes([0b01010101])

    def test_zero_tokens_are_exact_whatever_the_codebook(self):
        fmt, z = Rvq(groups=2, codes=4), gaussian((6, 8))
        z[2] = 0
        started(fmt, z)
        assert torch.equal(round_trip(fmt, z)[2], torch.zeros(8))
        assert fmt.pack(z, key()).body[4:6] == bytes(2)
        nothing = torch.zeros(3, 8)
        assert torch.equal(round_trip(fmt, nothing), nothing)

    @pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-20, 1e20, 3e38])
    def test_scales_of_any_magnitude(self, magnitude):
        fmt = Rvq(groups=1, codes=4, levels=1)
        fmt.use_table(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]))
        z = torch.tensor([[magnitude, -magnitude], [-magnitude, -magnitude]])
        error = (round_trip(fmt, z) - z).abs().max().item()
        assert error <= 2**-8 * magnitude + 2**-125

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_floating_dtypes(self, dtype):
        z = gaussian((64, 16)).to(torch.bfloat16).to(dtype)
        fmt = started(Rvq(groups=4, codes=16), z)
        assert fmt.master.dtype == torch.float32
        payload = fmt.pack(z, key())
        assert payload == fmt.pack(z.float(), key())
        assert fmt.unpack(payload, shape=(64, 16), dtype=dtype).dtype == dtype


class TestRefusals:
    @pytest.fixture
    def packed(self):
        fmt, z = Rvq(groups=2, codes=5, levels=2), gaussian((6, 8))
        started(fmt, z)
        return fmt, fmt.pack(z, key())

    def unpack(self, fmt, payload, body, shape=(6, 8)):
        return fmt.unpack(dataclasses.replace(payload, body=body), shape=shape, dtype=torch.float32)

    @pytest.mark.parametrize("change", [-1, 1, 9])
    def test_length(self, packed, change):
        fmt, payload = packed
        body = payload.body[:change] if change < 0 else payload.body + bytes(change)
        with pytest.raises(CodecError, match=f"has {len(body)} bytes, expected {len(payload.body)}"):
            self.unpack(fmt, payload, body)

    @pytest.mark.parametrize("scale", ["807f", "c07f", "80ff", "0080", "7f00", "0100", "80bf"])
    def test_scale(self, packed, scale):
        fmt, payload = packed
        body = payload.body[:4] + bytes.fromhex(scale) + payload.body[6:]
        with pytest.raises(CodecError, match="rvq payload's scale of token 2 is"):
            self.unpack(fmt, payload, body)

    def test_code(self, packed):
        fmt, payload = packed
        body = payload.body[:12] + bytes([0b00_111_000]) + payload.body[13:]
        with pytest.raises(CodecError, match="rvq payload's codes: value 7 at index 1 is not below the limit of 5"):
            self.unpack(fmt, payload, body)

    def test_what_is_not_finite_once_decoded(self, packed):
        fmt, payload = packed
        fmt.use_table(fmt.master * 100)
        with pytest.raises(CodecError, match=r"token 1 is not finite in torch.float32; its scale is 3\.38"):
            self.unpack(fmt, payload, payload.body[:2] + bytes.fromhex("7f7f") + payload.body[4:])

    def test_shape_and_width(self, packed):
        fmt, payload = packed
        with pytest.raises(CodecError, match=r"shape \[6, 8\], expected \[8, 6\]"):
            self.unpack(fmt, payload, payload.body, (8, 6))
        with pytest.raises(CodecError, match="a tensor of width 4, and a codebook for width 8"):
            fmt.pack(gaussian((6, 4)), key())
        with pytest.raises(CodecError, match="and not a number alone"):
            fmt.pack(torch.tensor(1.0), key())

    @pytest.mark.parametrize(
        ("width", "groups", "remedy"), [(64, 7, "groups=8"), (6, 8, "groups=6"), (65, 8, "groups=5"), (0, 8, "a width")]
    )
    def test_a_width_that_groups_do_not_divide(self, width, groups, remedy):
        fmt = Rvq(groups=groups)
        for ask in (
            lambda: fmt.table(width),
            lambda: fmt.body_bytes((3, width)),
            lambda: fmt.pack(torch.ones(3, width), key()),
        ):
            with pytest.raises(CodecError, match=f"width of {width} cannot be cut into groups={groups}; say {remedy}"):
                ask()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_not_finite(self, packed, bad):
        fmt, _ = packed
        z, before = gaussian((6, 8)), state_of(fmt)
        z[3, 1] = bad
        for act in (fmt.pack, fmt.learn):
            with pytest.raises(CodecError, match=f"value {bad} at element 25 of FORWARD tensor of boundary 2, step 3"):
                act(z, key())
        assert equal(state_of(fmt), before)

    def test_before_there_is_a_table(self, packed):
        _, payload = packed
        fmt = Rvq(groups=2, codes=5, levels=2)
        with pytest.raises(CodecError, match="no codebook yet"):
            fmt.pack(gaussian((6, 8)), key())
        with pytest.raises(CodecError, match="no codebook yet"):
            self.unpack(fmt, payload, payload.body)
        with pytest.raises(CodecError, match="no codebook before the first tensor"):
            _ = fmt.master
        fmt.learn(gaussian((6, 8)), key())
        with pytest.raises(CodecError, match="no codebook yet"):
            fmt.learn(gaussian((6, 8)), key(1))  # with which nothing was coded

    @pytest.mark.parametrize("table", [torch.zeros(20, 4, dtype=torch.float64), torch.zeros(19, 4), torch.zeros(20)])
    def test_a_table_of_another_shape(self, packed, table):
        with pytest.raises(CodecError, match=r"wants a table \(20, width\), float32; got"):
            packed[0].use_table(table)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"sums": None}, r"the state of a codebook is \['counts', 'sums', 'updates'\], but was given"),
            ({"more": torch.zeros(1)}, "was given .*'more'"),
            ({"counts": torch.zeros(2, 2, 4)}, r"'counts' is \[2, 2, 4\] torch.float32, wanted \[2, 2, 5\]"),
            ({"sums": torch.zeros(2, 2, 5, 0)}, r"wanted \[2, 2, 5, 1\]"),
            ({"sums": torch.zeros(())}, "'sums' is"),
            ({"updates": torch.zeros((), dtype=torch.int64)}, "'updates' is .* torch.int64"),
            ({"counts": torch.full((2, 2, 5), -1.0)}, "'counts' has a count below 0"),
            ({"sums": torch.full((2, 2, 5, 4), math.nan)}, "'sums' has a value"),
        ],
    )
    def test_a_state_that_is_none(self, packed, change, message):
        fmt, before = packed[0], state_of(packed[0])
        state = {name: tensor for name, tensor in {**before, **change}.items() if tensor is not None}
        with pytest.raises(CodecError, match=message):
            fmt.load_state_tensors(state)
        assert equal(state_of(fmt), before)


class TestSpec:
    def test_options(self):
        fmt = parse_format("rvq:groups=4, codes=100,levels=3,decay=0.9,delta=drift/32,encoding=int4")
        assert isinstance(fmt, Rvq)
        table = fmt.table(64)
        assert (table.entries, table.width, table.delta) == (3 * 4 * 100, 16, "int4")
        assert (table.policy, table.divisor, table.gradient) == ("drift", 32, None)
        assert (parse_format("rvq:delta=full").table(64).policy, parse_format("rvq").table(64).divisor) == ("full", 16)
        wire = parse_codec("mapl:r=64", "rvq:levels=1", "rvq")
        assert (wire.forward.table(64).entries, wire.backward.table(64).entries) == (8 * 256, 16 * 256)
        assert parse_codec("rvq:groups=4").codec.name == "identity"

    def test_the_dictionary_takes_it(self):
        spec = dictionary_of(parse_format("rvq").table(64), torch.float32)
        assert (spec.name, spec.entries, spec.width, spec.encoding) == ("codebook", 4096, 8, "int4")

    def test_policies_are_those_of_the_protocol(self):
        assert get_args(rvq.Policy) == get_args(dictionary_selection.Policy)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("group=8", "byte format 'rvq' has no option 'group'; the nearest known one is 'groups'"),
            ("groups=8.5", "option 'groups' may be auto, or wants a whole number, got '8.5'"),
            ("groups=0", "groups=0 has to be at least 1"),
            ("codes=1", "codes=1 has to be from 2 to 65536"),
            ("codes=65537", "codes=65537 has to be"),
            ("levels=0", "levels=0 has to be from 1 to 16"),
            ("decay=1", "decay=1 has to be at least 0 and below 1"),
            ("decay=nan", "wants a finite number"),
            ("encoding=int7", "option 'encoding' cannot be 'int7'; the nearest known one is"),
            ("delta=rndom/16", "option 'delta' cannot be 'rndom/16'; the nearest known one is 'random'"),
            ("delta=zzz", "option 'delta' cannot be 'zzz'; known: full, random, robin, drift"),
            ("delta=robin", "option 'delta' is 'robin', wants robin/D with D from 1 to 65536"),
            ("delta=robin/0", "wants robin/D"),
            ("delta=robin/1e3", "wants robin/D"),
            ("delta=robin/99999999999", "wants robin/D"),
            ("delta=full/2", "option 'delta' is 'full/2', wants full alone"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(CodecError) as error:
            parse_format(f"rvq:{options}")
        assert message in str(error.value)
        assert "\n" not in str(error.value)


class TestGroupsOfTheWidth:
    """groups=auto: a width says how many, the first one that anything is learned, received or restored for."""

    @pytest.mark.parametrize(("width", "groups"), [(32, 4), (64, 8), (12, 2), (8, 1), (7, 1), (11, 11)])
    def test_it_is_what_one_would_have_said(self, width, groups):
        z, said = gaussian((300, width)), Rvq(groups=groups, codes=16)
        auto = Rvq(codes=16)
        assert auto.body_bytes((300, width)) == said.body_bytes((300, width))
        assert auto.table(width) == said.table(width)
        started(auto, z), started(said, z)
        assert auto.pack(z, key()) == said.pack(z, key())

    def test_a_receiver_knows_it_from_the_table(self):
        z, there = gaussian((300, 32)), Rvq(codes=16)
        here = started(Rvq(codes=16), z)
        there.use_table(here.master)
        assert torch.equal(there.unpack(here.pack(z, key()), shape=(300, 32), dtype=z.dtype), round_trip(here, z))

    def test_a_restored_one_is_for_the_width_that_it_was_made_for(self):
        z, restored = gaussian((300, 32)), Rvq(codes=16)
        first = started(Rvq(codes=16), z)
        with pytest.raises(CodecError, match="the state of a codebook: 'counts' is"):
            restored.load_state_tensors(first.state_tensors())
        restored.table(32)  # as a node does first of all
        restored.check_state_tensors(first.state_tensors())
        restored.load_state_tensors(first.state_tensors())
        assert torch.equal(restored.master, first.master)
        layout = Rvq(codes=16).state_layout((300, 32), 1)
        assert {name: each.shape for name, each in first.state_tensors().items()} == {
            name: each.shape for name, each in layout.items()
        }

    def test_what_was_learned_for_one_width_is_not_for_another(self):
        fmt = started(Rvq(codes=16), gaussian((300, 32)))
        with pytest.raises(CodecError, match="a tensor of width 16, and a codebook for width 32"):
            fmt.pack(gaussian((300, 16)), key())
        assert fmt.body_bytes((300, 16)) == Rvq(codes=16).body_bytes((300, 16))


class TestQuality:
    def test_error_falls_with_levels_and_codes(self):
        z, fresh = gaussian((4096, 16), rho=0.7), gaussian((1024, 16), seed=1, rho=0.7)

        def error(codes, levels):
            return relative_error(started(Rvq(groups=4, codes=codes, levels=levels), z), fresh)

        errors = [error(64, levels) for levels in (1, 2, 3)]
        assert errors[1] < 0.6 * errors[0]
        assert errors[2] < 0.7 * errors[1]
        errors = [error(codes, 1) for codes in (4, 16, 64, 256)]
        assert errors == sorted(errors, reverse=True)

    def test_a_planted_codebook_is_found(self):
        """Coarse and fine parts are orthogonal and of one length each, so that all tokens have the same scale."""
        draw, zeros = torch.Generator().manual_seed(5), torch.zeros(16, 2)
        angles = torch.arange(16) / 16 * 2 * math.pi
        circle = torch.stack([angles.cos(), angles.sin()], dim=1)
        coarse, fine = torch.cat([2 * circle, zeros], dim=1), torch.cat([zeros, 0.05 * circle], dim=1)[::2]
        z = coarse[torch.randint(0, 16, (2048, 4), generator=draw)].view(2048, 16)
        assert relative_error(started(Rvq(groups=4, codes=16, levels=1), z), z) < 1e-3
        z = z + fine[torch.randint(0, 8, (2048, 4), generator=draw)].view(2048, 16)
        assert relative_error(started(Rvq(groups=4, codes=16, levels=1), z), z) > 0.02
        assert relative_error(started(Rvq(groups=4, codes=16, levels=2), z), z) < 0.004

    def test_better_than_int4_at_fewer_bytes_where_numbers_correlate(self):
        z, fresh = gaussian((8192, 64), rho=0.9), gaussian((1024, 64), seed=1, rho=0.9)
        fmt, grid = started(Rvq(groups=16, codes=128, levels=2), z), parse_format("int4")
        assert fmt.body_bytes((1024, 64)) < grid.body_bytes((1024, 64))
        assert relative_error(fmt, fresh) < 0.85 * relative_error(grid, fresh)

    def test_a_scale_for_each_token_keeps_small_tokens(self):
        z = gaussian((2048, 16)) * torch.logspace(-4, 4, 2048).unsqueeze(1)
        back = round_trip(started(Rvq(groups=4, codes=64), z), z)
        errors = (back - z).norm(dim=1) / z.norm(dim=1)
        assert errors.max() < 3 * errors.median()


class TestLearning:
    def test_the_average_follows_a_drifting_distribution(self):
        turn = torch.linalg.matrix_exp(0.01 * (gaussian((8, 8), seed=9) - gaussian((8, 8), seed=9).T))
        centres = 3 * gaussian((12, 8), seed=2)

        def tensors(count):
            nonlocal centres
            for microbatch in range(count):
                centres = centres @ turn
                which = torch.randint(0, 12, (256,), generator=torch.Generator().manual_seed(microbatch))
                yield centres[which] + 0.2 * gaussian((256, 8), seed=microbatch)

        z = next(tensors(1))
        fmt, frozen = (started(Rvq(groups=2, codes=16, levels=1, decay=0.9), z) for _ in range(2))
        train(fmt, tensors(160))
        last = next(tensors(1))
        assert relative_error(fmt, last) < 0.5 * relative_error(frozen, last)

    def test_rows_are_means_of_what_was_coded_with_them(self):
        fmt, z = Rvq(groups=1, codes=4, levels=1, decay=0.0), gaussian((500, 2))
        started(fmt, z)
        x, _ = fmt._scaled(z, key())
        codes = fmt._books.encode(x).codes_LNG[0, :, 0]
        fmt.learn(z, key())
        means = torch.stack([x[codes == code].mean(dim=0).view(2) for code in range(4)])
        torch.testing.assert_close(fmt.master, means, rtol=1e-5, atol=1e-5)

    def test_the_average_forgets_faster_at_first(self):
        fmt, z = Rvq(groups=1, codes=2, levels=1, decay=0.3), torch.tensor([[1.0, 1.0]] * 6 + [[-1.0, -1.0]] * 2)
        started(fmt, z)
        counts = fmt.state_tensors()["counts"].clone()
        for n in range(5):
            fmt.learn(z[:6], key(n))
            decay = min(0.3, (1 + n) / (10 + n))
            counts = decay * counts + (1 - decay) * torch.where(counts == counts.max(), 6.0, 0.0)
            counts[counts < DEAD * 3] = 0.1 * 3
            torch.testing.assert_close(fmt.state_tensors()["counts"], counts)
        assert fmt.state_tensors()["updates"] == 5

    def test_codes_that_are_used_no_more_are_revived(self):
        def cluster(seed, centre):
            return gaussian((1024, 8), seed=seed) + centre

        far = cluster(1, -2)
        fmt = started(Rvq(groups=1, codes=64, levels=1, decay=0.9), cluster(0, 2))
        fmt.pack(far, key(1))
        fmt.learn(far, key(1))
        before = fmt.measures()
        train(fmt, (cluster(seed, -2) for seed in range(2, 60)), first=2)
        assert fmt.measures()["revived"] >= 20
        fmt.learn(far, key(99))
        after = fmt.measures()
        assert before["perplexity_1"] < 25 < 45 < after["perplexity_1"]
        assert after["reconstruction_error"] < 0.8 * before["reconstruction_error"]

    def test_a_revived_row_is_a_residual_of_this_microbatch_that_the_key_drew(self):
        z = gaussian((300, 4))
        fmts = [started(Rvq(groups=1, codes=8, levels=2, decay=0.5), z) for _ in range(2)]
        away = torch.zeros(16, 4)
        away[:] = 50.0  # nobody is near: all use the nearest one
        away[0] = fmts[0].master[0]
        for fmt in fmts:
            fmt.use_table(away)
            for microbatch in range(8):
                fmt.learn(z, key(microbatch))
        assert equal(state_of(fmts[0]), state_of(fmts[1]))
        x, _ = fmts[0]._scaled(z, key())
        left = fmts[0]._books.encode(x).given[1].view(300, 4)
        revived = fmts[0].master[8:]
        distance = (revived.unsqueeze(1) - left).norm(dim=2).min(dim=1).values
        assert int((distance < 1e-5).sum()) >= 6
        other = started(Rvq(groups=1, codes=8, levels=2, decay=0.5), z)
        other.use_table(away)
        for microbatch in range(8):
            other.learn(z, key(microbatch, seed=2))
        assert not torch.equal(other.master, fmts[0].master)

    def test_counts_never_reach_zero(self):
        fmt, z = Rvq(groups=2, codes=32, levels=2, decay=0.0), gaussian((40, 8))
        started(fmt, z)
        train(fmt, [gaussian((40, 8), seed=seed) for seed in range(20)])
        assert bool((fmt.state_tensors()["counts"] >= DEAD * 40 / 32).all())
        assert bool(fmt.master.isfinite().all())

    def test_a_row_that_few_use_weighs_as_much_as_an_even_share(self):
        """Otherwise `drift` would never ship what was revived, and nobody uses what was not shipped."""
        fmt = started(Rvq(groups=1, codes=4, levels=1), gaussian((100, 2)))
        state = fmt.state_tensors()
        state["counts"].copy_(torch.tensor([[[70.0, 20, 9, 1]]]))
        assert fmt.usage.tolist() == [70, 25, 25, 25]

    def test_fewer_tokens_than_codes(self):
        fmt, z = Rvq(groups=2, codes=64), gaussian((3, 8))
        started(fmt, z)
        assert relative_error(fmt, z) < 0.01
        train(fmt, [z, gaussian((1, 8)), gaussian((0, 8))])
        assert bool(fmt.master.isfinite().all())

    def test_tokens_of_zeros_teach_nothing(self):
        z = gaussian((100, 8))
        both = torch.cat([z, torch.zeros(50, 8)])
        fmts = [Rvq(groups=2, codes=8) for _ in range(3)]
        for fmt in fmts:
            started(fmt, z)
        for fmt, tensor in zip(fmts, (z, both, torch.zeros(9, 8)), strict=True):
            fmt.learn(tensor, key(1))
        assert equal(state_of(fmts[0]), state_of(fmts[1]))
        assert equal(state_of(fmts[2]), state_of(started(Rvq(groups=2, codes=8), z)))

    def test_a_start_with_nothing_but_zeros_is_made_up_for(self):
        fmt, z = Rvq(groups=2, codes=8), gaussian((100, 8))
        started(fmt, torch.zeros(100, 8))
        assert not fmt.master.any()
        assert torch.equal(round_trip(fmt, torch.zeros(2, 8)), torch.zeros(2, 8))
        fmt.pack(z, key(1))
        fmt.learn(z, key(1))
        other = Rvq(groups=2, codes=8)
        other.learn(z, key(1))
        assert torch.equal(fmt.master, other.master)

    def test_learning_after_packing_is_learning_alone(self):
        z = gaussian((200, 8), seed=1)
        fmts = [started(Rvq(groups=2, codes=8), gaussian((200, 8))) for _ in range(3)]
        fmts[0].pack(z, key(1))
        fmts[2].pack(z, key(1))
        changed = z.clone()
        fmts[2].pack(changed, key(1))
        changed.mul_(1.5)[0] = 7.0  # no longer what was packed
        changed.copy_(z)
        fmts[0].learn(z, key(1))
        fmts[1].learn(z, key(1))
        fmts[2].learn(changed, key(1))
        assert equal(state_of(fmts[0]), state_of(fmts[1]))
        assert equal(state_of(fmts[0]), state_of(fmts[2]))

    def test_a_tensor_changed_since_it_was_packed_is_coded_anew(self):
        z = gaussian((200, 8), seed=1)
        one, other = (started(Rvq(groups=2, codes=8), gaussian((200, 8))) for _ in range(2))
        one.pack(z, key(1))
        z[:100] = 1.0
        one.learn(z, key(1))
        other.learn(z.clone(), key(1))
        assert equal(state_of(one), state_of(other))

    def test_same_key_and_state_same_bytes(self):
        tensors = [gaussian((128, 16), seed=seed) for seed in range(6)]
        bodies = []
        for _ in range(2):
            torch.manual_seed(len(bodies))  # the global generators have no say
            np.random.seed(len(bodies))
            fmt = started(Rvq(groups=4, codes=16), tensors[0])
            train(fmt, tensors[1:])
            bodies.append(fmt.pack(tensors[0], key(9)))
        assert bodies[0] == bodies[1]

    def test_packing_and_unpacking_change_no_state(self):
        z = gaussian((128, 16))
        fmt = started(Rvq(groups=4, codes=16), z)
        train(fmt, [z])
        before, figures = state_of(fmt), dataclasses.replace(key(5))
        payload = fmt.pack(gaussian((128, 16), seed=1), figures)
        fmt.unpack(payload, shape=(128, 16), dtype=torch.float32)
        assert equal(state_of(fmt), before)
        twin = started(Rvq(groups=4, codes=16), z)
        train(twin, [z])
        assert twin.measures() == fmt.measures()

    def test_state_round_trips_bit_for_bit(self):
        tensors = [gaussian((128, 16), seed=seed) for seed in range(8)]
        fmt, copy = started(Rvq(groups=4, codes=16), tensors[0]), Rvq(groups=4, codes=16)
        train(fmt, tensors[:4])
        kept, shipped = state_of(fmt), fmt.master.clone()
        copy.load_state_tensors(fmt.state_tensors())
        copy.use_table(shipped)
        assert all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in kept.values())
        train(fmt, tensors[4:])
        assert equal(state_of(copy), kept)  # its memory is its own
        train(copy, tensors[4:])
        assert equal(state_of(fmt), state_of(copy))
        fmt.load_state_tensors({})
        assert not fmt.has_started
        assert fmt.state_tensors() == {}
        assert equal(state_of(started(fmt, tensors[0])), state_of(started(Rvq(groups=4, codes=16), tensors[0])))

    def test_measures(self):
        fmt, z = Rvq(groups=1, codes=4, levels=1), torch.tensor([[1.0, 0], [0, 1.0], [-1.0, 0], [0, -1.0]]).repeat(8, 1)
        assert fmt.measures() == {}
        started(fmt, z)
        fmt.learn(z, key(1))
        figures = fmt.measures()
        assert figures["usage_1"] == 1.0
        assert figures["perplexity_1"] == pytest.approx(4.0)
        assert figures["reconstruction_error"] < 1e-6
        assert figures["revived"] == 0
        fmt.learn(z[:1].repeat(5, 1), key(2))
        figures = fmt.measures()
        assert (figures["usage_1"], figures["perplexity_1"]) == (0.25, pytest.approx(1.0))
        assert fmt.measures()["perplexity_1"] == 1.0  # of nothing
        fmt.use_table(fmt.master * 1.5)
        assert fmt.measures()["staleness"] == pytest.approx(0.5)


class TestDictionary:
    """The order of calls that the module's text gives a node, with a real dictionary between the ends."""

    @pytest.mark.parametrize("delta", ["full", "random/4", "robin/4", "drift/4"])
    @pytest.mark.parametrize("encoding", ["bf16", "int8", "int4"])
    def test_owner_and_follower_decode_the_same_bits(self, delta, encoding):
        owner, follower = (parse_format(f"rvq:groups=4,codes=16,delta={delta},encoding={encoding}") for _ in range(2))
        table = owner.table(16)
        spec = dictionary_of(table, torch.float32)
        publisher, replica = Publisher(spec, 0), Replica(spec, 0)
        for microbatch in range(20):
            z, k = gaussian((128, 16), seed=microbatch, rho=0.6) + microbatch / 10, key(microbatch)
            has_started = owner.has_started
            if not has_started:
                owner.learn(z, k)
            change = publisher.publish(
                owner.master.numpy(),
                step=3,
                microbatch=microbatch,
                entries=chosen(table, publisher, owner, k, microbatch) if has_started else None,
            )
            owner.use_table(torch.from_numpy(publisher.shipped.copy()))
            payload = owner.pack(z, k)
            if has_started:
                owner.learn(z, k)
            arrived = replica.apply(decode_delta(encode_delta(change), spec))
            follower.use_table(torch.from_numpy(arrived.copy()))
            there = follower.unpack(payload, shape=(128, 16), dtype=torch.float32)
            assert torch.equal(there, owner.unpack(payload, shape=(128, 16), dtype=torch.float32))
            assert float((there - z).norm() / z.norm()) < 0.75
        assert follower.state_tensors() == {}
        assert owner.measures()["staleness"] < (0.35 if delta == "full" else 1)


def chosen(table, publisher: Publisher, owner, k: Key, message: int):
    assert isinstance(publisher.spec, DictionarySpec)
    return dictionary_selection.select(
        table.policy,
        table.divisor,
        entries=table.entries,
        cursor=message,
        draw=k.generator(7),
        drift=owner.master.numpy() - publisher.shipped,
        usage=owner.usage.numpy(),
    )


def test_index_widths():
    assert [bit_width(codes) for codes in (2, 3, 200, 256, 257)] == [1, 2, 8, 8, 9]


class TestRotated:
    """`hadamard`: what is lost has no direction."""

    def lost(self, fmt, messages):
        """Of gradients that are strong in two directions of sixteen: the mean of what arrives, in parts of what was
        sent, of the strong and of the weak ones."""
        strength_W = torch.tensor([6.0] * 2 + [1.0] * 14)
        sent = [gaussian((512, 16), seed=seed) * strength_W for seed in range(messages)]
        parts = []
        for number, z in enumerate(sent):
            k = key(direction=Direction.BACKWARD, microbatch=number)
            if not fmt.has_started:
                fmt.learn(z, k)
            fmt.use_table(fmt.master)
            payload = fmt.pack(z, k)
            back = fmt.unpack(payload, shape=(512, 16), dtype=torch.float32, key=k)
            parts.append((back * z).sum(dim=0) / z.square().sum(dim=0))
            fmt.learn(z, k)
        mean_W = torch.stack(parts[messages // 2 :]).mean(dim=0)
        return mean_W[:2].mean().item(), mean_W[2:].mean().item()

    def test_the_records_tell(self):
        """What a node would have in its records of such a codebook, against what arrives."""
        z = gaussian((512, 16)) * torch.tensor([6.0] * 2 + [1.0] * 14)
        for rotated in (False, True):
            fmt = started(Rvq(groups=1, codes=16, levels=2, hadamard=rotated), z)
            fmt.learn(z, key())
            figures, (values, directions) = fmt.measures(), torch.linalg.eigh(z.double().mT @ z.double())
            back = fmt.unpack(fmt.pack(z, key()), shape=(512, 16), dtype=torch.float64, key=key())
            kept = ((z.double() @ directions) * (back @ directions)).sum(dim=0) / values
            assert figures["kept_weakest"] == pytest.approx(kept[0].item(), abs=1e-5)
            assert figures["kept_strongest"] == pytest.approx(kept[-1].item(), abs=1e-5)
            assert (figures["kept_weakest"] < 0.4 * figures["kept_strongest"]) is not rotated

    def test_weak_directions_arrive_like_strong_ones(self):
        strong, weak = self.lost(Rvq(groups=1, codes=16, levels=2), 12)
        assert strong > 0.8
        assert weak < 0.35  # never said
        strong, weak = self.lost(Rvq(groups=1, codes=16, levels=2, hadamard=True), 12)
        assert abs(strong / weak - 1) < 0.25

    def test_it_takes_no_byte(self):
        plain, rotated = (Rvq(groups=2, codes=16, hadamard=on) for on in (False, True))
        assert plain.body_bytes((7, 24)) == rotated.body_bytes((7, 24))

    @pytest.mark.parametrize("width", [7, 10, 12])
    def test_it_takes_a_width_that_it_can_hardly_mix(self, width):
        z, fmt = gaussian((600, width)), Rvq(codes=256, hadamard=True)
        started(fmt, z)
        arrived = fmt.unpack(fmt.pack(z, key()), shape=tuple(z.shape), dtype=z.dtype, key=key())
        assert float((arrived - z).norm() / z.norm()) < 0.5
