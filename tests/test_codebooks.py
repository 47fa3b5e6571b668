"""Codebooks that stream: both ends of a boundary hold the same table at every tensor, whatever happens between them.

The rules of the dictionaries have their own tests (`test_dictionary.py`), and so have the formats (`test_rvq.py`) and
runs that are broken off and restored (`test_checkpoint.py`, `test_faults.py`); real processes code with them in
`test_mapl.py` and `test_recovery.py`. Here whole runs do, in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from thinpipe.compress.byte_format import LearnedTable, Payload
from thinpipe.compress.registry import parse_format
from thinpipe.node.boundary.codebook_tables import CodebookOwner
from thinpipe.node.boundary.endpoints import BoundaryShape, DownstreamEndpoint, Encoded, UpstreamEndpoint
from thinpipe.node.boundary.pack_queue import PackQueue
from thinpipe.node.config import RunConfig
from thinpipe.protocol.dictionary_delta import join_deltas, split_deltas
from thinpipe.protocol.errors import RemoteProtocolError
from thinpipe.protocol.messages import Kind, Message
from thinpipe.sim.reports.summary import read_records

from .conftest import TinyConfig
from .in_memory import Cut, Outcome, run_in_memory, run_reference

MAPL = "mapl:r=8,anchors=full,table=1,every=2"
BOTH = {"codec.forward": "rvq:groups=2,codes=16,delta=random/4", "codec.backward": "rvq:groups=2,codes=8,delta=drift/4"}


def configure(tiny: TinyConfig, stages: int, codec: str = MAPL, **more: Any) -> RunConfig:
    settings = {"pipeline.stages": stages, "run.eval_every": 2, "codec.codec": codec, **BOTH, **more}
    return tiny({name.replace("__", "."): value for name, value in settings.items()})


VARIANTS: dict[str, dict[str, Any]] = {
    "two stages": {"stages": 2},
    "four stages": {"stages": 4},
    "gpipe": {"stages": 4, "pipeline__schedule": "gpipe"},
    "dense hidden states": {"stages": 2, "codec": "identity"},
    "robin, all of it": {
        "stages": 3,
        "codec__forward": "rvq:groups=2,codes=5,levels=3,scale=log4,delta=robin/7,encoding=bf16",
        "codec__backward": "rvq:groups=4,codes=16,scale=log8,hadamard=true,delta=full,encoding=fp32",
    },
    "axes and bits that follow, at every third step": {
        "stages": 3,
        "codec": "mapl:r=auto,bits=20,every=2",
        "codec__forward": "transform:bits=20,every=3,decay=0.9",
        "codec__backward": "transform:bits=20,every=3,encoding=int8",
    },
    "a rank that follows, by itself": {
        "stages": 2,
        "codec": "mapl:r=auto,bits=9",
        "codec__forward": None,
        "codec__backward": None,
    },
    "gradients alone": {"stages": 3, "codec__forward": "int4"},
    "activations alone": {"stages": 3, "codec__backward": "int4", "compute__dtype": "bfloat16"},
    "float64": {"stages": 2, "compute__dtype": "float64"},
}


@pytest.mark.pairwise(2)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_swarm_is_one_process(variant: dict[str, Any], tiny: TinyConfig, tmp_path: Path) -> None:
    config = configure(tiny, **variant)
    reference, swarm = run_reference(config, tmp_path / "reference"), run_in_memory(config, tmp_path / "swarm")
    assert swarm == reference
    assert all(math.isfinite(loss) for loss in swarm.losses[0])


def test_schedules_do_not_reach_the_codebooks(tiny: TinyConfig, tmp_path: Path) -> None:
    """Those of activations learn from forwards alone, those of gradients from backwards alone."""
    gpipe, one_f_one_b = (
        run_in_memory(configure(tiny, 4, pipeline__schedule=schedule), tmp_path / schedule)
        for schedule in ("gpipe", "1f1b")
    )
    assert gpipe == one_f_one_b


@pytest.mark.parametrize("at", ["read", "write"])
def test_broken_connections_change_no_bit(at: Any, tiny: TinyConfig, tmp_path: Path) -> None:
    config = configure(tiny, 3)
    cuts = {0: [Cut(frame=frame, at=at) for frame in (3, 4, 9, 7)], 1: [Cut(frame=frame, at=at) for frame in (7, 3, 5)]}
    disturbed = run_in_memory(config, tmp_path / "swarm", cuts=cuts)
    assert disturbed.connections == {0: 5, 1: 4}
    assert disturbed == run_reference(config, tmp_path / "reference")


def test_an_evaluation_changes_nothing(tiny: TinyConfig, tmp_path: Path) -> None:
    often, never = (run_reference(configure(tiny, 3, run__eval_every=every), tmp_path / str(every)) for every in (1, 0))
    assert len(often.val_losses[0]) > len(never.val_losses[0])
    assert (often.losses, often.state_sha256) == (never.losses, never.state_sha256)


def test_the_records_tell_of_the_codebooks(tiny: TinyConfig, tmp_path: Path) -> None:
    config = configure(tiny, 3)
    run_reference(config, tmp_path)
    *_, above = [record["codec"] for record in read_records(tmp_path / "stage-0.jsonl") if record["event"] == "step"]
    *_, below = [record["codec"] for record in read_records(tmp_path / "stage-2.jsonl") if record["event"] == "step"]
    for figures, way, codes in ((above, "activation", 16), (below, "gradient", 8)):
        assert {name for name in figures if name.startswith(("activation_", "gradient_"))} == {
            f"{way}_{name}"
            for name in (
                *("usage_1", "usage_2", "perplexity_1", "perplexity_2"),
                *("revived", "reconstruction_error", "kept_strongest", "kept_weakest", "staleness"),
            )
        }
        assert 0 < figures[f"{way}_usage_1"] <= 1 <= figures[f"{way}_perplexity_1"] <= codes
        assert 0 < figures[f"{way}_reconstruction_error"] < 1
        assert 0 < figures[f"{way}_staleness"] < 1  # one part in four travels: what is shipped lags behind


def test_changes_have_the_bytes_that_their_budget_says(tiny: TinyConfig, tmp_path: Path) -> None:
    """Both ways, all codebooks: one snapshot, then a fourth of the entries in int4 with each microbatch."""
    config = configure(tiny, 2, "identity", run__steps=6, codec__forward="rvq:groups=2,codes=16,delta=random/4")
    outcome: Outcome = run_reference(config, tmp_path)
    width, messages = 64, config.run.steps * config.pipeline.microbatches
    expected, heads = 0, 0
    for spec in (config.codec.forward, config.codec.backward):
        table = parse_format(spec or "").table(width)
        assert table is not None
        budget = -(-table.entries // 4)
        expected += 4 * table.entries * table.width + (messages - 1) * budget * (1 + 2 + (table.width + 1) // 2)
        heads += messages
    assert expected < outcome.sent_bytes["dictionary"] < expected + 150 * heads


# -- two ports, and what may go wrong between them -----------------------------------------------------------------


PROJECTOR = LearnedTable(name="projector", entries=8, width=3, delta="int8", gradient="bf16", every=1)


def _shape(table: LearnedTable | None = None) -> BoundaryShape:
    return BoundaryShape(
        boundary=0,
        seed=1,
        microbatch_size=2,
        sequence_length=16,
        wire_width=8,
        vocab_size=500,
        forward=parse_format("rvq:groups=2,codes=4,delta=robin/4"),
        backward=parse_format("rvq:groups=2,codes=4,levels=1,delta=full,encoding=int8"),
        table=table,
        dtype=torch.float32,
        microbatches=4,
    )


class Pair:
    """Both ends of one boundary, and tensors that cross it."""

    def __init__(self) -> None:
        place = {"dtype": torch.float32, "device": torch.device("cpu")}
        self.down, self.up = DownstreamEndpoint(_shape(), **place), UpstreamEndpoint(_shape(), **place)
        self.draw = torch.Generator().manual_seed(3)
        self.ids = np.arange(2 * 17) % 500

    def activation(self, microbatch: int, kind: Kind = Kind.ACTIVATION, scale: float = 1.0) -> Message:
        z = torch.randn(self.down.shape.z_shape, generator=self.draw) * scale
        return self.down.pack_activation(Encoded(z_BTW=z), self.ids, 0, microbatch, kind)

    def gradient(self, microbatch: int) -> Message:
        return self.up.pack_gradient(torch.randn(self.up.shape.z_shape, generator=self.draw), 0, microbatch, 1.0)

    def books(self) -> tuple[np.ndarray, np.ndarray]:
        """What each end holds for activations."""
        down, up = self.down.ends["activation_codebook_below"], self.up.ends["activation_codebook_above"]
        return down.state_tensors()["shipped"].numpy(), up.state_tensors()["replica"].numpy()


def decoded(port: DownstreamEndpoint | UpstreamEndpoint, message: Message) -> torch.Tensor:
    """By the end that coded it, with the table that it codes with."""
    fmt = port.shape.forward if isinstance(port, DownstreamEndpoint) else port.shape.backward
    payload = Payload(codec=message.codec, header=message.codec_header, body=bytes(message.body))
    return fmt.unpack(payload, shape=port.shape.z_shape, dtype=torch.float32)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_both_ends_agree_at_every_tensor(pair: Pair) -> None:
    for microbatch in range(12):
        message = pair.activation(microbatch)
        _, received = pair.up.unpack_activation(message)
        assert received.table is None  # nothing that the model's half would need
        ours, theirs = pair.books()
        assert np.array_equal(ours, theirs)
        assert torch.equal(received.z_BTW, decoded(pair.down, message))  # as who coded it means it
        gradient = pair.gradient(microbatch)
        assert torch.equal(pair.down.unpack_gradient(gradient), decoded(pair.up, gradient))


def test_a_tensor_of_zeros_comes_first(pair: Pair) -> None:
    """An empty microbatch teaches nothing; the codebook begins with the next one."""
    _, received = pair.up.unpack_activation(pair.activation(0, scale=0.0))
    assert not received.z_BTW.any()
    for microbatch in range(1, 10):
        _, received = pair.up.unpack_activation(pair.activation(microbatch))
        assert np.array_equal(*pair.books())
    assert pair.books()[1].any()
    assert received.z_BTW.any()


def _without_change(message: Message) -> Message:
    return replace(message, dictionary=b"")


def _twice(message: Message) -> Message:
    return replace(message, dictionary=bytes(message.dictionary) * 2)


def _torn(message: Message) -> Message:
    return replace(message, dictionary=bytes(message.dictionary)[:-1])


def _unknown(message: Message) -> Message:
    return replace(message, dictionary=bytes(message.dictionary).replace(b"codebook", b"codfbook"))


def _flipped(message: Message) -> Message:
    raw = bytearray(message.dictionary)
    raw[-1] ^= 0x10
    return replace(message, dictionary=bytes(raw))


def _past_the_table(message: Message) -> Message:
    """16 rows, numbered by one byte each right behind the header."""
    raw = bytearray(message.dictionary)
    at = len(raw) - 4 * (2 + 2) - 4  # four entries of a scale and two bytes of codes, and their numbers
    raw[at + 3] = 200
    return replace(message, dictionary=bytes(raw))


def _nameless(message: Message) -> Message:
    return replace(message, codec_header={"shape": message.codec_header["shape"]})


def _of_another_version(message: Message) -> Message:
    named = list(message.codec_header["codebook"])
    return replace(message, codec_header={**message.codec_header, "codebook": [*named[:2], named[2] + 1, *named[3:]]})


def _code_past_the_table(message: Message) -> Message:
    raw = bytes(message.body)
    return replace(message, body=raw[:-1])


REFUSED: dict[str, tuple[Callable[[Message], Message], str]] = {
    "no change": (_without_change, r"a tensor coded with Version.* of dictionary 'codebook', here: "),
    "the change twice": (_twice, r"two changes of dictionary 'codebook' in one message"),
    "a change that breaks off": (_torn, r"a delta that breaks off: \d+ bytes of \d+"),
    "an unknown dictionary": (_unknown, r"a change of dictionary 'codfbook'; here: 'codebook'"),
    "a flipped bit": (_flipped, r"leads to another table"),
    "an entry past the table": (_past_the_table, r"entries of 'codebook' are not ascending numbers below 16"),
    "no version": (_nameless, r"activation of step 0, microbatch 2 names no version of 'codebook'"),
    "another version": (_of_another_version, r"a tensor coded with .* brings the change to"),
    "a payload of another length": (_code_past_the_table, r"rvq payload has \d+ bytes, expected \d+"),
}


@pytest.mark.parametrize(("spoil", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_the_next_tensor_is_refused(spoil: Callable[[Message], Message], expected: str, pair: Pair) -> None:
    for microbatch in range(2):  # the first one alone teaches nothing that a change could bring
        pair.up.unpack_activation(pair.activation(microbatch))
    before = pair.books()[1]
    message = pair.activation(2)
    with pytest.raises(RemoteProtocolError, match=expected):
        pair.up.unpack_activation(spoil(message))
    if spoil is not _code_past_the_table:  # of which the change was good
        assert np.array_equal(pair.books()[1], before)
        pair.up.unpack_activation(message)  # whole, it is followed
    assert np.array_equal(*pair.books())


def test_a_tensor_without_the_change_that_is_due_is_refused(pair: Pair) -> None:
    """Even if it says that it was coded with the table that is here."""
    first, second = pair.activation(0), pair.activation(1)
    pair.up.unpack_activation(first)
    header = {**second.codec_header, "codebook": first.codec_header["codebook"]}
    with pytest.raises(RemoteProtocolError, match="microbatch 1 brings no change of 'codebook', where one is due"):
        pair.up.unpack_activation(replace(second, dictionary=b"", codec_header=header))
    pair.up.unpack_activation(second)


@pytest.mark.parametrize("spoiled", ["projector", "codebook"])
def test_of_two_changes_both_are_followed_or_none(spoiled: str) -> None:
    place = {"dtype": torch.float32, "device": torch.device("cpu")}
    down, up = DownstreamEndpoint(_shape(PROJECTOR), **place), UpstreamEndpoint(_shape(PROJECTOR), **place)
    draw = torch.Generator().manual_seed(5)

    def activation(step: int, microbatch: int) -> Message:
        assert down.table
        delta, _ = down.table.publish(torch.randn(8, 3, generator=draw), step, microbatch) or (b"", None)
        z = torch.randn(down.shape.z_shape, generator=draw)
        out = Encoded(z_BTW=z, coded_with=down.table.coded_with, delta=delta)
        return down.pack_activation(out, np.arange(34), step, microbatch, Kind.ACTIVATION)

    def held() -> dict[str, Any]:
        return {name: end.dictionary_state() for name, end in up.ends.items()}

    for microbatch in range(3):
        up.unpack_activation(activation(0, microbatch))
    message, before = activation(1, 0), held()
    changes = split_deltas(message.dictionary, ["projector", "codebook"])
    assert list(changes) == ["projector", "codebook"]
    damaged = changes | {spoiled: changes[spoiled][:-1] + bytes([changes[spoiled][-1] ^ 0x11])}
    with pytest.raises(RemoteProtocolError, match=f"of dictionary '{spoiled}' leads to another table"):
        up.unpack_activation(replace(message, dictionary=join_deltas(damaged.values())))
    assert held() == before
    _, received = up.unpack_activation(message)
    assert received.table is not None
    assert {name: state["version"][1:] for name, state in held().items() if name != "gradient_codebook_above"} == {
        "table_above": [1, 0, 0],
        "activation_codebook_above": [1, 0, 0],
    }


def test_a_code_past_the_table_is_refused() -> None:
    """Three codes take two bits, of which the fourth pattern means nothing."""
    place = {"dtype": torch.float32, "device": torch.device("cpu")}
    shapes = [replace(_shape(), forward=parse_format("rvq:groups=2,codes=3")) for _ in range(2)]
    down, up = DownstreamEndpoint(shapes[0], **place), UpstreamEndpoint(shapes[1], **place)
    z = torch.randn(down.shape.z_shape)
    message = down.pack_activation(Encoded(z_BTW=z), np.arange(34), 0, 0, Kind.ACTIVATION)
    body = bytes(message.body)[:-1] + b"\xff"
    with pytest.raises(
        RemoteProtocolError, match=r"activation of step 0, microbatch 0 at boundary 0: rvq payload's codes"
    ):
        up.unpack_activation(replace(message, body=body))


def test_a_change_with_an_evaluation_is_refused(pair: Pair) -> None:
    pair.up.unpack_activation(pair.activation(0))
    evaluation, activation = pair.activation(0, Kind.EVALUATION), pair.activation(1)
    assert not len(evaluation.dictionary)
    spoiled = replace(evaluation, dictionary=activation.dictionary, codec_header=activation.codec_header)
    with pytest.raises(RemoteProtocolError, match="a change of 'codebook' with an evaluation message"):
        pair.up.unpack_activation(spoiled)
    pair.up.unpack_activation(evaluation)


def test_a_strangers_changes_are_forgotten(pair: Pair) -> None:
    """Until something of a process was used, another one may take its place, and begins again."""
    stranger = Pair()
    stranger.draw.manual_seed(9)
    pair.up.unpack_activation(stranger.activation(0))
    pair.up.forget()
    pair.up.unpack_activation(pair.activation(0))
    assert np.array_equal(*pair.books())


def test_a_gradient_brings_no_change_of_what_only_activations_have(pair: Pair) -> None:
    pair.up.unpack_activation(pair.activation(0))
    gradient = pair.gradient(0)
    changes = [*split_deltas(gradient.dictionary, ["codebook"]).values(), b"\x02\x00\x90\x00"]
    with pytest.raises(RemoteProtocolError):
        pair.down.unpack_gradient(replace(gradient, dictionary=join_deltas(changes)))
    pair.down.unpack_gradient(gradient)


# -- packing behind the compute --------------------------------------------------------------------------------------


def _message(microbatch: int) -> Message:
    return Message(kind=Kind.GRADIENT, step=0, microbatch=microbatch)


def test_messages_are_packed_in_order_whoever_asks() -> None:
    pack_queue, packed = PackQueue(), []

    def job(microbatch: int) -> Callable[[], Message]:
        return pack_queue.submit(lambda: packed.append(microbatch) or _message(microbatch))

    jobs = [job(microbatch) for microbatch in range(4)]
    assert jobs[1]().microbatch == 1  # out of turn: what is before it comes first
    assert packed == [0, 1]
    pack_queue.flush()
    assert packed == [0, 1, 2, 3]
    assert [message().microbatch for message in jobs] == [0, 1, 2, 3]
    assert packed == [0, 1, 2, 3]


def test_what_packing_raises_is_raised_to_whoever_asks() -> None:
    pack_queue = PackQueue()

    def fail() -> Message:
        raise ValueError("not finite")

    message, after = pack_queue.submit(fail), pack_queue.submit(lambda: _message(1))
    with pytest.raises(ValueError, match="not finite"):
        pack_queue.flush()
    with pytest.raises(ValueError, match="not finite"):
        message()
    assert after().microbatch == 1


def test_a_codebook_is_the_owners(pair: Pair) -> None:
    """No process holds both: what decodes never learns, and has nothing but the table."""
    for microbatch in range(3):
        pair.up.unpack_activation(pair.activation(microbatch))
    receiver = pair.up.ends["activation_codebook_above"]
    assert not isinstance(receiver, CodebookOwner)
    assert set(receiver.state_tensors()) == {"replica", "version"}
    assert not pair.up.shape.forward.has_started
    assert set(pair.down.ends["activation_codebook_below"].state_tensors()) == {
        *("shipped", "version"),
        *("counts", "sums", "updates"),
    }
