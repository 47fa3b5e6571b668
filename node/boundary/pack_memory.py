"""What a byte format without a table remembers of what it packed, as a part of the packing node's state.

The node that packs has it alone: the other end needs nothing of it, so there is no dictionary and no version.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...compress.byte_format import ByteFormat


class PackMemory:
    """That of the format of one direction, whose tensors of training have the shape `z_shape`."""

    def __init__(self, fmt: ByteFormat, z_shape: tuple[int, ...]) -> None:
        self._format, self._shape = fmt, z_shape

    def state_tensors(self) -> dict[str, Tensor]:
        """As it is now; nothing is packed ahead of the step under way."""
        return self._format.state_tensors()

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        """What `state_tensors` has after `completed` steps, as meta tensors."""
        return self._format.state_layout(self._shape, completed)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises CodecError for what `state_tensors` cannot have returned; changes nothing."""
        self._format.check_state_tensors(tensors)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state_tensors`, which fit `state_layout`."""
        self._format.load_state_tensors(tensors)
