"""The tables in docs/protocol.md, from the code's own: `python -m tests.protocol_tables` writes them into the document.

What a field or a fault means is said here, and a field or a fault of which nothing is said, or that is gone, is an
error: so the document cannot fall behind. Rows on what follows from a frame are found out by trying it.
"""

from __future__ import annotations

import re
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
    Finished,
    Heartbeat,
    LastStep,
    StartView,
    StartViewChange,
)
from thinpipe.protocol.copy_transfer import PARTS_AHEAD_LEAST, PARTS_AHEAD_MOST, PARTS_TOGETHER
from thinpipe.protocol.delta import DIGEST_BYTES, DictionarySpec
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.header import HEADER_BYTES_MAX, HEADER_DEPTH_MAX, HEADER_VALUES_MAX, TEXT_CHARACTERS_MAX
from thinpipe.protocol.messages import ENVELOPE_BYTES_MAX, MICROBATCH_MAX, PROTOCOL_VERSION, Kind, Limits
from thinpipe.protocol.path_probe import (
    BALLAST_BYTES_MAX,
    BURST_BYTES_MAX,
    ECHOES_MAX,
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
    EndAfter,
    Rollback,
    RollbackPhase,
    Send,
    Side,
    Start,
    Stop,
)
from thinpipe.protocol.rows import Encoding, rows_bytes
from thinpipe.protocol.session import TRANSITIONS, SessionState

from .builders import identity

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "protocol.md"
Row = tuple[str, ...]

_COPY = "whose state it is"
_COMPLETED = "after how many completed steps"
FIELDS: dict[str, dict[str, str]] = {
    "Frame": {
        "greeting": "first frame of either stream, both ways",
        "refusal": "either stream, last",
        "chunk": "Link",
        "credit": "Link",
        "goodbye": "Link, last of its sender's chunks",
        **dict.fromkeys(
            [
                "heartbeat",
                "start_view_change",
                "do_view_change",
                "start_view",
                "finished",
                "all_finished",
                "drain",
                "last_step",
            ],
            "Control",
        ),
        **dict.fromkeys(
            ["copies_held", "copy_offer", "copy_progress", "copy_part", "copy_wanted", "copy_declined"],
            "Control: copies",
        ),
    },
    "Greeting": {
        "protocol_version": f"{PROTOCOL_VERSION}",
        "run_id": "text",
        "generation": "Link: the generation of this link. Control: the one that the sender is, or was last, in",
        "configuration": "text; hash of all that must agree; perhaps ` table ` and the digest of a generated table",
        "stage": "of the sender, from 0",
        "stages": "of the pipeline",
        "incarnation": "random number of the sender's process, drawn once at its start",
        "next_sequence": "Link: of the first chunk that the sender lacks. Control: 0",
        "granted_bytes": "Link: as in Credit. Control: 0",
        "completed_steps": "Control: of this generation, for people. Link: 0",
        "joining": "Control: 1 if the sender takes a stage's place and is in no generation; 0 or 1",
    },
    "Refusal": {"code": "text; name of a fault", "reason": "text; one line for people, with both values"},
    "Chunk": {
        "sequence": "from 0 in each direction and generation, without a gap",
        "generation": "the link's",
        "head": "present on the first chunk of a message and on no other",
        "crc32": "see Checksum",
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
    },
    "Credit": {
        "next_sequence": "all chunks before this one have arrived",
        "granted_bytes": "cost of what may be sent, since the link began",
    },
    "Goodbye": {},
    "Heartbeat": {
        "generation": "the sender's",
        "completed_steps": "of this generation",
        "missing": "1 + the nearest stage beyond the sender that nobody serves; 0: none; at most the number of stages",
        "copied_steps": "least, over the sender and all beyond it, of the newest state that a neighbour has a copy of",
    },
    "StartViewChange": {"generation": "the one that is over"},
    "DoViewChange": {
        "generation": "highest that the sender, or any stage below it, was in",
        "incarnations": "from the sender's down to the last stage's",
        "steps": f"falling, last one 0; after which all of these could go on; at most {STEPS_LISTED_MAX} are offered",
    },
    "StartView": {
        "generation": "the new one",
        "completed_steps": "go on after these",
        "incarnations": "of all stages, from stage 0 on",
    },
    "Finished": {},
    "AllFinished": {},
    "Drain": {},
    "LastStep": {"completed_steps": "end when so many are completed"},
    "CopiesHeld": {"stage": _COPY, "steps": "falling; all that the sender has of it"},
    "CopyOffer": {"stage": _COPY, "completed_steps": _COMPLETED, "manifest": "describes the file: length, SHA-256"},
    "CopyProgress": {"stage": _COPY, "completed_steps": _COMPLETED, "offset": "bytes that the sender has got"},
    "CopyPart": {
        "stage": _COPY,
        "completed_steps": _COMPLETED,
        "offset": "of the first byte",
        "data": "1 byte or more",
        "crc32": "see below",
    },
    "CopyWanted": {"stage": _COPY, "completed_steps": _COMPLETED},
    "CopyDeclined": {"stage": _COPY, "completed_steps": _COMPLETED, "reason": "text"},
    "ProbeFrame": {
        "terms": "first, both ways",
        "refusal": "last; the number that it has in Frame",
        "echo": "both ways",
        "turn": "from who asks",
        "filler": "both ways",
        "done": "both ways, after the last filler",
        "measured": "from who answers, last",
        "info_request": "first, instead of terms",
        "info_response": "the answer to a visit",
        "dial_back_result": "after it, if the visit named a port",
    },
    "ProbeTerms": {
        "protocol_version": f"{PROTOCOL_VERSION}",
        "milliseconds": "that each direction is filled, at most",
        "bytes": "of filler data in each direction, at most",
        "rate_bits_per_s": "by which both sides shape what they send; 0: they do not",
        "latency_us": "added by each sender",
        "jitter_us": "of it, either way; at most the latency",
        "burst_bytes": "that an idle sender passes at once; 0 without a rate",
        "round_trips_only": "1: no filler, as who answers is in a run; 0 or 1",
    },
    "ProbeEcho": {"number": "comes back as it is"},
    "ProbeTurn": {},
    "ProbeFiller": {"data": "dropped"},
    "ProbeDone": {},
    "ProbeMeasured": {
        "bytes": "framed, of the steady part of the filler that came",
        "microseconds": "that they took; 0: too little came to tell",
    },
    "ProbeInfoRequest": {
        "protocol_version": "who visits speaks; another one is answered too",
        "version": "text; of its program",
        "port": "of its address, to be dialled back; 0: none",
        "token": f"{TOKEN_BYTES} random bytes",
    },
    "ProbeInfoResponse": {
        "protocol_version": f"{PROTOCOL_VERSION}",
        "version": "text; of the program that answers",
        "unix_us": "its clock: microseconds since 1970",
        "seen_as": "text; the address that the visit came from",
        "in_a_run": "1: it has met a neighbour; 0 or 1",
    },
    "ProbeDialBackResult": {"outcome": ", ".join(f"{int(each)}: {each.name.lower()}" for each in Outcome)},
}
FAULTS: dict[Fault, str] = {
    Fault.MALFORMED: "bytes that are no frame, header, delta or section; a number out of range",
    Fault.OVERSIZED: "more bytes, values or characters than the receiver's limit",
    Fault.OUT_OF_ORDER: "a chunk, an acknowledgement, a delta or a version that is not the next one",
    Fault.UNEXPECTED: "a frame, message or dictionary that may not come here or now",
    Fault.CORRUPT: "a chunk, or a part of a copy, that does not match its checksum",
    Fault.OVERDRAWN: "a chunk beyond the credit",
    Fault.PROTOCOL_VERSION: "another version of this protocol",
    Fault.RUN_ID: "another run",
    Fault.CONFIGURATION: "another configuration, or a delta in another encoding than configured",
    Fault.STAGE: "not the stage that should be here",
    Fault.CERTIFICATE: "over TLS, a run or stage that the sender's certificate does not name",
    Fault.GENERATION: "a frame, a greeting or a delta of another generation",
    Fault.FENCED: "a process whose place another one has taken",
    Fault.STOPPED: "the stage is between two generations",
    Fault.INCARNATION: "another process in the middle of a link",
    Fault.RESUME: "chunks are asked for that are not kept",
    Fault.TIMEOUT: "no greeting in time",
    Fault.PAYLOAD: "a value that cannot be: not finite, no code, another digest",
}
KINDS: dict[Kind, Row] = {
    Kind.ACTIVATION: ("down", "token ids, deltas, the tensor", "0"),
    Kind.GRADIENT: ("up", "deltas, the gradient of that microbatch's tensor", "sum of the token losses"),
    Kind.EVALUATION: ("down", "token ids, the tensor; never a delta", "0"),
    Kind.EVALUATION_LOSS: ("up", "nothing", "sum over all evaluated tokens"),
    Kind.PROBE: ("both", "filler, dropped by the receiver", "0"),
    Kind.PROJECTOR_GRADIENT: ("up", "the receiver's half of a projector's gradient, once a step", "0"),
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


def transitions() -> list[Row]:
    frames = ["Greeting", "Chunk", "Credit", "Goodbye", "Refusal"]
    assert {kind.__name__ for row in TRANSITIONS.values() for kind in row} == set(frames)
    rows: list[Row] = [("state", *frames)]
    for state in SessionState:
        to = {kind.__name__: following for kind, following in TRANSITIONS[state].items()}
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
        ("frame, bytes beside that", str(ENVELOPE_BYTES_MAX)),
        ("codec header, bytes", str(HEADER_BYTES_MAX)),
        ("codec header, keys and values and containers, all levels together", str(HEADER_VALUES_MAX)),
        ("codec header, levels below the map", str(HEADER_DEPTH_MAX)),
        ("any text, characters (code points)", str(TEXT_CHARACTERS_MAX)),
        ("step, completed steps, control frame's generation and offset: below", bits(STEP_MAX)),
        ("microbatch, a version's index: below", bits(MICROBATCH_MAX)),
        ("cost of a message beside its data, bytes of credit", str(MESSAGE_COST_BYTES)),
        ("stages or steps in a control frame", str(LISTED_MAX)),
        ("manifest of a copy, bytes", str(BYTES_MAX["manifest"])),
        ("part of a copy, bytes", str(PART_BYTES_MAX)),
        ("steps that a stage offers, 0 among them", str(STEPS_LISTED_MAX)),
        ("generations that a DoViewChange or StartView may be ahead", bits(GENERATIONS_AHEAD_MAX)),
        ("parts of a copy that are acknowledged at once, at most", str(PARTS_TOGETHER)),
        ("parts of a copy that are not acknowledged: from, to", f"{PARTS_AHEAD_LEAST}, {PARTS_AHEAD_MOST}"),
        ("copies that are declined on one connection", str(DECLINED_MAX)),
        ("control frames that wait for one neighbour", str(QUEUED_MAX)),
        ("seconds between two Heartbeat", f"{HEARTBEAT_EVERY_S:g}"),
        ("seconds between two attempts to dial: first, most", f"{RETRY_FIRST_S:g}, {RETRY_MOST_S:g}"),
        ("seconds in which a refusal is told", f"{REFUSAL_TIMEOUT_S:g}"),
        ("streams that a node serves at once", str(CONNECTIONS_MAX)),
        ("digest of a dictionary, bytes", str(DIGEST_BYTES)),
        ("probe: seconds and bytes in each direction", f"{SECONDS_MAX:g}, {bits(PROBE_BYTES_MAX)}"),
        ("probe: echoes; filler in a frame, bytes", f"{ECHOES_MAX}, {BALLAST_BYTES_MAX}"),
        ("probe: rate to shape by, bits/s, from, to", "{}, {}".format(*RATE_BITS_PER_S)),
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
    """In words; None: it may not come from there."""
    machine = in_phase(phase)
    if isinstance(frame, Finished):
        machine.finished()
    if isinstance(frame, AllFinished) and phase is RollbackPhase.RUNNING:
        machine.finished()
        machine.receive("below", Finished())
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
COPIES = ["CopiesHeld", "CopyOffer", "CopyProgress", "CopyPart", "CopyWanted", "CopyDeclined"]
PROBES = ["ProbeFrame", "ProbeTerms", "ProbeEcho", "ProbeTurn", "ProbeFiller", "ProbeDone", "ProbeMeasured"]
PROBES += ["ProbeInfoRequest", "ProbeInfoResponse", "ProbeDialBackResult"]


def tables() -> dict[str, list[Row]]:
    """By the name that the document calls them by; the first row is the heading."""
    assert {*LINK, *CONTROL, *COPIES, *PROBES} == set(pb.DESCRIPTOR.message_types_by_name) == set(FIELDS)
    return {
        "link fields": fields_of(LINK),
        "control fields": fields_of(CONTROL),
        "copy fields": fields_of(COPIES),
        "probe fields": fields_of(PROBES),
        "messages": kinds(),
        "limits": limits(),
        "link states": transitions(),
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
    """The document with the tables of now. Raises ValueError for a table that it lacks, or that is none."""
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
