"""What lanes make of their rounds: the plan of rounds, and the laws that every mode obeys, with tensors for stages."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.compress.byte_format import CodecError
from thinpipe.node.averaging.averager import Averager, Place, RoundError
from thinpipe.node.averaging.gradients import GradientAverager
from thinpipe.node.averaging.modes import Gradients, Outer, Sparta, parse_averaging
from thinpipe.node.averaging.round_plan import Round, RoundPlan
from thinpipe.node.averaging.stage_averager import rounding_seed, stage_averager
from thinpipe.node.optim import NonFiniteGradient
from torch import Tensor, nn

SHAPES = [(40, 24), (7,), (24, 40), (300,)]


@st.composite
def plans(draw: st.DrawFn) -> tuple[Outer, int]:
    fragments, stride = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    every = fragments * stride
    mode = Outer(every=every, fragments=fragments, delay=draw(st.integers(0, every - 1)), format="fp32")
    return mode, draw(st.integers(1, 40))


@given(plans())
@settings(deadline=None)
def test_every_fragment_takes_its_turn_and_has_the_last_word(drawn: tuple[Outer, int]):
    mode, steps = drawn
    plan = RoundPlan(mode, steps)
    under_way: dict[int, int] = {}  # fragment -> round
    made_of = dict.fromkeys(range(mode.fragments), 0)
    number = 0
    for completed in range(steps + 1):
        used = plan.used_at(completed)
        assert [each.number for each in used] == sorted(each.number for each in used)
        for each in used:
            if each.made < completed:
                assert under_way.pop(each.fragment) == each.number
        for each in plan.made_at(completed):
            assert each.number == number
            assert plan.round(number) == each
            assert each.fragment not in under_way, "two rounds of one fragment at a time"
            assert each.made == completed <= each.used <= steps
            under_way[each.fragment] = number
            made_of[each.fragment] += 1
            number += 1
        for each in used:
            if each.made == completed:
                assert under_way.pop(each.fragment) == each.number
                assert each.last == (completed == steps)
        assert {each.fragment: each.number for each in plan.under_way(completed)} == under_way
        assert plan.first_after(completed) == min(under_way.values(), default=number)
        assert {f: plan.made_of(f, completed) for f in made_of} == made_of
    assert not under_way
    assert number == plan.count
    with pytest.raises(IndexError):
        plan.round(number)
    assert {each.fragment for each in plan.made_at(steps)} == set(range(mode.fragments))


MODES = [
    "gradients",
    "gradients:format=int4",
    "outer:every=4,format=fp32",
    "outer:every=4,fragments=2,delay=1",
    "outer:every=4,fragments=4,delay=3,format=topk:k=12",
    "outer:every=2,delay=1,format=int4:hadamard=true",
    "sparta:p=0.1,every=2,format=fp32",
    "sparta:p=0.3,every=3,delay=2",
]
LANES = 3
STEPS = 9


class Lane:
    """A stage that learns: its gradient is the distance to a point of the lane's own, its optimizer plain descent."""

    def __init__(self, spec: str, lane: int, *, lanes: int = LANES, dtype: torch.dtype = torch.float32) -> None:
        draw = torch.Generator().manual_seed(7)
        self.parameters = [
            (f"w{i}", nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype))) for i, shape in enumerate(SHAPES)
        ]
        own = torch.Generator().manual_seed(100 + lane)
        self.targets = [torch.randn(shape, generator=own, dtype=dtype) for shape in SHAPES]
        self.averager: Averager = stage_averager(
            parse_averaging(spec),
            Place(stage=1, lane=lane, lanes=lanes, seed=3),
            steps=STEPS,
            parameters=self.parameters,
            sender=None,
            table_moves=lambda _: False,
            table_gradient=lambda: None,
        )
        self.lanes, self.completed = lanes, 0

    def gradients(self) -> None:
        for (_, weight), target in zip(self.parameters, self.targets, strict=True):
            weight.grad = weight.detach() - target

    def descend(self) -> None:
        parts = self.lanes if self.averager.mode.of_gradients else 1
        with torch.no_grad():
            for _, weight in self.parameters:
                assert weight.grad is not None
                weight.sub_(weight.grad, alpha=0.1 / parts)
                weight.grad = None
        self.completed += 1

    def weights(self) -> list[Tensor]:
        return [weight.detach().clone() for _, weight in self.parameters]

    def state(self) -> dict[str, Tensor]:
        tensors = {name: weight.detach().clone() for name, weight in self.parameters}
        kept = self.averager.state_tensors()
        layout = self.averager.state_layout(self.completed)
        assert {n: (t.shape, t.dtype) for n, t in kept.items()} == {n: (t.shape, t.dtype) for n, t in layout.items()}
        return tensors | {f"lanes/{name}": tensor.clone() for name, tensor in kept.items()}

    def restore(self, state: Mapping[str, Tensor], completed: int) -> None:
        with torch.no_grad():
            for name, weight in self.parameters:
                weight.copy_(state[name])
        rounds = {name.removeprefix("lanes/"): each for name, each in state.items() if name.startswith("lanes/")}
        self.averager.load_state_tensors(rounds, completed)
        self.completed = completed


class Grid:
    """Lanes that take their steps and hold their rounds together."""

    def __init__(self, spec: str, *, lanes: int = LANES, dtype: torch.dtype = torch.float32) -> None:
        self.lanes = [Lane(spec, lane, lanes=lanes, dtype=dtype) for lane in range(lanes)]
        self.plan = self.lanes[0].averager.plan
        self._kept: dict[int, dict[int, bytes]] = {}  # round -> lane -> contribution

    def step(self, shuffle: random.Random | None = None) -> None:
        of_gradients = self.lanes[0].averager.mode.of_gradients
        for each in self.lanes:
            each.gradients()
        if of_gradients:
            self._hold(self.lanes[0].completed + 1, shuffle)
        for each in self.lanes:
            each.descend()
        if not of_gradients:
            self._hold(self.lanes[0].completed, shuffle)

    def _hold(self, completed: int, shuffle: random.Random | None) -> None:
        used = self.plan.used_at(completed)
        for round_ in used:
            if round_.made < completed:
                self._use(round_, shuffle)
        for round_ in self.plan.made_at(completed):
            made = {each.averager.place.lane: each.averager.contribute(round_) for each in self.lanes}
            assert {len(body) for body in made.values()} == {self.lanes[0].averager.contribution_bytes(round_)}
            self._kept[round_.number] = made
        for round_ in used:
            if round_.made == completed:
                self._use(round_, shuffle)

    def _use(self, round_: Round, shuffle: random.Random | None) -> None:
        for each in self.lanes:
            others = [(n, body) for n, body in self._kept[round_.number].items() if n != each.averager.place.lane]
            if shuffle:
                shuffle.shuffle(others)
            assert each.averager.use(round_, dict(others)).members == list(range(len(self.lanes)))

    def kept_from(self, other: Grid) -> None:
        """What peers still hold of rounds under way."""
        self._kept = dict(other._kept)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("spec", MODES)
def test_all_lanes_end_with_the_same_bits_whatever_came_first(spec: str):
    grid, other = Grid(spec), Grid(spec)
    shuffle = random.Random(1)
    for _ in range(STEPS):
        grid.step()
        other.step(shuffle)
    ends = [each.weights() for each in grid.lanes]
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])
    assert same(ends[0], other.lanes[2].weights())
    assert not same(ends[0], Lane(spec, 0).weights()), "nothing was learned"


@pytest.mark.parametrize("spec", MODES)
def test_a_state_taken_between_any_two_steps_goes_on_with_the_same_bits(spec: str):
    grid = Grid(spec)
    states = [[each.state() for each in grid.lanes]]
    for _ in range(STEPS):
        grid.step()
        states.append([each.state() for each in grid.lanes])
    for completed in range(STEPS):
        again = Grid(spec)
        again.kept_from(grid)
        for each, state in zip(again.lanes, states[completed], strict=True):
            each.restore(state, completed)
        again.step()
        for each, state in zip(again.lanes, states[completed + 1], strict=True):
            found = each.state()
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], state[name]) for name in state), (spec, completed)


@pytest.mark.parametrize("spec", [spec for spec in MODES if not spec.startswith("gradients")])
def test_lanes_that_agree_are_left_alone(spec: str):
    grid = Grid(spec, lanes=2)  # the mean of two equal numbers is that number; of three it is rounded
    before = grid.lanes[0].weights()
    for each in grid.lanes:
        each.targets = each.weights()
    for _ in range(STEPS - 1):
        grid.step()
    assert all(same(each.weights(), before) for each in grid.lanes)


def test_the_outer_step_is_that_of_torch():
    grid = Grid("outer:every=3,lr=0.7,momentum=0.9,format=fp64", dtype=torch.float64)
    textbook = [Lane("outer", lane, dtype=torch.float64) for lane in range(LANES)]
    agreed = [nn.Parameter(each) for each in textbook[0].weights()]
    outer = torch.optim.SGD(agreed, lr=0.7, momentum=0.9, nesterov=True)
    for completed in range(1, STEPS + 1):
        grid.step()
        for each in textbook:
            each.gradients()
            each.descend()
        if completed % 3 == 0:
            for place, weight in enumerate(agreed):
                weight.grad = torch.stack([weight.detach() - each.weights()[place] for each in textbook]).mean(dim=0)
            outer.step()
            for each in textbook:
                for (_, own), weight in zip(each.parameters, agreed, strict=True):
                    own.data.copy_(weight.data)
    for found, wanted in zip(grid.lanes[0].weights(), agreed, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-12)


def test_what_was_learned_while_a_round_was_under_way_is_kept():
    """With lr=1, no momentum and one step of delay, a lane ends a round with the mean plus its own step since."""
    spec = "outer:every=4,lr=1,momentum=0,delay=1,format=fp64"
    grid = Grid(spec, dtype=torch.float64)
    for _ in range(4):
        grid.step()
    given = [each.weights() for each in grid.lanes]
    mean = [torch.stack(parts).mean(dim=0) for parts in zip(*given, strict=True)]
    grid.step()
    for each, at_made in zip(grid.lanes, given, strict=True):
        for found, began, target, agreed in zip(each.weights(), at_made, each.targets, mean, strict=True):
            torch.testing.assert_close(found, agreed + (began - 0.1 * (began - target)) - began)


def test_gradients_of_lanes_are_those_of_one_with_all_their_batches():
    grid = Grid("gradients:format=fp64", dtype=torch.float64)
    weights = grid.lanes[0].weights()
    targets = [torch.stack([each.targets[i] for each in grid.lanes]) for i in range(len(SHAPES))]
    for _ in range(STEPS):
        grid.step()
        weights = [w - 0.1 / LANES * (w - t).sum(dim=0) for w, t in zip(weights, targets, strict=True)]
    for found, wanted in zip(grid.lanes[1].weights(), weights, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_what_int4_rounds_away_comes_with_the_next_round():
    """With lr=1 and no momentum the anchor has moved by the sum of what arrived: off by one error, however many."""
    grid = Grid("outer:every=1,lr=1,momentum=0,format=int4", lanes=1)
    lane = grid.lanes[0]
    start, gone = lane.weights(), [torch.zeros(shape) for shape in SHAPES]
    for _ in range(STEPS):
        before = lane.weights()
        grid.step()
        gone = [g + 0.1 * (w - t) for g, w, t in zip(gone, before, lane.targets, strict=True)]
    errors = lane.averager.state_tensors()["error/0"].view(-1)
    wanted = torch.cat([(s - g).view(-1) for s, g in zip(start, gone, strict=True)])
    found = torch.cat([each.view(-1) for each in lane.weights()])
    torch.testing.assert_close(found - wanted, errors[: len(found)], rtol=0, atol=2e-5)


@pytest.mark.parametrize("spec", MODES)
def test_a_contribution_that_is_none_is_refused_by_name_and_changes_nothing(spec: str):
    lane, other = Lane(spec, 0, lanes=2), Lane(spec, 1, lanes=2)
    round_ = next(each for c in range(STEPS + 1) for each in lane.averager.plan.made_at(c))
    for each in (lane, other):
        each.gradients()
    good = other.averager.contribute(round_)
    lane.averager.contribute(round_)
    before = lane.weights() + [each.clone() for each in lane.averager.state_tensors().values()]
    lane.averager.check(0, 1, good)
    for bad in (good[:-1], good + b"\0", b"\xff" * len(good)):
        for refuses in (lambda bad: lane.averager.use(round_, {1: bad}), lambda bad: lane.averager.check(0, 1, bad)):
            with pytest.raises(RoundError, match=r"lane 1's contribution to round 0 of stage 1"):
                refuses(bad)
        assert same(lane.weights() + list(lane.averager.state_tensors().values()), before)
    lane.averager.use(round_, {1: good})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("outr", "unknown averaging 'outr'; the nearest known one is 'outer'"),
        ("outer:evry=3", "averaging 'outer' has no option 'evry'; the nearest known one is 'every'"),
        ("outer:every=0", "every=0 has to be at least 1"),
        ("outer:every=4,delay=4", "delay=4 has to be from 0 to 3, below every"),
        ("outer:every=4,fragments=3", "fragments=3 has to divide every=4"),
        ("outer:lr=0", "lr=0 has to be above 0"),
        ("outer:momentum=1", "momentum=1 has to be at least 0 and below 1"),
        ("outer:format=int5", "unknown byte format 'int5'; the nearest known one is 'int"),
        ("outer:format=rvq", "format 'rvq' codes with a learned table"),
        ("outer:format=mask:k=4", "format 'mask' cannot carry its error to the next round"),
        ("outer:format=int4,evry=3", "byte format 'int4' has no option 'evry'"),
        ("sparta:format=int8", "format 'int8' rounds weights too coarsely"),
        ("sparta:p=0", "p=0 has to be above 0"),
        ("gradients:every=2", "averaging 'gradients' has no option 'every'"),
    ],
)
def test_a_mode_that_cannot_be_is_refused_in_one_line(spec: str, said: str):
    with pytest.raises(CodecError) as refused:
        parse_averaging(spec)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_options_after_a_format_are_its_own_unless_the_mode_has_them():
    mode = parse_averaging("outer:format=int4:hadamard=true,centre=false,lr=0.5")
    assert isinstance(mode, Outer)
    assert (mode.lr, mode.format) == (0.5, "int4:hadamard=true,centre=false")
    assert isinstance(parse_averaging("gradients"), Gradients)
    assert isinstance(parse_averaging(" sparta : p=0.5 "), Sparta)


def test_more_fragments_than_a_stage_has_rows_are_refused():
    with pytest.raises(CodecError, match=r"fragments=40 are more than the \d+ rows of 128 weights of a stage"):
        Lane("outer:every=40,fragments=40", 0)


def test_lanes_round_at_random_apart():
    assert rounding_seed(5, 0) == 5
    assert len({rounding_seed(5, lane) for lane in range(64)}) == 64
    assert all(0 <= rounding_seed(2**63 - 1, lane) < 2**63 for lane in range(64))


def test_a_gradient_that_is_not_finite_is_named():
    lane = Lane("gradients:format=int8", 0)
    lane.gradients()
    gradient = lane.parameters[3][1].grad
    assert gradient is not None
    gradient[5] = float("nan")
    with pytest.raises(NonFiniteGradient, match="step 0: the gradient of 'w3' is not finite"):
        lane.averager.contribute(lane.averager.plan.made_at(1)[0])


def test_a_gradient_that_is_not_there_is_named():
    lane = Lane("gradients", 0)
    assert isinstance(lane.averager, GradientAverager)
    lane.gradients()
    lane.parameters[2][1].grad = None
    with pytest.raises(RuntimeError, match="parameter 'w2' has no gradient to average"):
        lane.averager.contribute(lane.averager.plan.made_at(1)[0])


def test_what_does_not_learn_has_no_gradient_to_average():
    lane = Lane("gradients", 0)
    frozen = nn.Parameter(torch.ones(3, 50, 4), requires_grad=False)
    lane.parameters.append(("frame", frozen))
    more = stage_averager(
        parse_averaging("gradients"),
        lane.averager.place,
        steps=STEPS,
        parameters=lane.parameters,
        sender=None,
        table_moves=lambda _: False,
        table_gradient=lambda: None,
    )
    lane.parameters.pop()
    lane.gradients()
    round_ = lane.averager.plan.made_at(1)[0]
    assert more.contribute(round_) == lane.averager.contribute(round_)
    assert frozen.grad is None
