"""How fast this machine computes a model's own shapes: one layer, the final norm and the head, forward and backward.

What it gives, in operations a second (`node.stage_costs`), is what `pipeline.speeds` wants from each machine. The usual
alternative, a product of two large matrices, is kinder to some machines than to others: narrow matrices, attention and
the loss take time that it does not show.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..config import RunConfig
from ..model import ModelError, build_stage
from ..model.architecture import first_line
from ..model.slices import describe
from ..stage import DTYPES
from ..stage_costs import model_operations

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def machine_speed(config: RunConfig, architecture: PretrainedConfig, *, seconds: float = 1.0) -> float:
    """Operations a second, on the run's device and in its dtype, with one thread as in a node. Takes `seconds` and what
    two passes take. Raises ModelError, also for a model that cannot be computed here."""
    try:
        return _measured(config, architecture, seconds)
    except ModelError:
        raise
    except Exception as error:  # of whatever model, in whatever memory
        fault = f"a layer and the head of {describe(architecture)} do not compute: {first_line(error)}"
        raise ModelError(f"{fault}; choose another model, or a machine with more memory") from error


def _measured(config: RunConfig, architecture: PretrainedConfig, seconds: float) -> float:
    device, dtype = torch.device(config.compute.device), DTYPES[config.compute.dtype]
    last = architecture.num_hidden_layers
    model = build_stage(
        architecture, stage=1, stages=2, seed=1, dtype=dtype, device=device, layers=range(last - 1, last)
    )
    shape = (config.microbatch_size, config.data.sequence_length)
    entering_BTD = torch.randn(*shape, model.width, device=device, dtype=next(model.parameters()).dtype)
    wanted_N = torch.zeros(shape[0] * shape[1], dtype=torch.int64, device=device)

    def passes(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
                logits_BTV = model(entering_BTD.detach().requires_grad_())
                loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), wanted_N, reduction="sum")
            loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    passes(1)  # warms up
    count = max(1, round(seconds / passes(1)))
    costs = model_operations(config, architecture)
    done = 3 * (costs.layer + costs.head) * len(wanted_N) * count  # backward is twice forward
    return done / passes(count)
