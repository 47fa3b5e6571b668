"""What byte formats lose of the numbers that training really sends: share of the energy, by direction and boundary.

    .venv/bin/python benchmarks/coding_error.py --step 100 int4 int4:centre=true rvq:groups=2,levels=3,scale=log4

Trains `mapl` with context at the settings of `quality.py --preset compute-optimal` (int4 down, int3 up) on the standard
library's source, keeps what is packed in the ten steps from `--step` on, four microbatches each, and codes it with each
format: codebooks learn from all tensors but the last, which is what the figures are of. Prints a Markdown table. So
formats are held beside each other on the same numbers; that one loses less of them does not say that it trains better
(docs/results/loss.md).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from described import described
from quality import PRESETS
from thinpipe.compress.byte_format import ByteFormat, Direction, Key, Payload
from thinpipe.compress.integer_formats import Int3, Int4
from thinpipe.compress.registry import parse_format
from thinpipe.node.config_file import merge, parse_config, parse_override
from thinpipe.node.local import run_local
from torch import Tensor

STEPS, MICROBATCHES = 10, 4  # that are kept
CODEC = "mapl:r=16,context=4"


def gathered(step: int) -> dict[Key, Tensor]:
    """What a run packs from `step` on, by the key of each tensor."""
    found: dict[Key, Tensor] = {}
    settings = dict(map(parse_override, PRESETS["compute-optimal"][0]))
    settings |= {"codec.codec": CODEC, "codec.forward": "int4", "codec.backward": "int3"}
    settings |= {"optim.muon_lr": 0.01, "optim.adamw_lr": 0.02}
    settings |= {"run.steps": step + STEPS, "run.eval_every": 0, "data.heldout_sequences": 8}
    for cls in (Int4, Int3):
        pack = cls.pack

        def keeping(self: ByteFormat, z: Tensor, key: Key, pack: Any = pack) -> Payload:
            if key.step >= step and key.microbatch < MICROBATCHES:
                found.setdefault(key, z.detach().to(torch.float32).clone())
            return pack(self, z, key)

        cls.pack = keeping  # pyright: ignore[reportAttributeAccessIssue]
    with tempfile.TemporaryDirectory() as directory:
        config = parse_config(merge({}, settings))
        run_local(config, Path(directory) / "run", one_process=True, overwrite=True, trace=False, quiet=True)
    return found


def lost(spec: str, tensors: list[tuple[Key, Tensor]]) -> tuple[float, float]:
    """Share of the last tensor's energy that coding loses, and its bytes a token."""
    fmt = parse_format(spec)
    learns = fmt.table(tensors[0][1].shape[-1]) is not None
    for key, z in tensors[:-1] if learns else ():
        if not fmt.has_started:
            fmt.learn(z, key)
        fmt.use_table(fmt.master)
        fmt.pack(z, key)
        fmt.learn(z, key)
    key, z = tensors[-1]
    if learns:
        fmt.use_table(fmt.master)
    payload = fmt.pack(z, key)
    arrived = fmt.unpack(payload, shape=tuple(z.shape), dtype=torch.float32, key=key)
    return ((arrived - z).square().sum() / z.square().sum()).item(), len(payload.body) / (z.numel() // z.shape[-1])


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("formats", nargs="+", metavar="FORMAT")
    parser.add_argument("--step", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = gathered(given.step)
    print("| format | bytes a token | activations, by boundary | gradients |\n|---|---|---|---|")
    for spec in given.formats:
        cells: list[str] = []
        size = 0.0
        for direction in Direction:
            shares = []
            for boundary in sorted({key.boundary for key in found}):
                of = [(k, z) for k, z in found.items() if (k.boundary, k.direction) == (boundary, direction)]
                share, size = lost(spec, sorted(of, key=lambda each: (each[0].step, each[0].microbatch)))
                shares.append(f"{share:.3f}")
            cells.append(", ".join(shares))
        print(f"| `{spec}` | {size:.1f} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
