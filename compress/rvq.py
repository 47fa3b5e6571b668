"""Grouped residual vector quantisation as a byte format: `rvq:groups=auto,codes=256,levels=2`.

A tensor (..., W) is N tokens of W numbers. Each token has one scale, the root mean square of its numbers, and is
divided by it; then its numbers are cut into G groups side by side, and each group is coded in L rounds with one of K
rows a round (`compress.residual_codebooks`, learned in `compress.kmeans`). Body: N scales (`compress.token_scales`),
then the codes, ceil(log2(K)) bits each, in the order (level, token, group). A token of zeros has the scale 0 and is
exact; other scales are at least 2^-126, so nothing depends on whether a processor flushes subnormal numbers. Decoding
is single IEEE operations on fp32 in a fixed order (rows of the levels added up, then times the scale): every device has
the same bits.

Why vectors: at two bits a number a uniform grid wastes most of its points on combinations that never occur, and a
codebook of groups learns how neighbouring coordinates go together. Why residual: one codebook of as many bits would
have K^L rows. Why a scale for each token: norms of hidden states differ by orders of magnitude between tokens, and a
codebook spent on lengths has none left for directions (Gersho & Gray, 1992, chapter 12: shape-gain quantisation).

MAPL (arXiv 2606.05484) doubles its ratio with residual VQ, but says neither its sizes, nor how it learns, nor what
becomes of dead codes: all of that is our own choice. Gradients are coded in the same way, to the nearest row, with a
codebook of their own, which lives where they are packed.

What the nearest row loses is no noise: few rows in many dimensions know the strong directions and never the weak ones.
A gradient that lacks the same directions at every step, at every boundary again, fails to train what lies above
(measured: docs/results/loss.md), and Muon, which makes all directions of an update equally long, puts noise into their
place. `hadamard` rotates each token at random before it is coded (`compress.hadamard`): as much is lost, but of all
directions alike. It is for gradients; activations lose more of what is strong in them.

How a node uses it. Who packs owns the table, so a boundary may have two: the upstream node that of activations, the
downstream node that of gradients, each beside a `TableOwner` (dictionary "codebook", always float32), with a
`TableReplica` at the other end. A training tensor, in the order of the schedule:

    if not format.has_started: format.learn(z, key)           k-means: from here on there is a master
    delta = publisher.publish(format.master, entries=select(...)); format.use_table(shipped)
    payload = format.pack(z, key)                        the message carries delta and names its version
    if it had begun before: format.learn(z, key)         reuses the search that pack did

and at the other end: apply the delta, `use_table`, unpack. Tensors of an evaluation are packed only.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from .bit_packing import bit_width, pack_bits, packed_bytes, unpack_bits
from .byte_format import ByteFormat, CodecError, Key, LearnedTable, Payload, Policy, is_finite
from .coding_survey import CodingSurvey
from .float_formats import MIN_SCALE, refusal
from .hadamard import rotate, rotate_back
from .kmeans import Learner
from .registry import register_format
from .residual_codebooks import Codebooks, CodebookShape, Coded
from .token_scales import ScaleKind, root_mean_squares, token_scales, whole_tokens

_POLICIES: dict[str, Policy] = {name: name for name in cast("tuple[Policy, ...]", get_args(Policy))}
MAX_CODES, MAX_LEVELS, MAX_DIVISOR = 2**16, 16, 2**16
GROUP_WIDTH = 8  # of groups=auto


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Search:
    """What `pack` made of `z`, for `learn` to use again; `version` tells whether somebody changed `z` since."""

    z: Tensor
    version: int | None
    scales_N: Tensor
    coded: Coded


@register_format
class Rvq(ByteFormat):
    """`rvq:groups=auto,codes=256,levels=2,scale=bf16,hadamard=false,decay=0.99,delta=drift/16,encoding=int4`

    groups: parts of a token, each with codebooks of its own; `auto`: as many as make groups of 8 numbers, or of the
    next fewer that divide the width (with groups of 16 nothing trained). codes: rows of each, 2 to 65536. levels:
    rounds. scale: of a token, `bf16`, or `log8` or `log4` for so many bits below the tensor's largest. hadamard: each
    token is rotated before it is coded, and back. decay: of the moving average, a microbatch. delta: which entries each
    message's change covers: `random/D`, `robin/D` or `drift/D` for one part in D, or `full`. encoding: byte format of
    those changes. At a width that only a small power of two divides, a rotation mixes few numbers, or none.
    """

    id = "rvq"

    def __init__(
        self,
        groups: int | Literal["auto"] = "auto",
        codes: int = 256,
        levels: int = 2,
        scale: ScaleKind = "bf16",
        hadamard: bool = False,
        decay: float = 0.99,
        delta: str = "drift/16",
        encoding: Literal["fp32", "bf16", "int8", "int4"] = "int4",
    ) -> None:
        for fault, bad, wanted in (
            (f"groups={groups}", groups != "auto" and groups < 1, "at least 1"),
            (f"codes={codes}", not 2 <= codes <= MAX_CODES, f"from 2 to {MAX_CODES}"),
            (f"levels={levels}", not 1 <= levels <= MAX_LEVELS, f"from 1 to {MAX_LEVELS}"),
            (f"decay={decay:g}", not 0 <= decay < 1, "at least 0 and below 1"),
        ):
            if bad:
                raise CodecError(f"byte format 'rvq': {fault} has to be {wanted}")
        self.policy: Policy
        self.policy, self.divisor = _parse_delta(delta)
        self.encoding = encoding
        self._grouped_by_width = groups == "auto"
        # With groups=auto a stand-in until a width is known (`_fit`).
        self.grid = CodebookShape(levels=levels, groups=1 if groups == "auto" else groups, codes=codes)
        self._bits = bit_width(codes)
        self._scales = token_scales(scale)
        self._hadamard = hadamard
        self._decay = decay
        self._learner = Learner(self.grid, decay)
        self._books: Codebooks | None = None
        self._search: _Search | None = None
        self._survey = CodingSurvey()

    # -- the table ------------------------------------------------------------------------------------------------

    def table(self, width: int) -> LearnedTable:
        self._fit(width)
        return LearnedTable(
            name="codebook",
            entries=self.grid.entries,
            width=self._group_width(width),
            delta=self.encoding,
            gradient=None,
            every=1,
            streamed=True,
            policy=self.policy,
            divisor=self.divisor,
        )

    @property
    def has_started(self) -> bool:
        """Whether there is a master."""
        return self._learner.has_started

    @property
    def master(self) -> Tensor:
        if not self.has_started:
            raise CodecError("format 'rvq' has no codebook before the first tensor that it learns from")
        return self._learner.master

    @property
    def usage(self) -> Tensor:
        counts_LGK = self._learner.counts
        # A row that was revived is not used before it has been shipped: it counts as if it had an even share.
        return counts_LGK.clamp(min=counts_LGK.mean(dim=2, keepdim=True)).view(-1)

    def use_table(self, table: Tensor) -> None:
        if table.ndim == 2:
            self._fit(table.shape[0] // (self.grid.levels * self.grid.codes) * table.shape[1])
        entries = self.grid.entries
        if table.ndim != 2 or table.shape[0] != entries or not table.shape[1] or table.dtype != torch.float32:
            raise CodecError(
                f"format 'rvq' wants a table ({entries}, width), float32; got {list(table.shape)} {table.dtype}"
            )
        self._books, self._search = Codebooks(table.contiguous(), self.grid), None

    def has_table_of(self, other: ByteFormat, width: int) -> bool:
        if not isinstance(other, Rvq) or self._hadamard != other._hadamard:
            return False
        return self._grid(width) == other._grid(width)

    def for_tensors_of(self, state: Mapping[str, Tensor], times: float) -> dict[str, Tensor]:
        return {name: tensor if times == 1 or name == "updates" else tensor * times for name, tensor in state.items()}

    # -- bytes ----------------------------------------------------------------------------------------------------

    def body_bytes(self, shape: tuple[int, ...]) -> int:
        tokens, width = self._tokens(shape)
        grid = self._grid(width)
        return self._scales.byte_count(tokens) + packed_bytes(tokens * grid.groups * grid.levels, self._bits)

    def pack(self, z: Tensor, key: Key) -> Payload:
        self._tokens(tuple(z.shape))
        search = self._search = self._searched(z.detach(), key)
        scales = self._scales.pack(search.scales_N)
        codes = pack_bits(search.coded.codes_LNG.cpu().numpy(), self._bits)
        return Payload(codec=self.id, header={"shape": list(z.shape)}, body=scales + codes)

    def unpack(
        self,
        payload: Payload,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        key: Key | None = None,
    ) -> Tensor:
        self.check(payload, shape)
        tokens, width = self._tokens(shape)
        books = self._in_use(width)
        cut = self._scales.byte_count(tokens)
        scales_N = self._scales.unpack(payload.body[:cut], tokens)
        count = tokens * self.grid.groups * self.grid.levels
        try:
            codes = unpack_bits(payload.body[cut:], self._bits, count, self.grid.codes)
        except CodecError as error:
            raise CodecError(f"rvq payload's codes: {error}") from None
        where = books.table.device
        codes_LNG = torch.from_numpy(codes).to(where).view(self.grid.levels, tokens, self.grid.groups)
        values_NW = books.decode(codes_LNG).view(tokens, width).mul_(scales_N.to(where).unsqueeze(1))
        if self._hadamard:
            values_NW = rotate_back(values_NW, self.needed(key))
        return whole_tokens(values_NW, scales_N, shape=shape, dtype=dtype, device=device)

    def _searched(self, z: Tensor, key: Key) -> _Search:
        """`z` coded with the table in use."""
        x_NGD, scales_N = self._scaled(z, key)
        coded = self._in_use(z.shape[-1]).encode(x_NGD)
        return _Search(z=z, version=_version(z), scales_N=scales_N, coded=coded)

    def _scaled(self, z: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        """The tokens divided by their scales (N, G, D) and the scales (N,), fp32. Raises CodecError for a value
        that is not finite."""
        tokens, width = self._tokens(tuple(z.shape))
        flat_NW = z.to(torch.float32).reshape(tokens, width)
        if self._hadamard and is_finite(flat_NW):
            flat_NW = rotate(flat_NW, key)
        rms_N = root_mean_squares(flat_NW)
        if not is_finite(rms_N):
            raise refusal(self, z, flat_NW, key)
        scales_N = self._scales.rounded(rms_N)
        x_NW = flat_NW / scales_N.clamp(min=MIN_SCALE).unsqueeze(1)
        x_NGD = x_NW.view(tokens, self.grid.groups, width // self.grid.groups)
        return x_NGD, scales_N

    def _tokens(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """N and W."""
        if not shape:
            raise CodecError("format 'rvq' codes tokens (..., W), and not a number alone")
        self._group_width(shape[-1])
        return math.prod(shape[:-1]), shape[-1]

    def _group_width(self, width: int) -> int:
        groups = self._grid(width).groups
        if width < 1 or width % groups:
            divisors = [n for n in range(1, min(width, 4 * groups) + 1) if width % n == 0]
            remedy = f"groups={min(divisors, key=lambda n: abs(n - groups))}" if divisors else "a width above 0"
            raise CodecError(f"format 'rvq': a width of {width} cannot be cut into groups={groups}; say {remedy}")
        return width // groups

    def _grid(self, width: int) -> CodebookShape:
        """Of the codebooks for tokens of that width."""
        if not self._grouped_by_width or width < 1:
            return self.grid
        return replace(self.grid, groups=width // next(d for d in range(GROUP_WIDTH, 0, -1) if width % d == 0))

    def _fit(self, width: int) -> None:
        """Be for tokens of that width, as long as nothing was learned or received for another."""
        grid = self._grid(width)
        if grid != self.grid and not self.has_started and self._books is None:
            self.grid, self._learner = grid, Learner(grid, self._decay)

    def _in_use(self, width: int) -> Codebooks:
        if self._books is None:
            raise CodecError("format 'rvq' has no codebook yet: learn, publish and use one before tensors are coded")
        has = self._books.width * self.grid.groups
        if has != width:
            raise CodecError(f"format 'rvq': a tensor of width {width}, and a codebook for width {has}")
        return self._books

    # -- learning -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def learn(self, z: Tensor, key: Key) -> None:
        z = z.detach()
        self._fit(self._tokens(tuple(z.shape))[1])
        if self._learner.blank:
            x_NGD, scales_N = self._scaled(z, key)
            self._learner.start(x_NGD[scales_N != 0].cpu(), key)
            return
        last, self._search = self._search, None
        if last is None or not _same(last.z, z) or last.version is None or last.version != _version(z):
            last = self._searched(z, key)
        if self._survey.is_due(z.shape[-1]):
            self._look_at(z, last, key)
        self._learner.follow(last.coded, last.scales_N, key)

    def _look_at(self, z: Tensor, last: _Search, key: Key) -> None:
        coded = last.coded
        arrived_NW = (coded.given[0] - coded.left_NGD).flatten(1) * last.scales_N.unsqueeze(1)
        if self._hadamard:
            arrived_NW = rotate_back(arrived_NW, key)
        self._survey.see(z.to(torch.float32).reshape(arrived_NW.shape), arrived_NW)

    def measures(self) -> dict[str, float]:
        """`kmeans.Learner.measures`, `CodingSurvey.shares`, and how far what is in use stands from the master, relative
        to it."""
        if not self.has_started:
            return {}
        return self._learner.measures() | self._survey.shares() | {"staleness": self._staleness()}

    def _staleness(self) -> float:
        if self._books is None:
            return 0.0
        master, used = self._learner.master.double(), self._books.table.cpu().double()
        norm = master.norm().item()
        return (master - used).norm().item() / norm if norm else 0.0

    # -- state ----------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """What the owner has learned; what is in use is the dictionary's. Nothing at the other end."""
        return self._learner.state() if self.has_started else {}

    def state_layout(self, shape: tuple[int, ...], completed: int) -> dict[str, Tensor]:
        if not completed:
            return {}
        return Learner(self._grid(shape[-1]), self._decay).layout(self._group_width(shape[-1]))

    def check_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self._learner.check(state)

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """As the base class says; the table that was in use has to follow (`use_table`)."""
        if state:
            self._learner.load(state)
        else:
            self._learner.reset()
        self._books = self._search = None


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same view of the same memory, which `one` keeps alive."""
    views = [(z.data_ptr(), z.shape, z.stride(), z.dtype, z.device) for z in (one, other)]
    return views[0] == views[1]


def _version(z: Tensor) -> int | None:
    """How often `z` was changed in place, where anybody counts."""
    return None if z.is_inference() else z._version


def _parse_delta(text: str) -> tuple[Policy, int]:
    """`random/16` -> ("random", 16). Raises CodecError."""
    name, slash, part = text.partition("/")
    policy = _POLICIES.get(name)
    if policy is None:
        near = difflib.get_close_matches(name, _POLICIES, n=1, cutoff=0.4)
        hint = f"the nearest known one is '{near[0]}'" if near else f"known: {', '.join(_POLICIES)}"
        raise CodecError(f"byte format 'rvq': option 'delta' cannot be '{text}'; {hint}")
    if policy == "full" and not slash:
        return policy, 1
    if policy == "full" or not (part.isascii() and part.isdigit() and 1 <= int(part[:9]) <= MAX_DIVISOR):
        wanted = "full alone" if policy == "full" else f"{policy}/D with D from 1 to {MAX_DIVISOR}"
        raise CodecError(f"byte format 'rvq': option 'delta' is '{text}', wants {wanted}")
    return policy, int(part[:9])
