"""Can this architecture be cut into stages exactly? Tested at each start, on a small copy of the model.

A list of supported names would be wrong twice: a release of transformers may move an embedding scale into the base
model's forward, and an unknown decoder may well be exact. So a narrow random copy is run whole and in two stages, and
logits and every gradient must agree to the last bit; "close" is no criterion, because a wrong attention window or a
repeated scale can be close on random weights.

A process asks again and again, once for each stage that it builds, so what was found exact is remembered until it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .architecture import (
    REMEDY,
    ModelError,
    architecture_digest,
    describe,
    first_line,
    per_layer_keys,
    with_layers,
)
from .initialise import draw, refuse_unset, set_constants
from .pull import pull
from .slices import allocate, cut, skeleton
from .stage_cut import partition

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CHECK_TOKENS = 12  # longer than the shrunken sliding window, so that a wrong mask shows
CHECK_WINDOW = 4
CHECK_VOCABULARY = 96
found_exact: set[tuple[str, bool, bool]] = set()  # digest of the architecture, and which ends had no layer


def check_sliceable(config: PretrainedConfig, stages: Sequence[range] = ()) -> None:
    """Compare a narrow random copy, whole and in two stages: logits and every gradient, bit for bit (float32, CPU).
    Where the first or the last of `stages`, the layers of each, has none, so has the copy's.

    The copy has the model's first layers, as many as it takes to meet every kind of layer on a side where a wrong
    list would show, and narrow matrices: where a model can be cut does not depend on its widths. Raises ModelError.
    """
    first_bare, last_bare = (bool(stages) and not stages[end] for end in (0, -1))
    case = (architecture_digest(config), first_bare, last_bare)
    if case in found_exact:
        return
    try:
        # Before it is asked how: an architecture without these parts lacks the sizes that a copy is made by, too.
        skeleton(with_layers(config, range(1)), torch.float32)
        narrow = narrowed(config)
        fault = _difference(narrow, first_bare=first_bare, last_bare=last_bare)
    except ModelError:
        raise
    except Exception as error:  # an unknown architecture may fail in any way; every one of them is a refusal
        fault = f"its stages fail: {first_line(error)}"
    if fault:
        raise ModelError(f"{describe(config)} cannot be cut into stages exactly: {fault}; {REMEDY}")
    found_exact.add(case)


def narrowed(config: PretrainedConfig) -> PretrainedConfig:
    """The first layers of `config` at a width that runs in no time, with heads as wide as they were."""
    lists = [getattr(config, key) for key in per_layer_keys(config)]

    def tells(count: int) -> bool:
        own = count // 2  # layers of the second stage
        return all(
            all(kind in values[:count] for kind in values)
            and (len(set(map(str, values))) == 1 or values[:own] != values[count - own : count])
            for values in lists
        )

    total = config.num_hidden_layers
    count = next((n for n in range(min(2, total), total + 1) if tells(n)), total)
    narrow = with_layers(config, range(count))
    if count < 2:  # one layer cannot be cut; two of its kind can
        for key in per_layer_keys(config):
            setattr(narrow, key, list(getattr(config, key)) * 2)
        narrow.num_hidden_layers = 2
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    narrow.num_attention_heads = 2
    if groups is not None:
        narrow.num_key_value_heads = 2 if groups == heads else 1
    narrow.hidden_size = 2 * head_dim
    if isinstance(getattr(config, "intermediate_size", None), int):
        narrow.intermediate_size = 48
    narrow.vocab_size = CHECK_VOCABULARY
    narrow.pad_token_id = None
    if isinstance(getattr(config, "sliding_window", None), int):
        narrow.sliding_window = CHECK_WINDOW  # pyright: ignore[reportAttributeAccessIssue]
    return narrow


def _difference(config: PretrainedConfig, *, first_bare: bool, last_bare: bool) -> str | None:
    """What differs between the whole model and two stages with its weights, before them the embedding alone if
    `first_bare`, and behind them norm and head if `last_bare`; None when nothing does."""
    whole = skeleton(config, torch.float32, "cpu")
    weights = {name: draw(name, p.shape, seed=0, std=0.1) for name, p in whole.named_parameters()}
    ids_BT = torch.arange(2 * CHECK_TOKENS).reshape(2, CHECK_TOKENS) * 7 % CHECK_VOCABULARY
    _assign(dict(whole.named_parameters()), weights)
    logits_BTV = whole(input_ids=ids_BT, use_cache=False).logits
    pull_BTV = draw("pull", logits_BTV.shape, seed=0, std=1.0)
    pull(logits_BTV, pull_BTV)

    found: dict[str, nn.Parameter] = {}
    halves = partition(config.num_hidden_layers, 2)
    parts = [*[range(0)] * first_bare, *halves, *[range(halves[-1].stop, halves[-1].stop)] * last_bare]
    entered_BTd, left_BTd = [ids_BT], []  # a wire lies between two stages: as many graphs, not one
    for stage, layers in enumerate(parts):
        model = cut(skeleton(config, torch.float32), layers, first=stage == 0, last=stage == len(parts) - 1)
        allocate(model)
        set_constants(model.causal, keep=list(model.parameters()))
        _assign(dict(model.full_names()), weights)
        refuse_unset(model.causal)
        found |= dict(model.full_names())
        left_BTd.append(model(entered_BTd[-1]))
        entered_BTd.append(left_BTd[-1].detach().requires_grad_())
    ours_BTV, pulled = left_BTd[-1], pull_BTV
    for entered, left in zip(reversed(entered_BTd[:-1]), reversed(left_BTd), strict=True):
        pull(left, pulled)
        pulled = entered.grad

    if not torch.equal(ours_BTV, logits_BTV):
        return f"logits differ by up to {(ours_BTV - logits_BTV).abs().max():.1e}"
    for name, parameter in whole.named_parameters():
        ours = found[name].grad if name in found else None
        if (ours is None) != (parameter.grad is None) or (ours is not None and not torch.equal(ours, parameter.grad)):
            return f"the gradient of {name} differs"
    return None


@torch.no_grad()
def _assign(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
