"""Can this architecture's sequences be cut into chunks exactly? Tested at the start of a run, on a small copy.

What transformers gives to a function of attention is not all that an architecture may do with keys: it may look at a
window, turn them in some layers only, or turn a part of each. A list of what may be would be wrong with its next
release, so a narrow random copy computes the logits of some tokens twice: with its own attention over the whole, and
over two chunks that exchange keys and values as the lanes of the run would, by the same method without rounding. What
the method puts into the model is in both, so what differs is what chunks do. Two sequences are computed, in turns where
the run does that: a module that keeps something from one layer to the next would take it from the other sequence.

In float64, where only a few architectures compute a part in float32: what is right differs by 1e-7 at most.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...compress.byte_format import CodecError
from ...compress.context_registry import parse_context
from ..config import RunConfig
from ..model import ModelError, StageModel, build_stage
from ..model.architecture import describe, first_line
from ..model.exactness import CHECK_VOCABULARY, CHECK_WINDOW, narrowed
from ..model.initialise import draw
from .chunked_model import WITHOUT_THAT, ChunkedModel, attention_of, context_shape, with_chunks
from .lane_threads import LaneThreads
from .mailbox import Mailbox

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LANES, SEGMENTS = 2, 4
TOKENS = SEGMENTS * 2 * CHECK_WINDOW  # a window is shorter than a segment
LARGEST_DIFFERENCE = 1e-5  # of logits, as a share of the largest


Constrain = Callable[[StageModel], None]


def check_chunks(config: RunConfig, architecture: PretrainedConfig) -> None:
    """Raises ModelError for an architecture that does not compute over chunks what it computes over whole sequences,
    by the context method of `config`."""
    name, small = describe(architecture), _small(config)
    remedy = WITHOUT_THAT if small.context.method == "full" else f"{WITHOUT_THAT}, or context method 'full'"
    try:
        difference = _difference(small, narrowed(architecture))
    except ModelError:
        raise
    except CodecError as error:
        raise ModelError(f"{name}: {error}") from None
    except Exception as error:  # an unknown architecture may fail in any way; every one of them is a refusal
        fault = f"it fails on one: {first_line(error)}"
    else:
        if difference <= LARGEST_DIFFERENCE:
            return
        fault = (
            f"logits differ by {difference:.1e} from those of whole sequences, at most {LARGEST_DIFFERENCE:g} is right"
        )
    raise ModelError(f"{name} cannot be cut into chunks: {fault}; {remedy}")


def _small(config: RunConfig) -> RunConfig:
    """Two lanes with a short sequence, and nothing that rounds."""
    changed = {
        "lanes": config.lanes.model_copy(update={"count": LANES}),
        "context": config.context.model_copy(
            update={"method": parse_context(config.context.method).exact_spec, "order": "zigzag"}
        ),
        "data": config.data.model_copy(update={"sequence_length": TOKENS}),
        "pipeline": config.pipeline.model_copy(update={"batch_size": 2, "microbatches": 2}),
        "compute": config.compute.model_copy(update={"device": "cpu"}),
    }
    return config.model_copy(update=changed)


def _difference(config: RunConfig, architecture: PretrainedConfig) -> float:
    """The largest between the logits, as a share of the largest of them."""
    layout, lanes = config.chunk_layout, list[ChunkedModel]()
    ids_BT = torch.stack([torch.arange(TOKENS) * each % CHECK_VOCABULARY for each in (7, 5)])
    whole = _model(architecture, partial(_attach, config))

    def constrain(lane: int, model: StageModel) -> None:
        lanes.append(ChunkedModel(config, model, lane, torch.float64))

    chunked = with_chunks(copy.deepcopy(architecture))
    models = [_model(chunked, partial(constrain, lane)) for lane in range(LANES)]
    mailbox = Mailbox()
    found_BTV = torch.zeros(2, TOKENS, CHECK_VOCABULARY, dtype=torch.float64)

    @torch.no_grad()  # of each thread
    def sequence(lane: int, which: int) -> None:
        lanes[lane].begin(0, which, evaluation=True)
        at = layout.lane_positions(lane)
        found_BTV[which, at] = models[lane](ids_BT[which : which + 1, at])[0]

    def work(lane: int) -> None:
        lanes[lane].connect(mailbox.of(0, lane))
        works = [partial(sequence, lane, which) for which in range(2)]
        if config.in_flight == 2:
            lanes[lane].turns.both(works[0], works[1])
        else:
            for each in works:
                each()

    threads = LaneThreads(LANES, mailbox)
    try:
        threads.each(work, range(LANES))
    finally:
        threads.close()
    with torch.no_grad():
        wanted_BTV: Tensor = whole(ids_BT)
    return float((found_BTV - wanted_BTV).abs().max() / wanted_BTV.abs().max())


def _model(architecture: PretrainedConfig, constrain: Constrain) -> StageModel:
    """With random weights, the same for all, and such that no part counts for nothing."""
    model = build_stage(architecture, stage=0, stages=1, seed=0, dtype=torch.float64, device="cpu", constrain=constrain)
    with torch.no_grad():
        for name, parameter in model.full_names():
            if parameter.requires_grad:
                parameter.add_(draw(name, parameter.shape, seed=1, std=0.1))
    return model


def _attach(config: RunConfig, model: StageModel) -> None:
    """What the method puts into a model that has all segments of a sequence, and its own attention."""
    method = parse_context(config.context.method)
    for layer, module in zip(model.layers, model.layer_modules, strict=True):
        attention = attention_of(module, model)
        method.attach(attention, context_shape(config, model, attention, layer, torch.float64, segments=SEGMENTS))
