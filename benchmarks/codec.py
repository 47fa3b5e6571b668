"""What a codec costs in time: encode + pack + unpack + decode of both directions, as a share of the stage's compute.

    .venv/bin/python benchmarks/codec.py [--preset tiny] [--tokens 1024] [--device cpu] [--layers 4]
        [--codec "mapl:r=64 int4 int4"] [--autocast] [--json FILE]

One interior stage with the preset's shape and `--layers` of its layers (a quarter of the model by default, as in a
pipeline of four). Its own forward and backward are timed without codec; then each half of the codec with its backward,
and both byte formats, at both of its boundaries (codebooks learn from what they pack; their changes as messages are not
in it). One thread; the median of `--repeats`; the ratio is within one run.
The optimizers are timed apart, once a step of 16 microbatches: SPEL and the projector's messages beside Muon and AdamW.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from described import described
from thinpipe.compress.byte_format import Direction, Key
from thinpipe.compress.codec_interface import BoundaryContext, StageContext
from thinpipe.compress.registry import parse_codec
from thinpipe.node.config_sections import ModelSection
from thinpipe.node.model import build_stage, resolve_model
from torch import Tensor

MICROBATCHES = 16


def median_s(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return statistics.median(once() for _ in range(repeats))


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--tokens", type=int, default=1024, help="of one microbatch, in sequences of 512 at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=0, help="of the stage; 0: a quarter of the preset's")
    parser.add_argument("--codec", action="append", metavar="CODEC [FORWARD [BACKWARD]]")
    parser.add_argument("--autocast", action="store_true", help="the stage computes in bfloat16; the codec never does")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(given.device)
    length = min(512, given.tokens)
    architecture = resolve_model(ModelSection(preset=given.preset), vocab_size=4096, sequence_length=length)
    layers = given.layers or max(1, architecture.num_hidden_layers // 4)
    architecture.num_hidden_layers = 3 * layers  # the middle one of three stages
    model = build_stage(architecture, stage=1, stages=3, seed=1, dtype=torch.float32, device=device)
    shape = (given.tokens // length, length, model.width)
    hidden_BTD = torch.randn(shape, device=device)
    ids_BT = torch.randint(0, model.vocab_size, shape[:2], device=device)

    def compute() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=given.autocast):
            out_BTD = model(hidden_BTD.requires_grad_(True))
        out_BTD.to(hidden_BTD.dtype).backward(hidden_BTD.detach())

    stage_s = median_s(compute, given.repeats, device)
    where = f"{given.device}{', autocast to bfloat16' if given.autocast else ''}"
    print(f"{given.preset}: width {model.width}, {layers} layers, {given.tokens} tokens a microbatch, {where}")
    print(f"one forward and backward of the stage: {1e3 * stage_s:.1f} ms\n")
    print("| codec | encode + decode | pack + unpack | share of the stage's compute | learning, a step |")
    print("|---|---|---|---|---|")
    rows: list[dict[str, str | float]] = []
    for spec in given.codec or [
        "identity bf16 bf16",
        "identity int4 int4",
        "mapl:r=64,context=0 int4 int4",
        "mapl:r=64 int4 int4",
        "mapl:r=64",
    ]:
        in_graph_s, bytes_s, learn_s = cost(spec, hidden_BTD.detach(), ids_BT, model.vocab_size, given.repeats)
        share = (in_graph_s + bytes_s) / stage_s
        rows.append({"codec": spec, "in_graph_s": in_graph_s, "bytes_s": bytes_s, "learn_s": learn_s, "share": share})
        print(
            f"| `{spec}` | {1e3 * in_graph_s:.2f} ms | {1e3 * bytes_s:.2f} ms | {share:.1%} "
            f"| {learn_s / (MICROBATCHES * stage_s):.2%} of {MICROBATCHES} microbatches' compute |"
        )
    if given.json:
        given.json.write_text(json.dumps({"stage_s": stage_s, "tokens": given.tokens, "codecs": rows}, indent=2) + "\n")


def cost(spec: str, hidden_BTD: Tensor, ids_BT: Tensor, vocab_size: int, repeats: int) -> tuple[float, float, float]:
    """Seconds of one microbatch in the graph (forward and backward, both boundaries of an interior stage, that is one
    encode and one decode), of packing and unpacking both ways, and of a step of what the sender learns."""
    bundle, device, width = parse_codec(*spec.split()), hidden_BTD.device, hidden_BTD.shape[-1]
    stage = StageContext(seed=1, stage=1, width=width, vocab_size=vocab_size, device=device)
    table_VD = torch.randn(vocab_size, width, device=device) if bundle.codec.table_scale else None
    context = BoundaryContext(
        seed=1,
        boundary=1,
        width=width,
        vocab_size=vocab_size,
        device=device,
        tokens=bundle.codec.tokens(stage, table_VD),
    )
    sender, receiver = bundle.codec.encoder(context).to(device), bundle.codec.decoder(context).to(device)
    learned = bundle.codec.table(width) is not None
    if learned:
        sender.use_table(sender.master.clone())
        receiver.use_table(sender.master.clone())
    z_BTW = sender.encode(hidden_BTD, ids_BT).detach()

    keys = {direction: Key(seed=1, boundary=1, direction=direction, step=0, microbatch=0) for direction in Direction}
    with_books = [direction for direction in Direction if bundle.format(direction).table(z_BTW.shape[-1])]
    for direction in with_books:
        byte_format = bundle.format(direction)
        byte_format.learn(z_BTW, keys[direction])
        byte_format.use_table(byte_format.master.to(device))  # it is learned on the CPU

    def in_graph() -> None:
        sender.encode(hidden_BTD.requires_grad_(True), ids_BT).backward(z_BTW)
        receiver.decode(z_BTW.requires_grad_(True), ids_BT).backward(hidden_BTD.detach())

    def both_ways() -> None:
        for direction in Direction:
            byte_format, key = bundle.format(direction), keys[direction]
            payload = byte_format.pack(z_BTW, key)
            if direction in with_books:
                byte_format.learn(z_BTW, key)
            byte_format.unpack(payload, shape=tuple(z_BTW.shape), dtype=z_BTW.dtype, device=device, key=key)

    def learn() -> None:
        sender.encode(hidden_BTD[:1, :1], ids_BT[:1, :1]).sum().backward()
        sender.learn(sender.take_gradient(None), rate=0.02)

    return (
        median_s(in_graph, repeats, device),
        median_s(both_ways, repeats, device),
        median_s(learn, repeats, device) if learned else 0.0,
    )


if __name__ == "__main__":
    main()
