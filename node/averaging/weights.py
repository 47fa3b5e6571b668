"""Modes `outer` and `sparta`: lanes train alone, and what they learned is averaged now and then.

`outer`: with A the weights that all lanes agreed on last (the *anchor*) and θ what one lane has now, it contributes
A - θ; with Δ the mean of these, the outer step is Nesterov's as DiLoCo takes it: m ← μ m + Δ, A' = A - lr (Δ + μ m).

`sparta`: a lane contributes those of its weights that the round's own random numbers choose; A' is what it has, and
there the mean less what its own contribution says, so that rounding alone moves nothing. The last round is of all
weights, and A' is their mean.

Either way a lane's weights become θ + (A' - θ₀), where θ₀ are those that it contributed: what it learned while the
round was under way is kept. With delay=0 nothing was, and all lanes hold A' itself, in the same bits.

The inner optimizer's state stays each lane's own, as in DiLoCo. So do codebooks. A learned projector is averaged with
the weights that use it and brought back to its manifold (`moved`); the stage below hears of it with the next change
that is due.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compress.byte_format import ByteFormat
from .averager import Averager, Place, octets
from .fragments import fragments_of, row_shape
from .modes import AveragingMode, Outer, Sparta
from .round_plan import Round


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageWeights:
    """All of a stage that is averaged, in place. cut: what fragments may cut; whole: what they must not. moved: called
    after they were changed."""

    cut: list[Tensor]
    whole: list[Tensor]
    moved: Callable[[], None]


class WeightAverager(Averager):
    """What both modes have: fragments of the weights, and what of them a round under way began with."""

    def __init__(self, mode: AveragingMode, place: Place, of: StageWeights, *, steps: int) -> None:
        super().__init__(mode, place, steps=steps, moved=of.moved)
        self._fragments = fragments_of(of.cut, of.whole, mode.fragments)
        self._began: dict[int, Tensor] = {}  # by fragment: θ₀ of the round that is under way

    def _add_difference(self, round_: Round, agreed: Tensor) -> None:
        """θ ← θ + (A' - θ₀), or A' in its own bits where nothing was learned since."""
        rows, began = self._fragments[round_.fragment], self._began.pop(round_.fragment, None)
        if began is None:
            rows.write(agreed)
        else:
            rows.add(agreed - began)

    def _remember(self, round_: Round, rows: Tensor) -> None:
        if round_.used > round_.made:
            self._began[round_.fragment] = rows

    def _begin_anew(self, round_: Round) -> None:
        self._remember(round_, self._fragments[round_.fragment].read())

    def state_tensors(self) -> dict[str, Tensor]:
        state = {f"began/{fragment}": rows for fragment, rows in self._began.items()}
        return state | {f"own/{fragment}": octets(body) for fragment, body in self._own.items()}

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        layout: dict[str, Tensor] = {}
        for round_ in self.plan.under_way(completed):
            rows = self._fragments[round_.fragment]
            size = self.contribution_bytes(round_)
            layout[f"began/{round_.fragment}"] = torch.empty(rows.shape, dtype=self._dtype, device="meta")
            layout[f"own/{round_.fragment}"] = torch.empty(size, dtype=torch.uint8, device="meta")
        return layout

    def load_state_tensors(self, state: Mapping[str, Tensor], completed: int) -> None:
        self._began.clear()
        self._own.clear()
        for round_ in self.plan.under_way(completed):
            like = self._fragments[round_.fragment].read()
            self._began[round_.fragment] = like.copy_(state[f"began/{round_.fragment}"])
            self._own[round_.fragment] = state[f"own/{round_.fragment}"].numpy().tobytes()

    def _check_rows(
        self, round_: Round, lane: int, contribution: bytes, fmt: ByteFormat, shape: tuple[int, ...]
    ) -> None:
        self._unpacked(round_, lane, contribution, fmt, shape, torch.empty(0, dtype=self._dtype))

    @property
    def _dtype(self) -> torch.dtype:
        return self._fragments[0].dtype


class OuterAverager(WeightAverager):
    """Mode `outer`."""

    def __init__(self, mode: Outer, place: Place, of: StageWeights, *, steps: int) -> None:
        super().__init__(mode, place, of, steps=steps)
        self._lr, self._beta = mode.lr, mode.momentum
        self._anchors = [rows.read() for rows in self._fragments]
        self._momenta = [torch.zeros_like(anchor) for anchor in self._anchors]
        self._formats = [mode.byte_format() for _ in self._fragments]  # each carries the error of its fragment

    def contribution_bytes(self, round_: Round) -> int:
        return self._formats[round_.fragment].body_bytes(self._fragments[round_.fragment].shape)

    def _packed(self, round_: Round) -> bytes:
        rows = self._fragments[round_.fragment].read()
        self._remember(round_, rows)
        gone = self._anchors[round_.fragment] - rows
        return bytes(self._formats[round_.fragment].pack_training(gone, self._key(round_, self.place.lane)).body)

    def _check(self, round_: Round, lane: int, contribution: bytes) -> None:
        place = round_.fragment
        self._check_rows(round_, lane, contribution, self._formats[place], self._fragments[place].shape)

    def _apply(self, round_: Round, contributions: Mapping[int, bytes]) -> float:
        place = round_.fragment
        anchor, momentum = self._anchors[place], self._momenta[place]
        mean = self._mean(round_, contributions, self._formats[place], tuple(anchor.shape), anchor)
        momentum.mul_(self._beta).add_(mean)
        anchor.sub_(mean.add(momentum, alpha=self._beta), alpha=self._lr)
        self._add_difference(round_, anchor)
        return torch.linalg.vector_norm(mean, dtype=torch.float64).item()

    def state_tensors(self) -> dict[str, Tensor]:
        state = super().state_tensors()
        for place, (anchor, momentum) in enumerate(zip(self._anchors, self._momenta, strict=True)):
            state |= {f"anchor/{place}": anchor, f"momentum/{place}": momentum}
            errors = self._formats[place].state_tensors()
            state |= {f"{name}/{place}": tensor for name, tensor in errors.items()}
        return state

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        layout = super().state_layout(completed)
        for place, anchor in enumerate(self._anchors):
            layout |= {f"anchor/{place}": anchor.to("meta"), f"momentum/{place}": anchor.to("meta")}
        return layout | self._errors_layout(completed)

    def _errors_layout(self, completed: int) -> dict[str, Tensor]:
        layout: dict[str, Tensor] = {}
        for place, anchor in enumerate(self._anchors):
            errors = self._formats[place].state_layout(tuple(anchor.shape), self.plan.made_of(place, completed))
            layout |= {f"{name}/{place}": tensor for name, tensor in errors.items()}
        return layout

    def load_state_tensors(self, state: Mapping[str, Tensor], completed: int) -> None:
        super().load_state_tensors(state, completed)
        for place in range(len(self._formats)):
            self._anchors[place].copy_(state[f"anchor/{place}"])
            self._momenta[place].copy_(state[f"momentum/{place}"])
        self._load_errors(state, completed)

    def _load_errors(self, errors: Mapping[str, Tensor], completed: int) -> None:
        for place, fmt in enumerate(self._formats):
            names = fmt.state_layout(tuple(self._anchors[place].shape), self.plan.made_of(place, completed))
            fmt.load_state_tensors({name: errors[f"{name}/{place}"] for name in names})


class SpartaAverager(WeightAverager):
    """Mode `sparta`. The state is that of rounds under way and nothing else."""

    def __init__(self, mode: Sparta, place: Place, of: StageWeights, *, steps: int) -> None:
        super().__init__(mode, place, of, steps=steps)
        self._format = mode.byte_format()
        self._share = mode.p

    def _chosen(self, round_: Round) -> int:
        numbers = self._fragments[0].numbers
        return numbers if round_.last else max(1, round(self._share * numbers))

    def contribution_bytes(self, round_: Round) -> int:
        return self._format.body_bytes(row_shape(self._chosen(round_)))

    def _places(self, round_: Round) -> Tensor:
        """Which weights the round averages (chosen,), the same in all lanes: those that the raw numbers of its key put
        first."""
        numbers, chosen = self._fragments[0].numbers, self._chosen(round_)
        if chosen == numbers:
            return torch.arange(numbers)
        raw = torch.from_numpy(self._key(round_, 0, 1).generator().random_raw(numbers).view("int64"))
        return torch.topk(raw, chosen, largest=False, sorted=False).indices.sort().values

    def _packed(self, round_: Round) -> bytes:
        rows = self._fragments[0].read()
        self._remember(round_, rows)
        chosen = rows.new_zeros(row_shape(self._chosen(round_)))
        chosen.view(-1)[: self._chosen(round_)] = rows.view(-1)[self._places(round_).to(rows.device)]
        return bytes(self._format.pack(chosen, self._key(round_, self.place.lane)).body)

    def _check(self, round_: Round, lane: int, contribution: bytes) -> None:
        self._check_rows(round_, lane, contribution, self._format, row_shape(self._chosen(round_)))

    def _apply(self, round_: Round, contributions: Mapping[int, bytes]) -> float:
        rows = self._fragments[0].read()
        shape, count = row_shape(self._chosen(round_)), self._chosen(round_)
        mean = self._mean(round_, contributions, self._format, shape, rows)
        places = self._places(round_).to(rows.device)
        if round_.last:
            agreed = mean
        else:
            agreed = self._began.get(round_.fragment, rows).clone()
            if self.place.lane in contributions:
                own = self._unpacked(round_, self.place.lane, contributions[self.place.lane], self._format, shape, rows)
                agreed.view(-1)[places] += (mean - own).view(-1)[:count]
            else:  # it has said nothing, so it takes what the others have
                agreed.view(-1)[places] = mean.view(-1)[:count]
        self._add_difference(round_, agreed)
        return torch.linalg.vector_norm(mean, dtype=torch.float64).item()
