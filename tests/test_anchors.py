"""The token table's bits and pairs' hashes, derived once more; their statistics; what anchors add, learn and refuse."""

import hashlib
import itertools
import math
import struct
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from thinpipe.compress.anchors import MAX_PAIRS, Anchors, make_anchors, pair_buckets
from thinpipe.compress.byte_format import Direction, Key
from thinpipe.compress.token_table import integers, table_digest, token_table

KINDS = ["factorized", "full", "none"]
V, D, R = 37, 24, 10
SCALE = 0.7  # no power of two, so that the one multiplication does round


# --- the token table, in plain Python integers ---------------------------------------------------------------------

MASK = 2**64 - 1


def philox_block(key: tuple[int, int], counter: int) -> list[int]:
    """Philox 4x64 with ten rounds, from the paper (Salmon et al., SC'11): four 64-bit words."""
    k0, k1 = key
    c0, c1, c2, c3 = (counter >> 64 * word & MASK for word in range(4))
    for _ in range(10):
        left, right = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = right >> 64 ^ c1 ^ k0, right & MASK, left >> 64 ^ c3 ^ k1, left & MASK
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & MASK, k1 + 0xBB67AE8584CAA73B & MASK
    return [c0, c1, c2, c3]


def plain_value(seed: int, row: int, column: int, width: int, scale: float) -> float:
    blocks_a_row = math.ceil(3 * width / 4)
    total = 0
    for index in (column, column + width, column + 2 * width):
        # numpy counts up before it draws, hence 1; the counter's second word is the width, its third 2^63
        block = philox_block((seed, 0), (2**63 << 128) + (width << 64) + row * blocks_a_row + index // 4 + 1)
        word = block[index % 4]
        total += sum(word >> shift & 0xFFFF for shift in (0, 16, 32, 48))
    factor = struct.unpack("<f", struct.pack("<f", scale / 65536))[0]
    # the product of two 24-bit numbers is exact in float64, so packing it rounds once
    return struct.unpack("<f", struct.pack("<f", (total - 6 * 65535) * factor))[0]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("width", [1, 5, 24, 2048])
@pytest.mark.parametrize("scale", [1.0, SCALE, 0.02])
def test_table_equals_a_slow_one_in_plainintegers(seed, width, scale):
    table = token_table(seed, 40, width, scale)
    for row in (0, 1, 17, 39):
        for column in {0, width // 3, width - 1}:
            assert table[row, column].item() == plain_value(seed, row, column, width, scale)


@pytest.mark.parametrize(
    ("seed", "scale", "digest"),
    [
        (0, 1.0, "6902209a445f600643b21031ebdd01818da2bddfdeabfb218cd0faa38519caaa"),
        (1234567, SCALE, "73a9f1e77e3e4869ccf7b64a4133cfb52d8cd10e642f2215b54d9fd6501ad1a6"),
    ],
)
def test_table_has_the_bits_it_had_when_this_test_was_written(seed, scale, digest):
    assert table_digest(seed, 1000, 72, scale) == digest
    assert hashlib.sha256(token_table(seed, 1000, 72, scale).numpy().tobytes()).hexdigest() == digest


def test_digest_depends_on_every_argument():
    arguments = [
        (5, 8, 6, 1.0),
        (6, 8, 6, 1.0),
        (5, 9, 6, 1.0),
        (5, 8, 7, 1.0),
        (5, 6, 8, 1.0),
        (5, 8, 6, 1.0 + 2**-23),
    ]
    assert len({table_digest(*given) for given in arguments}) == len(arguments)
    assert table_digest(5, 8, 6) == table_digest(5, 8, 6, 1.0)


@pytest.mark.parametrize("width", [7, 2048, 40_000])  # the widest is a slab for each row
def test_rows_do_not_depend_on_the_size_of_the_vocabulary(width):
    large = token_table(3, 50, width)
    for vocab_size in (1, 16, 17, 49):
        assert torch.equal(token_table(3, vocab_size, width), large[:vocab_size])


def test_scale_one_gives_the_integers_unrounded_and_other_scales_round_once():
    table = token_table(3, 100, 64)
    integers = table.double() * 65536
    assert torch.equal(integers, integers.round())
    assert torch.equal(token_table(3, 100, 64, 0.5), table / 2)
    factor = np.float32(SCALE / 65536)
    assert torch.equal(token_table(3, 100, 64, SCALE).double(), (integers * float(factor)).float().double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_the_fp32_values_converted(dtype):
    table = token_table(3, 100, 64, SCALE, dtype=dtype)
    assert table.dtype is dtype
    assert torch.equal(table, token_table(3, 100, 64, SCALE).to(dtype))


def test_moments_are_those_of_a_sum_of_twelve_uniforms():
    x = token_table(7, 4000, 500).double().flatten()
    n = x.numel()  # 2e6: bounds are five standard errors
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (1.9 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() / x.var() ** 2 - 2.9) < 5 * (96 / n) ** 0.5
    assert x.abs().max() < 6
    thresholds = torch.linspace(-4, 4, 161, dtype=torch.float64)
    below = torch.searchsorted(x.sort().values, thresholds) / n
    normal = 0.5 * (1 + torch.erf(thresholds / 2**0.5))
    assert (below - normal).abs().max() < 0.0023 + 1.7 / n**0.5
    assert 2e-6 * n < (x.abs() > 4).sum() < 5e-5 * n


def test_rows_columns_seeds_and_widths_are_not_correlated():
    count = 96
    tables = [token_table(seed, count, 4096) for seed in (0, 1, 2**32)]
    tables.append(token_table(0, count, 8192)[:, :4096])
    rows = torch.cat(tables).double()
    correlation = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0)
    assert correlation.abs().max() < 6.5 / rows.shape[1] ** 0.5
    columns = token_table(0, 4096, 256).double()
    correlation = (columns.T @ columns / columns.shape[0]).fill_diagonal_(0)
    assert correlation.abs().max() < 6.5 / columns.shape[0] ** 0.5
    assert len({row.numpy().tobytes() for row in token_table(0, 5000, 4)}) == 5000


def test_table_shares_no_random_number_with_messages(monkeypatch):
    made = []
    philox = np.random.Philox
    monkeypatch.setattr(np.random, "Philox", lambda **given: made.append(given) or philox(**given))
    token_table(0, 3, 8)
    make_anchors("factorized", vocab_size=3, width=8, rank=2, seed=0, stage=1)
    tables = len(made)
    Key(seed=0, boundary=0, direction=Direction.FORWARD, step=2**63 - 1, microbatch=2**63 - 1).generator(2**64 - 1)
    assert tables == 2
    assert all(int(given["counter"][2]) >= 2**63 for given in made[:tables])
    assert int(made[-1]["counter"][2]) < 2**63
    assert made[0]["key"].tolist() != made[1]["key"].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 4, 4), r"seed -1 is outside \[0, 2\*\*63\)"),
        ((2**63, 4, 4), "seed 9223372036854775808"),
        ((0, 0, 4), "vocabulary 0 x width 4"),
        ((0, 4, -4), "vocabulary 4 x width -4"),
        ((0, 4, 4, 0.0), r"scale 0\.0 is outside"),
        ((0, 4, 4, -1.0), r"scale -1\.0"),
        ((0, 4, 4, math.nan), "scale nan"),
        ((0, 4, 4, 2.0**101), "scale"),
        ((0, 4, 4, 2.0**-101), "scale"),
    ],
)
def test_table_refuses_what_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        token_table(*arguments)
    with pytest.raises(ValueError, match=message):
        table_digest(*arguments)


def test_table_refuses_an_integer_dtype():
    with pytest.raises(ValueError, match=r"got dtype torch\.int32; choose torch\.float32"):
        token_table(0, 4, 4, dtype=torch.int32)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_extreme_scales_stay_normal_and_finite(scale):
    table = token_table(0, 200, 200, scale)
    assert table.isfinite().all()
    assert table[table != 0].abs().min() >= torch.finfo(torch.float32).tiny
    assert torch.equal(table / scale, token_table(0, 200, 200))


# --- pairs of tokens, in plain Python integers ---------------------------------------------------------------------


def plain_mix(x: int) -> int:
    """lowbias32, as its page has it: 32-bit unsigned C arithmetic."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def plain_bucket(before: int, own: int, buckets: int) -> int:
    return plain_mix(plain_mix(before) ^ own) * buckets // 2**32


@pytest.mark.parametrize("buckets", [1, 2, 97, 4096, MAX_PAIRS - 1, MAX_PAIRS])
@pytest.mark.parametrize("vocab_size", [1, 37, 32_000, 2**20, 2**31])
def test_buckets_equal_slow_ones_in_plainintegers(vocab_size, buckets):
    ids = torch.randint(vocab_size, (3, 50), generator=torch.Generator().manual_seed(1))
    ids[0, :4] = torch.tensor([0, vocab_size - 1, vocab_size - 1, 0])
    before = ids.clone()
    got = pair_buckets(ids, vocab_size, buckets)
    assert got.dtype is torch.int64
    assert got.tolist() == [
        [plain_bucket(*pair, buckets) for pair in itertools.pairwise([vocab_size, *row])] for row in ids.tolist()
    ]
    assert torch.equal(ids, before)
    if vocab_size < 2**31:
        assert torch.equal(pair_buckets(ids.to(torch.int32), vocab_size, buckets), got)


def test_buckets_are_those_they_were_when_this_test_was_written():
    assert pair_buckets(torch.tensor([[1, 2, 3, 3, 2, 1]]), 32_000, 2**20).tolist() == [
        [561168, 831486, 333524, 1012320, 871213, 74660]
    ]


def test_pairs_spread_evenly():
    vocab_size, buckets = 700, 1000
    first = torch.arange(vocab_size).repeat_interleave(vocab_size)
    ids = torch.stack([first, torch.arange(vocab_size).repeat(vocab_size)], dim=1)
    for chosen in (slice(None), (ids % 64 == 0).all(dim=1), (ids < 100).all(dim=1)):  # all; ids alike in low, high bits
        found = torch.bincount(pair_buckets(ids[chosen], vocab_size, buckets)[:, 1], minlength=buckets)
        expected = found.sum() / buckets
        chi_square = ((found - expected).square() / expected).sum().item()
        assert abs(chi_square - (buckets - 1)) < 5 * math.sqrt(2 * (buckets - 1))
    whole = pair_buckets(ids, vocab_size, MAX_PAIRS)[:, 1]
    distinct, wanted = len(whole.unique()), MAX_PAIRS * (1 - math.exp(-len(ids) / MAX_PAIRS))
    assert abs(distinct - wanted) < 0.01 * wanted
    swapped = pair_buckets(ids.flip(1), vocab_size, buckets)[:, 1]
    same = (swapped == pair_buckets(ids, vocab_size, buckets)[:, 1]).double().mean().item()
    assert same < 2 / buckets + 1 / vocab_size  # a token twice is its own replica image; all others by chance


# --- anchors -------------------------------------------------------------------------------------------------------


def build(
    kind, *, table: torch.Tensor | None = None, seed=1, stage=2, rank=R, width=D, vocab_size=V, pairs=0
) -> Anchors:
    return make_anchors(
        kind, vocab_size=vocab_size, width=width, rank=rank, seed=seed, stage=stage, table=table, pairs=pairs
    )


def trained(kind, table: torch.Tensor | None = None, pairs=0) -> Anchors:
    """In float64, as if training had moved what is trainable."""
    anchors = build(kind, table=table, pairs=pairs).double()
    generator = torch.Generator().manual_seed(4)
    for parameter in anchors.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return anchors


def some_ids(batch=3, length=11) -> torch.Tensor:
    ids = torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(5))
    ids[0, 0], ids[0, 1], ids[1, 0] = 0, V - 1, V - 1  # both ends, one of them twice
    return ids


@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_formula(kind, with_table):
    table = token_table(9, V, D) if with_table else None
    anchors, ids = trained(kind, table), some_ids()
    learned = {
        "factorized": lambda: anchors.weight @ anchors.projection,
        "full": lambda: anchors.weight,
        "none": lambda: torch.zeros(V, D, dtype=torch.float64),
    }[kind]()
    expected = (learned if table is None else learned + table.double())[ids]
    got = anchors(ids)
    if kind == "none" and table is None:
        assert got is None
        return
    assert got is not None
    assert got.shape == (3, 11, D)
    assert got.dtype is torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_a_stage_knows_exactly_the_table(kind):
    table, ids = token_table(9, V, D), some_ids()
    hidden = torch.randn(3, 11, D, generator=torch.Generator().manual_seed(6))
    sender, receiver = build(kind, table=table), build(kind, table=table, stage=3)
    assert torch.equal(sender(ids), table[ids])
    assert torch.equal(hidden - sender(ids), hidden - table[ids])
    assert torch.equal(hidden + receiver(ids), hidden + table[ids])
    assert sender.norm() == 0.0
    without = build(kind)(ids)
    assert without is None if kind == "none" else not without.any()


@pytest.mark.parametrize("kind", ["factorized", "full"])
def test_gradient_is_right_and_frozen_parts_have_none(kind):
    table = token_table(9, V, D, dtype=torch.float64).requires_grad_()
    anchors, ids = trained(kind, table), some_ids(2, 5)
    assert [name for name, parameter in anchors.named_parameters() if parameter.requires_grad] == ["weight"]

    def value(weight):
        return torch.func.functional_call(anchors, {"weight": weight}, (ids,))

    assert torch.autograd.gradcheck(value, (anchors.weight.detach().requires_grad_(),))
    anchors(ids).square().sum().backward()
    assert anchors.weight.grad[ids].any(dim=-1).all()
    unseen = torch.ones(V, dtype=torch.bool)
    unseen[ids] = False
    assert not anchors.weight.grad[unseen].any()
    assert table.grad is None
    assert not any(buffer.requires_grad or buffer.grad is not None for buffer in anchors.buffers())


def test_learning_starts_from_zero():
    anchors, ids = build("factorized"), some_ids()
    anchors(ids).sum().backward()
    assert anchors.weight.grad[ids].any(dim=-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_learns_takes_part_in_the_graph(kind):
    out = build(kind, table=token_table(9, V, D))(some_ids())
    assert out.requires_grad == (kind != "none")


def test_factorised_anchors_build_no_intermediate_as_large_as_the_vocabulary():
    vocab_size = 5000
    anchors, ids = build("factorized", table=token_table(9, vocab_size, D), vocab_size=vocab_size), some_ids()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        anchors(ids)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events() or ())
    assert 0 < allocated < vocab_size * R


@pytest.mark.parametrize(("rank", "width"), [(1, 1), (1, 9), (9, 9), (10, 24), (64, 512)])
def test_projection_has_orthonormal_rows(rank, width):
    projection = build("factorized", rank=rank, width=width).projection
    assert projection.shape == (rank, width)
    assert projection.dtype is torch.float32
    assert projection.is_contiguous()
    gram = projection.double() @ projection.double().T
    torch.testing.assert_close(gram, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)


def test_projection_belongs_to_its_seed_and_stage():
    first = build("factorized", seed=1, stage=2).projection
    assert torch.equal(first, build("factorized", seed=1, stage=2).projection)
    others = [
        build("factorized", seed=seed, stage=stage).projection for seed, stage in [(1, 3), (2, 2), (2, 1), (1, 0)]
    ]
    for other in others:  # two random subspaces of 10 and 24 dimensions meet at about sqrt(1 / 24)
        assert (first @ other.T).abs().max() < 0.9
    rows = token_table(1, R, D)
    assert (first @ torch.nn.functional.normalize(rows).T).abs().max() < 0.9


def test_projection_is_the_unique_factor_whose_triangle_has_a_positive_diagonal():
    # Each row spans the next draw: with another sign convention of the library's, some of these would be negative.
    draws = torch.from_numpy(integers(1, 1 + 2, 0, R, D) / 65536)
    triangle = draws @ build("factorized").projection.double().T
    assert (triangle.diagonal() > 0).all()
    assert triangle.triu(1).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_norm_is_the_mean_length_of_what_was_learned(kind):
    anchors = trained(kind, token_table(9, V, D))
    learned = anchors(torch.arange(V)[None])[0] - anchors.table
    expected = learned.square().sum(dim=1).mean().sqrt().item()
    assert anchors.norm() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_norm_stays_exact_for_a_large_table():
    anchors = build("full", vocab_size=8192, width=512)
    anchors.weight.data.fill_(0.1)
    assert anchors.norm() == pytest.approx(0.1 * 512**0.5, rel=1e-6)


@pytest.mark.parametrize("ids", [[[0, V]], [[-1, 0]], [[3, 2**40]]])
@pytest.mark.parametrize("kind", KINDS)
def test_an_id_outside_the_vocabulary_is_refused_by_name(kind, ids):
    bad = next(i for i in ids[0] if not 0 <= i < V)
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of {V}; "):
        build(kind, table=token_table(9, V, D))(torch.tensor(ids))


def test_an_empty_batch_is_an_empty_answer():
    assert build("factorized", table=token_table(9, V, D))(torch.empty(0, 4, dtype=torch.int64)).shape == (0, 4, D)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "factorised"}, "unknown anchors 'factorised'; choose factorized, full, none"),
        ({"rank": 0}, r"anchor rank 0 is outside \[1, 24\]"),
        ({"rank": D + 1}, r"anchor rank 25 is outside \[1, 24\]"),
        ({"pairs": -1}, r"pairs=-1 is outside \[0, 16777216\]"),
        ({"pairs": 2**24 + 1}, r"pairs=16777217 is outside"),
        ({"kind": "none", "pairs": 3}, "pairs=3 beside anchors=none, which learn nothing"),
        ({"stage": -1}, "stage -1 is outside"),
        ({"seed": -1}, "seed -1 is outside"),
        ({"vocab_size": 0}, "vocabulary 0 x width 24"),
        ({"table": torch.zeros(V + 1, D)}, r"shape is \(38, 24\), but vocabulary and width are \(37, 24\)"),
        ({"table": torch.zeros(D, V)}, r"shape is \(24, 37\)"),
        ({"table": torch.zeros(V, D, dtype=torch.int32)}, r"dtype is torch\.int32"),
    ],
)
def test_factory_refuses_what_cannot_be(changed, message):
    with pytest.raises(ValueError, match=message):
        build(**{"kind": "factorized", **changed})


@pytest.mark.parametrize("kind", ["full", "none"])
def test_kinds_without_a_projection_ignore_the_rank(kind):
    assert build(kind, rank=0).projection is None
    with pytest.raises(ValueError, match="shape"):
        build(kind, table=torch.zeros(V, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_table_is_shared_moves_along_and_is_left_out_of_checkpoints(kind):
    table = token_table(9, V, D)
    first, second = build(kind, table=table), build(kind, table=table, stage=3)
    assert first.table.data_ptr() == second.table.data_ptr() == table.data_ptr()
    first.to("cpu", torch.float32)
    assert first.table.data_ptr() == table.data_ptr()
    expected = {"factorized": {"weight", "projection"}, "full": {"weight"}, "none": set()}[kind]
    assert set(first.state_dict()) == expected
    moved = first.to("meta")
    assert all(t.device.type == "meta" for t in [*moved.parameters(), *moved.buffers()])
    assert moved.table.shape == (V, D)
    assert second.table.device.type == "cpu"


def test_checkpoint_restores_another_start():
    source = trained("factorized")
    target = build("factorized", seed=8, stage=0).double()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(some_ids()), source(some_ids()))


@pytest.mark.parametrize("kind", KINDS)
def test_no_parameter_is_named_as_a_hidden_matrix(kind):  # node/optim.py gives Muon what has `layers` in its name
    pairs = 0 if kind == "none" else 7
    names = [name for name, _ in build(kind, table=token_table(9, V, D), pairs=pairs).named_parameters()]
    assert len(names) == 2 * (kind != "none")
    assert not any("layers" in name.split(".") for name in names)


def test_within_once_the_same_ids_have_the_same_answer():
    anchors, ids = trained("full"), some_ids()
    with anchors.once(ids):
        said = anchors(ids)
        assert anchors(ids) is said
        assert anchors(ids.clone()) is not said
    assert anchors(ids) is not said  # what it knows may have changed since
    assert torch.equal(anchors(ids), said)
    said.sum().backward()
    once = anchors.weight.grad.clone()
    anchors.weight.grad = None
    with anchors.once(ids):
        (anchors(ids) + anchors(ids)).sum().backward()
    assert torch.equal(anchors.weight.grad, 2 * once)


def test_two_microbatches_have_answers_of_their_own():
    """One is under way while the other begins and ends."""
    anchors, first, second = trained("full"), some_ids(), some_ids()
    with ExitStack() as outer:
        outer.enter_context(anchors.once(first))
        said = anchors(first)
        with anchors.once(second):
            other = anchors(second)
            assert anchors(first) is said
            assert anchors(second) is other is not said
        assert anchors(first) is said
        assert anchors(second) is not other


# --- anchors of pairs ----------------------------------------------------------------------------------------------

LEARNING = ["factorized", "full"]
N = 50


@pytest.mark.parametrize("kind", LEARNING)
def test_values_with_pairs_are_the_formula(kind):
    table = token_table(9, V, D)
    anchors, ids = trained(kind, table, N), some_ids()
    assert anchors.pairs is not None
    assert anchors.pairs.shape == (N, R if kind == "factorized" else D)
    projection = torch.eye(D, dtype=torch.float64) if anchors.projection is None else anchors.projection
    got = anchors(ids)
    for b, row in enumerate(ids.tolist()):
        for i, (before, own) in enumerate(itertools.pairwise([V, *row])):
            learned = anchors.weight[own] + anchors.pairs[plain_bucket(before, own, N)]
            torch.testing.assert_close(got[b, i], table[own].double() + learned @ projection, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LEARNING)
def test_pairs_start_at_zero_and_learn_at_once(kind):
    table, ids = token_table(9, V, D), some_ids()
    anchors = build(kind, table=table, pairs=N)
    assert torch.equal(anchors(ids), table[ids])
    anchors(ids).sum().backward()
    rows = pair_buckets(ids, V, N)
    assert anchors.pairs.grad[rows].any(dim=-1).all()
    unseen = torch.ones(N, dtype=torch.bool)
    unseen[rows] = False
    assert unseen.any()
    assert not anchors.pairs.grad[unseen].any()


@pytest.mark.parametrize("kind", LEARNING)
def test_an_anchor_depends_on_its_token_and_the_one_before_alone(kind):
    anchors, ids = trained(kind, pairs=MAX_PAIRS // 2**10), some_ids()[:1]
    base = anchors(ids)
    for changed in range(ids.shape[1]):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % V
        moved = (anchors(other) != base).any(dim=-1)[0].nonzero().flatten().tolist()
        assert moved == [changed, changed + 1][: ids.shape[1] - changed]


def test_every_sequence_starts_anew_with_a_number_that_no_token_has():
    anchors, ids = trained("full", pairs=MAX_PAIRS // 2**10), some_ids()
    together = anchors(ids)
    for row in range(len(ids)):
        assert torch.equal(anchors(ids[row : row + 1]), together[row : row + 1])
        assert torch.equal(anchors(ids[row : row + 1, :4]), together[row : row + 1, :4])
    first = anchors(torch.tensor([[5, 5]]))[0]
    assert not any(torch.equal(first[0], anchors(torch.tensor([[t, 5]]))[0, 1]) for t in range(V))


def test_pairs_are_ordered_and_share_a_row_where_their_hashes_meet():
    anchors = trained("full", pairs=MAX_PAIRS // 2**10)
    assert not torch.equal(*(anchors.pairs[pair_buckets(torch.tensor([p]), V, N)[0, 1]] for p in ((3, 4), (4, 3))))
    alone = trained("full", pairs=1)
    ids = some_ids()
    torch.testing.assert_close(alone(ids), alone.weight[ids] + alone.pairs[0])  # one row: all pairs share it
    rows = {}
    for before, own in itertools.product(range(V), repeat=2):
        rows.setdefault(plain_bucket(before, own, N), []).append((before, own))
    few = trained("full", pairs=N)
    one, other = rows[7][:2]
    learned = [few(torch.tensor([pair]))[0, 1] - few.weight[pair[1]] for pair in (one, other)]
    torch.testing.assert_close(learned[0], learned[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LEARNING)
def test_gradient_of_pairs_is_right(kind):
    anchors, ids = trained(kind, pairs=9), some_ids(2, 5)

    def value(weight, pairs):
        return torch.func.functional_call(anchors, {"weight": weight, "pairs": pairs}, (ids,))

    assert torch.autograd.gradcheck(value, [p.detach().requires_grad_() for p in (anchors.weight, anchors.pairs)])


def test_pairs_are_in_checkpoints_and_not_in_the_norm():
    source, target = trained("factorized", pairs=N), build("factorized", seed=8, stage=0, pairs=N).double()
    assert set(source.state_dict()) == {"weight", "pairs", "projection"}
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(some_ids()), source(some_ids()))
    norm = source.norm()
    source.pairs.data.zero_()
    assert source.norm() == norm


def test_pairs_of_an_empty_batch_and_of_no_tokens():
    anchors = build("factorized", pairs=N)
    for shape in ((0, 4), (3, 0)):
        assert anchors(torch.empty(shape, dtype=torch.int64)).shape == (*shape, D)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_table_and_anchors_on_cuda():
    table, ids = token_table(9, V, D), some_ids()
    there = token_table(9, V, D, device="cuda")
    assert torch.equal(there.cpu(), table)
    anchors = build("factorized", table=table).cuda()
    assert torch.equal(anchors(ids.cuda()).cpu(), table[ids])
    many = torch.randint(2**20, (64, 512))
    for buckets in (97, MAX_PAIRS):
        assert torch.equal(pair_buckets(many.cuda(), 2**20, buckets).cpu(), pair_buckets(many, 2**20, buckets))
