"""Laws of the matrix sign, and its coefficient table derived a second time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.compress.stiefel import LOW_PRECISION_SAFETY, POLAR_EXPRESS, QUINTIC, msign
from torch.optim._muon import _zeropower_via_newtonschulz as torch_newton_schulz

SHAPES = [(1, 1), (1, 7), (7, 1), (16, 16), (16, 40), (40, 16), (64, 17)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# room beside the exact interval for rounding in each dtype
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.03}
FIVE_STEPS = (0.8764, 1.1236)  # POLAR_EXPRESS, fifth row
FIVE_STEPS_SAFE = (0.8461, 1.1236)  # the same with LOW_PRECISION_SAFETY


def random_matrix(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_orthogonal(n, seed):
    return torch.linalg.qr(random_matrix((n, n), seed)).Q


def matrix_with(singular_values, shape, seed):
    m, n = shape
    k = len(singular_values)
    return random_orthogonal(m, seed)[:, :k] * singular_values @ random_orthogonal(n, seed + 1)[:, :k].T


def polar_factor(g):
    u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
    return u @ vh


def apply(polynomial, s):
    a, b, c = polynomial
    return a * s + b * s**3 + c * s**5


def minimax_quintic(low, high):
    """The odd quintic nearest to 1 on [low, high], by Remez exchange: its error alternates at four points."""
    points = np.linspace(low, high, 4)
    error = np.inf
    for _ in range(100):
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, new_error = np.linalg.solve(system, np.ones(4))
        extrema = np.sort(np.sqrt(np.roots([5 * c, 3 * b, a])))
        points = np.array([low, *extrema, high])
        if abs(new_error - error) < 1e-15:
            break
        error = new_error
    return np.array([a, b, c])


def test_polar_express_table_is_the_greedy_minimax_chain():
    low, high = 1e-3, 1.0
    *minimax, limit = POLAR_EXPRESS
    for row, published in enumerate(minimax):
        derived = minimax_quintic(max(low, 0.02407327424182761 * high), high)
        derived *= 2 / (apply(derived, low) + apply(derived, high))  # as far below 1 at one end as above at the other
        # the last row sits on an interval 2e-3 wide, where the system loses digits
        assert derived == pytest.approx(np.array(published), rel=1e-13 if row < 6 else 1e-8, abs=0)
        low = apply(derived, low)
        high = 2 - low
    a, b, c = limit  # an interval of no width: value 1 at 1, first and second derivative 0
    assert (a + b + c, a + 3 * b + 5 * c, 6 * b + 20 * c) == (1, 0, 0)


@pytest.mark.parametrize(("steps", "error"), [(5, 0.1235590547), (6, 1.1849296e-3), (7, 1.03981945e-9)])
def test_polar_express_sends_the_paper_s_interval_to_one(steps, error):
    s = np.logspace(-3, 0, 100_001)
    for polynomial in POLAR_EXPRESS[:steps]:
        s = apply(polynomial, s)
    assert 1 - s.min() == pytest.approx(error, rel=1e-5)  # minimax: the error is the same at both ends
    assert s.max() - 1 == pytest.approx(error, rel=1e-5)


def test_the_safety_factor_widens_the_interval_as_stated():
    s = np.logspace(-3, 0, 100_001)
    for polynomial in POLAR_EXPRESS[:5]:
        s = apply(polynomial, s / LOW_PRECISION_SAFETY)
    assert s.min() == pytest.approx(FIVE_STEPS_SAFE[0], abs=1e-4)
    assert s.max() == pytest.approx(FIVE_STEPS_SAFE[1], abs=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_come_near_one(shape, dtype):
    # from 1 down to 1/60: all stay inside the design interval after division by the Frobenius norm
    g = matrix_with(torch.logspace(0, -1.78, min(shape), dtype=torch.float64), shape, seed=3)
    sign = msign(g, dtype=dtype)
    low, high = FIVE_STEPS_SAFE if dtype == torch.bfloat16 else FIVE_STEPS
    values = torch.linalg.svdvals(sign)
    assert sign.dtype == g.dtype
    assert sign.shape == g.shape
    assert values.min() >= low - ROUNDING[dtype]
    assert values.max() <= high + ROUNDING[dtype]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)], ids=str)
def test_enough_steps_give_the_polar_factor(shape, seed):
    g = matrix_with(torch.logspace(0, -2, min(shape), dtype=torch.float64), shape, seed)
    exact = polar_factor(g)
    assert torch.dist(msign(g, steps=9, dtype=torch.float64), exact) < 1e-11
    assert torch.dist(msign(g, steps=9, dtype=torch.float32), exact) < 1e-4


def test_the_default_is_the_more_orthogonal_of_the_two():
    for dtype in DTYPES:
        g = random_matrix((64, 172), seed=5)
        exact = polar_factor(g)
        distance = {c: torch.dist(msign(g, dtype=dtype, coefficients=c), exact) for c in ("polar_express", "quintic")}
        assert distance["polar_express"] < 0.7 * distance["quintic"]
        assert torch.equal(msign(g, dtype=dtype), msign(g, dtype=dtype, coefficients="polar_express"))


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (256, 256), (688, 256)], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_quintic_in_bfloat16_is_torch_muon_s_to_the_bit(shape, source):
    g = random_matrix(shape, seed=7, dtype=source)
    theirs = torch_newton_schulz(g.clone(), QUINTIC, 5, 1e-7)
    assert torch.equal(msign(g, dtype=torch.bfloat16, coefficients="quintic"), theirs.to(source))


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 20), n=st.integers(1, 20), seed=st.integers(0, 2**31), quintic=st.booleans())
def test_laws_in_float64(m, n, seed, quintic):
    chain = "quintic" if quintic else "polar_express"
    g = random_matrix((m, n), seed)
    sign = msign(g, dtype=torch.float64, coefficients=chain)
    left, right = random_orthogonal(m, seed + 1), random_orthogonal(n, seed + 2)
    # tolerance: the chain's slope at zero, about 1900, times the rounding of the products before it
    turned = msign(left @ g @ right, dtype=torch.float64, coefficients=chain)
    assert torch.allclose(turned, left @ sign @ right, rtol=0, atol=1e-9)
    assert torch.allclose(msign(37.0 * g, dtype=torch.float64, coefficients=chain), sign, rtol=0, atol=1e-9)
    assert torch.equal(msign(-g, dtype=torch.float64, coefficients=chain), -sign)
    assert torch.allclose(msign(g.T, dtype=torch.float64, coefficients=chain), sign.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (33, 33)], ids=str)
def test_bits_depend_neither_on_layout_nor_on_the_batch(shape, dtype):
    g = random_matrix((2, 3, *shape), seed=11, dtype=torch.float32)
    before = g.clone()
    together = msign(g, dtype=dtype)
    assert torch.equal(g, before)
    assert together.dtype == torch.float32
    for i in range(2):
        for j in range(3):
            assert torch.equal(together[i, j], msign(g[i, j], dtype=dtype))
    single = msign(g[0, 0], dtype=dtype)
    assert torch.equal(msign(g[0, 0].T.contiguous().T, dtype=dtype), single)
    if shape[0] != shape[1]:  # a square matrix and its transpose have two different Gram matrices
        assert torch.equal(msign(g[0, 0].T.contiguous(), dtype=dtype), single.T)
    assert torch.equal(msign(g[0, 0], dtype=dtype), single)


def test_zero_empty_and_tiny_matrices():
    assert torch.equal(msign(torch.zeros(4, 6)), torch.zeros(4, 6))
    assert msign(torch.zeros(0, 4, 6)).shape == (0, 4, 6)
    assert msign(torch.zeros(4, 0)).shape == (4, 0)
    tiny = msign(1e-12 * torch.eye(4))  # below the floor of the norm: not blown up to a full-sized update
    assert tiny.norm() < 0.1


def test_no_gradient_flows():
    assert not msign(torch.eye(3, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: msign(torch.ones(3)), r"\(3,\)"),
        (lambda: msign(torch.ones(3, 3, dtype=torch.int64)), "int64"),
        (lambda: msign(torch.ones(3, 3), dtype=torch.int32), "int32"),
        (lambda: msign(torch.ones(3, 3), steps=-1), "-1"),
        (lambda: msign(torch.ones(3, 3), coefficients="cubic"), "cubic"),
    ],
)
def test_errors_name_the_offender(call, word):
    with pytest.raises(ValueError, match=word):
        call()
