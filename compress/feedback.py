"""Error feedback: what rounding or dropping took from one tensor is added to the next one before it is packed.

An option of the formats that lose something in every message, `feedback=true`. A training tensor z is packed as
z + e; then e becomes z + e less what the other end unpacks. So the sum of all that arrived differs from the sum of all
that was sent by one e, however many tensors there were (Seide et al., Interspeech 2014; Karimireddy et al., arXiv
1901.09847). Between the stages of a pipeline this is the lazy error propagation of Optimus-CC (arXiv 2301.09830): the
next tensor is that of another microbatch, and the weights' gradient is a sum over microbatches, so what one of them
lacks the next one brings. It is meant for gradients. Activations of other tokens have no use for what was lost here; as
a format of activations it is taken, and is an experiment.

Nothing that was lost may grow: coding has to leave less than it was given. Rounding to nearest and keeping the largest
do; stochastic rounding to few codes does not (of int2 it leaves more than all), and needs no feedback, as it has no
bias. So with feedback both directions are rounded to nearest.

Whoever packs has the state, a float32 tensor as large as one microbatch's. It is a part of the node's checkpoint, and
is carried over from the last microbatch of a step to the first of the next. Tensors of an evaluation are packed without
it and leave it alone.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .byte_format import ByteFormat, CodecError, Key, Payload, is_finite


class Feedback(ByteFormat):
    """A format that may carry its error: `feedback` says whether it does."""

    feedback: bool = False
    _error: Tensor | None = None  # replaced and never changed

    @property
    def remembers(self) -> bool:
        return self.feedback

    def pack_training(self, z: Tensor, key: Key) -> Payload:
        if not self.feedback:
            return self.pack(z, key)
        shape, wanted = tuple(z.shape), z.detach().to(torch.float32)
        if self._error is not None:
            if self._error.shape != shape:
                raise CodecError(
                    f"format '{self.id}' with feedback=true carries an error of {list(self._error.shape)} to a tensor "
                    f"of {list(shape)}; give all tensors of training one shape"
                )
            wanted = wanted + self._error.to(wanted.device)
        payload = self.pack(wanted, key)
        arrived = self.unpack(payload, shape=shape, dtype=torch.float32, device=wanted.device, key=key)
        self._error = wanted - arrived
        return payload

    def state_tensors(self) -> dict[str, Tensor]:
        return {} if self._error is None else {"error": self._error}

    def state_layout(self, shape: tuple[int, ...], completed: int) -> dict[str, Tensor]:
        started = self.feedback and completed > 0
        return {"error": torch.empty(shape, dtype=torch.float32, device="meta")} if started else {}

    def check_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        if not self.feedback or not state:
            super().check_state_tensors(state)
            return
        if list(state) != ["error"] or state["error"].dtype != torch.float32:
            raise CodecError(
                f"format '{self.id}' has the state 'error' in float32, but was given {reprlib.repr(sorted(state))}"
            )
        if not is_finite(state["error"]):
            raise CodecError(f"format '{self.id}': the error that it carried is not finite")

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        self.check_state_tensors(state)
        self._error = state["error"].clone() if state else None
