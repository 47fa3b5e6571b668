"""What a codec may change of a stage's model before its optimizer is made, and what it says of a boundary then.

Some methods need a model whose hidden states can cross a narrow boundary without loss, and so live in the model as well
as on the wire (`compress.ssn`). They get the model as torch modules and the places of its parts, and know nothing of
architectures or of how a stage was built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParts:
    """A stage's model and where its parts are, as paths for `get_submodule`."""

    model: nn.Module
    embedding: str | None  # on the first stage only
    layers: Mapping[int, str]  # by their number in the whole model
    all_layers: int  # of the whole model
