"""What a node gives the other chunks of its sequences in each layer, and takes from them: packed, sent, added up.

A part is a wire tensor z and a few exact numbers s for each sequence (compress/context_method.py). All who look at a
segment get the same bytes. What comes back for it is a gradient from each of them, added in the order of lanes; so
nothing depends on who was first.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...compress.byte_format import CodecError, Direction, Key, Payload
from ...compress.context_method import ContextMethod, ContextShape
from ...compress.registry import parse_format
from .chunk_layout import ChunkLayout
from .exchange import ContextKey, ContextTransport

AS_IT_IS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
EVALUATION_MICROBATCH_OFFSET = 2**31  # as at boundaries: an evaluation has random numbers of its own
_PLACE = 2**48  # beyond all boundaries and rounds: layers have random numbers of their own
_SEGMENTS = 2**8  # of a sequence, at most

Part = tuple[Tensor, Tensor]  # z, s


class ContextCoder:
    """Parts of one layer as bytes. dtype: in which the stage computes; seed: of the node that packs."""

    def __init__(
        self, method: ContextMethod, shape: ContextShape, *, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._method, self._shape, self._batch = method, shape, batch
        self._dtype, self._device = dtype, device
        self._s_shape = (batch, method.scalars(shape))
        self._s_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        self._formats = {
            gradient: parse_format(spec or AS_IT_IS[dtype])
            for gradient, spec in ((False, method.format), (True, method.backward))
        }

    def _z_shape(self, key: ContextKey) -> tuple[int, int, int]:
        return (self._batch, self._shape.segment_length, self._method.width_at(key.step, self._shape))

    def body_bytes(self, key: ContextKey) -> int:
        """Exact length of that part."""
        return self._formats[key.gradient].body_bytes(self._z_shape(key)) + self._s_bytes

    @property
    def _s_bytes(self) -> int:
        return self._s_shape[0] * self._s_shape[1] * self._s_dtype.itemsize

    def pack(self, key: ContextKey, seed: int, part: Part) -> bytes:
        """Raises CodecError for what is not finite."""
        z, s = part
        fmt = self._formats[key.gradient]
        body = (fmt.pack_training if not key.evaluation else fmt.pack)(z, _key(key, seed)).body
        return bytes(body) + s.to(self._s_dtype).cpu().contiguous().numpy().tobytes()

    def unpack(self, key: ContextKey, seed: int, body: bytes | memoryview, *, lane: int) -> Part:
        """What `pack` was given, of the node in `lane` that has this `seed`. Raises CodecError, which names it."""
        fmt, wanted = self._formats[key.gradient], self.body_bytes(key)
        if len(body) != wanted:
            raise CodecError(f"lane {lane}: {key} is {len(body)} bytes, {wanted} were agreed")
        cut = wanted - self._s_bytes
        shape = self._z_shape(key)
        payload = Payload(codec=fmt.id, header={"shape": list(shape)}, body=memoryview(body)[:cut])
        try:
            z = fmt.unpack(payload, shape=shape, dtype=self._dtype, device=self._device, key=_key(key, seed))
        except CodecError as error:
            raise CodecError(f"lane {lane}: {key}: {error}") from None
        numbers = np.frombuffer(body, np.float64 if self._s_dtype is torch.float64 else np.float32, offset=cut)
        if not np.isfinite(numbers).all():
            raise CodecError(f"lane {lane}: {key}: a number beside it is not finite")
        return z, torch.from_numpy(numbers.reshape(self._s_shape).copy()).to(self._device)


def _key(key: ContextKey, seed: int) -> Key:
    """Of its own for each layer and segment, of training and of evaluation, and of each node by its seed."""
    return Key(
        seed=seed,
        boundary=_PLACE + key.layer * _SEGMENTS + key.segment,
        direction=Direction.BACKWARD if key.gradient else Direction.FORWARD,
        step=key.step,
        microbatch=key.microbatch + EVALUATION_MICROBATCH_OFFSET * key.evaluation,
    )


class ContextExchange:
    """The exchange of one node. seeds: of each lane's random numbers, in order; coders: by layer."""

    def __init__(
        self,
        layout: ChunkLayout,
        lane: int,
        transport: ContextTransport,
        coders: dict[int, ContextCoder],
        seeds: list[int],
    ) -> None:
        self.layout, self.lane = layout, lane
        self._transport, self._coders, self._seeds = transport, coders, seeds

    def give(self, key: ContextKey, part: Part) -> None:
        """This node's part of one of its segments, to all who look at it."""
        users = self.layout.users(key.segment)
        body = self._pack(key, part) if users else b""
        for lane in users:
            self._transport.send(lane, key, body)

    def take(self, key: ContextKey) -> Part:
        """That of a segment of another node."""
        return self._take(self.layout.owner(key.segment), key)

    def give_gradient(self, key: ContextKey, part: Part) -> None:
        """What comes back for a part that was taken, to whose it is."""
        self._transport.send(self.layout.owner(key.segment), key, self._pack(key, part))

    def take_gradients(self, key: ContextKey) -> Part | None:
        """The sum of what comes back for a part that was given, in lane order; None where nobody looks at it."""
        total: Part | None = None
        for lane in self.layout.users(key.segment):
            dz, ds = self._take(lane, key)
            total = (dz, ds) if total is None else (total[0] + dz, total[1] + ds)
        return total

    def _pack(self, key: ContextKey, part: Part) -> bytes:
        return self._coders[key.layer].pack(key, self._seeds[self.lane], part)

    def _take(self, lane: int, key: ContextKey) -> Part:
        body = self._transport.receive(lane, key)
        return self._coders[key.layer].unpack(key, self._seeds[lane], body, lane=lane)
