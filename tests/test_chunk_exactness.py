"""An architecture whose sequences cannot be cut into chunks exactly is refused by name before a run starts, with what
to choose in its place; all others compute over chunks what they compute over the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from thinpipe.node.config_file import parse_config
from thinpipe.node.context import segment_attention
from thinpipe.node.context.chunk_exactness import check_chunks
from thinpipe.node.model import ModelError, resolve_model
from thinpipe.node.preparation import check_model

MIXTURE = "mos:k=0.02,v=0.05,warm=2,format=int4"
EXACT = [("llama", "full"), ("llama", MIXTURE), ("qwen3", "full:format=int8"), ("qwen2", f"{MIXTURE},head=first")]
EXACT += [("phi", "full"), ("granite", MIXTURE), ("smollm3", "full"), ("nanochat", "full")]
INSTEAD = "choose a decoder that looks at all earlier tokens, such as llama or qwen3"
REFUSED = [
    ("mistral", "full", f"its attention takes sliding_window, which attention over chunks .*; {INSTEAD}"),
    ("gpt_neox", "full", f"its layers have no 'self_attn'; {INSTEAD}"),
    ("qwen3", "mos", r"normalises after projecting \(k_norm\).*; choose a decoder such as llama .* method 'full'"),
    ("olmo2", "mos", r"normalises after projecting \(k_norm\)"),
    ("phi", "mos", f"it fails on one: .*; {INSTEAD}, or context method 'full'"),  # turns a part of each key
    ("smollm3", "mos", f"logits differ by .*; {INSTEAD}, or context method 'full'"),  # turns none in one of its layers
]


def settings(kind: str, method: str, directory: Path) -> Any:
    """Two chunks of a small decoder of that architecture."""
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    more: dict[str, Any] = {"num_hidden_layers": 2}
    if kind == "smollm3":
        more = {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}
    if kind not in ("gpt_neox", "phi"):
        more["num_key_value_heads"] = 2
    (directory / "config.json").write_text(json.dumps({"model_type": kind, **sizes, **more}), encoding="utf-8")
    assert kind in transformers.CONFIG_MAPPING
    return parse_config(
        {
            "model": {"path": str(directory), "vocab_size": 512},
            "pipeline": {"stages": 1},
            "lanes": {"count": 2, "average": "gradients"},
            "context": {"method": method},
            "data": {"sequence_length": 64},
        }
    )


def check(kind: str, method: str, directory: Path) -> None:
    config = settings(kind, method, directory)
    check_chunks(config, resolve_model(config.model, vocab_size=None, sequence_length=64))


@pytest.mark.parametrize(("kind", "method"), EXACT)
def test_what_is_exact_may_be_cut(kind: str, method: str, tmp_path: Path) -> None:
    check(kind, method, tmp_path)


@pytest.mark.parametrize(("kind", "method", "line"), REFUSED)
def test_what_is_not_is_refused_by_name(kind: str, method: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"architecture '{kind}'.*{line}"):
        check(kind, method, tmp_path)


@pytest.mark.parametrize("method", ["full", MIXTURE])
def test_a_small_difference_is_noticed(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = segment_attention.forward

    def off(*parts: Any, scale: float, **options: Any) -> Any:
        return right(*parts, scale=1.0001 * scale, **options)

    monkeypatch.setattr(segment_attention, "forward", off)
    with pytest.raises(ModelError, match=r"'llama' cannot be cut into chunks: logits differ by .*, at most 1e-05"):
        check("llama", method, tmp_path)


def test_a_run_is_refused_before_it_starts(tmp_path: Path) -> None:
    config = settings("qwen3", "mos", tmp_path)
    with pytest.raises(ModelError, match="normalises after projecting"):
        check_model(config, resolve_model(config.model, vocab_size=None, sequence_length=64))
