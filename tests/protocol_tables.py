"""The tables in docs/protocol.md, from the code's own: `python -m tests.protocol_tables` writes them into the document.

The meaning of each field and fault is written here. A field or fault without a text, or a text without its field or
fault, is an error, so the document cannot fall behind. Rows on the effect of a frame are found by trying it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from thinpipe.node.checkpoints.copy_service import DECLINED_MAX
from thinpipe.node.links.control_stream import HEARTBEAT_EVERY_S, QUEUED_MAX
from thinpipe.node.links.dialling import PERMANENT, RETRY_FIRST_S, RETRY_MOST_S, THEIR_PLACE
from thinpipe.node.links.transport import CONNECTIONS_MAX, PASSING, REFUSAL_TIMEOUT_S
from thinpipe.protocol import stage_pb2 as pb
from thinpipe.protocol.control_messages import (
    BYTES_MAX,
    LISTED_MAX,
    PART_BYTES_MAX,
    STEP_MAX,
    AllFinished,
    ControlFrame,
    DoViewChange,
    Drain,
    Failed,
    Finished,
    Heartbeat,
    LastStep,
    StartView,
    StartViewChange,
)
from thinpipe.protocol.copy_transfer import PARTS_AHEAD_LEAST, PARTS_AHEAD_MOST, PARTS_TOGETHER
from thinpipe.protocol.dictionary_delta import DIGEST_BYTES, DictionarySpec
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.header import HEADER_BYTES_MAX, HEADER_DEPTH_MAX, HEADER_VALUES_MAX, TEXT_CHARACTERS_MAX
from thinpipe.protocol.membership_log import STRETCHES_MAX
from thinpipe.protocol.messages import (
    ENVELOPE_BYTES_MAX,
    LAYERS_MAX,
    MICROBATCH_MAX,
    PROTOCOL_VERSION,
    SEGMENTS_MAX,
    Frame,
    Kind,
    Limits,
)
from thinpipe.protocol.path_probe import (
    BURST_BYTES_MAX,
    ECHOES_MAX,
    FILLER_BYTES_MAX,
    LATENCY_S_MAX,
    RATE_BITS_PER_S,
    SECONDS_MAX,
    TOKEN_BYTES,
    Outcome,
)
from thinpipe.protocol.path_probe import BYTES_MAX as PROBE_BYTES_MAX
from thinpipe.protocol.reassembly import MESSAGE_COST_BYTES
from thinpipe.protocol.rollback import (
    GENERATIONS_AHEAD_MAX,
    STEPS_LISTED_MAX,
    Effect,
    End,
    EndAfter,
    Rollback,
    RollbackPhase,
    Send,
    Side,
    Start,
    Stop,
)
from thinpipe.protocol.round_messages import LANES_MAX
from thinpipe.protocol.round_session import TRANSITIONS as ROUND_TRANSITIONS
from thinpipe.protocol.round_transfer import ROUNDS_AHEAD, WINDOW_PARTS_LEAST
from thinpipe.protocol.rows import Encoding, rows_bytes
from thinpipe.protocol.session import TRANSITIONS

from .builders import identity

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "protocol.md"
Row = tuple[str, ...]

_COPY = "whose state it is"
_COMPLETED = "the number of completed steps of that state"
FIELDS: dict[str, dict[str, str]] = {
    "Frame": {
        "greeting": "first frame of each stream, both ways",
        "refusal": "any stream, last frame",
        "chunk": "Link, Context",
        "credit": "Link, Context",
        "goodbye": "Link, Context: after the last chunk of its sender. Rounds, after its last request, and once more",
        "heartbeat": "Control, Rounds",
        **dict.fromkeys(
            [
                "start_view_change",
                "do_view_change",
                "start_view",
                "finished",
                "all_finished",
                "drain",
                "last_step",
                "failed",
            ],
            "Control",
        ),
        "copies_held": "Control: copies",
        **dict.fromkeys(
            ["copy_offer", "copy_progress", "copy_part", "copy_wanted", "copy_declined"], "Control: copies; Rounds"
        ),
        **dict.fromkeys(["rounds_wanted", "round_part", "rounds_received"], "Rounds"),
        "round_status": "Rounds, of stage 0; Control",
    },
    "Greeting": {
        "protocol_version": f"{PROTOCOL_VERSION}",
        "run_id": "text",
        "generation": "Link, Context: the generation of this link. Else: the one that the sender is in, or was in last",
        "configuration": "text; hash of all settings that must agree; then, if a table is generated, ` table ` and its "
        "digest",
        "stage": "of the sender, from 0",
        "stages": "of the pipeline",
        "incarnation": "random number of the sender's process, drawn once at its start",
        "next_sequence": "Link, Context: number of the first chunk that the sender lacks. Else: 0",
        "granted_bytes": "Link, Context: as in Credit. Else: 0",
        "completed_steps": "Control, Rounds: steps completed, for people to read. Link, Context: 0",
        "joining": "Control, Rounds: 1 if the sender takes a stage's place and is in no generation; 0 or 1",
        "lane": "of the sender, from 0",
    },
    "Refusal": {"code": "text; name of a fault", "reason": "text; one line for people to read, with both values"},
    "Chunk": {
        "sequence": "from 0 in each direction and generation, without a gap",
        "generation": "the link's",
        "head": "present on the first chunk of a message and on no other",
        "xxh3": "see Checksum",
        "data": "the next bytes of the message; at most the receiver's chunk limit",
        "next_sequence": "as in Credit",
        "granted_bytes": "as in Credit",
        "acknowledge": "1: answer at once, with a Credit if no chunk is about to go; 0 or 1",
    },
    "MessageHead": {
        "kind": "see Messages",
        "step": f"from 0; below 2^{STEP_MAX.bit_length() - 1}",
        "microbatch": f"from 0; below 2^{MICROBATCH_MAX.bit_length() - 1}",
        "codec": "text; byte format of the body",
        "codec_header": "msgpack map, see Codec headers; empty: no entries",
        "token_ids_bytes": "length of the first section of the data",
        "body_bytes": "length of the third",
        "loss_sum": "sum over the microbatch's tokens; finite",
        "dictionary_bytes": "length of the second",
        "layer": f"of keys and values, from 0 in the whole model; below {LAYERS_MAX}; else 0",
        "segment": f"of keys and values, from 0 in the sequence; below {SEGMENTS_MAX}; else 0",
    },
    "Credit": {
        "next_sequence": "all chunks before this one have arrived",
        "granted_bytes": "cost of what may be sent, since the link began",
    },
    "Goodbye": {},
    "Heartbeat": {
        "generation": "the sender's generation",
        "completed_steps": "steps that the sender has completed",
        "missing": "1 + the nearest stage beyond the sender that no process serves; 0: none; at most the "
        "number of stages",
        "copied_steps": "steps of the newest copy on a neighbour; the lowest over the sender and all stages beyond it",
        "preparing": "1 + the nearest stage, the sender or beyond it, that prepares its data; 0: none; at most the "
        "number of stages",
    },
    "StartViewChange": {"generation": "the generation that is over"},
    "DoViewChange": {
        "generation": "highest generation that the sender, or any stage below it, was in or has a state of",
        "incarnations": "of the processes from the sender down to the last stage",
        "steps": f"steps after which all of these could go on; falling, the last one 0; at most {STEPS_LISTED_MAX}",
    },
    "StartView": {
        "generation": "the new generation",
        "completed_steps": "all go on after so many completed steps",
        "incarnations": "of the processes of all stages, from stage 0 on",
    },
    "Finished": {},
    "AllFinished": {},
    "Drain": {},
    "LastStep": {"completed_steps": "end when so many steps are completed"},
    "Failed": {
        "stage": "the stage that has failed; the sender, or beyond it",
        "completed_steps": "steps that it had completed",
        "reason": "text; one line for people to read",
        "replays": "1: the computation failed, so it fails again at that step; 0: something around it, which may pass",
    },
    "CopiesHeld": {"stage": _COPY, "steps": "completed steps of all copies that the sender has, falling"},
    "CopyOffer": {"stage": _COPY, "completed_steps": _COMPLETED, "manifest": "describes the file: length, SHA-256"},
    "CopyProgress": {"stage": _COPY, "completed_steps": _COMPLETED, "offset": "bytes that the sender has received"},
    "CopyPart": {
        "stage": _COPY,
        "completed_steps": _COMPLETED,
        "offset": "position of the first byte",
        "data": "1 byte or more",
        "xxh3": "see below",
    },
    "CopyWanted": {"stage": _COPY, "completed_steps": _COMPLETED},
    "CopyDeclined": {"stage": _COPY, "completed_steps": _COMPLETED, "reason": "text"},
    "RoundsWanted": {
        "round": "the first round of which the sender lacks anything; at least `forget_before`",
        "offset": "bytes of it that the sender has",
        "granted_before": "the receiver may send rounds before this one; above `round`, or equal if `offset` is 0",
        "forget_before": "the sender will never ask for a round before this one again",
        "stay": "the history of the receiver's lane that the sender means, see Members; below 2^48",
    },
    "RoundPart": {
        "round": "from 0",
        "offset": "position of the first byte",
        "total_bytes": "length of the contribution",
        "contribution_xxh3": "XXH3 of the whole contribution",
        "data": "1 byte or more",
        "xxh3": "see below",
    },
    "RoundStatus": {
        "held": "by lane: that many rounds of its contributions, from 0, are held by all stages, or needed by none",
        "decided": "that many rounds are",
        "stretches": "of the log, all; none: as said last on this connection",
        "admitted": "who is to enter, by lane, rising",
        "returning": "1 + the steps from which the sender's lane goes on, which was left out; 0: it was not",
        "source": "1 + the lane whose state after these it takes up; 0: its own",
        "saved": "all stages of the lane have a checkpoint after that many steps",
        "kept": "of the lane's contributions, those before this round are gone",
        "forgot": "a stage of the lane never asks for a round before this one again",
        "there": "on Control: lanes to which a stage of this lane is connected, rising",
    },
    "RoundStretch": {
        "first": "the round from which it counts; rising, the first one 0, below `decided`",
        "members": "lanes, rising, 1 or more",
        "entered": "who of them is new with it, by lane, rising; without any, members differ from those before",
    },
    "RoundEntry": {
        "lane": "below the number of lanes",
        "first": "the round that it contributes to first",
        "begins": "steps after which it trains on; not below `copied`",
        "source": "the lane whose state it took up",
        "copied": "after how many steps",
    },
    "RoundsReceived": {
        "round": "the sender has all rounds before this one",
        "offset": "and so many bytes of this one",
        "granted_before": "as in RoundsWanted",
        "forget_before": "as in RoundsWanted",
    },
    "ProbeFrame": {
        "terms": "first frame, both ways",
        "refusal": "last frame; it has the same field number in Frame",
        "echo": "both ways",
        "turn": "from the asking side",
        "filler": "both ways",
        "done": "both ways, after the last filler",
        "measured": "from the answering side, last frame",
        "info_request": "first frame, instead of terms",
        "info_response": "the answer to info_request",
        "dial_back_result": "after info_response, if the request named a port",
    },
    "ProbeTerms": {
        "protocol_version": f"{PROTOCOL_VERSION}",
        "milliseconds": "longest time for which each direction is filled",
        "bytes": "most filler data in each direction",
        "rate_bits_per_s": "rate limit for what each side sends; 0: none",
        "latency_us": "added by each sender",
        "jitter_us": "variation of the latency, up or down; at most the latency",
        "burst_bytes": "bytes that an idle sender may send at once; 0 without a rate",
        "round_trips_only": "1: no filler, because the answering node is in a run; 0 or 1",
    },
    "ProbeEcho": {"number": "is returned unchanged"},
    "ProbeTurn": {},
    "ProbeFiller": {"data": "dropped"},
    "ProbeDone": {},
    "ProbeMeasured": {
        "bytes": "framed bytes of the steady part of the received filler",
        "microseconds": "time that they took; 0: too few bytes to measure",
    },
    "ProbeInfoRequest": {
        "protocol_version": "version of the asking side; any version is answered",
        "version": "text; version of its program",
        "port": "port at the asker's address, to be dialled back; 0: none",
        "token": f"{TOKEN_BYTES} random bytes",
    },
    "ProbeInfoResponse": {
        "protocol_version": f"{PROTOCOL_VERSION}",
        "version": "text; version of the answering program",
        "unix_us": "its clock: microseconds since 1970",
        "seen_as": "text; the address that the request came from",
        "in_a_run": "1: the node has met a neighbour; 0 or 1",
    },
    "ProbeDialBackResult": {"outcome": ", ".join(f"{int(each)}: {each.name.lower()}" for each in Outcome)},
}
FAULTS: dict[Fault, str] = {
    Fault.MALFORMED: "bytes that are not a valid frame, header, delta or section; a number out of range",
    Fault.OVERSIZED: "more bytes, values or characters than the receiver's limit",
    Fault.OUT_OF_ORDER: "a chunk, an acknowledgement, a delta or a version that is not the next one",
    Fault.UNEXPECTED: "a frame, message or dictionary that is not allowed here or now",
    Fault.CORRUPT: "a chunk, or a part of a copy or of a contribution, that does not match its checksum",
    Fault.OVERDRAWN: "a chunk beyond the credit, a round beyond the grant",
    Fault.PROTOCOL_VERSION: "the peer has another version of this protocol",
    Fault.RUN_ID: "the peer is in another run",
    Fault.CONFIGURATION: "the peer has another configuration, or sends a delta in another encoding than configured",
    Fault.STAGE: "not the stage that should be here",
    Fault.LANE: "not the lane that should be here, or a node without lanes",
    Fault.CERTIFICATE: "over TLS, a run, stage or lane that the sender's certificate does not name",
    Fault.GENERATION: "a frame, a greeting or a delta of another generation",
    Fault.FENCED: "another process has taken the place of this one",
    Fault.STOPPED: "the stage is between two generations",
    Fault.INCARNATION: "another process appears in the middle of a link",
    Fault.RESUME: "the peer asks for chunks or rounds that are not kept any more",
    Fault.TIMEOUT: "no greeting in time",
    Fault.PAYLOAD: "an impossible value: not finite, not a valid code, or another digest",
}
KINDS: dict[Kind, Row] = {
    Kind.ACTIVATION: ("down", "token ids, deltas, the tensor", "0"),
    Kind.GRADIENT: ("up", "deltas, the gradient of that microbatch's tensor", "sum of the token losses"),
    Kind.EVALUATION: ("down", "token ids, the tensor; never a delta", "0"),
    Kind.EVALUATION_LOSS: ("up", "nothing", "sum over all evaluated tokens"),
    Kind.PROBE: ("both", "filler, dropped by the receiver", "0"),
    Kind.PROJECTOR_GRADIENT: ("up", "the receiver's half of a projector's gradient, once a step", "0"),
    Kind.GRADIENT_NORM: ("both", "the body: a sum of squares, float64, once a step", "0"),
    Kind.CONTEXT: ("Context", "keys and values of a layer and segment, of the sender's own tokens", "0"),
    Kind.CONTEXT_GRADIENT: ("Context", "the gradient of such a message, from who took it to who sent it", "0"),
    Kind.CONTEXT_EVALUATION: ("Context", "as CONTEXT, of held-out text", "0"),
    Kind.CONTEXT_GRAM: (
        "Context",
        "to lane 0: Gram matrices of a layer, of the sender's tokens",
        "0",
    ),
    Kind.CONTEXT_SUBSPACE: ("Context", "from lane 0: that layer's subspaces from now on", "0"),
}
_TYPES = {1: "double", 4: "uint64", 6: "fixed64", 7: "fixed32", 9: "string", 12: "bytes", 13: "uint32"}


def bits(number: int) -> str:
    """2^n, where it is one."""
    exponent = number.bit_length() - 1
    return f"2^{exponent}" if number == 2**exponent and exponent > 20 else str(number)


def type_of(field: Any) -> str:
    name = field.message_type.name if field.message_type else _TYPES[field.type]
    return f"repeated {name}" if field.is_repeated else name


def fields_of(names: list[str]) -> list[Row]:
    rows: list[Row] = [("message", "no.", "field", "type", "what it says")]
    for name in names:
        descriptor, said = pb.DESCRIPTOR.message_types_by_name[name], FIELDS[name]
        assert {field.name for field in descriptor.fields} == set(said), name
        rows += [(name, str(f.number), f"`{f.name}`", type_of(f), said[f.name]) for f in descriptor.fields]
    return rows


def transitions(table: Mapping[Any, Mapping[type[Frame], Any]], frames: list[str]) -> list[Row]:
    assert {kind.__name__ for row in table.values() for kind in row} == set(frames)
    rows: list[Row] = [("state", *frames)]
    for state, row in table.items():
        to = {kind.__name__: following for kind, following in row.items()}
        rows.append((f"{state.name}: {state.value}", *(to[kind].name if kind in to else "refused" for kind in frames)))
    return rows


def faults() -> list[Row]:
    rows: list[Row] = [("name", "what was found", "then the dialler")]
    for fault in Fault:
        then = "dials again"
        if fault in PASSING:
            then = "dials again at once"
        elif fault in THEIR_PLACE:
            then = "gives up if it was refused; dials again if it refused"
        elif fault in PERMANENT:
            then = "gives up"
        rows.append((f"`{fault}`", FAULTS[fault], then))
    return rows


def kinds() -> list[Row]:
    return [("no.", "kind", "goes", "data", "loss_sum"), *((str(int(k)), k.name, *KINDS[k]) for k in sorted(Kind))]


def limits() -> list[Row]:
    largest = Limits(message_bytes=1)
    return [
        ("limit", "value"),
        ("data of a chunk, bytes, unless configured lower", str(largest.chunk_bytes)),
        ("frame, bytes beside its data", str(ENVELOPE_BYTES_MAX)),
        ("codec header, bytes", str(HEADER_BYTES_MAX)),
        ("codec header, keys and values and containers, all levels together", str(HEADER_VALUES_MAX)),
        ("codec header, levels below the map", str(HEADER_DEPTH_MAX)),
        ("any text, characters (code points)", str(TEXT_CHARACTERS_MAX)),
        ("step, completed steps, control frame's generation and offset: below", bits(STEP_MAX)),
        ("microbatch, a version's index: below", bits(MICROBATCH_MAX)),
        ("layer; segment: below", f"{LAYERS_MAX}, {SEGMENTS_MAX}"),
        ("cost of a message beside its data, bytes of credit", str(MESSAGE_COST_BYTES)),
        ("stages or steps in a control frame", str(LISTED_MAX)),
        ("manifest of a copy, bytes", str(BYTES_MAX["manifest"])),
        ("part of a copy, bytes", str(PART_BYTES_MAX)),
        ("steps that a stage offers, 0 among them", str(STEPS_LISTED_MAX)),
        ("generations that a DoViewChange or StartView may be ahead", bits(GENERATIONS_AHEAD_MAX)),
        ("parts of a copy that are acknowledged at once, at most", str(PARTS_TOGETHER)),
        ("parts of a copy that are not acknowledged: from, to", f"{PARTS_AHEAD_LEAST}, {PARTS_AHEAD_MOST}"),
        ("part of a contribution, bytes", str(PART_BYTES_MAX)),
        ("parts of a contribution that are acknowledged at once, at most", str(PARTS_TOGETHER)),
        ("parts of contributions that a sender must be ready to send ahead", str(WINDOW_PARTS_LEAST)),
        ("rounds granted beyond the one that a node is at", str(ROUNDS_AHEAD)),
        ("lanes in a status; stretches of rounds in it", f"{LANES_MAX}, {STRETCHES_MAX}"),
        ("copies that may be declined on one connection", str(DECLINED_MAX)),
        ("control frames that wait for one neighbour", str(QUEUED_MAX)),
        ("seconds between two Heartbeats", f"{HEARTBEAT_EVERY_S:g}"),
        ("seconds between two attempts to dial: first, most", f"{RETRY_FIRST_S:g}, {RETRY_MOST_S:g}"),
        ("seconds to deliver a refusal", f"{REFUSAL_TIMEOUT_S:g}"),
        ("streams that a node serves at once", str(CONNECTIONS_MAX)),
        ("digest of a dictionary, bytes", str(DIGEST_BYTES)),
        ("probe: seconds and bytes in each direction", f"{SECONDS_MAX:g}, {bits(PROBE_BYTES_MAX)}"),
        ("probe: echoes; filler in a frame, bytes", f"{ECHOES_MAX}, {FILLER_BYTES_MAX}"),
        ("probe: rate limit, bits/s, from, to", "{}, {}".format(*RATE_BITS_PER_S)),
        ("probe: latency, seconds; burst, bytes", f"{LATENCY_S_MAX:g}, {BURST_BYTES_MAX}"),
    ]


def encodings() -> list[Row]:
    said: dict[Encoding, tuple[str, str, str]] = {
        "fp64": ("8RW", "float64", "the value"),
        "fp32": ("4RW", "float32", "the value"),
        "bf16": ("2RW", "bfloat16: the upper two bytes of a float32", "the value"),
        "int8": ("2R + RW", "R scales in bf16; then RW codes, signed bytes, -127 to 127", "code x scale of its row"),
        "int4": (
            "2R + ceil(RW / 2)",
            "R scales in bf16; then RW codes, -7 to 7, as code + 8, two in a byte, the earlier one in the lower four "
            "bits; of an odd number the last upper four bits are 8",
            "code x scale of its row",
        ),
    }
    sizes = {"8RW": 8 * 15, "4RW": 4 * 15, "2RW": 2 * 15, "2R + RW": 2 * 5 + 15, "2R + ceil(RW / 2)": 2 * 5 + 8}
    assert all(rows_bytes(5, 3, name) == sizes[size] for name, (size, _, _) in said.items())
    return [
        ("encoding", "bytes for R rows of W", "layout", "change of an entry"),
        *((f"`{n}`", *v) for n, v in said.items()),
    ]


def index_widths() -> list[Row]:
    rows: list[Row] = [("entries of the dictionary", "bytes of an index")]
    for least, most in ((1, 2**8), (2**8 + 1, 2**16), (2**16 + 1, 2**32)):
        widths = {DictionarySpec("x", count, 1).index_dtype.itemsize for count in (least, most)}
        (width,) = widths
        rows.append((f"{least} to {bits(most)}", str(width)))
    return rows


# -- what a control frame brings about, by trying it -------------------------------------------------------------------

_FRAMES: list[ControlFrame] = [
    Heartbeat(generation=0, completed_steps=1),
    StartViewChange(generation=0),
    DoViewChange(generation=0, incarnations=(102,), steps=(5, 0)),
    StartView(generation=1, completed_steps=5, incarnations=(100, 101, 102)),
    Finished(),
    AllFinished(),
    Drain(),
    LastStep(completed_steps=9),
    Failed(stage=2, completed_steps=9, reason="x"),
]


def in_phase(phase: RollbackPhase) -> Rollback:
    """The middle one of three stages, both neighbours being there."""

    machine = Rollback(identity(1, 3), joining=False)
    machine.meet("above", identity(0, 3).greeting())
    machine.meet("below", identity(2, 3).greeting())
    if phase in (RollbackPhase.STOPPING, RollbackPhase.STOPPED):
        machine.start_view_change()
    if phase is RollbackPhase.STOPPED:
        machine.stopped({5})
    if phase is RollbackPhase.FINISHED:
        machine.finished()
        machine.receive("below", Finished())
        machine.receive("above", AllFinished())
    assert machine.phase is phase
    return machine


def brought_about(phase: RollbackPhase, side: Side, frame: ControlFrame) -> str | None:
    """The effect in words; None if the frame may not come from that side."""
    machine = in_phase(phase)
    if isinstance(frame, Finished):
        machine.finished()
    if isinstance(frame, AllFinished) and phase is RollbackPhase.RUNNING:
        machine.finished()
        machine.receive("below", Finished())
    if isinstance(frame, Failed):
        frame = replace(frame, stage=machine.identity.beside(side))
    try:
        effects = machine.receive(side, frame)
    except RemoteProtocolError as error:
        if error.fault is not Fault.UNEXPECTED:
            raise
        if isinstance(frame, AllFinished) and side == "above":
            return "refused"
        return None
    said = ", ".join(_worded(effect) for effect in effects)
    change = f"-> {machine.phase.name}" if machine.phase is not phase else ""
    return "; ".join(filter(None, [change, said])) or "nothing"


def _worded(effect: Effect) -> str:
    match effect:
        case Send():
            return f"{type(effect.frame).__name__} {'up' if effect.side == 'above' else 'down'}"
        case Stop():
            return "break off"
        case Start():
            return "restore, go on"
        case EndAfter():
            return "end after that step"
        case End():
            return "end with the reason"
        case _:
            return "end"


def waves() -> list[Row]:
    rows: list[Row] = [("frame", "from", *(f"{phase.name}: {phase.value}" for phase in RollbackPhase))]
    for frame in _FRAMES:
        cells = {
            side: tuple(brought_about(phase, side, frame) for phase in RollbackPhase) for side in ("above", "below")
        }
        some = {side: cell for side, cell in cells.items() if any(cell)}
        same = len(some) == 2 and len(set(some.values())) == 1
        for side, cell in list(some.items())[:1] if same else some.items():
            rows.append((type(frame).__name__, "either" if same else side, *(text or "refused" for text in cell)))
    return rows


# -- the document ------------------------------------------------------------------------------------------------------

LINK = ["Frame", "Greeting", "Refusal", "Chunk", "MessageHead", "Credit", "Goodbye"]
CONTROL = ["Heartbeat", "StartViewChange", "DoViewChange", "StartView", "Finished", "AllFinished", "Drain", "LastStep"]
CONTROL += ["Failed"]
ROUND_FRAMES = [
    "Greeting",
    "Heartbeat",
    "RoundStatus",
    "RoundsWanted",
    "RoundPart",
    "RoundsReceived",
    "CopyWanted",
    "CopyOffer",
    "CopyPart",
    "CopyProgress",
    "CopyDeclined",
    "Goodbye",
    "Refusal",
]
COPIES = ["CopiesHeld", "CopyOffer", "CopyProgress", "CopyPart", "CopyWanted", "CopyDeclined"]
ROUNDS = ["RoundsWanted", "RoundPart", "RoundsReceived", "RoundStatus", "RoundStretch", "RoundEntry"]
PROBES = ["ProbeFrame", "ProbeTerms", "ProbeEcho", "ProbeTurn", "ProbeFiller", "ProbeDone", "ProbeMeasured"]
PROBES += ["ProbeInfoRequest", "ProbeInfoResponse", "ProbeDialBackResult"]


def tables() -> dict[str, list[Row]]:
    """All tables by the names that the document gives them. The first row is the heading."""
    assert {*LINK, *CONTROL, *COPIES, *ROUNDS, *PROBES} == set(pb.DESCRIPTOR.message_types_by_name) == set(FIELDS)
    return {
        "link fields": fields_of(LINK),
        "control fields": fields_of(CONTROL),
        "copy fields": fields_of(COPIES),
        "round fields": fields_of(ROUNDS),
        "probe fields": fields_of(PROBES),
        "messages": kinds(),
        "limits": limits(),
        "link states": transitions(TRANSITIONS, ["Greeting", "Chunk", "Credit", "Goodbye", "Refusal"]),
        "round states": transitions(ROUND_TRANSITIONS, ROUND_FRAMES),
        "faults": faults(),
        "index widths": index_widths(),
        "encodings": encodings(),
        "waves": waves(),
    }


def rendered(rows: list[Row]) -> str:
    heading, *others = rows
    lines = [heading, tuple("---" for _ in heading), *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(document: str) -> str:
    """The document with its tables filled in. Raises ValueError if it lacks a table, or names one that is not known."""
    left = tables()

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name not in left:
            raise ValueError(f"there is no table '{name}', or it comes twice")
        return f"<!-- table: {name} -->\n{rendered(left.pop(name))}\n<!-- end -->"

    document = re.sub(r"<!-- table: ([a-z ]+) -->\n.*?<!-- end -->", fill, document, flags=re.DOTALL)
    if left:
        raise ValueError(f"the document has no place for {', '.join(left)}")
    return document


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"docs/{DOCUMENT.name}: {len(tables())} tables")
