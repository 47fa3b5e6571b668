"""What splitting a backward costs: input gradient + weight gradient against the whole, and what waits in between.

    .venv/bin/python benchmarks/split.py [--preset tiny] [--tokens 1024] [--layers 0] [--autocast] [--recompute]
        [--head]

An interior stage with the preset's shape, or with `--head` the last one. Whole and split backwards take turns in one
process, so that whatever else the machine does meets both; medians of `--repeats`, CPU seconds of the one thread. Then
the MiB that a forward keeps (`kept`: saved tensors, parameters apart, copies in bfloat16 included) against what waits
between the two halves (`waits`).
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext

import torch
from described import described
from thinpipe.node.config_sections import ModelSection
from thinpipe.node.model import StageModel, build_stage, resolve_model
from torch import Tensor

VOCABULARY = 32768


def bytes_of(tensors: list[Tensor], without: set[int]) -> int:
    """Of their storages, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(nbytes for address, nbytes in storages.items() if address not in without)


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--tokens", type=int, default=1024, help="of one microbatch, in sequences of 512 at most")
    parser.add_argument("--layers", type=int, default=0, help="of the stage; 0: a quarter of the preset's")
    parser.add_argument("--autocast", action="store_true", help="compute in bfloat16")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--head", action="store_true", help=f"the last stage, {VOCABULARY:,} rows")
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    length = min(512, given.tokens)
    architecture = resolve_model(ModelSection(preset=given.preset), vocab_size=VOCABULARY, sequence_length=length)
    layers = given.layers or max(1, architecture.num_hidden_layers // 4)
    architecture.num_hidden_layers = 3 * layers

    def build(deferred: bool) -> StageModel:
        return build_stage(
            architecture,
            stage=2 if given.head else 1,
            stages=3,
            seed=1,
            dtype=torch.float32,
            device="cpu",
            activation_checkpointing=given.recompute,
            deferred=deferred,
        )

    whole, split = build(False), build(True)
    hidden_BTD = torch.randn(given.tokens // length, length, whole.width)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def forward(model: StageModel) -> Tensor:
        precision = torch.autocast("cpu", dtype=torch.bfloat16) if given.autocast else nullcontext()
        with precision:
            return model(hidden_BTD.detach().requires_grad_())

    times: dict[str, list[float]] = {"backward": [], "input gradient": [], "weight gradient": []}
    waits = 0
    assert split.deferral
    for _ in range(given.repeats + 1):
        y = forward(whole)
        dy = torch.randn_like(y)
        moments = [time.thread_time()]
        y.backward(dy)
        moments.append(time.thread_time())
        y = forward(split)
        moments.append(time.thread_time())
        with split.deferral.putting_aside() as owed:
            y.backward(dy)
        moments.append(time.thread_time())
        waits = owed.nbytes()
        owed.add_up()
        moments.append(time.thread_time())
        for name, start, end in zip(times, (0, 2, 3), (1, 3, 4), strict=True):
            times[name].append(moments[end] - moments[start])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(split)
    kept = bytes_of(saved, {p.untyped_storage().data_ptr() for p in split.parameters()})
    ms = {name: 1e3 * statistics.median(seconds[1:]) for name, seconds in times.items()}
    ratio = (ms["input gradient"] + ms["weight gradient"]) / ms["backward"]
    print("| shape | backward | input gradient | weight gradient | both / backward | kept | waits |")
    print("|---|---|---|---|---|---|---|")
    options = "".join(f", {name}" for name in ("autocast", "recompute", "head") if getattr(given, name))
    print(
        f"| `{given.preset}`, {layers} layers{options}",
        *(f"{each:.1f} ms" for each in ms.values()),
        f"{ratio:.3f}",
        f"{kept / 2**20:.1f} MiB",
        f"{waits / 2**20:.1f} MiB |",
        sep=" | ",
    )


if __name__ == "__main__":
    main()
