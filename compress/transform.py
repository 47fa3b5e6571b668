"""Transform coding as a byte format: `transform:bits=48` sends the coordinates that matter, in as many bits as pay.

A tensor (..., W) is N tokens of W numbers. From each token their mean is taken off and one scale is divided out
(`compress.token_scales`); what is left is turned to its principal axes (the Karhunen-Loève transform) and each
coordinate is rounded to the levels that are best for a normal variable of its variance, with the number of bits that
`compress.bit_allocation` gives it: B bits a token in all, more for the strongest coordinates and none for the weakest.
So there is a rank, and it follows what is sent. It should not be left much to choose: with fewer bits a number, over a
wider projection, the model trains worse (docs/results/loss.md). (Huang & Schultheiss, 1963; Goyal, IEEE Signal
Processing Magazine, 2001. For what crosses a pipeline's boundaries nearest is NSC-SL, arXiv 2602.02696, which cuts
singular values and quantises the rest alike.)

What both ends must know is one table (W + 1, W + 1), which the end that packs owns: row 0 has the mean, row i the axis
i and the standard deviation along it. It goes by the dictionary protocol, whole, with the first tensor of every
16th step (`every`). Which axis is the stronger one, and its bits, follow from the deviations as they were shipped: both
ends find the same, and a rewind that restores the table restores them. Body: N scales, then B bits a token, coordinate
after coordinate.

Why not a codebook of groups (`compress.rvq`): its groups all get as many bits, and which coordinates are in one is an
accident of the projection. Why not an entropy code, which would do without whole bits: messages would have another
length each time, and a link's load is to be known beforehand.

Which level is nearest, only the one that packs decides. Turning back is a product of matrices, whose sums each kind of
processor adds up in an order of its own, as in the projection behind it: the last bits may differ between devices.

The nearest level of a coordinate that gets no bits is 0 always. A gradient that lacks the same directions at every
step does not train them (`compress.rvq` has the measurement); those of a projection are few to begin with, so look at
`kept_weakest` in the records before using this for gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .bit_allocation import MOST_BITS
from .byte_format import ByteFormat, CodecError, Key, LearnedTable, Payload, is_finite
from .coding_survey import CodingSurvey
from .coordinate_codes import CoordinatePlan
from .float_formats import MIN_SCALE, refusal
from .registry import register_format
from .token_moments import TokenMoments
from .token_scales import ScaleKind, root_mean_squares, token_scales, whole_tokens


@register_format
class Transform(ByteFormat):
    """`transform:bits=auto,every=16,scale=log4,decay=0.99,encoding=fp32`

    bits: of a token, beside its scale, at most 5 a number; `auto`: as many as make 2 a number on average. every: steps
    between two changes of the table. scale: of a token, `bf16`, or `log8` or `log4` for so many bits below the tensor's
    largest. decay: of the moving average, a microbatch. encoding: byte format of the changes.
    """

    id = "transform"

    def __init__(
        self,
        bits: int | Literal["auto"] = "auto",
        every: int = 16,
        scale: ScaleKind = "log4",
        decay: float = 0.99,
        encoding: Literal["fp32", "bf16", "int8"] = "fp32",
    ) -> None:
        for fault, bad, wanted in (
            (f"bits={bits}", bits != "auto" and bits < 1, "at least 1"),
            (f"every={every}", every < 1, "at least 1"),
            (f"decay={decay:g}", not 0 <= decay < 1, "at least 0 and below 1"),
        ):
            if bad:
                raise CodecError(f"byte format 'transform': {fault} has to be {wanted}")
        self._asked: int | Literal["auto"] = bits
        self.every, self.encoding = every, encoding
        self._scales = token_scales(scale)
        self._moments = TokenMoments(decay)
        self._width = 0  # of the tokens that the table in use is for
        self._plan: CoordinatePlan | None = None
        self._survey = CodingSurvey()
        self._energy = torch.zeros(2, dtype=torch.float64)  # of what was sent, and of what did not arrive

    def bits(self, width: int) -> int:
        """B, of a token of this width, beside its scale. Raises CodecError for more than so many numbers can take."""
        bits = 2 * width if self._asked == "auto" else self._asked
        if bits > MOST_BITS * width:
            raise CodecError(
                f"format 'transform': bits={bits} are more than {MOST_BITS} for each of {width} numbers; "
                f"say bits={MOST_BITS * width} or less"
            )
        return bits

    # -- the table ------------------------------------------------------------------------------------------------

    def table(self, width: int) -> LearnedTable:
        self.bits(width)
        return LearnedTable(
            name="codebook",
            entries=width + 1,
            width=width + 1,
            delta=self.encoding,
            gradient=None,
            every=self.every,
            streamed=True,
        )

    @property
    def has_started(self) -> bool:
        return self._moments.width > 0

    @property
    def master(self) -> Tensor:
        if not self.has_started:
            raise CodecError("format 'transform' has no codebook before the first tensor that it learns from")
        return self._moments.table()

    @property
    def usage(self) -> Tensor:
        return torch.ones(self._moments.width + 1)

    def use_table(self, table: Tensor) -> None:
        width = table.shape[-1] - 1 if table.ndim == 2 else 0
        if width < 1 or table.shape[0] != width + 1 or table.dtype != torch.float32:
            shape = f"{list(table.shape)} {table.dtype}"
            raise CodecError(f"format 'transform' wants a table (W + 1, W + 1), float32; got {shape}")
        if not is_finite(table):
            raise CodecError("format 'transform' wants a table of finite numbers")
        self._width, self._plan = width, CoordinatePlan.of(table, self.bits(width))

    def has_table_of(self, other: ByteFormat, width: int) -> bool:
        del width
        return isinstance(other, Transform)

    # -- bytes ----------------------------------------------------------------------------------------------------

    def body_bytes(self, shape: tuple[int, ...]) -> int:
        tokens, width = self._tokens(shape)
        return self._scales.byte_count(tokens) + -(-tokens * self.bits(width) // 8)

    def pack(self, z: Tensor, key: Key) -> Payload:
        _, scales_N, codes = self._coded(z.detach(), key)
        body = self._scales.pack(scales_N) + self._in_use(z.shape[-1]).packed(codes)
        return Payload(codec=self.id, header={"shape": list(z.shape)}, body=body)

    def unpack(
        self,
        payload: Payload,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        key: Key | None = None,
    ) -> Tensor:
        del key
        self.check(payload, shape)
        tokens, width = self._tokens(shape)
        plan, cut = self._in_use(width), self._scales.byte_count(tokens)
        scales_N = self._scales.unpack(payload.body[:cut], tokens)
        octets = np.frombuffer(payload.body, np.uint8, offset=cut)
        count = tokens * self.bits(width)
        stream = np.unpackbits(octets, bitorder="little")
        if stream[count:].any():
            raise CodecError("transform payload has bits behind its last code; zeros fill it up")
        codes = plan.unpacked(stream[:count].reshape(tokens, self.bits(width)))
        values_NW = self._values(plan, codes, scales_N.to(plan.mean_W.device))
        return whole_tokens(values_NW, scales_N, shape=shape, dtype=dtype, device=device)

    def _values(self, plan: CoordinatePlan, codes: list[Tensor], scales_N: Tensor) -> Tensor:
        """The tokens (N, W), fp32, that these codes stand for."""
        return plan.values(codes).mul_(scales_N.unsqueeze(1)).add_(plan.mean_W)

    def _coded(self, z: Tensor, key: Key) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The tokens (N, W), fp32, their scales (N,), and the codes of each run (N, R), uint8. Raises CodecError for a
        value that is not finite."""
        tokens, width = self._tokens(tuple(z.shape))
        plan = self._in_use(width)
        flat_NW = z.to(torch.float32).reshape(tokens, width)
        apart_NW = flat_NW - plan.mean_W
        rms_N = root_mean_squares(apart_NW)
        if not is_finite(rms_N):
            raise refusal(self, z, apart_NW, key)
        scales_N = self._scales.rounded(rms_N)
        codes = plan.codes(apart_NW / scales_N.clamp(min=MIN_SCALE).unsqueeze(1))
        return flat_NW, scales_N, codes

    def _tokens(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """N and W."""
        if not shape or shape[-1] < 1:
            raise CodecError("format 'transform' codes tokens (..., W), and not a number alone")
        return math.prod(shape[:-1]), shape[-1]

    def _in_use(self, width: int) -> CoordinatePlan:
        if self._plan is None:
            raise CodecError(
                "format 'transform' has no codebook yet: learn, publish and use one before tensors are coded"
            )
        if self._width != width:
            raise CodecError(f"format 'transform': a tensor of width {width}, and a table for width {self._width}")
        return self._plan

    # -- learning -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def learn(self, z: Tensor, key: Key) -> None:
        z = z.detach()
        tokens, width = self._tokens(tuple(z.shape))
        flat_NW = z.reshape(tokens, width).to("cpu", torch.float32)
        if not is_finite(flat_NW):
            raise refusal(self, z, flat_NW, key)
        is_due = self._survey.is_due(width)
        if self._plan is not None and tokens and (is_due or not self._energy[0]):
            self._look_at(z, key, survey=is_due)
        self._moments.follow(flat_NW)

    def _look_at(self, z: Tensor, key: Key, *, survey: bool) -> None:
        flat_NW, scales_N, codes = self._coded(z, key)
        arrived_NW = self._values(self._in_use(z.shape[-1]), codes, scales_N)
        lost = (flat_NW - arrived_NW).to(torch.float64).square().sum()
        self._energy += torch.stack([flat_NW.to(torch.float64).square().sum(), lost]).cpu()
        if survey:
            self._survey.see(flat_NW, arrived_NW)

    def measures(self) -> dict[str, float]:
        """The rank (coordinates that get bits), the most bits of one, `CodingSurvey.shares`, and the relative error,
        root of energies, of the tensors that were looked at since the last call: the first one and those surveyed."""
        if self._plan is None or not self.has_started:
            return {}
        whole, lost = self._energy.tolist()
        self._energy.zero_()
        runs = self._plan.runs
        return {
            "rank": float(runs[-1].end),
            "most_bits": float(runs[0].bits),
            "reconstruction_error": math.sqrt(lost / whole) if whole else 0.0,
            **self._survey.shares(),
        }

    # -- state ----------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        return self._moments.state() if self.has_started else {}

    def state_layout(self, shape: tuple[int, ...], completed: int) -> dict[str, Tensor]:
        return self._moments.layout(shape[-1]) if completed else {}

    def check_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self._moments.check(state)

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """As the base class says; the table that was in use has to follow (`use_table`)."""
        if state:
            self._moments.load(state)
        else:
            self._moments.reset()
        self._plan = None
        self._energy.zero_()
