"""Invariant 2: in float64 the pipeline is a plain Hugging Face model under a textbook's training loop, to 1e-8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from thinpipe.node.config import RunConfig
from thinpipe.node.host import prepare_corpus
from thinpipe.node.model import partition

from . import textbook
from .conftest import TinyConfig
from .in_memory import run_in_memory

STEPS, LAYERS, VOCABULARY = 50, 4, 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def plain_model(config: Any) -> Any:
    """The whole model in float64, all of its parameters random."""
    config._attn_implementation = "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(p + 0.1 * noise if p.ndim == 1 else 0.05 * noise)
    return model

CASES = {"llama": transformers.LlamaConfig, "starcoder2": transformers.Starcoder2Config}

def double_norm(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("pol", ["quintic", "polar_express"])
@pytest.mark.parametrize("arch", CASES)
def test_try(arch, pol, patch, tiny, tmp_path, monkeypatch):
    import time
    if patch and arch=="llama":
        monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaRMSNorm, "forward", double_norm)
    model = plain_model(CASES[arch](**SIZES))
    model.config.to_json_file(tmp_path / "config.json")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = tiny({
        "run.steps": STEPS, "model.path": str(tmp_path), "model.pretrained": True, "model.width": None, "model.layers": None, "model.vocab_size": None if 0 else 512,
        "data.sequence_length": 16, "codec.codec": "fp64", "compute.dtype":"float64", "optim.msign_dtype":"float64","optim.msign_coefficients": pol,
        "optim.weight_decay": 0.01, "optim.clip": 0.5, "optim.muon_lr": 0.02,
    })
    t=time.time(); got = run_in_memory(config, tmp_path/"run"); print("pipeline", time.time()-t)
    corpus = prepare_corpus(config)
    b, m = config.microbatch_size, config.pipeline.microbatches
    batches = [torch.cat([torch.from_numpy(corpus.batch(s, k, microbatches=m, batch_size=b)) for k in range(m)]).long() for s in range(STEPS)]
    o = config.optim
    recipe = textbook.Recipe(steps=STEPS, muon_rate=o.muon_lr, adam_rate=o.adamw_lr, momentum=o.momentum, beta1=o.adamw_beta1,beta2=o.adamw_beta2, weight_decay=o.weight_decay, warmup=o.warmup_steps, decay=round(o.decay_fraction*STEPS), clip=o.clip, polynomials=pol)
    parts = partition(LAYERS, 4)
    def group(name):
        if ".layers." in name:
            l = int(name.split(".layers.")[1].split(".")[0]); return next(i for i,p in enumerate(parts) if l in p)
        return 0 if "embed" in name else 3
    t=time.time(); want = textbook.train(model, batches, recipe, group); print("textbook", time.time()-t)
    rel=[abs(a-b)/b for a,b in zip(got.losses[0], want)]
    print(want[0], want[-1])
    print("loss rel", [f"{r:.1e}" for r in rel[::7]], max(rel))
    w = {n: ((got.weights[n]-p).norm()/p.norm()).item() for n,p in model.named_parameters()}
    worst = max(w, key=w.get); print("weights", worst, w[worst])
