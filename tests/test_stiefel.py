"""Laws of the matrix sign and of the walk on the Stiefel manifold; the coefficient table derived a second time."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.compress.matrix_sign import LOW_PRECISION_SAFETY, POLAR_EXPRESS, QUINTIC, msign
from thinpipe.compress.stiefel import (
    SPEL,
    horizontal,
    longest_step,
    orthonormality_error,
    random_orthonormal,
    retract,
    subspace_angle,
    tangent,
)
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
def test_quintic_in_bfloat16_is_torch_muon_s(shape, source):
    """To the bit where a sum is short. A long one is split into blocks, which CPUs without bfloat16 instructions add up
    in another order for our batched product than for torch's: there to the rounding of bfloat16."""
    g = random_matrix(shape, seed=7, dtype=source)
    theirs = torch_newton_schulz(g.clone(), QUINTIC, 5, 1e-7).to(source)
    ours = msign(g, dtype=torch.bfloat16, coefficients="quintic")
    if max(shape) < 64:
        assert torch.equal(ours, theirs)
    else:
        assert torch.dist(ours.float(), theirs.float()) <= 2**-6 * theirs.float().norm()


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


# ---- the manifold: (d, r) with orthonormal columns ----

TALL = [(1, 1), (9, 1), (12, 5), (16, 16), (40, 8)]
PROJECTIONS = {"stiefel": tangent, "grassmann": horizontal}
WIDE_DTYPES = [torch.float64, torch.float32]
EXACT = {torch.float64: 1e-13, torch.float32: 2e-6}  # products of entries of size 1, 40 terms


def philox(seed):
    return np.random.Philox(key=seed)


def orthonormal(shape, seed, dtype=torch.float64):
    return random_orthonormal(*shape, philox(seed), dtype=dtype)


def principal_angles(a, b):
    """Exact, in radians, ascending: from sines of float64 bases of the two spans, so that small ones keep digits."""
    a, b = torch.linalg.qr(a.double()).Q, torch.linalg.qr(b.double()).Q
    rest = b - a @ (a.T @ b)
    sines = torch.linalg.svdvals(rest - a @ (a.T @ rest)).flip(0)
    return torch.atan2(sines, torch.linalg.svdvals(a.T @ b))


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", TALL, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_projections_are_projections_on_what_they_claim(shape, seed, dtype):
    a, g, other = orthonormal(shape, seed, dtype), random_matrix(shape, seed + 1, dtype), random_matrix(shape, 9, dtype)
    t, h = tangent(a, g), horizontal(a, g)
    close = {"rtol": 0, "atol": 10 * EXACT[dtype]}
    zero = torch.zeros(shape[1], shape[1], dtype=dtype)
    assert torch.allclose(a.T @ t + t.T @ a, zero, **close)
    assert torch.allclose(a.T @ h, zero, **close)
    for project, image in ((tangent, t), (horizontal, h)):
        assert torch.allclose(project(a, image), image, **close)
        # orthogonal: what was removed is perpendicular to everything that is kept
        assert ((g - image) * project(a, other)).sum().abs() < 10 * EXACT[dtype] * g.norm() * other.norm()
    assert torch.allclose(tangent(a, h), h, **close)  # horizontal directions are tangent ones
    # and nothing tangent is lost: d r - r (r + 1) / 2 dimensions, in place of (d - r) r
    skew = g[: shape[1]] - g[: shape[1]].T
    assert torch.allclose(tangent(a, a @ skew), a @ skew, **close)
    assert torch.allclose(horizontal(a, a @ skew), torch.zeros_like(a), **close)


@pytest.mark.parametrize("shape", [(12, 5), (40, 8)], ids=str)
def test_the_sign_of_a_horizontal_direction_stays_horizontal(shape):
    a, g = orthonormal(shape, 0), random_matrix(shape, 1)
    assert (a.T @ msign(horizontal(a, g), dtype=torch.float64)).norm() < 1e-12
    sign = a.T @ msign(tangent(a, g), dtype=torch.float64)
    assert (sign + sign.T).norm() > 1e-3  # of a tangent one: not in general, and the module says so


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", TALL, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_retract_gives_the_polar_factor(shape, seed, dtype):
    x = matrix_with(torch.linspace(0.92, 1.08, shape[1], dtype=torch.float64), shape, seed).to(dtype)
    before = x.clone()
    back = retract(x)
    # three steps from |s² - 1| = 0.17: the rest is 1e-7 an eigenvalue
    assert torch.dist(back.double(), polar_factor(x)) <= 1e-6
    assert orthonormality_error(back.double()) <= 1e-6
    assert torch.dist(retract(x, steps=6).double(), polar_factor(x)) <= EXACT[dtype] / 2
    assert back.dtype == dtype
    assert torch.equal(x, before)
    for steps in (0, 3):
        assert retract(x, steps).data_ptr() != x.data_ptr()
    assert torch.equal(retract(x, 0), x)
    assert torch.equal(retract(x.T.contiguous().T), back)  # bits do not depend on strides
    assert not retract(x.clone().requires_grad_()).requires_grad


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), r=st.integers(1, 8), more=st.integers(0, 8), step=st.floats(-3, -0.5))
def test_retraction_follows_the_tangent_to_second_order(seed, r, more, step):
    a = orthonormal((r + more, r), seed)
    t = tangent(a, random_matrix(a.shape, seed))
    t = t / torch.linalg.matrix_norm(t, 2).clamp(min=1e-3) * 10**step
    # polar(A + T) = (A + T)(I + TᵀT)^-1/2: off A + T by at most ‖T‖² (1 + ‖T‖) / 2 in every direction
    error = torch.linalg.matrix_norm(retract(a + t, steps=8) - (a + t), 2)
    assert error <= 100**step * (1 + 10**step) / 2 + 1e-12


@pytest.mark.parametrize("value", [1.42, 1.74, 3.0, 0.0, math.nan, math.inf])
@pytest.mark.parametrize("shape", [(5, 1), (12, 5), (16, 16)], ids=str)
def test_retract_refuses_what_does_not_converge(shape, value):
    x = orthonormal(shape, 4)
    x[:, -1] *= value
    with pytest.raises(ValueError, match="too far"):
        retract(x)


def test_retract_accepts_what_is_only_large_in_sum():
    x = 1.05 * orthonormal((300, 256), 0)
    assert orthonormality_error(x) > 1  # the condition is on each direction, nearly, and not on how many there are
    assert torch.dist(retract(x, 6), x / 1.05) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_orthonormality_error_is_the_frobenius_norm(dtype):
    a = orthonormal((20, 5), 0)
    stretched = a * torch.tensor([1.0, 1.1, 1.0, 0.9, 1.0], dtype=torch.float64)
    assert orthonormality_error(stretched) == pytest.approx(math.hypot(0.21, 0.19), rel=1e-12)
    shipped = a.to(dtype)
    exact = float((shipped.double().T @ shipped.double() - torch.eye(5)).norm())
    assert orthonormality_error(shipped) == pytest.approx(exact, rel=1e-3, abs=EXACT.get(dtype, 0))


def turned_by(a, angles, seed):
    """`a` with its columns, in some basis of its span, turned by these angles into directions outside it."""
    d, r = a.shape
    full = torch.linalg.qr(torch.cat([a, random_matrix((d, r), seed)], dim=1)).Q
    basis, outside, turn = a @ random_orthogonal(r, seed + 1), full[:, r : 2 * r], random_orthogonal(r, seed + 2)
    return (basis * angles.cos() + outside * angles.sin()) @ turn, basis @ turn


@pytest.mark.parametrize("size", [1e-8, 1e-4, 1e-2, 0.3, 1.0, math.pi / 2])
@pytest.mark.parametrize("shape", [(2, 1), (12, 5), (40, 20)], ids=str)
def test_subspace_angle_is_the_root_mean_square_angle(shape, size):
    a, angles = orthonormal(shape, 0), size * torch.linspace(0.5, 1, shape[1], dtype=torch.float64)
    b, same_basis = turned_by(a, angles, 5)
    assert principal_angles(a, b).numpy() == pytest.approx(angles.numpy(), rel=1e-6)  # the yardstick itself
    mean_sine = math.asin(float(angles.sin().square().mean().sqrt()))
    assert subspace_angle(a, b) == pytest.approx(mean_sine, rel=1e-6)
    assert subspace_angle(b, a) == pytest.approx(mean_sine, rel=1e-6)
    # against the mean over angles: equal where they are small, near wherever they are of one order
    spread = 1e-3 if size < 0.1 else 0.1
    assert mean_sine == pytest.approx(float(angles.square().mean().sqrt()), rel=spread)
    # two points of one walk: relative precision in float32 too, however small the angle
    a32, b32 = same_basis.float(), b.float()
    exact = float(principal_angles(a32, b32).square().mean().sqrt())
    assert subspace_angle(a32, b32) == pytest.approx(exact, rel=spread)


def test_subspace_angle_sees_spans_only():
    a = orthonormal((30, 6), 0)
    assert subspace_angle(a, a) == 0
    assert subspace_angle(a, a @ random_orthogonal(6, 1)) < 1e-14
    assert subspace_angle(a, orthonormal((30, 6), 2)) > 0.5
    full = random_orthogonal(12, 3)
    assert subspace_angle(full[:, :6], full[:, 6:]) == pytest.approx(math.pi / 2, rel=1e-12)


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*TALL, (256, 64)], ids=str)
def test_random_orthonormal(shape, dtype):
    a = orthonormal(shape, 7, dtype)
    assert a.shape == shape
    assert a.dtype == dtype
    assert orthonormality_error(a.double()) < {torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
    assert torch.equal(a, orthonormal(shape, 7, dtype))
    assert torch.equal(a, random_orthonormal(*shape, np.random.Generator(philox(7)), dtype=dtype))
    generator = philox(7)
    random_orthonormal(*shape, generator)
    if shape != (1, 1):
        assert not torch.equal(a, random_orthonormal(*shape, generator, dtype=dtype))  # a draw moves the generator on


def test_random_orthonormal_is_uniform():
    draws = torch.stack([random_orthonormal(3, 2, generator) for generator in [philox(0)] for _ in range(2_000)])
    # a QR whose signs are left as they come has a first entry of one sign: its mean is 0.5, not 0
    assert draws.mean(0).abs().max() < 0.06  # 4.6 standard deviations of 1 / sqrt(3 * 2,000)
    assert (draws.square().mean(0) - 1 / 3).abs().max() < 0.03
    assert draws.prod(2).mean(0).abs().max() < 0.03


# ---- SPEL ----


def walk(a, gradient, steps, *, lr=lambda _: 0.05, **settings):
    parameter = torch.nn.Parameter(a.clone())
    spel = SPEL([parameter], lr=0.0, **settings)
    for step in range(steps):
        spel.param_groups[0]["lr"] = lr(step)
        parameter.grad = gradient(parameter.detach(), step)
        spel.step()
    return parameter.detach()


@pytest.mark.pairwise(3)
@pytest.mark.parametrize(
    ("shape", "constraint"),
    [
        (shape, constraint)
        for shape in ((1, 1), (9, 1), (12, 5), (16, 16))
        for constraint in ("stiefel", "grassmann", "none")
        if constraint != "grassmann" or shape[0] > shape[1]  # square: the Grassmann manifold is one point
    ],
    ids=str,
)
def test_a_thousand_steps_stay_on_the_manifold(shape, constraint):
    a, generator = orthonormal(shape, 1, torch.float32), torch.Generator().manual_seed(2)
    end = walk(a, lambda *_: torch.randn(shape, generator=generator), 1_000, constraint=constraint)
    if constraint == "none":
        assert orthonormality_error(end) > 0.1
    else:
        assert orthonormality_error(end) <= 1e-5
        assert torch.dist(end, a) > 0.1 or shape == (1, 1)  # it has moved


@pytest.mark.pairwise(5)
@pytest.mark.parametrize("constraint", ["stiefel", "grassmann"])
@pytest.mark.parametrize(("noise", "steps"), [(0.0, 300), (0.05, 1_000)])
@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
@pytest.mark.parametrize("r", [1, 4])
def test_it_finds_the_principal_subspace(r, dtype, noise, steps, constraint):
    """Maximise tr(AᵀCA): by Ky Fan's theorem the maximum is the span of the leading eigenvectors."""
    d = 24
    basis = random_orthogonal(d, 3)
    spectrum = torch.cat([torch.linspace(3, 2, r), torch.linspace(1, 0.1, d - r)]).double()
    covariance = (basis * spectrum @ basis.T).to(dtype)
    leading = torch.linalg.svd(covariance.double()).U[:, :r]
    generator = torch.Generator().manual_seed(4)

    def gradient(a, _):
        return -2 * covariance @ a + noise * torch.randn(a.shape, generator=generator, dtype=dtype)

    start = orthonormal((d, r), 5, dtype)
    assert math.degrees(principal_angles(start, leading)[-1]) > 30
    end = walk(start, gradient, steps, lr=lambda step: 0.1 * (1 - step / steps) ** 2, constraint=constraint)
    assert math.degrees(principal_angles(end, leading)[-1]) < 1
    assert orthonormality_error(end) < 1e-5


@pytest.mark.parametrize("constraint", ["stiefel", "grassmann", "none"])
def test_one_step_is_the_formula(constraint):
    a, lr, beta = orthonormal((12, 5), 0), 0.03, 0.8
    parameter, first, second = torch.nn.Parameter(a.clone()), random_matrix((12, 5), 1), random_matrix((12, 5), 2)
    spel = SPEL([parameter], lr=lr, beta=beta, constraint=constraint, msign_steps=9, msign_dtype=torch.float64)
    m = torch.zeros_like(a)
    for g in (first, second):
        inner = a.T @ g
        removed = {"stiefel": a @ (inner + inner.T) / 2, "grassmann": a @ inner, "none": 0 * g}[constraint]
        m = beta * m + (1 - beta) * (g - removed)
        a = a - lr * polar_factor(m)
        a = a if constraint == "none" else polar_factor(a)
        parameter.grad = g.clone()
        spel.step()
        assert torch.equal(parameter.grad, g)
        assert torch.dist(parameter.detach(), a) < 1e-11
        assert torch.dist(spel.state[parameter]["momentum"], m) < 1e-13


@pytest.mark.parametrize("constraint", ["stiefel", "grassmann", "none"])
def test_turning_the_coordinates_turns_the_walk(constraint):
    """Left: the basis of the hidden states. Right: that of the wire. Neither is anything but a name."""
    left, right = random_orthogonal(12, 1), random_orthogonal(5, 2)
    gradients = [random_matrix((12, 5), 10 + step) for step in range(6)]
    settings = {"constraint": constraint, "msign_dtype": torch.float64}
    a = orthonormal((12, 5), 3)
    plain = walk(a, lambda _, step: gradients[step], 6, **settings)
    turned = walk(left @ a @ right, lambda _, step: left @ gradients[step] @ right, 6, **settings)
    assert torch.dist(turned, left @ plain @ right) < 1e-10


def test_its_settings_reach_the_matrix_sign():
    a, g = orthonormal((12, 5), 0, torch.float32), random_matrix((12, 5), 1, torch.float32)
    chosen = {"msign_steps": 3, "msign_dtype": torch.bfloat16, "msign_coefficients": "quintic"}
    moved = walk(a, lambda *_: g, 1, beta=0.0, **chosen)
    assert torch.equal(
        moved, retract(a - 0.05 * msign(tangent(a, g), steps=3, dtype=torch.bfloat16, coefficients="quintic"))
    )


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
def test_a_reloaded_state_continues_to_the_bit(dtype):
    gradients = [random_matrix((12, 5), step, dtype) for step in range(10)]

    def run(parameter, spel, steps):
        for step in steps:
            parameter.grad = gradients[step]
            spel.step()

    whole = torch.nn.Parameter(orthonormal((12, 5), 0, dtype))
    spel = SPEL([whole], lr=0.04, beta=0.7, constraint="grassmann")
    run(whole, spel, range(5))
    file = io.BytesIO()
    torch.save({"a": whole.detach(), "spel": spel.state_dict()}, file)
    run(whole, spel, range(5, 10))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = torch.nn.Parameter(saved["a"])
    spel = SPEL([resumed], lr=1.0)
    spel.load_state_dict(saved["spel"])
    run(resumed, spel, range(5, 10))
    assert torch.equal(resumed, whole)


def test_nothing_changes_before_all_is_well():
    def fresh(lr=0.05):
        named = [(name, torch.nn.Parameter(orthonormal((12, 5), seed))) for seed, name in enumerate(["a", "b", "idle"])]
        for _, parameter in named[:2]:
            parameter.grad = torch.ones_like(parameter)
        return dict(named), SPEL(named, lr=lr)

    for bad in (math.nan, math.inf, -math.inf):
        parameters, spel = fresh()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        parameters["b"].grad = torch.ones(12, 5, dtype=torch.float64).index_fill(0, torch.tensor([3]), bad)
        with pytest.raises(ValueError, match=r"SPEL, b: its gradient holds NaN or infinity; nothing was changed"):
            spel.step()
        assert all(torch.equal(parameters[name], value) for name, value in before.items())
        assert not spel.state_dict()["state"]

    parameters, spel = fresh(lr=2.0)
    with pytest.raises(ValueError, match=r"SPEL, a: too far"):
        spel.step()
    assert torch.equal(parameters["a"], before["a"])

    parameters, spel = fresh()
    storage = parameters["a"].data_ptr()
    assert spel.step(lambda: 1.5) == 1.5
    assert parameters["a"].data_ptr() == storage
    assert not torch.equal(parameters["a"], before["a"])
    assert torch.equal(parameters["idle"], before["idle"])
    assert parameters["idle"] not in spel.state


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: retract(torch.ones(2, 3)), r"\(2, 3\)"),
        (lambda: retract(torch.ones(3)), r"\(3,\)"),
        (lambda: retract(torch.eye(3), steps=-1), "-1"),
        (lambda: random_orthonormal(3, 4, philox(0)), "4 orthonormal columns in 3"),
        (lambda: random_orthonormal(3, 0, philox(0)), "0 orthonormal"),
        (lambda: SPEL([torch.eye(3)], lr=-0.1), "-0.1"),
        (lambda: SPEL([torch.eye(3)], lr=math.nan), "nan"),
        (lambda: SPEL([torch.eye(3)], lr=0.1, beta=1.0), "beta 1.0"),
        (lambda: SPEL([torch.eye(3)], lr=0.1, constraint="sphere"), "sphere"),
        (lambda: SPEL([torch.eye(3)[:2]], lr=0.1), r"parameter 0 of group 0 .*\(2, 3\)"),
        (lambda: SPEL([torch.eye(3), torch.ones(3)], lr=0.1), r"parameter 1 of group 0 .*\(3,\)"),
        (lambda: SPEL([torch.eye(3)], lr=0.1, constraint="grassmann"), "d - r >= 1"),
        (lambda: SPEL([("codes", torch.eye(3).bfloat16())], lr=0.1), "codes is torch.bfloat16"),
    ],
)
def test_errors_of_the_walk_name_the_offender(call, word):
    with pytest.raises(ValueError, match=word):
        call()


@pytest.mark.parametrize("r", [1, 8, 32, 256])
def test_the_longest_step_comes_back_from_wherever_it_leads_and_a_longer_one_need_not(r: int) -> None:
    a_DR = random_orthonormal(300, r, np.random.Philox(7), dtype=torch.float64)
    lr = longest_step(r)
    aside_DR = random_orthonormal(300, r, np.random.Philox(8), dtype=torch.float64)
    for direction_DR in (a_DR, -a_DR, aside_DR):
        retract(a_DR - 0.999 * lr * 1.13 * direction_DR)
    with pytest.raises(ValueError, match="too far"):
        retract(a_DR + 1.001 * lr * 1.13 * a_DR)
