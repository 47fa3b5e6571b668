"""How lanes average: the modes that a run may ask for, as spec strings, and their options.

- `gradients` (data parallel): the sums of gradients of every step, before the optimizer. R lanes are then one lane with
  R times the batch, up to what the byte format rounds; it costs a round a step, which nobody can overlap.
- `outer` (DiLoCo, Douillard et al., arXiv 2311.08105; with Muon as the inner optimizer MuLoCo, arXiv 2505.23725): each
  lane trains alone for `every` steps; then the distance that all went, on average, is taken as a gradient by an outer
  Nesterov step. With `fragments`, the weights are averaged a part at a time, and with `delay` a round is used so many
  steps after it was made, while training goes on (Streaming DiLoCo, arXiv 2501.18512): the peak rate falls by the
  number of fragments, and no stage waits.
- `sparta` (Baioletti et al., 2025): a random part `p` of the weights themselves is averaged, often. What a lane learned
  while a round was under way is kept: the difference to the mean is added.

A format that rounds a distance or a gradient carries its error to the next round (`compress.feedback`): without that,
what int4 drops every time would never be learned. Weights as they are (`sparta`) must not be rounded coarsely.

Why a spec string and not a section of settings for each mode: one line on the command line, as for codecs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from ...compress.byte_format import ByteFormat, CodecError
from ...compress.feedback import Feedback
from ...compress.registry import parse_format
from ...compress.spec_strings import built, nearest

ROW = 128  # numbers in a row of what is packed, a block of the integer formats
_EXACT = ("fp64", "fp32")


class AveragingMode(ABC):
    """Options of one mode, never state. every: steps between two rounds of the same weights; delay: steps from making a
    round to using it; fragments: parts that take turns; format: the byte format of contributions."""

    name: ClassVar[str]
    of_gradients: ClassVar[bool] = False  # rounds are within a step, before the optimizer
    every: int
    delay: int = 0
    fragments: int = 1
    format: str

    def _check(self) -> None:
        """Raises CodecError for options out of range, or a format that cannot be used."""
        for fault, bad, wanted in (
            (f"every={self.every}", self.every < 1, "at least 1"),
            (f"fragments={self.fragments}", self.fragments < 1, "at least 1"),
            (f"delay={self.delay}", not 0 <= self.delay < self.every, f"from 0 to {self.every - 1}, below every"),
        ):
            if bad:
                raise CodecError(f"averaging '{self.name}': {fault} has to be {wanted}")
        if self.every % self.fragments:
            raise CodecError(
                f"averaging '{self.name}': fragments={self.fragments} has to divide every={self.every}, so that the "
                "parts take turns at even distances"
            )
        self.byte_format()

    @abstractmethod
    def byte_format(self) -> ByteFormat:
        """A fresh format for one kind of contribution. Raises CodecError for one that this mode cannot use."""

    def _with_feedback(self) -> ByteFormat:
        """One that carries its error, where it makes one."""
        found = _plain(self.name, self.format)
        if isinstance(found, Feedback):
            found.feedback = True
        elif found.id not in (*_EXACT, "bf16"):
            raise CodecError(
                f"averaging '{self.name}': format '{found.id}' cannot carry its error to the next round; "
                "choose int4, int8, topk or bf16"
            )
        return found


class Gradients(AveragingMode):
    """`gradients:format=int8`."""

    name = "gradients"
    of_gradients = True
    every = 1

    def __init__(self, format: str = "bf16") -> None:
        self.format = format
        self._check()

    def byte_format(self) -> ByteFormat:
        return self._with_feedback()


class Outer(AveragingMode):
    """`outer:every=20,lr=0.7,momentum=0.9,fragments=1,delay=0,format=int4`: lr and momentum of the outer step."""

    name = "outer"

    def __init__(
        self,
        every: int = 20,
        lr: float = 0.7,
        momentum: float = 0.9,
        fragments: int = 1,
        delay: int = 0,
        format: str = "int4",
    ) -> None:
        self.every, self.fragments, self.delay, self.format = every, fragments, delay, format
        self.lr, self.momentum = lr, momentum
        for fault, bad, wanted in (
            (f"lr={lr:g}", lr <= 0, "above 0; 1 with momentum=0 is the plain mean"),
            (f"momentum={momentum:g}", not 0 <= momentum < 1, "at least 0 and below 1"),
        ):
            if bad:
                raise CodecError(f"averaging 'outer': {fault} has to be {wanted}")
        self._check()

    def byte_format(self) -> ByteFormat:
        return self._with_feedback()


class Sparta(AveragingMode):
    """`sparta:p=0.05,every=10,delay=0,format=bf16`: p is the part of the weights that a round averages."""

    name = "sparta"

    def __init__(
        self,
        p: float = 0.05,
        every: int = 10,
        delay: int = 0,
        format: str = "bf16",
    ) -> None:
        self.p, self.every, self.delay, self.format = p, every, delay, format
        if not 0 < p <= 1:
            raise CodecError(f"averaging 'sparta': p={p:g} has to be above 0 and at most 1, all weights")
        self._check()

    def byte_format(self) -> ByteFormat:
        found = _plain(self.name, self.format)
        if found.id not in (*_EXACT, "bf16"):
            raise CodecError(
                f"averaging 'sparta': format '{found.id}' rounds weights too coarsely; choose fp32 or bf16"
            )
        return found


MODES: dict[str, type[AveragingMode]] = {mode.name: mode for mode in (Gradients, Outer, Sparta)}


def parse_averaging(spec: str) -> AveragingMode:
    """The mode that `spec` asks for, such as `outer:every=20,format=int4:hadamard=true,lr=0.7`: options after a format
    that are not the mode's own are the format's. Raises CodecError, naming the nearest known one."""
    name, colon, rest = (part.strip() for part in spec.partition(":"))
    if name not in MODES:
        raise CodecError(f"unknown averaging '{name}'{nearest(name, list(MODES))}")
    own, format_options, of_format = [], [], False
    known = MODES[name].__init__.__annotations__
    for item in rest.split(",") if colon else ():
        key = item.partition("=")[0].strip()
        if key == "format":
            own_part, _, first = item.partition(":")
            own.append(own_part)
            format_options += [first] if first else []
            of_format = True
        elif of_format and key not in known:
            format_options.append(item)
        else:
            own.append(item)
    mode = built(MODES[name], "averaging", f"{name}{colon}{','.join(own)}")
    if format_options:
        mode.format = f"{mode.format}:{','.join(format_options)}"
        mode.byte_format()  # which refuses what it cannot use
    return mode


def _plain(mode: str, spec: str) -> ByteFormat:
    """Raises CodecError for a format with a learned table, which contributions have no stream for, or one that does not
    fit rows of `ROW` numbers."""
    found = parse_format(spec)
    if found.table(ROW) is not None:
        raise CodecError(
            f"averaging '{mode}': format '{found.id}' codes with a learned table, which rounds do not ship; "
            "choose int4, int8, topk or bf16"
        )
    return found
