"""Mixtures of Subspaces: keys and values in few numbers, each segment in its own subspace (arXiv 2606.16384).

Keys and values have low rank, values less so than keys, and where a sequence is cut over machines, they alone travel.
So their projections are made to have that rank (`compress.mixture_projection`): of a segment of T tokens, T R numbers
and one angle cross for the keys and for the values, instead of T K of each, and nothing is lost by it. With one
subspace for all tokens a model is narrower than it need be; here a segment's angle θ, a function of its tokens, says
which one of a family it uses.

    owner     z = x B U(θ)        others    keys = z U(θ)ᵀ, then their rotary embedding
    back      dz = dkeys U(θ) and dθ: each user gives both, and the owner adds them up and goes on through B and ψ

k and v are the ranks as shares of K, the width of all heads' keys or values together: as published, 98 % of the keys'
and 95 % of the values' numbers are saved with k = 0.02 and v = 0.05. `mixture=none` has Ū alone and sends no angle;
`random` has a head that is drawn and not trained: two of the paper's ablations, the second as we read it.

*Warm start.* In the first `warm` steps keys and values cross as they are, and Ū is then their principal components, of
keys before the rotary embedding. In the last of those steps (`gathers`) each node adds up the Gram matrices of its own
tokens, in float64; lane 0 adds those of all lanes in their order, computes the components, and tells all: computed by
each, they would differ where CPUs round differently, and where two components weigh the same by much. It is one step's,
and not a running sum over all: that would weigh weights that are gone, and would be state that a checkpoint has to
keep. The frame is a part of the model's state then.

*Folding.* In the last share `fold` of the steps θ is 0, the wire stays as narrow, and the model learns to do without
angles; then `folded` gives the plain projections B Ū Ūᵀ, and the model is an ordinary one. (The paper's heads fold
back, and may be removed in the last 30 % without loss; that θ goes to 0 for it, and at once, is our reading.)

`head=mean` is as published: ψ looks at the mean of a segment's tokens, those behind a query too, so one number of each
segment is known before its time. `head=first`, ours, looks at the segment's first token alone, which has seen all
before it and nothing else: use it where a loss is to be that of a model which generates.

What normalises keys after projecting them leads out of any subspace: such architectures are refused by name. Why not a
byte format for the keys as they are: at 2 % of the numbers it would leave nothing of them, and here the model learns to
need no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .byte_format import CodecError
from .context_method import ContextLayer, ContextMethod, ContextShape, Rotate
from .exact_orthonormal import exact_orthonormal
from .mixture_projection import Looks, MixtureProjection, Phase, folded
from .principal_components import principal
from .token_table import UNIT, integers
from .turned_subspace import frame_of

Mixture = Literal["learned", "random", "none"]
PROJECTIONS = ("k_proj", "v_proj")
_WHICH = {name: which for which, name in enumerate(PROJECTIONS)}
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj")
_STREAMS = 0x4D6F53 << 24  # "MoS": of the seed's draws; the layer and what is drawn are added
_DRAWS = 3  # of one matrix: Ū, A, ψ


class MixtureLayer(ContextLayer):
    """Keys' and values' projections of one layer. A user sets `phase` before a forward."""

    def __init__(self, shape: ContextShape, keys: MixtureProjection, values: MixtureProjection) -> None:
        self.keys, self.values = keys, values
        self._shape = shape

    def encode(self, segment: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Of the projections' last forward, which made these keys and values."""
        del k_BHTD, v_BHTD
        parts = [projection.kept(segment) for projection in (self.keys, self.values)]
        z_BTW = torch.cat([z for z, _ in parts], dim=-1)
        angles = [theta for _, theta in parts if theta is not None]
        s_BN = torch.stack(angles, dim=-1) if angles else self.keys.frame.new_empty(len(z_BTW), 0)
        return z_BTW, s_BN

    def decode(self, z_BTW: Tensor, s_BN: Tensor, rotate: Rotate) -> tuple[Tensor, Tensor]:
        warm = self.keys.phase == "warm"
        widths = [p.out_features if warm else p.frame.shape[2] for p in (self.keys, self.values)]
        angles: Sequence[Tensor | None] = s_BN.unbind(-1) if s_BN.shape[-1] else (None, None)
        heads: list[Tensor] = []
        for projection, z_BTR, theta_B in zip((self.keys, self.values), z_BTW.split(widths, -1), angles, strict=True):
            if warm:  # a gradient of zero for the angle, which is zero
                rows_BTK = z_BTR if theta_B is None else z_BTR + 0 * theta_B[:, None, None].to(z_BTR.dtype)
            else:
                rows_BTK = projection.lift(z_BTR, theta_B)
            heads.append(rows_BTK.unflatten(-1, (self._shape.heads, self._shape.head_width)).transpose(1, 2))
        return rotate(heads[0]), heads[1]

    def begin(self, phase: Phase, *, gathers: bool = False) -> None:
        """Before the first forward of a step, or of an evaluation: how it computes; gathers: Gram matrices, afresh."""
        for projection in (self.keys, self.values):
            projection.phase = phase
            size = projection.out_features
            projection.gram = projection.weight.new_zeros(size, size, dtype=torch.float64) if gathers else None

    def grams(self) -> tuple[Tensor, Tensor]:
        """Of keys and of values, each (K, K), float64: of this node's tokens in the step that gathers."""
        keys, values = (
            projection.weight.new_zeros(2 * (projection.out_features,), dtype=torch.float64)
            if projection.gram is None
            else projection.gram
            for projection in (self.keys, self.values)
        )
        return keys, values

    def subspaces(self) -> tuple[Tensor, Tensor]:
        return self.keys.frame.detach(), self.values.frame.detach()

    def choose(self, *grams: Tensor) -> tuple[Tensor, ...]:
        """Frames of Ū, the principal components of keys, and of values."""
        chosen: list[Tensor] = []
        for which, (projection, gram) in enumerate(zip((self.keys, self.values), grams, strict=True)):
            try:
                u_KR = principal(gram, projection.frame.shape[2])
            except ValueError as error:
                raise CodecError(f"context method 'mos': layer {self._shape.layer}: {error}") from None
            chosen.append(frame_of(u_KR, self._shape.seed, _stream(self._shape.layer, which, 1)).to(projection.frame))
        return tuple(chosen)

    @torch.no_grad()
    def use_subspaces(self, *chosen: Tensor) -> None:
        for projection, frame in zip((self.keys, self.values), chosen, strict=True):
            projection.frame.copy_(frame)

    def folded(self) -> dict[str, Tensor]:
        """Weights of the plain projections that these are at θ = 0, by their names in the attention module."""
        parts = zip(PROJECTIONS, (self.keys, self.values), strict=True)
        return {f"{name}.{kind}": tensor for name, part in parts for kind, tensor in part.folded().items()}

    def measures(self) -> dict[str, float]:
        """`angle`, `energy_kept` and `orthogonality` of keys and of values; see `MixtureProjection.measures`."""
        parts = (("keys", self.keys), ("values", self.values))
        return {f"{name}_{what}": number for name, part in parts for what, number in part.measures().items()}


class MixtureOfSubspaces(ContextMethod):
    """`--context mos:k=0.02,v=0.05,mixture=learned,bound=0.3,head=mean,format=,backward=,warm=0,fold=0`

    k, v: ranks of keys and values, as shares of their width; at least one dimension. mixture: whether angles are
    learned, random functions of the tokens, or none. bound: of an angle. head: what it is a function of, the mean of a
    segment's tokens or its first one. format, backward: byte formats. warm: steps before the subspaces are chosen.
    fold: share of the steps at the end in which angles are 0.
    """

    name = "mos"

    def __init__(
        self,
        k: float = 0.02,
        v: float = 0.05,
        mixture: Mixture = "learned",
        bound: float = 0.3,
        head: Looks = "mean",
        format: str = "",
        backward: str = "",
        warm: int = 0,
        fold: float = 0.0,
    ) -> None:
        for what, bad, remedy in (
            (f"k={k:g}", not 0 < k <= 1, "is no share of the keys' width; give one above 0, at most 1"),
            (f"v={v:g}", not 0 < v <= 1, "is no share of the values' width; give one above 0, at most 1"),
            (f"bound={bound:g}", not 0 < bound <= 1, "is no bound of a small angle; give one above 0, at most 1"),
            (f"warm={warm}", warm < 0, "is no number of steps; give 0 or more"),
            (f"fold={fold:g}", not 0 <= fold < 1, "is no share of the steps; give one from 0, below 1"),
        ):
            if bad:
                raise CodecError(f"context method 'mos': {what} {remedy}")
        self.shares = (k, v)
        self.mixture: Mixture = mixture
        self.bound, self.warm, self.fold = bound, warm, fold
        self.head: Looks = head
        self.format, self.backward = format, backward

    def ranks(self, shape: ContextShape) -> tuple[int, int]:
        """Of keys and of values."""
        size = shape.heads * shape.head_width
        return self._rank(0, size), self._rank(1, size)

    def _rank(self, which: int, size: int) -> int:
        return max(1, round(self.shares[which] * size))

    @property
    def exact_spec(self) -> str:
        """With angles that are not zero at the start."""
        return f"{self.name}:k=0.5,v=0.5,mixture=random,head={self.head}"

    def wire_width(self, shape: ContextShape) -> int:
        """Behind the warm phase; see `width_in`."""
        return sum(self.ranks(shape))

    def width_in(self, phase: Phase, shape: ContextShape) -> int:
        """W in a phase: while it is warm, z is keys before their rotary embedding, and values, as they are."""
        return 2 * shape.heads * shape.head_width if phase == "warm" else self.wire_width(shape)

    def width_at(self, step: int, shape: ContextShape) -> int:
        return self.width_in("warm" if step < self.warm else "mixed", shape)

    def begin(self, layer: MixtureLayer, step: int, steps: int) -> None:
        layer.begin(self.phase(step, steps), gathers=self.gathers(step))

    def scalars(self, shape: ContextShape) -> int:
        del shape
        return 0 if self.mixture == "none" else len(PROJECTIONS)

    def check_steps(self, steps: int) -> None:
        """Raises CodecError for a run that is over before it is warm."""
        if self.warm and self.warm >= steps - round(self.fold * steps):
            raise CodecError(
                f"context method 'mos': warm={self.warm} of {steps} steps, {round(self.fold * steps)} of which fold, "
                "leaves none between; lower warm or fold"
            )

    def phase(self, step: int, steps: int) -> Phase:
        """Of step `step` (from 0) of a run of so many."""
        if step < self.warm:
            return "warm"
        return "folding" if step >= steps - round(self.fold * steps) else "mixed"

    @property
    def gathering_step(self) -> int | None:
        """The last that is warm."""
        return self.warm - 1 if self.warm else None

    def frozen(self, shape: ContextShape) -> Iterator[Tensor]:
        for which in range(len(PROJECTIONS)):
            yield self._frame(shape.seed, shape.layer, which, shape.heads * shape.head_width)
            if self.mixture == "random":
                yield _drawn_head(shape, which)

    def check_plain(self, step: int, steps: int) -> None:
        if self.mixture == "none" or self.phase(step, steps) != "mixed":
            return
        folds = steps - round(self.fold * steps)
        when = f"its angles are 0 from step {folds + 1} of {steps} on" if folds < steps else "fold=0: they stay"
        raise CodecError(
            f"context method 'mos': after step {step + 1} keys and values lie in subspaces that turn by angles, which "
            f"no plain projection does ({when})"
        )

    def plain_weights(self, weights: Mapping[str, Tensor], *, seed: int, step: int) -> dict[str, Tensor]:
        """Those at θ = 0; of a model that is warm still, its own. Each layer's number is the only one in its weights'
        names."""
        found: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            owner, _, kind = name.rpartition(".")
            which = _WHICH.get(owner.rpartition(".")[2])
            if which is None or (kind in ("weight", "bias") and step < self.warm):
                found[name] = tensor
            elif kind in ("weight", "bias"):
                frame = weights.get(f"{owner}.frame")
                if frame is None:
                    layer = next(int(part) for part in name.split(".") if part.isdigit())
                    frame = self._frame(seed, layer, which, len(tensor))
                found[name] = folded(tensor, frame[0])
        return found

    def _frame(self, seed: int, layer: int, which: int, size: int) -> Tensor:
        u_KR = exact_orthonormal(seed, _stream(layer, which, 0), size, self._rank(which, size))
        return frame_of(u_KR, seed, _stream(layer, which, 1))

    def attach(self, attention: nn.Module, shape: ContextShape) -> MixtureLayer:
        check_attention(attention, shape)
        made: list[MixtureProjection] = []
        for which, name in enumerate(PROJECTIONS):
            dense = attention.get_submodule(name)
            assert isinstance(dense, nn.Linear)
            angle_D = None if self.mixture == "none" else torch.zeros(shape.width)
            projection = MixtureProjection(
                dense,
                self._frame(shape.seed, shape.layer, which, dense.out_features),
                learned_frame=self.warm > 0,
                angle_D=_drawn_head(shape, which) if self.mixture == "random" else angle_D,
                trained=self.mixture == "learned",
                bound=self.bound,
                looks=self.head,
                segment_length=shape.segment_length,
            )
            attention.set_submodule(name, projection)
            made.append(projection)
        layer = MixtureLayer(shape, *made)
        layer.begin("warm" if self.warm else "mixed")
        return layer


def check_attention(attention: nn.Module, shape: ContextShape) -> None:
    """Raises CodecError, by name, for attention whose keys and values are not what projections of their own give."""
    kind = type(attention).__name__
    remedy = "choose a decoder such as llama or qwen2, or context method 'full'"

    def refuse(fault: str) -> CodecError:
        return CodecError(f"context method 'mos': layer {shape.layer}, {kind} {fault}; {remedy}")

    children = dict(attention.named_children())
    if fused := next((name for name in _FUSED if name in children), None):
        raise refuse(f"makes queries, keys and values with one matrix ({fused})")
    for name in PROJECTIONS:
        if not isinstance(children.get(name), nn.Linear) or isinstance(children[name], MixtureProjection):
            raise refuse(f"has no '{name}' that is a linear map")
        size, wanted = children[name].out_features, shape.heads * shape.head_width
        if size != wanted:
            raise refuse(f"has a '{name}' of {size} outputs for {shape.heads} heads of {shape.head_width}")
    for name in children:
        if "norm" in name and name.startswith(("k", "v", "qk")):
            raise refuse(f"normalises after projecting ({name}), which leads out of a subspace")
    if getattr(getattr(attention, "config", None), "clip_qkv", None):
        raise refuse("clips keys and values after projecting (clip_qkv), which leads out of a subspace")


def _stream(layer: int, which: int, draw: int) -> int:
    return _STREAMS + (layer * len(PROJECTIONS) + which) * _DRAWS + draw


def _drawn_head(shape: ContextShape, which: int) -> Tensor:
    """(D,), float64, standard deviates. With inputs of unit energy (D of a token), ψ then has unit variance for one
    token, and less for the mean of many."""
    drawn = integers(shape.seed, _stream(shape.layer, which, 2), 0, 1, shape.width)[0]
    return torch.from_numpy(drawn * UNIT)
