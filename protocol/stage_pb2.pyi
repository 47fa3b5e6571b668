from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("greeting", "refusal", "chunk", "credit", "goodbye")
    GREETING_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    greeting: Greeting
    refusal: Refusal
    chunk: Chunk
    credit: Credit
    goodbye: Goodbye
    def __init__(self, greeting: _Optional[_Union[Greeting, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class Greeting(_message.Message):
    __slots__ = ("protocol_version", "run_id", "epoch", "configuration", "stage", "stages", "incarnation", "next_sequence", "granted_bytes", "committed_steps")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    GRANTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_STEPS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    run_id: str
    epoch: int
    configuration: str
    stage: int
    stages: int
    incarnation: int
    next_sequence: int
    granted_bytes: int
    committed_steps: int
    def __init__(self, protocol_version: _Optional[int] = ..., run_id: _Optional[str] = ..., epoch: _Optional[int] = ..., configuration: _Optional[str] = ..., stage: _Optional[int] = ..., stages: _Optional[int] = ..., incarnation: _Optional[int] = ..., next_sequence: _Optional[int] = ..., granted_bytes: _Optional[int] = ..., committed_steps: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: str
    reason: str
    def __init__(self, code: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("sequence", "epoch", "head", "crc32", "data", "next_sequence", "granted_bytes", "acknowledge")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    GRANTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    epoch: int
    head: MessageHead
    crc32: int
    data: bytes
    next_sequence: int
    granted_bytes: int
    acknowledge: int
    def __init__(self, sequence: _Optional[int] = ..., epoch: _Optional[int] = ..., head: _Optional[_Union[MessageHead, _Mapping]] = ..., crc32: _Optional[int] = ..., data: _Optional[bytes] = ..., next_sequence: _Optional[int] = ..., granted_bytes: _Optional[int] = ..., acknowledge: _Optional[int] = ...) -> None: ...

class MessageHead(_message.Message):
    __slots__ = ("kind", "step", "microbatch", "codec", "codec_header", "token_ids_bytes", "body_bytes", "dictionary_bytes", "loss_sum")
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CODEC_HEADER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_BYTES_FIELD_NUMBER: _ClassVar[int]
    BODY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DICTIONARY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    kind: int
    step: int
    microbatch: int
    codec: str
    codec_header: bytes
    token_ids_bytes: int
    body_bytes: int
    dictionary_bytes: int
    loss_sum: float
    def __init__(self, kind: _Optional[int] = ..., step: _Optional[int] = ..., microbatch: _Optional[int] = ..., codec: _Optional[str] = ..., codec_header: _Optional[bytes] = ..., token_ids_bytes: _Optional[int] = ..., body_bytes: _Optional[int] = ..., dictionary_bytes: _Optional[int] = ..., loss_sum: _Optional[float] = ...) -> None: ...

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
