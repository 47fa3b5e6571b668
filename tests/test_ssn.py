"""Subspace Networks: nothing is lost at a boundary, the swarm is one process, and one graph without boundaries."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from thinpipe.compress.exact_orthonormal import exact_orthonormal
from thinpipe.compress.registry import parse_codec
from thinpipe.compress.ssn import SsnCodec, SubspaceLinear
from thinpipe.node.config import RunConfig
from thinpipe.node.constrained_stage import check_architecture
from thinpipe.node.local import run_local
from thinpipe.node.model import ModelError
from thinpipe.node.preparation import ConfigError, prepare, prepare_corpus
from thinpipe.node.stage import Stage
from thinpipe.node.stage_codec import stage_context
from thinpipe.sim.reports.summary import read_records
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from . import textbook
from .conftest import TinyConfig
from .float64 import assert_clipped_now_and_then, batches_of, recipe_of, settings
from .in_memory import read_outcome, run_in_memory, run_reference
from .preloaded import forks
from .test_float64_parity import TOLERANCE, norm_in_float64, plain_model, relative
from .test_float64_parity import stage_of as group_of
from .test_model import EXACT

VARIANTS = {
    "as it comes": ("ssn:k=8", {}),
    "four stages, no table": ("ssn:k=8,table=0", {"pipeline.stages": 4, "model.layers": 4}),
    "all layers, more units": ("ssn:k=8,free=0,spend=ffn", {"codec.forward": "int8"}),
    "autocast": ("ssn:k=8", {"compute.dtype": "bfloat16", "pipeline.schedule": "gpipe"}),
    "split backward": ("ssn:k=8", {"pipeline.schedule": "zb", "codec.forward": "rvq:groups=2,codes=16"}),
    "recomputed": ("ssn:k=8", {"compute.activation_checkpointing": True}),
}


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1), (3, 2), (24, 24), (130, 17)])
def test_the_subspace_is_orthonormal_and_mixed(rows: int, columns: int) -> None:
    u = exact_orthonormal(3, 1, rows, columns)
    assert (u.mT @ u - torch.eye(columns, dtype=torch.float64)).abs().max() < 1e-14
    if rows > 100:
        assert (u.abs() < 0.6).all()
        assert (u**4).mean() * rows**2 == pytest.approx(3, rel=0.1)  # as of Gaussian numbers
        assert not torch.equal(u, exact_orthonormal(4, 1, rows, columns))


def test_the_subspace_has_the_same_bits_everywhere() -> None:
    """Fixed for good: nodes of two versions that differ here would refuse each other."""
    u = exact_orthonormal(5, 0x53534E, 5, 2)
    assert [x.hex() for x in u[:2].flatten().tolist()] == GOLDEN


GOLDEN = ["-0x1.052f4b9c4a652p-4", "-0x1.d5da1aada9a13p-1", "-0x1.590d6958847a8p-2", "0x1.ed9c1597cdc58p-3"]


def subspace_of(stage: Stage) -> Tensor | None:
    """Of a stage whose codec is ssn:k=8."""
    context = stage_context(stage.config, stage.index, stage.model, dtype=stage.dtype)
    return parse_codec("ssn:k=8").codec.frozen(context)


def test_neighbours_compare_the_subspace_where_there_is_no_table(tiny: TinyConfig) -> None:
    stage = prepare(tiny({"pipeline.stages": 2, "codec.codec": "ssn:k=8,table=0"}), 1)[0]
    u = subspace_of(stage)
    assert u is not None
    assert stage.token_table_digest == hashlib.sha256(u.numpy().tobytes()).hexdigest()


@pytest.mark.pairwise(2)
@pytest.mark.parametrize(("codec", "more"), VARIANTS.values(), ids=VARIANTS)
def test_a_swarm_is_one_process(codec: str, more: dict[str, Any], tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({"pipeline.stages": 2, "run.eval_every": 2, "codec.codec": codec, **more})
    assert run_in_memory(config, tmp_path / "swarm") == run_reference(config, tmp_path / "reference")


@pytest.mark.slow
def test_processes_are_one_process(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({"pipeline.stages": 4, "model.layers": 4, "codec.codec": "ssn:k=8"})
    run_local(config, tmp_path / "swarm", quiet=True, forks=forks())
    assert read_outcome(tmp_path / "swarm", 4) == run_reference(config, tmp_path / "reference")


@pytest.mark.parametrize(
    ("steps", "dtype"),
    [
        (30, "float32"),
        pytest.param(30, "bfloat16", marks=pytest.mark.slow),
        pytest.param(500, "float32", marks=pytest.mark.slow),
    ],
)
def test_what_crosses_stays_whole_while_it_trains(steps: int, dtype: str, tiny: TinyConfig, tmp_path: Path) -> None:
    more = {"run.steps": steps, "run.eval_every": 0, "pipeline.microbatches": 1, "compute.dtype": dtype}
    run_reference(tiny({"pipeline.stages": 2, "codec.codec": "ssn:k=8", **more}), tmp_path)
    records = [each for each in read_records(tmp_path / "stage-0.jsonl") if each["event"] == "step"]
    errors = [each["codec"]["boundary_error"] for each in records]
    assert len(errors) == steps
    assert 0 < max(errors) <= 1e-5
    assert records[-1]["loss"] < records[0]["loss"] - 0.2


def test_writers_are_what_dense_training_starts_from(tiny: TinyConfig) -> None:
    narrow, dense = (prepare(tiny({"pipeline.stages": 2, "codec.codec": codec}), 0)[0] for codec in ("ssn:k=8", "fp32"))
    u = subspace_of(narrow)
    assert u is not None
    whole = dict(dense.model.full_names())
    replaced = {name for name, _ in narrow.model.full_names() if ".inner." in name}
    assert replaced
    for name, parameter in narrow.model.full_names():
        was = whole[name.replace(".inner", "")]
        wanted = was if name not in replaced else was @ u if "embed" in name else u.mT @ was
        torch.testing.assert_close(parameter, wanted)


def test_what_is_saved_is_spent_on_the_ffn(tiny: TinyConfig) -> None:
    def numbers(codec: str) -> int:
        stage = prepare(tiny({"pipeline.stages": 2, "codec.codec": codec}), 0)[0]
        return sum(p.numel() for name, p in stage.model.full_names() if ".layers." in name)

    dense, saved, spent = map(numbers, ("fp32", "ssn:k=8", "ssn:k=8,spend=ffn"))
    assert saved < dense
    assert 0.97 * dense < spent <= dense


def test_free_layers_stay(tiny: TinyConfig) -> None:
    def constrained(stage: int, free: int) -> int:
        config = tiny({"pipeline.stages": 2, "model.layers": 4, "codec.codec": f"ssn:k=8,free={free}"})
        return sum(isinstance(module, SubspaceLinear) for module in prepare(config, stage)[0].model.modules())

    assert [constrained(0, 1), constrained(1, 0), constrained(1, 1), constrained(1, 2)] == [4, 4, 2, 0]


EVERY_LLAMA = ["llama", "qwen3", "mistral", "starcoder2"]


@pytest.mark.parametrize("name", [name for name in EVERY_LLAMA if name in EXACT])
def test_architectures_that_fit(name: str) -> None:
    check_architecture(SsnCodec(), EXACT[name](), seed=1)


@pytest.mark.parametrize("name", [name for name in ("gemma2", "gemma3", "olmo2") if name in EXACT])
def test_architectures_that_do_not_are_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=r"codec 'ssn'.*choose"):
        check_architecture(SsnCodec(), EXACT[name](), seed=1)


def test_a_norm_behind_a_branch_is_refused(tiny: TinyConfig, tmp_path: Path) -> None:
    transformers.Olmo2Config(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    ).to_json_file(tmp_path / "config.json")
    given = {"model.path": str(tmp_path), "model.width": None, "model.layers": None}
    with pytest.raises(ModelError, match=r"codec 'ssn': architecture 'olmo2' leads out of the subspace"):
        prepare(tiny({"pipeline.stages": 2, "codec.codec": "ssn:k=8", **given}), 0)


def test_weights_from_elsewhere_are_refused(tiny: TinyConfig, tmp_path: Path) -> None:
    given = {"model.path": str(tmp_path), "model.pretrained": True, "model.width": None, "model.layers": None}
    with pytest.raises(ConfigError, match=r"codec 'ssn' starts from weights of its own.*do not lie in its subspace"):
        prepare(tiny({"pipeline.stages": 2, "codec.codec": "ssn:k=8", **given}), 0)


# -- float64 ------------------------------------------------------------------------------------------------------


class Through(nn.Module):
    """x to U (W x)."""

    def __init__(self, inner: Any, u: Tensor) -> None:
        super().__init__()
        self.inner, self._u = inner, u

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self._u.T


class Embedded(Through):
    """The same of an embedding, and the token table."""

    def __init__(self, inner: Any, u: Tensor, table: Tensor) -> None:
        super().__init__(inner, u)
        self._table = table

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.embedding(x, self._table)


def without_boundaries(stages: Sequence[Stage], u: Tensor, free: int) -> Any:
    """The whole model with its writers replaced, and no boundary at all."""
    causal, k = plain_model("llama"), u.shape[1]
    table = stages[0].model.token_table_VD
    assert table is not None
    causal.model.embed_tokens = Embedded(nn.Embedding(512, k), u, table)
    for layer in causal.model.layers[: len(causal.model.layers) - free]:
        for owner, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            setattr(owner, name, Through(nn.Linear(getattr(owner, name).in_features, k, bias=False), u))
    causal.to(torch.float64)
    start = {name: p.detach().clone() for stage in stages for name, p in stage.model.full_names()}
    causal.load_state_dict(start, strict=True)
    return causal


@pytest.fixture
def in_float64(tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], RunConfig]:
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
    torch.set_num_threads(1)
    plain_model("llama").config.to_json_file(tmp_path / "config.json")

    def make(steps: int) -> RunConfig:
        return tiny(settings(tmp_path, steps) | {"optim.muon_lr": 0.002, "codec.codec": "ssn:k=8"})

    return make


@pytest.mark.parametrize("steps", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_it_is_one_model_without_boundaries(steps: int, in_float64: Callable[[int], RunConfig], tmp_path: Path) -> None:
    config = in_float64(steps)
    stages = [prepare(config, index)[0] for index in range(4)]
    u = subspace_of(stages[0])
    assert u is not None
    plain = without_boundaries(stages, u, free=1)
    got = run_in_memory(config, tmp_path / "run")
    losses, norms = textbook.train(plain, batches_of(config), recipe_of(config), group_of)
    assert_clipped_now_and_then(norms, config.optim.clip)
    heldout = torch.from_numpy(prepare_corpus(config).heldout_batch(0, config.data.heldout_sequences)).long()
    with torch.no_grad():
        val_loss = textbook.mean_loss(plain, heldout).item()
    weights = dict(plain.named_parameters())
    assert got.weights.keys() == weights.keys()
    errors = {
        "loss": relative(got.losses[0], losses),
        "val_loss": relative(got.val_losses[0], [val_loss]),
        "gradient norm": relative(got.grad_norms, [[of_step[index] for of_step in norms] for index in range(4)]),
        "weight": max(
            ((got.weights[name] - p).norm() / p.norm().clamp(min=1e-30)).item() for name, p in weights.items()
        ),
    }
    assert max(errors.values()) < TOLERANCE, errors
