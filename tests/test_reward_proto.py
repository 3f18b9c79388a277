"""The wire contract: what is committed is what the .proto says, and nothing that was promised has moved."""

from __future__ import annotations

from pathlib import Path

import ds_inpaint_protos
from ds_inpaint_protos.generate import generate
from ds_inpaint_protos.reward.v1 import reward_pb2

PROMISED = {
    "Tensor": {"data_type": 1, "shape": 2, "data": 3},
    "ImageBatch": {"tensor": 1},
    "ScoreRequest": {
        "request_id": 1,
        "scorers": 2,
        "decoded_images": 3,
        "pasted_images": 4,
        "masks": 5,
        "reference_images": 6,
        "prompts": 7,
        "sample_ids": 8,
        "group_ids": 9,
        "expected_fingerprints": 10,
    },
    "ScoreResponse": {"request_id": 1, "results": 2, "timing": 3, "server_id": 4},
    "Timing": {"queue_ms": 1, "compute_ms": 2, "batch_items": 3},
    "ScorerResult": {
        "scorer": 1,
        "fingerprint": 2,
        "scores": 3,
        "statuses": 4,
        "messages": 5,
        "components": 6,
    },
    "Component": {"name": 1, "values": 2},
    "GetServerInfoRequest": {},
    "GetServerInfoResponse": {"version": 1, "limits": 2, "scorers": 3, "server_id": 4, "device": 5},
    "Limits": {"max_message_bytes": 1, "max_items_per_request": 2, "max_queue_items": 3},
    "ScorerInfo": {
        "name": 1,
        "fingerprint": 2,
        "description": 3,
        "licence": 4,
        "typical_low": 5,
        "typical_high": 6,
        "components": 7,
        "needs": 8,
    },
    "GetStatsRequest": {},
    "GetStatsResponse": {
        "server_id": 1,
        "uptime_seconds": 2,
        "requests_scored": 3,
        "requests_pushed_back": 4,
        "requests_refused": 5,
        "requests_dropped": 6,
        "queue_items": 7,
        "scorers": 8,
    },
    "ScorerStats": {
        "name": 1,
        "items_scored": 2,
        "items_failed": 3,
        "mean": 4,
        "std": 5,
        "min": 6,
        "max": 7,
        "compute_seconds": 8,
    },
}
"""Message to field to number: a change of any of these breaks servers or trainers that are already out."""


def test_committed_modules_are_what_the_compiler_writes(tmp_path):
    package = Path(ds_inpaint_protos.__path__[0])
    for module in generate(tmp_path):
        assert (package / module).read_text() == (tmp_path / module).read_text(), (
            f"{module} is out of date: run python -m ds_inpaint_protos.generate"
        )


def test_promised_fields_keep_their_numbers():
    found = {
        message.name: {field.name: field.number for field in message.fields}
        for message in reward_pb2.DESCRIPTOR.message_types_by_name.values()
    }
    assert found == PROMISED


def test_enums_follow_the_style_that_lets_them_grow():
    for enum in reward_pb2.DESCRIPTOR.enum_types_by_name.values():
        prefix = "".join(f"_{c}" if c.isupper() else c.upper() for c in enum.name).lstrip("_")
        assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
        assert all(value.name.startswith(f"{prefix}_") for value in enum.values)


def test_service_is_unary_with_messages_of_its_own():
    service = reward_pb2.DESCRIPTOR.services_by_name["RewardService"]
    assert service.full_name == "ds_inpaint.reward.v1.RewardService"
    assert set(service.methods_by_name) == {"Score", "GetServerInfo", "GetStats"}
    for method in service.methods:
        assert not method.client_streaming
        assert not method.server_streaming
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"
