from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("greeting", "refusal", "chunk", "credit", "goodbye", "heartbeat", "start_view_change", "do_view_change", "start_view", "finished", "all_finished", "drain", "last_step", "copies_held", "copy_offer", "copy_progress", "copy_part", "copy_wanted", "copy_declined", "failed", "rounds_wanted", "round_part", "rounds_received", "round_status")
    GREETING_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    START_VIEW_CHANGE_FIELD_NUMBER: _ClassVar[int]
    DO_VIEW_CHANGE_FIELD_NUMBER: _ClassVar[int]
    START_VIEW_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ALL_FINISHED_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    COPIES_HELD_FIELD_NUMBER: _ClassVar[int]
    COPY_OFFER_FIELD_NUMBER: _ClassVar[int]
    COPY_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    COPY_PART_FIELD_NUMBER: _ClassVar[int]
    COPY_WANTED_FIELD_NUMBER: _ClassVar[int]
    COPY_DECLINED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_WANTED_FIELD_NUMBER: _ClassVar[int]
    ROUND_PART_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    ROUND_STATUS_FIELD_NUMBER: _ClassVar[int]
    greeting: Greeting
    refusal: Refusal
    chunk: Chunk
    credit: Credit
    goodbye: Goodbye
    heartbeat: Heartbeat
    start_view_change: StartViewChange
    do_view_change: DoViewChange
    start_view: StartView
    finished: Finished
    all_finished: AllFinished
    drain: Drain
    last_step: LastStep
    copies_held: CopiesHeld
    copy_offer: CopyOffer
    copy_progress: CopyProgress
    copy_part: CopyPart
    copy_wanted: CopyWanted
    copy_declined: CopyDeclined
    failed: Failed
    rounds_wanted: RoundsWanted
    round_part: RoundPart
    rounds_received: RoundsReceived
    round_status: RoundStatus
    def __init__(self, greeting: _Optional[_Union[Greeting, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., start_view_change: _Optional[_Union[StartViewChange, _Mapping]] = ..., do_view_change: _Optional[_Union[DoViewChange, _Mapping]] = ..., start_view: _Optional[_Union[StartView, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., all_finished: _Optional[_Union[AllFinished, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., last_step: _Optional[_Union[LastStep, _Mapping]] = ..., copies_held: _Optional[_Union[CopiesHeld, _Mapping]] = ..., copy_offer: _Optional[_Union[CopyOffer, _Mapping]] = ..., copy_progress: _Optional[_Union[CopyProgress, _Mapping]] = ..., copy_part: _Optional[_Union[CopyPart, _Mapping]] = ..., copy_wanted: _Optional[_Union[CopyWanted, _Mapping]] = ..., copy_declined: _Optional[_Union[CopyDeclined, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., rounds_wanted: _Optional[_Union[RoundsWanted, _Mapping]] = ..., round_part: _Optional[_Union[RoundPart, _Mapping]] = ..., rounds_received: _Optional[_Union[RoundsReceived, _Mapping]] = ..., round_status: _Optional[_Union[RoundStatus, _Mapping]] = ...) -> None: ...

class Greeting(_message.Message):
    __slots__ = ("protocol_version", "run_id", "generation", "configuration", "stage", "stages", "incarnation", "next_sequence", "granted_bytes", "completed_steps", "joining", "lane")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    GRANTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_STEPS_FIELD_NUMBER: _ClassVar[int]
    JOINING_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    run_id: str
    generation: int
    configuration: str
    stage: int
    stages: int
    incarnation: int
    next_sequence: int
    granted_bytes: int
    completed_steps: int
    joining: int
    lane: int
    def __init__(self, protocol_version: _Optional[int] = ..., run_id: _Optional[str] = ..., generation: _Optional[int] = ..., configuration: _Optional[str] = ..., stage: _Optional[int] = ..., stages: _Optional[int] = ..., incarnation: _Optional[int] = ..., next_sequence: _Optional[int] = ..., granted_bytes: _Optional[int] = ..., completed_steps: _Optional[int] = ..., joining: _Optional[int] = ..., lane: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: str
    reason: str
    def __init__(self, code: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("sequence", "generation", "head", "xxh3", "data", "next_sequence", "granted_bytes", "acknowledge")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    GRANTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    generation: int
    head: MessageHead
    xxh3: int
    data: bytes
    next_sequence: int
    granted_bytes: int
    acknowledge: int
    def __init__(self, sequence: _Optional[int] = ..., generation: _Optional[int] = ..., head: _Optional[_Union[MessageHead, _Mapping]] = ..., xxh3: _Optional[int] = ..., data: _Optional[bytes] = ..., next_sequence: _Optional[int] = ..., granted_bytes: _Optional[int] = ..., acknowledge: _Optional[int] = ...) -> None: ...

class MessageHead(_message.Message):
    __slots__ = ("kind", "step", "microbatch", "codec", "codec_header", "token_ids_bytes", "body_bytes", "dictionary_bytes", "loss_sum", "layer", "segment")
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CODEC_HEADER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_BYTES_FIELD_NUMBER: _ClassVar[int]
    BODY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DICTIONARY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    kind: int
    step: int
    microbatch: int
    codec: str
    codec_header: bytes
    token_ids_bytes: int
    body_bytes: int
    dictionary_bytes: int
    loss_sum: float
    layer: int
    segment: int
    def __init__(self, kind: _Optional[int] = ..., step: _Optional[int] = ..., microbatch: _Optional[int] = ..., codec: _Optional[str] = ..., codec_header: _Optional[bytes] = ..., token_ids_bytes: _Optional[int] = ..., body_bytes: _Optional[int] = ..., dictionary_bytes: _Optional[int] = ..., loss_sum: _Optional[float] = ..., layer: _Optional[int] = ..., segment: _Optional[int] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("next_sequence", "granted_bytes")
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    GRANTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    next_sequence: int
    granted_bytes: int
    def __init__(self, next_sequence: _Optional[int] = ..., granted_bytes: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("generation", "completed_steps", "missing", "copied_steps", "preparing")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_STEPS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    COPIED_STEPS_FIELD_NUMBER: _ClassVar[int]
    PREPARING_FIELD_NUMBER: _ClassVar[int]
    generation: int
    completed_steps: int
    missing: int
    copied_steps: int
    preparing: int
    def __init__(self, generation: _Optional[int] = ..., completed_steps: _Optional[int] = ..., missing: _Optional[int] = ..., copied_steps: _Optional[int] = ..., preparing: _Optional[int] = ...) -> None: ...

class StartViewChange(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class DoViewChange(_message.Message):
    __slots__ = ("generation", "incarnations", "steps")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    incarnations: _containers.RepeatedScalarFieldContainer[int]
    steps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, generation: _Optional[int] = ..., incarnations: _Optional[_Iterable[int]] = ..., steps: _Optional[_Iterable[int]] = ...) -> None: ...

class StartView(_message.Message):
    __slots__ = ("generation", "completed_steps", "incarnations")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_STEPS_FIELD_NUMBER: _ClassVar[int]
    INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    completed_steps: int
    incarnations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, generation: _Optional[int] = ..., completed_steps: _Optional[int] = ..., incarnations: _Optional[_Iterable[int]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AllFinished(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LastStep(_message.Message):
    __slots__ = ("completed_steps",)
    COMPLETED_STEPS_FIELD_NUMBER: _ClassVar[int]
    completed_steps: int
    def __init__(self, completed_steps: _Optional[int] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("stage", "completed_steps", "reason", "replays")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_STEPS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REPLAYS_FIELD_NUMBER: _ClassVar[int]
    stage: int
    completed_steps: int
    reason: str
    replays: int
    def __init__(self, stage: _Optional[int] = ..., completed_steps: _Optional[int] = ..., reason: _Optional[str] = ..., replays: _Optional[int] = ...) -> None: ...

class CopiesHeld(_message.Message):
    __slots__ = ("stage", "steps")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    stage: int
    steps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stage: _Optional[int] = ..., steps: _Optional[_Iterable[int]] = ...) -> None: ...

class CopyOffer(_message.Message):
    __slots__ = ("stage", "completed_steps", "manifest")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_STEPS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    stage: int
    completed_steps: int
    manifest: bytes
    def __init__(self, stage: _Optional[int] = ..., completed_steps: _Optional[int] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class CopyProgress(_message.Message):
    __slots__ = ("stage", "completed_steps", "offset")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_STEPS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    stage: int
    completed_steps: int
    offset: int
    def __init__(self, stage: _Optional[int] = ..., completed_steps: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class CopyPart(_message.Message):
    __slots__ = ("stage", "completed_steps", "offset", "data", "xxh3")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_STEPS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    stage: int
    completed_steps: int
    offset: int
    data: bytes
    xxh3: int
    def __init__(self, stage: _Optional[int] = ..., completed_steps: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., xxh3: _Optional[int] = ...) -> None: ...

class CopyWanted(_message.Message):
    __slots__ = ("stage", "completed_steps")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_STEPS_FIELD_NUMBER: _ClassVar[int]
    stage: int
    completed_steps: int
    def __init__(self, stage: _Optional[int] = ..., completed_steps: _Optional[int] = ...) -> None: ...

class CopyDeclined(_message.Message):
    __slots__ = ("stage", "completed_steps", "reason")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_STEPS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    stage: int
    completed_steps: int
    reason: str
    def __init__(self, stage: _Optional[int] = ..., completed_steps: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class RoundsWanted(_message.Message):
    __slots__ = ("round", "offset", "granted_before", "forget_before", "stay")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    GRANTED_BEFORE_FIELD_NUMBER: _ClassVar[int]
    FORGET_BEFORE_FIELD_NUMBER: _ClassVar[int]
    STAY_FIELD_NUMBER: _ClassVar[int]
    round: int
    offset: int
    granted_before: int
    forget_before: int
    stay: int
    def __init__(self, round: _Optional[int] = ..., offset: _Optional[int] = ..., granted_before: _Optional[int] = ..., forget_before: _Optional[int] = ..., stay: _Optional[int] = ...) -> None: ...

class RoundPart(_message.Message):
    __slots__ = ("round", "offset", "total_bytes", "contribution_xxh3", "data", "xxh3")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_XXH3_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    round: int
    offset: int
    total_bytes: int
    contribution_xxh3: int
    data: bytes
    xxh3: int
    def __init__(self, round: _Optional[int] = ..., offset: _Optional[int] = ..., total_bytes: _Optional[int] = ..., contribution_xxh3: _Optional[int] = ..., data: _Optional[bytes] = ..., xxh3: _Optional[int] = ...) -> None: ...

class RoundsReceived(_message.Message):
    __slots__ = ("round", "offset", "granted_before", "forget_before")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    GRANTED_BEFORE_FIELD_NUMBER: _ClassVar[int]
    FORGET_BEFORE_FIELD_NUMBER: _ClassVar[int]
    round: int
    offset: int
    granted_before: int
    forget_before: int
    def __init__(self, round: _Optional[int] = ..., offset: _Optional[int] = ..., granted_before: _Optional[int] = ..., forget_before: _Optional[int] = ...) -> None: ...

class RoundStatus(_message.Message):
    __slots__ = ("held", "decided", "stretches", "admitted", "returning", "source", "saved", "kept", "forgot", "there")
    HELD_FIELD_NUMBER: _ClassVar[int]
    DECIDED_FIELD_NUMBER: _ClassVar[int]
    STRETCHES_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    RETURNING_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    FORGOT_FIELD_NUMBER: _ClassVar[int]
    THERE_FIELD_NUMBER: _ClassVar[int]
    held: _containers.RepeatedScalarFieldContainer[int]
    decided: int
    stretches: _containers.RepeatedCompositeFieldContainer[RoundStretch]
    admitted: _containers.RepeatedCompositeFieldContainer[RoundEntry]
    returning: int
    source: int
    saved: int
    kept: int
    forgot: int
    there: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, held: _Optional[_Iterable[int]] = ..., decided: _Optional[int] = ..., stretches: _Optional[_Iterable[_Union[RoundStretch, _Mapping]]] = ..., admitted: _Optional[_Iterable[_Union[RoundEntry, _Mapping]]] = ..., returning: _Optional[int] = ..., source: _Optional[int] = ..., saved: _Optional[int] = ..., kept: _Optional[int] = ..., forgot: _Optional[int] = ..., there: _Optional[_Iterable[int]] = ...) -> None: ...

class RoundStretch(_message.Message):
    __slots__ = ("first", "members", "entered")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    ENTERED_FIELD_NUMBER: _ClassVar[int]
    first: int
    members: _containers.RepeatedScalarFieldContainer[int]
    entered: _containers.RepeatedCompositeFieldContainer[RoundEntry]
    def __init__(self, first: _Optional[int] = ..., members: _Optional[_Iterable[int]] = ..., entered: _Optional[_Iterable[_Union[RoundEntry, _Mapping]]] = ...) -> None: ...

class RoundEntry(_message.Message):
    __slots__ = ("lane", "first", "begins", "source", "copied")
    LANE_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    BEGINS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    lane: int
    first: int
    begins: int
    source: int
    copied: int
    def __init__(self, lane: _Optional[int] = ..., first: _Optional[int] = ..., begins: _Optional[int] = ..., source: _Optional[int] = ..., copied: _Optional[int] = ...) -> None: ...

class ProbeFrame(_message.Message):
    __slots__ = ("terms", "refusal", "echo", "turn", "filler", "done", "measured", "info_request", "info_response", "dial_back_result")
    TERMS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    FILLER_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    INFO_REQUEST_FIELD_NUMBER: _ClassVar[int]
    INFO_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    DIAL_BACK_RESULT_FIELD_NUMBER: _ClassVar[int]
    terms: ProbeTerms
    refusal: Refusal
    echo: ProbeEcho
    turn: ProbeTurn
    filler: ProbeFiller
    done: ProbeDone
    measured: ProbeMeasured
    info_request: ProbeInfoRequest
    info_response: ProbeInfoResponse
    dial_back_result: ProbeDialBackResult
    def __init__(self, terms: _Optional[_Union[ProbeTerms, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., echo: _Optional[_Union[ProbeEcho, _Mapping]] = ..., turn: _Optional[_Union[ProbeTurn, _Mapping]] = ..., filler: _Optional[_Union[ProbeFiller, _Mapping]] = ..., done: _Optional[_Union[ProbeDone, _Mapping]] = ..., measured: _Optional[_Union[ProbeMeasured, _Mapping]] = ..., info_request: _Optional[_Union[ProbeInfoRequest, _Mapping]] = ..., info_response: _Optional[_Union[ProbeInfoResponse, _Mapping]] = ..., dial_back_result: _Optional[_Union[ProbeDialBackResult, _Mapping]] = ...) -> None: ...

class ProbeTerms(_message.Message):
    __slots__ = ("protocol_version", "milliseconds", "bytes", "rate_bits_per_s", "latency_us", "jitter_us", "burst_bytes", "round_trips_only")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MILLISECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    RATE_BITS_PER_S_FIELD_NUMBER: _ClassVar[int]
    LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    JITTER_US_FIELD_NUMBER: _ClassVar[int]
    BURST_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIPS_ONLY_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    milliseconds: int
    bytes: int
    rate_bits_per_s: int
    latency_us: int
    jitter_us: int
    burst_bytes: int
    round_trips_only: int
    def __init__(self, protocol_version: _Optional[int] = ..., milliseconds: _Optional[int] = ..., bytes: _Optional[int] = ..., rate_bits_per_s: _Optional[int] = ..., latency_us: _Optional[int] = ..., jitter_us: _Optional[int] = ..., burst_bytes: _Optional[int] = ..., round_trips_only: _Optional[int] = ...) -> None: ...

class ProbeEcho(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class ProbeTurn(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProbeFiller(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ProbeDone(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProbeMeasured(_message.Message):
    __slots__ = ("bytes", "microseconds")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    MICROSECONDS_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    microseconds: int
    def __init__(self, bytes: _Optional[int] = ..., microseconds: _Optional[int] = ...) -> None: ...

class ProbeInfoRequest(_message.Message):
    __slots__ = ("protocol_version", "version", "port", "token")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    version: str
    port: int
    token: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., version: _Optional[str] = ..., port: _Optional[int] = ..., token: _Optional[bytes] = ...) -> None: ...

class ProbeInfoResponse(_message.Message):
    __slots__ = ("protocol_version", "version", "unix_us", "seen_as", "in_a_run")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UNIX_US_FIELD_NUMBER: _ClassVar[int]
    SEEN_AS_FIELD_NUMBER: _ClassVar[int]
    IN_A_RUN_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    version: str
    unix_us: int
    seen_as: str
    in_a_run: int
    def __init__(self, protocol_version: _Optional[int] = ..., version: _Optional[str] = ..., unix_us: _Optional[int] = ..., seen_as: _Optional[str] = ..., in_a_run: _Optional[int] = ...) -> None: ...

class ProbeDialBackResult(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: int
    def __init__(self, outcome: _Optional[int] = ...) -> None: ...
