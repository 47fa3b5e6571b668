"""Subspace Networks: a model whose hidden states lie in one fixed subspace (arXiv 2506.01260, "Protocol Models").

A frozen table F of tokens, N(0, 1) and equal on all nodes, and one U in St(D, k) for all layers and boundaries:

    hidden    x = F[t] + U z
    sender    z = Uᵀ (x - F[t])          receiver    x = F[t] + U z          backward    dz = Uᵀ dx

k numbers a token cross, and nothing is lost in either direction as long as every writer to the residual stream stays in
span(U). So they are re-parameterised: an attention's output and an FFN's down projection y = x Wᵀ + b become
z = x W_zᵀ + b_z with W_z (k, in), followed by U; the embedding becomes F[t] + E[t] Uᵀ with E (V, k). There is then
nothing to project after a step, and any optimizer serves. (The paper's first version projects the weights themselves
after each step.) The layers behind the last boundary need not obey: the last `free` ones, the norm and the head stay as
they are. Norms *before* a branch may have gains; behind one, gains lead out of span(U), and so does a norm that takes
the mean off. Which architectures those are is not listed but tried, on a small copy and on each stage.

U and F are computed by every node for itself, to the same bits (`compress.exact_orthonormal`, `compress.token_table`):
nothing is synchronised, and their digest is in the greeting. W_z starts as Uᵀ W and E as E U, of what dense training
would start from.

What the writers save, in (D - k) numbers each, is gone; `spend=ffn` puts it into more FFN units of the same layer. So
either all shapes are those of the dense model, or about as many parameters: two fair comparisons, which public trainers
mix.

Why not MAPL: its projectors follow the model, here the model is made to follow the projector. No table has to be kept
in step, and without rounding the boundary is exact; the price is a narrower model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .anchors import Anchors
from .byte_format import CodecError
from .codec_interface import BoundaryContext, Codec, Decoder, Encoder, StageContext, check_table_scale
from .exact_orthonormal import exact_orthonormal
from .registry import register_codec
from .stage_parts import StageParts
from .token_table import UNIT, integers

Spend = Literal["none", "ffn"]
# Linear maps that write to the residual stream, by the last part of their names, as transformers calls them.
ATTENTION_WRITERS = ("o_proj", "out_proj", "dense")
FFN_WRITERS = ("down_proj", "c_proj", "fc2", "dense_4h_to_h")
_STREAM = 0x53534E  # "SSN": of the seed's draws
_MULTIPLE = 8  # FFN units that are added


class SubspaceLinear(nn.Module):
    """x to U (W_z x + b_z). `inner` (in, k) is trained; U (D, k) is not."""

    def __init__(self, dense: nn.Linear, u_DK: Tensor) -> None:
        super().__init__()
        weight = dense.weight.detach()
        self.inner = nn.Linear(dense.in_features, u_DK.shape[1], bias=dense.bias is not None, device="meta")
        self.inner.weight = nn.Parameter(u_DK.mT @ weight)
        if dense.bias is not None:
            self.inner.bias = nn.Parameter(u_DK.mT @ dense.bias.detach())
        self.register_buffer("u", u_DK, persistent=False)

    u: Tensor

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 it would leave span(U)
            return F.linear(z.to(self.u.dtype), self.u)


class SubspaceEmbedding(nn.Module):
    """Token ids to E[t] Uᵀ. `inner` (V, k) is trained."""

    def __init__(self, dense: nn.Embedding, u_DK: Tensor) -> None:
        super().__init__()
        self.inner = nn.Embedding(dense.num_embeddings, u_DK.shape[1], device="meta")
        self.inner.weight = nn.Parameter(dense.weight.detach() @ u_DK)
        self.register_buffer("u", u_DK, persistent=False)

    u: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, enabled=False):
            return F.linear(self.inner(ids), self.u)


class SsnEncoder(Encoder):
    def __init__(self, context: BoundaryContext, u_DK: Tensor) -> None:
        super().__init__()
        self._tokens = context.tokens
        self.register_buffer("u", u_DK, persistent=False)
        self._largest = torch.zeros((), device=context.device, dtype=context.dtype)

    u: Tensor

    def encode(self, hidden_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        own_BTD = None if self._tokens is None else self._tokens(ids_BT)
        x_BTD = hidden_BTD if own_BTD is None else hidden_BTD - own_BTD
        z_BTK = x_BTD @ self.u
        if torch.is_grad_enabled():
            with torch.no_grad():  # stays on the device, which is not waited for
                lost_BTD = x_BTD - z_BTK @ self.u.mT
                self._largest = torch.maximum(self._largest, lost_BTD.norm() / hidden_BTD.norm().clamp(min=1e-30))
        return z_BTK

    def measures(self) -> dict[str, float]:
        """The largest part of a microbatch's hidden states that did not lie in the subspace, relative, root of
        energies."""
        largest, self._largest = self._largest.item(), torch.zeros_like(self._largest)
        return {"boundary_error": largest}


class SsnDecoder(Decoder):
    def __init__(self, context: BoundaryContext, u_DK: Tensor) -> None:
        super().__init__()
        self._tokens = context.tokens
        self.register_buffer("u", u_DK, persistent=False)

    u: Tensor

    def decode(self, z_BTW: Tensor, ids_BT: Tensor) -> Tensor:
        hidden_BTD = z_BTW @ self.u.mT
        own_BTD = None if self._tokens is None else self._tokens(ids_BT)
        return hidden_BTD if own_BTD is None else hidden_BTD + own_BTD


@register_codec
class SsnCodec(Codec):
    """`--codec ssn:k=32,free=1,table=1,spend=none`

    k: the subspace's dimension, the numbers a token on the wire. free: layers at the end of the model, all of them on
    the last stage, that may leave the subspace. table: scale of the frozen token table; 0 for none. spend: `ffn` for
    FFN units in the place of what the writers save, `none`.
    """

    name = "ssn"
    default_forward, default_backward = "int4", "int4"
    constrains = True

    def __init__(self, k: int = 32, free: int = 1, table: float = 1.0, spend: Spend = "none") -> None:
        for fault, bad in ((f"k={k}", k < 1), (f"free={free}", free < 0)):
            if bad:
                raise CodecError(f"codec 'ssn': {fault} has to be at least {int(fault.startswith('k'))}")
        check_table_scale(self.name, table)
        self.rank, self.free, self.table_scale = k, free, table
        self.spend: Spend = spend

    def check(self, width: int) -> None:
        if self.rank > width:
            raise CodecError(f"codec 'ssn': k={self.rank} is above the model's width {width}; lower k")

    def wire_width(self, width: int) -> int:
        del width
        return self.rank

    def tokens(self, context: StageContext, table_VD: Tensor | None) -> nn.Module | None:
        del context
        return None if table_VD is None else Anchors(weight=None, projection=None, table=table_VD)

    def last_layers(self, width: int) -> int:
        return max(self.free, super().last_layers(width))

    def check_layers(self, layers: Sequence[int]) -> None:
        if self.free > layers[-1]:
            raise CodecError(
                f"codec 'ssn': free={self.free} layers, but the last stage has {layers[-1]} of {sum(layers)}; "
                f"lower free to {layers[-1]}"
            )

    def shrunk(self, width: int) -> Codec:
        return SsnCodec(k=max(1, width // 4), free=self.free, table=self.table_scale, spend=self.spend)

    def frozen(self, context: StageContext) -> Tensor:
        return self._subspace(context)

    def constrain(self, parts: StageParts, context: StageContext) -> None:
        """Raises CodecError for a layer in which no writer is found."""
        u_DK = self._subspace(context)
        first_free = parts.all_layers - self.free
        if parts.embedding is not None:
            embedding = parts.model.get_submodule(parts.embedding)
            if type(embedding) is not nn.Embedding:
                raise CodecError(
                    f"codec 'ssn': the embedding is a {type(embedding).__name__}, which does more than look up rows; "
                    "choose a decoder such as llama or qwen3, or codec 'mapl'"
                )
            parts.model.set_submodule(parts.embedding, SubspaceEmbedding(embedding, u_DK))
        for number, path in parts.layers.items():
            if number < first_free:
                self._constrain_layer(parts.model, number, path, u_DK, context)

    def _constrain_layer(self, model: nn.Module, number: int, path: str, u_DK: Tensor, context: StageContext) -> None:
        found = [
            (f"{path}.{name}", module)
            for name, module in model.get_submodule(path).named_modules()
            if name.rpartition(".")[2] in ATTENTION_WRITERS + FFN_WRITERS
            and isinstance(module, nn.Linear)
            and module.out_features == context.width
        ]
        if len(found) != 2:
            names = ", ".join(name for name, _ in found) or "none"
            raise CodecError(
                f"codec 'ssn': layer {number} has to have two writers to the residual stream, an attention's and an "
                f"FFN's; found {names}; choose a decoder such as llama or qwen3, or codec 'mapl'"
            )
        saved = sum(writer.in_features for _, writer in found) * (context.width - self.rank)
        for name, writer in found:
            if self.spend == "ffn" and name.rpartition(".")[2] in FFN_WRITERS:
                writer = self._widened(model, name, writer, saved, number, context)
            model.set_submodule(name, SubspaceLinear(writer, u_DK))

    def _widened(
        self, model: nn.Module, name: str, writer: nn.Linear, saved: int, number: int, context: StageContext
    ) -> nn.Linear:
        """The FFN of this writer gets as many more units as `saved` numbers pay for; returns its writer, widened."""
        ffn, before = name.rpartition(".")[0], writer.in_features
        readers = [
            (f"{ffn}.{child}", module)
            for child, module in model.get_submodule(ffn).named_children()
            if isinstance(module, nn.Linear) and module is not writer and module.out_features == before
        ]
        more = saved // (len(readers) * context.width + self.rank) // _MULTIPLE * _MULTIPLE
        for path, reader in readers:
            own = f"{number} {path.rpartition('.')[2]}"  # a name in the whole model
            model.set_submodule(path, _with_more(reader, own, context.seed, rows=more))
        return _with_more(writer, f"{number} {name.rpartition('.')[2]}", context.seed, columns=more)

    def unconstrained(self, weights: dict[str, Tensor], context: StageContext) -> dict[str, Tensor]:
        """W = U W_z, b = U b_z, and E Uᵀ for the embedding. With `spend=ffn` layers have FFNs of two widths."""
        u_DK = self._subspace(context).to(torch.float64)  # one rounding, at the end
        found: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            owner, inner, kind = name.rpartition(".inner.")
            if not inner:
                found[name] = tensor
                continue
            wide = tensor.to(torch.float64)
            writer = owner.rpartition(".")[2] in ATTENTION_WRITERS + FFN_WRITERS
            found[f"{owner}.{kind}"] = (u_DK @ wide if writer else wide @ u_DK.mT).to(tensor.dtype)
        return found

    def boundary_function(
        self, *, table: Tensor | None, sender: Mapping[str, Tensor], receiver: Mapping[str, Tensor]
    ) -> None:
        """Nothing that reaches a boundary is lost there but by rounding."""
        del table, sender, receiver

    def lost(self, hidden_BTD: Tensor, known_BTD: Tensor | None, context: StageContext) -> float:
        u_DK = self._subspace(context)
        x_BTD = hidden_BTD if known_BTD is None else hidden_BTD - known_BTD
        return float((x_BTD - x_BTD @ u_DK @ u_DK.mT).norm() / hidden_BTD.norm())

    def _subspace(self, context: StageContext | BoundaryContext) -> Tensor:
        u_DK = exact_orthonormal(context.seed, _STREAM, context.width, self.rank)
        return u_DK.to(device=context.device, dtype=context.dtype)

    def encoder(self, context: BoundaryContext) -> Encoder:
        return SsnEncoder(context, self._subspace(context))

    def decoder(self, context: BoundaryContext) -> Decoder:
        return SsnDecoder(context, self._subspace(context))


def _with_more(linear: nn.Linear, name: str, seed: int, *, rows: int = 0, columns: int = 0) -> nn.Linear:
    """A linear map with so many more outputs or inputs, drawn like its own, by (seed, name)."""
    old = linear.weight.detach()
    shape = (rows or old.shape[0], columns or old.shape[1])
    stream = int.from_bytes(hashlib.sha256(f"ssn {name}".encode()).digest()[:8], "little")
    drawn = torch.from_numpy(integers(seed, stream, 0, *shape) * UNIT).to(old) * old.std()
    wider = nn.Linear(old.shape[1] + columns, old.shape[0] + rows, bias=linear.bias is not None, device="meta")
    wider.weight = nn.Parameter(torch.cat([old, drawn], dim=1 if columns else 0))
    if linear.bias is not None:
        bias = linear.bias.detach()
        wider.bias = nn.Parameter(torch.cat([bias, bias.new_zeros(rows)]))
    return wider
