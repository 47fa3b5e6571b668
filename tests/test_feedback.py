"""Error feedback: nothing is lost for good, what is carried is state, and evaluations do not see it.

Whole runs carry it in `test_parity.py`, and go on with it in `test_checkpoint.py`.
"""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from thinpipe.compress.byte_format import CodecError, Direction, Key
from thinpipe.compress.registry import parse_format

from .conftest import TinyConfig
from .in_memory import run_reference

KEY = Key(seed=1, boundary=2, direction=Direction.BACKWARD, step=3, microbatch=0)
SHAPE = (2, 8, 16)
BARE = [
    *("int8", "int4", "int3", "int2", "int4:centre=true", "int2:hadamard=true"),
    *("topk:k=4", "topk:k=3,values=int4", "columns:k=4"),
]
SPECS = [f"{spec}{',' if ':' in spec else ':'}feedback=true" for spec in BARE]


def key(microbatch, direction=Direction.BACKWARD):
    return dataclasses.replace(KEY, direction=direction, microbatch=microbatch)


def draw(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def cross(fmt, z, k):
    return fmt.unpack(fmt.pack_training(z, k), shape=SHAPE, dtype=torch.float32, key=k)


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("spec", SPECS)
class TestFeedback:
    def test_what_arrived_is_what_was_sent_but_for_one_error(self, spec, direction):
        fmt, sent, arrived, largest = parse_format(spec), torch.zeros(SHAPE), torch.zeros(SHAPE), 0.0
        for microbatch in range(300):
            z = draw(microbatch) + 0.05
            sent += z
            arrived += cross(fmt, z, key(microbatch, direction))
            error = fmt.state_tensors()["error"]
            assert torch.allclose(sent - arrived, error, atol=2e-3)  # sums in float32
            largest = max(largest, float(error.norm()) / math.sqrt(error.numel()))
        assert largest < 8  # of numbers like N(0, 1): it does not grow with the number of tensors

    def test_the_first_tensor_and_an_evaluations_are_packed_as_they_are(self, spec, direction):
        fmt, fresh = parse_format(spec), parse_format(spec)
        k = key(0, direction)
        assert fmt.pack_training(draw(0), k) == fresh.pack(draw(0), k)
        held = fmt.state_tensors()["error"].clone()
        assert fmt.pack(draw(5), k) == fresh.pack(draw(5), k)
        assert torch.equal(fmt.state_tensors()["error"], held)
        assert fresh.state_tensors() == {}
        assert fmt.pack_training(draw(5), k) != fresh.pack(draw(5), k)

    def test_state_survives_a_checkpoint(self, spec, direction):
        fmt, copy = parse_format(spec), parse_format(spec)
        assert fmt.remembers
        assert fmt.state_tensors() == fmt.state_layout(SHAPE, 0) == {}
        cross(fmt, draw(0), key(0, direction))
        state = {name: tensor.clone() for name, tensor in fmt.state_tensors().items()}
        assert {n: (t.shape, t.dtype) for n, t in state.items()} == {
            n: (t.shape, t.dtype) for n, t in fmt.state_layout(SHAPE, 1).items()
        }
        copy.load_state_tensors(state)
        following = fmt.pack_training(draw(1), key(1, direction))
        assert copy.pack_training(draw(1), key(1, direction)) == following
        assert torch.equal(copy.state_tensors()["error"], fmt.state_tensors()["error"])
        copy.load_state_tensors({})
        assert copy.pack_training(draw(1), key(1, direction)) != following

    def test_both_directions_are_rounded_to_nearest(self, spec, direction):
        del direction
        forward, backward = (parse_format(spec).pack(draw(0), key(0, way)) for way in Direction)
        if "hadamard" not in spec:  # whose signs are the direction's own
            assert forward == backward


def test_a_state_that_cannot_be_is_refused():
    fmt, bare = parse_format("topk:k=4,feedback=true"), parse_format("topk:k=4")
    for state, fault in (
        ({"eror": torch.zeros(SHAPE)}, "has the state 'error' in float32, but was given"),
        ({"error": torch.zeros(SHAPE, dtype=torch.float64)}, "has the state 'error' in float32"),
        ({"error": torch.full(SHAPE, math.nan)}, "the error that it carried is not finite"),
    ):
        with pytest.raises(CodecError, match=fault):
            fmt.load_state_tensors(state)
    assert fmt.state_tensors() == {}
    assert not bare.remembers
    assert bare.state_layout(SHAPE, 5) == {}
    with pytest.raises(CodecError, match="format 'topk' has no state"):
        bare.load_state_tensors({"error": torch.zeros(SHAPE)})


def test_a_tensor_of_another_shape_is_refused():
    fmt = parse_format("int4:feedback=true")
    fmt.pack_training(draw(0), KEY)
    with pytest.raises(CodecError, match=r"an error of \[2, 8, 16\] to a tensor of \[2, 8\]; give all tensors"):
        fmt.pack_training(torch.ones(2, 8), KEY)


def test_a_tensor_that_is_refused_changes_nothing():
    fmt = parse_format("int4:feedback=true")
    fmt.pack_training(draw(0), KEY)
    held = fmt.state_tensors()["error"]
    bad = draw(1)
    bad[1, 2, 3] = math.nan
    with pytest.raises(CodecError, match="is not finite"):
        fmt.pack_training(bad, key(1))
    assert fmt.state_tensors()["error"] is held


def test_without_the_option_training_packs_as_evaluation_does():
    fmt = parse_format("int4")
    assert fmt.pack_training(draw(0), KEY) == fmt.pack(draw(0), KEY)
    assert fmt.state_tensors() == {}


def test_an_evaluation_changes_nothing(tiny: TinyConfig, tmp_path: Path) -> None:
    def run(every: int, backward: str = "topk:k=8,feedback=true"):
        formats = {"codec.codec": "identity", "codec.forward": "int4:feedback=true", "codec.backward": backward}
        config = tiny({"pipeline.stages": 2, "run.eval_every": every, **formats})
        return run_reference(config, tmp_path / f"{every} {backward}")

    often, never = run(2), run(0)
    assert len(often.val_losses[0]) > len(never.val_losses[0])
    assert (often.losses, often.state_sha256) == (never.losses, never.state_sha256)
    assert never.losses != run(0, "topk:k=8").losses
