"""Optimizer settings that suit a codec: names and numbers, which whoever trains may take or leave.

The learning rate decides more than the codec does: at dense training's rates `mapl` ends 6 % above its own best loss
(docs/results/short-runs.md, "Learning rates, swept alike"). So a codec says which rates it was found to train best
with, and a setting that the user left alone takes its value from here (`node.config`). What the user sets always wins.

Why a module of its own, without torch: every process that reads a run's settings asks, and some of them (a supervisor,
a place to meet) stay for days and have no other use for torch. Why not options of the codec: the rates are the
optimizer's, are reported as such, and belong to the digest that neighbours compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

OptimizerSetting = Literal["muon_lr", "adamw_lr"]  # what a codec may have a say in; a run's settings have these names
Recommended = Mapping[OptimizerSetting, float]

NOTHING: Recommended = MappingProxyType({})
_BY_CODEC: Mapping[str, Recommended] = MappingProxyType(
    {"mapl": MappingProxyType({"muon_lr": 0.01, "adamw_lr": 0.02})},
)


def codec_name(spec: str) -> str:
    """`mapl` of `mapl:r=64,anchors=factorized`."""
    return spec.partition(":")[0].strip()


def recommended_for(spec: str) -> Recommended:
    """What the codec of this spec recommends; nothing for byte formats alone, and for names that are not known, which
    are refused elsewhere (`registry.parse_codec`)."""
    return _BY_CODEC.get(codec_name(spec), NOTHING)
