"""Shared fixtures: a small corpus that is tokenised once a session, settings that train on it in milliseconds, and
whether the kernel caps links here."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .real_up import Up, started
from .tiers import check_alone, long_files_first, split_tiers

if TYPE_CHECKING:
    from thinpipe.node.config import RunConfig

# Before torch is imported, as the command line has it. Workers are as many as cores: threads beside them would spin.
for _name, _value in {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}.items():
    os.environ.setdefault(_name, _value)

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "node",
    "link",
    "wire",
    "stage",
    "token",
    "layer",
    "loss",
    "step",
    "rate",
    "bytes",
    "codec",
    "generation",
]

# A swarm of processes on these starts in the time of its imports; a step takes about 30 ms.
TINY: dict[str, Any] = {
    "run.steps": 3,
    "model.width": 64,
    "model.layers": 4,
    "model.vocab_size": 512,
    "data.sequence_length": 32,
    "data.heldout_sequences": 8,
    "pipeline.batch_size": 8,
    "pipeline.microbatches": 4,
    # Stated, so that neither another default nor what a codec recommends makes these other runs.
    "codec.codec": "bf16",
    "optim.muon_lr": 0.02,
    "optim.adamw_lr": 0.005,
}

TinyConfig = Callable[..., "RunConfig"]


@pytest.hookimpl(tryfirst=True)  # before `-m` looks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    check_alone(items)
    split_tiers(items)
    long_files_first(items)


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 300 KB of text, the same in every session."""
    draw = random.Random(7)
    lines = []
    for _ in range(6000):
        a, b, c = (draw.choice(WORDS) for _ in range(3))
        lines.append(f"def {a}_{b}(x{draw.randrange(20)}):\n    return {c}(x, {draw.randrange(100)}) + {b}\n")
    path = tmp_path_factory.mktemp("text") / "tiny.py.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_settings(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`section.key` -> value of a run that trains in milliseconds; its corpus is tokenised and in the cache."""
    from thinpipe.node.config_file import merge, parse_config
    from thinpipe.node.preparation import prepare_corpus

    cache = tmp_path_factory.mktemp("cache")
    settings = {**TINY, "data.source": str(tiny_text), "data.cache": str(cache)}
    prepare_corpus(parse_config(merge({}, settings)))
    return settings


@pytest.fixture(scope="session")
def tiny(tiny_settings: dict[str, Any]) -> TinyConfig:
    """`tiny({"pipeline.stages": 2, ...})`: the tiny run with these settings laid over it."""
    from thinpipe.node.config_file import merge, parse_config

    def make(overrides: dict[str, Any] | None = None) -> RunConfig:
        return parse_config(merge({}, {**tiny_settings, **(overrides or {})}))

    return make


@pytest.fixture
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`thinpipe up` with these options, as a process."""
    yield from started(tmp_path_factory.mktemp("up"))


@pytest.fixture(scope="session")
def odd_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder as large as the tiny run's that can be built and not computed: 3 heads of keys do not divide 4."""
    import transformers

    directory = tmp_path_factory.mktemp("odd-heads")
    config = transformers.LlamaConfig(
        vocab_size=TINY["model.vocab_size"],
        hidden_size=TINY["model.width"],
        intermediate_size=48,
        num_hidden_layers=TINY["model.layers"],
        num_attention_heads=4,
        num_key_value_heads=3,
    )
    config.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def kernel_links() -> None:
    """Namespaces behind interfaces that the kernel caps. Skips, with the one line that says what this machine lacks."""
    from thinpipe.sim.links import netns
    from thinpipe.sim.links.tc import KernelLinkError

    try:
        netns.check()
    except KernelLinkError as error:
        pytest.skip(str(error))
