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
    __slots__ = ("request_id", "results")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    results: _containers.RepeatedCompositeFieldContainer[ScorerResult]
    def __init__(self, request_id: _Optional[str] = ..., results: _Optional[_Iterable[_Union[ScorerResult, _Mapping]]] = ...) -> None: ...

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
    __slots__ = ("version", "limits", "scorers")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SCORERS_FIELD_NUMBER: _ClassVar[int]
    version: str
    limits: Limits
    scorers: _containers.RepeatedCompositeFieldContainer[ScorerInfo]
    def __init__(self, version: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., scorers: _Optional[_Iterable[_Union[ScorerInfo, _Mapping]]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "max_items_per_request")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ITEMS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_items_per_request: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_items_per_request: _Optional[int] = ...) -> None: ...

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
