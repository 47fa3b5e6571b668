"""A run's own stages in one process, one behind the other, as one model.

They are the stages that trained, restored from their checkpoints, boundaries and all: what is measured here is the
function that was trained. Between two stages lies what the wire does, or nothing: packed and unpacked as in the run's
own evaluation, z is rounded to a few bits; handed on as it is, it is not. The first gives, on the run's held-out text,
the bits of the loss that the run wrote down.

Why not the export, which computes the same without rounding: it knows no byte formats, and the two are a check of each
other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ...protocol.messages import Kind
from ..boundary.endpoints import Encoded, ReceivedTensor
from ..checkpoints.assemble import Assembled
from ..checkpoints.plain_projections import on_one_node
from ..export.export import usable_device
from ..stage import Stage

if TYPE_CHECKING:
    from ..config import RunConfig

LARGEST_CONTEXT = 2**20  # of architectures that name none


class Chain:
    """The stages of an assembled run, or of one of its lanes. A `Subject` without rounding; `rounded_logits` are with
    it."""

    def __init__(self, found: Assembled, tokenizer: Tokenizer, *, begin_id: int, lane: int = 0) -> None:
        torch.set_num_threads(1)
        found = on_one_node(found)
        config = _untaught(found.config)
        self.stages = [Stage(config, found.architecture, index, lane) for index in range(config.pipeline.stages)]
        for stage, snapshot in zip(self.stages, found.snapshots, strict=True):
            stage.restore(snapshot)
        self.silent = [  # boundaries that a conversion made, over which nothing was sent yet
            stage.index
            for stage, snapshot in zip(self.stages[:-1], found.snapshots, strict=False)
            if any(held["version"] is None for name, held in snapshot.dictionaries.items() if name.endswith("_below"))
        ]
        for boundary in self.silent:
            if (table := found.boundaries[boundary].table) is not None:  # what will be sent first
                self.stages[boundary].sender.use_table(table.clone())
                self.stages[boundary + 1].receiver.use_table(table.clone())
        self.config = config
        self.tokenizer, self.begin_id = tokenizer, begin_id
        self.context: int = getattr(found.architecture, "max_position_embeddings", None) or LARGEST_CONTEXT
        self.ids: int = found.architecture.vocab_size
        self._step = found.completed - 1  # at which the run itself would have evaluated this state

    def logits(self, ids_BT: Tensor) -> Tensor:
        ids_BT = ids_BT.to(self.stages[0].device)
        received: ReceivedTensor | None = None
        for stage in self.stages[:-1]:
            out = stage.infer(ids_BT, received)
            assert isinstance(out, Encoded)
            received = ReceivedTensor(z_BTW=out.z_BTW)
        return _of_last(self.stages[-1].infer(ids_BT, received))

    def rounded_logits(self, ids_BS: np.ndarray, microbatch: int) -> Tensor:
        """Of a whole microbatch (B, T+1) of the run, whose last column is a target only, as its messages round it.
        microbatch: its number, from which random rounding follows."""
        received: ReceivedTensor | None = None
        for above, below in zip(self.stages[:-1], self.stages[1:], strict=True):
            assert above.downstream_endpoint
            assert below.upstream_endpoint
            out = above.infer(_inputs(ids_BS).to(above.device), received)
            assert isinstance(out, Encoded)
            message = above.downstream_endpoint.pack_activation(out, ids_BS, self._step, microbatch, Kind.EVALUATION)
            ids_BS, received = below.upstream_endpoint.unpack_activation(message)
        last = self.stages[-1]
        return _of_last(last.infer(_inputs(ids_BS).to(last.device), received))


def _untaught(config: RunConfig) -> RunConfig:
    """Weights and codecs come from the checkpoints, so what the run began with need not be there any more; nor need the
    run's device and compiler."""
    compute = {"device": str(usable_device(config)), "compile": False, "activation_checkpointing": False}
    changed = {
        "model": config.model.model_copy(update={"pretrained": False}),
        "compute": config.compute.model_copy(update=compute),
        "run": config.run.model_copy(update={"origin_codec": ""}),
    }
    return config.model_copy(update=changed)


def _inputs(ids_BS: np.ndarray) -> Tensor:
    return torch.from_numpy(ids_BS.astype(np.int64))[:, :-1]


def _of_last(out: Encoded | Tensor) -> Tensor:
    assert isinstance(out, Tensor)
    return out.cpu()
