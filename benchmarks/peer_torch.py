"""One stage of the peer: torch.distributed.pipelining over gloo, bf16 on the wire. Started by peer.py, one a namespace.

    python benchmarks/peer_torch.py --config run.toml --stage 0 --master 10.77.0.1:29500 --out DIRECTORY

It reads the run.toml of a thinpipe run and does what that says as a user of torch would: `PipelineStage` around a
module, `Schedule1F1B`, `step`, the optimizer. The module is thinpipe's own stage (`node.model.build_stage`, the same
weights), so the arithmetic is equal; hidden states leave it as bf16 (fp32 if the codec is), and so do their gradients.
The loss is the sum over tokens, and thinpipe's own `StageOptimizer` divides and steps. With `compute.emulate` a stage
is a function that sleeps, forward and backward, on tensors of the exact shape. Every stage draws batches by itself
(torch sends no token ids); records are written as thinpipe's nodes write them: one line a step, after the optimizer.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from described import described
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import load_config
from thinpipe.node.measuring.emulated_machine import EmulatedMachine
from thinpipe.node.model import build_stage
from thinpipe.node.optim import StageOptimizer
from thinpipe.node.preparation import prepare_corpus, resolve_architecture
from thinpipe.node.run_records import Lap, MetricsWriter
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B


class Wired(nn.Module):
    """A stage of the model, fp32 inside, `wire` at its boundaries."""

    def __init__(self, model: Any, wire: torch.dtype) -> None:
        super().__init__()
        self.model, self.wire = model, wire

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x if self.model.first else x.float())
        return out if self.model.last else out.to(self.wire)


def pass_s(seconds: float) -> None:
    """As node.measuring.emulated_stage passes time: asleep, on this thread."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(left)


class Sleeps(torch.autograd.Function):
    """(x, weight) -> zeros of `shape`, after `forward_s`; its backward takes `backward_s` and gives zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: torch.Size, forward_s: float, backward_s: float) -> Tensor:
        ctx.like, ctx.backward_s = x, backward_s
        pass_s(forward_s)
        return weight.new_zeros(shape, dtype=torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        pass_s(ctx.backward_s)
        x = ctx.like
        return torch.zeros_like(x) if x.is_floating_point() else None, torch.zeros(1), None, None, None


class Emulated(nn.Module):
    """A stage that computes nothing and takes its time."""

    def __init__(self, shape: torch.Size, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.arguments = (shape, forward_s, backward_s)

    def forward(self, x: Tensor) -> Tensor:
        out = Sleeps.apply(x, self.weight, *self.arguments)
        assert isinstance(out, Tensor)
        return out


def summed_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")


def train(config: RunConfig, index: int, metrics: MetricsWriter) -> None:
    """All steps of stage `index`; the process group is there."""
    stages, parts = config.pipeline.stages, config.pipeline.microbatches
    architecture = resolve_architecture(config)
    corpus = prepare_corpus(config)
    first, last = index == 0, index == stages - 1
    ids = torch.zeros(config.microbatch_size, config.data.sequence_length, dtype=torch.int64)
    wire = torch.float32 if config.codec.codec == "fp32" else torch.bfloat16
    hidden = torch.zeros(*ids.shape, architecture.hidden_size, dtype=wire)
    if config.compute.emulate:
        times = EmulatedMachine.parse(config.compute.emulate).times(config, architecture)[index]
        out = hidden[..., :1].detach() if last else hidden  # nobody reads the last one's
        module: nn.Module = Emulated(out.shape, times.forward_s, times.backward_s)
        optimizer = None
    else:
        model = build_stage(
            architecture, stage=index, stages=stages, seed=config.run.seed, dtype=torch.float32, device="cpu"
        )
        out = ids.new_zeros(*ids.shape, architecture.vocab_size, dtype=torch.float32) if last else hidden
        module = Wired(model, wire)
        optimizer = StageOptimizer(model.full_names(), config.optim, total_steps=config.run.steps)
    hidden.requires_grad_()  # the stages agree beforehand on what gets a gradient
    x = ids if first else hidden
    stage = PipelineStage(module, index, stages, torch.device("cpu"), input_args=(x,), output_args=(out,))
    loss_fn = (lambda out, _: out.float().sum()) if config.compute.emulate else summed_loss
    schedule = Schedule1F1B(stage, parts, loss_fn=loss_fn, scale_grads=False)
    distributed.barrier()
    for step in range(config.run.steps):
        lap = Lap()
        batch = torch.cat(
            [
                torch.from_numpy(corpus.batch(step, part, microbatches=parts, batch_size=config.microbatch_size)).long()
                for part in range(parts)
            ]
        )
        losses: list[Tensor] = []
        inputs = (batch[:, :-1],) if first else ()
        more = {"target": batch[:, 1:], "losses": losses} if last else {}
        schedule.step(*inputs, return_outputs=False, **more)  # else it joins the logits of all microbatches, unread
        if optimizer:
            optimizer.step(step, config.tokens_per_step)
        loss = float(sum(losses)) / config.tokens_per_step if last else None
        metrics.write("step", step=step, loss=loss, tokens=config.tokens_per_step, seconds=lap.seconds, cpu_s=lap.cpu_s)
    distributed.barrier()


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--master", required=True, help="host:port of stage 0")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    config = load_config(given.config)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://{given.master}", rank=given.stage, world_size=config.pipeline.stages
    )
    metrics = MetricsWriter(given.out / f"stage-{given.stage}.jsonl")
    try:
        train(config, given.stage, metrics)
    finally:
        metrics.close()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
