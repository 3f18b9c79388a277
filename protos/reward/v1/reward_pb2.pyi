from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]

class ItemStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ITEM_STATUS_UNSPECIFIED: _ClassVar[ItemStatus]
    ITEM_STATUS_OK: _ClassVar[ItemStatus]
    ITEM_STATUS_INVALID_INPUT: _ClassVar[ItemStatus]
    ITEM_STATUS_SCORER_ERROR: _ClassVar[ItemStatus]
    ITEM_STATUS_NON_FINITE: _ClassVar[ItemStatus]

class InputKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INPUT_KIND_UNSPECIFIED: _ClassVar[InputKind]
    INPUT_KIND_DECODED_IMAGES: _ClassVar[InputKind]
    INPUT_KIND_PASTED_IMAGES: _ClassVar[InputKind]
    INPUT_KIND_MASKS: _ClassVar[InputKind]
    INPUT_KIND_REFERENCE_IMAGES: _ClassVar[InputKind]
    INPUT_KIND_PROMPTS: _ClassVar[InputKind]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_UINT8: DataType
ITEM_STATUS_UNSPECIFIED: ItemStatus
ITEM_STATUS_OK: ItemStatus
ITEM_STATUS_INVALID_INPUT: ItemStatus
ITEM_STATUS_SCORER_ERROR: ItemStatus
ITEM_STATUS_NON_FINITE: ItemStatus
INPUT_KIND_UNSPECIFIED: InputKind
INPUT_KIND_DECODED_IMAGES: InputKind
INPUT_KIND_PASTED_IMAGES: InputKind
INPUT_KIND_MASKS: InputKind
INPUT_KIND_REFERENCE_IMAGES: InputKind
INPUT_KIND_PROMPTS: InputKind

class Tensor(_message.Message):
    __slots__ = ("data_type", "shape", "data")
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    data_type: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, data_type: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ImageBatch(_message.Message):
    __slots__ = ("tensor",)
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    tensor: Tensor
    def __init__(self, tensor: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "scorers", "decoded_images", "pasted_images", "masks", "reference_images", "prompts", "sample_ids", "group_ids", "expected_fingerprints")
    class ExpectedFingerprintsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SCORERS_FIELD_NUMBER: _ClassVar[int]
    DECODED_IMAGES_FIELD_NUMBER: _ClassVar[int]
    PASTED_IMAGES_FIELD_NUMBER: _ClassVar[int]
    MASKS_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_IMAGES_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_IDS_FIELD_NUMBER: _ClassVar[int]
    GROUP_IDS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FINGERPRINTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    scorers: _containers.RepeatedScalarFieldContainer[str]
    decoded_images: ImageBatch
    pasted_images: ImageBatch
    masks: ImageBatch
    reference_images: ImageBatch
    prompts: _containers.RepeatedScalarFieldContainer[str]
    sample_ids: _containers.RepeatedScalarFieldContainer[str]
    group_ids: _containers.RepeatedScalarFieldContainer[str]
    expected_fingerprints: _containers.ScalarMap[str, str]
    def __init__(self, request_id: _Optional[str] = ..., scorers: _Optional[_Iterable[str]] = ..., decoded_images: _Optional[_Union[ImageBatch, _Mapping]] = ..., pasted_images: _Optional[_Union[ImageBatch, _Mapping]] = ..., masks: _Optional[_Union[ImageBatch, _Mapping]] = ..., reference_images: _Optional[_Union[ImageBatch, _Mapping]] = ..., prompts: _Optional[_Iterable[str]] = ..., sample_ids: _Optional[_Iterable[str]] = ..., group_ids: _Optional[_Iterable[str]] = ..., expected_fingerprints: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("request_id", "results", "timing", "server_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    results: _containers.RepeatedCompositeFieldContainer[ScorerResult]
    timing: Timing
    server_id: str
    def __init__(self, request_id: _Optional[str] = ..., results: _Optional[_Iterable[_Union[ScorerResult, _Mapping]]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., server_id: _Optional[str] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_ms", "compute_ms", "batch_items")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    BATCH_ITEMS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    compute_ms: float
    batch_items: int
    def __init__(self, queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ..., batch_items: _Optional[int] = ...) -> None: ...

class ScorerResult(_message.Message):
    __slots__ = ("scorer", "fingerprint", "scores", "statuses", "messages", "components")
    SCORER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    scorer: str
    fingerprint: str
    scores: _containers.RepeatedScalarFieldContainer[float]
    statuses: _containers.RepeatedScalarFieldContainer[ItemStatus]
    messages: _containers.RepeatedScalarFieldContainer[str]
    components: _containers.RepeatedCompositeFieldContainer[Component]
    def __init__(self, scorer: _Optional[str] = ..., fingerprint: _Optional[str] = ..., scores: _Optional[_Iterable[float]] = ..., statuses: _Optional[_Iterable[_Union[ItemStatus, str]]] = ..., messages: _Optional[_Iterable[str]] = ..., components: _Optional[_Iterable[_Union[Component, _Mapping]]] = ...) -> None: ...

class Component(_message.Message):
    __slots__ = ("name", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "limits", "scorers", "server_id", "device")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SCORERS_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    version: str
    limits: Limits
    scorers: _containers.RepeatedCompositeFieldContainer[ScorerInfo]
    server_id: str
    device: str
    def __init__(self, version: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., scorers: _Optional[_Iterable[_Union[ScorerInfo, _Mapping]]] = ..., server_id: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "max_items_per_request", "max_queue_items")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ITEMS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_ITEMS_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_items_per_request: int
    max_queue_items: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_items_per_request: _Optional[int] = ..., max_queue_items: _Optional[int] = ...) -> None: ...

class ScorerInfo(_message.Message):
    __slots__ = ("name", "fingerprint", "description", "licence", "typical_low", "typical_high", "components", "needs")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_LOW_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_HIGH_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    description: str
    licence: str
    typical_low: float
    typical_high: float
    components: _containers.RepeatedScalarFieldContainer[str]
    needs: _containers.RepeatedScalarFieldContainer[InputKind]
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., description: _Optional[str] = ..., licence: _Optional[str] = ..., typical_low: _Optional[float] = ..., typical_high: _Optional[float] = ..., components: _Optional[_Iterable[str]] = ..., needs: _Optional[_Iterable[_Union[InputKind, str]]] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("server_id", "uptime_seconds", "requests_scored", "requests_pushed_back", "requests_refused", "requests_dropped", "queue_items", "scorers")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_SCORED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PUSHED_BACK_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_DROPPED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_ITEMS_FIELD_NUMBER: _ClassVar[int]
    SCORERS_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    uptime_seconds: float
    requests_scored: int
    requests_pushed_back: int
    requests_refused: int
    requests_dropped: int
    queue_items: int
    scorers: _containers.RepeatedCompositeFieldContainer[ScorerStats]
    def __init__(self, server_id: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., requests_scored: _Optional[int] = ..., requests_pushed_back: _Optional[int] = ..., requests_refused: _Optional[int] = ..., requests_dropped: _Optional[int] = ..., queue_items: _Optional[int] = ..., scorers: _Optional[_Iterable[_Union[ScorerStats, _Mapping]]] = ...) -> None: ...

class ScorerStats(_message.Message):
    __slots__ = ("name", "items_scored", "items_failed", "mean", "std", "min", "max", "compute_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ITEMS_SCORED_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FAILED_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    items_scored: int
    items_failed: int
    mean: float
    std: float
    min: float
    max: float
    compute_seconds: float
    def __init__(self, name: _Optional[str] = ..., items_scored: _Optional[int] = ..., items_failed: _Optional[int] = ..., mean: _Optional[float] = ..., std: _Optional[float] = ..., min: _Optional[float] = ..., max: _Optional[float] = ..., compute_seconds: _Optional[float] = ...) -> None: ...
