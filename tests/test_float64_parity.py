"""Invariant 2: in float64 the pipeline is a plain Hugging Face model under a textbook's training loop, to 1e-8.

The swarm has four stages and four microbatches; the yardstick (`textbook`) has one model and one batch. Both start from
the same safetensors. The learning rate matters for what can be asked: five steep polynomials make Muon's update answer
a change of 1e-16 in the gradient with one of 1e-13, and training carries that on. Measured, worst gradient norm of 50
steps of Llama with the Polar Express: 1e-10 at 0.02, 6e-11 at 0.01, 3e-13 at 0.005. Worst weight of
Starcoder2 at 0.02, clipped at 0.5: 7e-9.

Llama's own norm rounds to float32 inside whatever its input is, so a difference of 1e-16 can become one of 6e-8 there.
Both sides therefore run it with a norm in float64; Starcoder2 (LayerNorm, biases) is float64 throughout as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from thinpipe.node.boundary.endpoints import UpstreamEndpoint
from thinpipe.node.config import RunConfig
from thinpipe.node.model import partition
from thinpipe.node.model.stage_cut import layer_ranges
from thinpipe.node.preparation import prepare_corpus
from thinpipe.node.stage import Stage
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from . import textbook
from .conftest import TinyConfig
from .corpora import byte_level, save
from .float64 import assert_clipped_now_and_then, batches_of, recipe_of, settings
from .in_memory import Outcome, run_in_memory, run_reference

TOLERANCE = 1e-8
STEPS, SOME_STEPS, FEW_STEPS, LAYERS, STAGES = 50, 12, 6, 4, 4

ARCHITECTURES = {"llama": transformers.LlamaConfig, "starcoder2": transformers.Starcoder2Config}

Configure = Callable[..., RunConfig]


def norm_in_float64(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def plain_model(architecture: str) -> Any:
    """The whole model in float64; all of its parameters, gains and biases too, are random."""
    config = ARCHITECTURES[architecture](
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(p + 0.1 * noise if p.ndim == 1 else 0.05 * noise)
    return model


@pytest.fixture
def configure(tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Settings of a run that starts from a plain model's weights."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
    torch.set_num_threads(1)

    def make(
        model: Any,
        directory: Path,
        *,
        steps: int,
        polynomials: str,
        schedule: str = "1f1b",
        cut: str = "equal",
        **more: Any,
    ) -> RunConfig:
        directory.mkdir()
        model.config.to_json_file(directory / "config.json")
        save_file(model.state_dict(), directory / "model.safetensors")
        save(directory, byte_level())
        return tiny(
            settings(directory, steps)
            | {
                "model.pretrained": True,
                "optim.msign_coefficients": polynomials,
                "codec.codec": "fp64",
                "pipeline.schedule": schedule,
                "pipeline.cut": cut,
                **{name.replace("__", "."): value for name, value in more.items()},
            }
        )

    return make


def stage_of(name: str, cut: str = "equal") -> int:
    """The group in which a parameter is clipped: the stage that would hold it."""
    if ".layers." not in name:
        return 0 if "embed_tokens" in name else STAGES - 1
    layer = int(name.partition(".layers.")[2].partition(".")[0])
    groups = partition(LAYERS, STAGES) if cut == "equal" else layer_ranges([int(count) for count in cut.split(",")])
    return next(stage for stage, layers in enumerate(groups) if layer in layers)


def compare(model: Any, config: RunConfig, got: Outcome) -> dict[str, float]:
    """Train `model` by the book and say how far, relatively, `got` is from it; `model` ends trained."""
    whole, stages = config.optim.clip_norm == "global", config.pipeline.stages
    clipped_with = (lambda _: 0) if whole else functools.partial(stage_of, cut=config.pipeline.cut)
    losses, norms = textbook.train(model, batches_of(config), recipe_of(config), clipped_with)
    assert_clipped_now_and_then(norms, config.optim.clip)
    heldout = torch.from_numpy(prepare_corpus(config).heldout_batch(0, config.data.heldout_sequences)).long()
    with torch.no_grad():
        val_loss = textbook.mean_loss(model, heldout).item()
    weights = dict(model.named_parameters())
    assert got.weights.keys() == weights.keys()
    assert all(of_stage == got.losses[0] for of_stage in got.losses)
    wanted_norms = [[of_step[0 if whole else stage] for of_step in norms] for stage in range(stages)]
    return {
        "loss": relative(got.losses[0], losses),
        "val_loss": relative(got.val_losses[0], [val_loss]),
        "gradient norm": relative(got.grad_norms, wanted_norms),
        "weight": max(
            (torch.linalg.vector_norm(got.weights[name] - p) / torch.linalg.vector_norm(p)).item()
            for name, p in weights.items()
        ),
    }


def relative(got: Any, wanted: Any) -> float:
    """The largest relative difference of two equally shaped lists of numbers."""
    ours, theirs = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "polynomials", "schedule", "cut"),
    [
        ("llama", "polar_express", "1f1b", "equal"),
        ("starcoder2", "quintic", "1f1b", "0,3,1,0"),
        ("starcoder2", "polar_express", "zb", "2,1,1,0"),
    ],
)
def test_a_swarm_trains_what_a_plain_model_would(
    architecture: str, polynomials: str, schedule: str, cut: str, configure: Configure, tmp_path: Path
) -> None:
    model = plain_model(architecture)
    config = configure(model, tmp_path / "model", steps=STEPS, polynomials=polynomials, schedule=schedule, cut=cut)
    got = run_in_memory(config, tmp_path / "run")
    errors = compare(model, config, got)
    assert max(errors.values()) < TOLERANCE, errors
    assert got.losses[0][-1] < 0.5 * got.losses[0][0]  # it did learn


@pytest.mark.pairwise(1)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b:rtt_ratio=0.5", "zb"])
@pytest.mark.parametrize("predict", ["none", "momentum", "orthogonal"])
def test_with_gradients_that_are_late_it_is_a_loop_with_late_gradients(
    predict: str, schedule: str, configure: Configure, tmp_path: Path
) -> None:
    model = plain_model("llama")
    steps = STEPS if (predict, schedule) == ("orthogonal", "zb") else SOME_STEPS
    given = {"steps": steps, "polynomials": "polar_express", "schedule": schedule}
    config = configure(model, tmp_path / "model", pipeline__delay=1, pipeline__predict=predict, **given)
    got = run_in_memory(config, tmp_path / "run")
    errors = compare(model, config, got)
    assert max(errors.values()) < TOLERANCE, errors
    assert got.losses[0][-1] < (0.5 if steps == STEPS else 1.0) * got.losses[0][0]


@pytest.mark.pairwise(3)
@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_with_one_norm_for_all_any_number_of_stages_is_that_model(
    stages: int, schedule: str, configure: Configure, tmp_path: Path
) -> None:
    """It is clipped as a whole, as torch.nn.utils.clip_grad_norm_ would do it."""
    model = plain_model("llama")
    given = {"steps": FEW_STEPS, "polynomials": "polar_express", "schedule": schedule}
    clip = {"optim__clip": 2.0, "optim__clip_norm": "global"}
    config = configure(model, tmp_path / "model", pipeline__stages=stages, **given, **clip)
    errors = compare(model, config, run_in_memory(config, tmp_path / "run"))
    assert max(errors.values()) < TOLERANCE, errors


def too_many_tokens(patch: pytest.MonkeyPatch) -> None:
    """The mean counts the first token of a sequence, which nobody predicts."""
    patch.setattr(
        RunConfig, "tokens_per_step", property(lambda self: self.pipeline.batch_size * (self.data.sequence_length + 1))
    )


def scaled_gradients(patch: pytest.MonkeyPatch, microbatch: int, factor: float) -> None:
    """The sum of the gradients up to `microbatch` is multiplied."""
    backward = Stage.backward

    def wrong(self: Stage, done: int, *args: Any) -> Any:
        dz = backward(self, done, *args)
        if done == microbatch:
            for _, p in self.model.full_names():
                assert p.grad is not None
                p.grad.mul_(factor)
        return dz

    patch.setattr(Stage, "backward", wrong)


def louder_boundary(patch: pytest.MonkeyPatch) -> None:
    """Gradients grow by a millionth on their way upstream."""
    pack = UpstreamEndpoint.pack_gradient
    patch.setattr(UpstreamEndpoint, "pack_gradient", lambda self, dz, *args: pack(self, dz * (1 + 1e-6), *args))


BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "loss divided by a wrong token count": too_many_tokens,
    "first microbatch accumulated twice": lambda patch: scaled_gradients(patch, 0, 2.0),
    "first microbatch forgotten": lambda patch: scaled_gradients(patch, 0, 0.0),
    "every microbatch accumulated twice": lambda patch: scaled_gradients(patch, 3, 2.0),
    "gradients changed by a boundary": louder_boundary,
}


def error_of(configure: Configure, tmp_path: Path) -> dict[str, float]:
    model = plain_model("llama")
    config = configure(model, tmp_path / "model", steps=FEW_STEPS, polynomials="polar_express")
    return compare(model, config, run_reference(config, tmp_path / "run"))


@pytest.mark.pairwise(2)
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_small_bug_is_seen(
    bug: Callable[[pytest.MonkeyPatch], None], configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    errors = error_of(configure, tmp_path)
    assert max(errors.values()) > 10 * TOLERANCE, errors


def test_without_a_bug_nothing_is_seen(configure: Configure, tmp_path: Path) -> None:
    errors = error_of(configure, tmp_path)
    assert max(errors.values()) < TOLERANCE, errors
