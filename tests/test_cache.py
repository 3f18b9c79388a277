"""Prepared rows read back whole, or refused by a sentence that names the shard and the row."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODELS, prepare_here
from model_helpers import placement

from ds_inpaint.cache import Cell, check_encoders, digest, write_shard
from ds_inpaint.data import load
from ds_inpaint.errors import InputError
from ds_inpaint.framing import Framing
from ds_inpaint.models.flux import Flux
from ds_inpaint.models.sd import SD
from ds_inpaint.outputs import read_json_lines
from ds_inpaint.rows import read_rows
from ds_inpaint.sampling import encode

TENSORS = {
    "a": {"image": torch.arange(12, dtype=torch.uint8).view(3, 2, 2), "hole": torch.tensor([True, False])},
    "b": {"image": torch.zeros(0), "latents": torch.randn(2, 3).to(torch.bfloat16).mT},
}


@pytest.fixture(scope="module")
def prepared(photos, tmp_path_factory):
    """A few photographs prepared for Flux; tests that damage it take a copy."""
    out = tmp_path_factory.mktemp("cache") / "out"
    few = photos / "few.jsonl"
    few.write_text("\n".join((photos / "heldout.jsonl").read_text().splitlines()[:6]))
    flux = ["--model", TINY_MODELS / "flux", "model.text_tokens=16"]
    assert prepare_here("--data", few, "--out", out, *flux, "data.size=32", "split.rows_per_shard=4") == 0
    return out


@pytest.fixture
def damaged(prepared, tmp_path):
    """A copy of it."""
    return shutil.copytree(prepared, tmp_path / "out")


def refusal(folder: Path) -> str:
    """What training says when it reads the rows one by one until one cannot be read."""
    with pytest.raises(InputError) as error:
        read_one_by_one(folder / "train.jsonl")
    assert error.value.exit_code == 2
    return str(error.value)


def read_one_by_one(index: Path) -> None:
    for row in read_rows(index, Framing(32)):
        load([row])


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_tensors_come_back_bit_for_bit(tmp_path):
    _, digests = write_shard(tmp_path, "x.safetensors", TENSORS)
    for row, tensors in TENSORS.items():
        found = Cell(tmp_path / "x.safetensors", row, digests[row]).read("rows:1")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_a_digest_knows_names_types_shapes_and_bytes():
    zeros = torch.zeros(4, dtype=torch.uint8)
    same = [{"a": zeros}, {"b": zeros}, {"a": zeros.view(2, 2)}, {"a": zeros.view(torch.int32)}, {"a": zeros + 1}, {}]
    assert len({digest(tensors) for tensors in same}) == len(same)
    assert digest({"a": zeros, "b": zeros}) == digest({"b": zeros, "a": zeros})


@pytest.mark.parametrize("mask", [1, 0x20, 0xFF])
def test_no_changed_byte_of_a_shard_goes_unseen(tmp_path, mask):
    shard, digests = write_shard(tmp_path, "x.safetensors", TENSORS)
    file = tmp_path / shard.file
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
        refused = []
        for row, tensors in TENSORS.items():
            try:
                found = Cell(file, row, digests[row]).read("rows:1")
                assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items()), place
            except InputError as error:
                refused.append(str(error))
        assert all(each.startswith("rows:1: ") and str(file) in each for each in refused)
        # Of the header's JSON a byte may mean nothing, as in the padding.
        assert refused or 8 <= place < 8 + int.from_bytes(whole[:8], "little")


def test_training_names_the_row_whose_bytes_changed_and_reads_the_others(damaged):
    row = read_json_lines(damaged / "train.jsonl")[5]
    flip(damaged / row["shard"], -1)
    rows = read_rows(damaged / "train.jsonl", Framing(32))
    bad = []
    for number, each in enumerate(rows):
        try:
            load([each])
        except InputError as error:
            bad.append((number, str(error)))
    [(number, told)] = bad
    stored = read_json_lines(damaged / "train.jsonl")[number]
    assert stored["shard"] == row["shard"]
    assert told.startswith(
        f"{damaged / 'train.jsonl'}:{number + 1}: row {stored['row']} of {damaged / row['shard']} is"
    )
    assert "Delete" in told


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("rows/00001.safetensors", "rows/00001.safetensors cannot be read"),
        ("prompts/00000.safetensors", "prompts/00000.safetensors cannot be read"),
        ("prompts.jsonl", "prompts.jsonl"),
        ("manifest.json", "manifest.json cannot be read"),
    ],
)
def test_a_missing_file_is_named(damaged, missing, told):
    (damaged / missing).unlink()
    assert told in refusal(damaged)


@pytest.mark.parametrize("index", ["train.jsonl", "prompts.jsonl"])
@pytest.mark.parametrize("text", ["{", "[]", "3", '{"id": 3}', '{"prompt": "a", "shard": 3}'])
def test_a_damaged_index_is_named(damaged, index, text):
    (damaged / index).write_text(text + "\n")
    assert f"indices of the prepared dataset {damaged} cannot be read" in refusal(damaged)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read"),
        ("[]", "has format None"),
        ('{"format": 99}', "has format 99, but this release reads 1"),
    ],
)
def test_a_manifest_of_another_kind_is_named(damaged, text, told):
    (damaged / "manifest.json").write_text(text)
    assert told in refusal(damaged)


def test_a_prompt_that_was_not_prepared_is_named(prepared):
    row = read_rows(prepared / "train.jsonl", Framing(32))[0]
    with pytest.raises(InputError, match=r"train.jsonl:1: the prompt 'another' was not prepared"):
        load([replace(row, prompt="another")])
    assert load([replace(row, prompt="")]).encoded is not None


@pytest.mark.parametrize(
    ("framing", "told"),
    [
        (Framing(64), "size 32 there, 64 here"),
        (Framing((32, 48)), "size 32 there, [32, 48] here"),
        (Framing(32, fit="pad"), "fit crop there, pad here"),
        (
            Framing(64, max_aspect=2, shape_step=16),
            "max_aspect 1.0 there, 2 here, shape_step 64 there, 16 here, size 32",
        ),
    ],
)
def test_other_sizes_than_were_prepared_are_refused(prepared, framing, told):
    with pytest.raises(InputError, match=r"was prepared for pictures of another kind") as error:
        read_rows(prepared / "train.jsonl", framing)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("model", "precision", "told"),
    [
        (Flux(str(TINY_MODELS / "flux"), text_tokens=16), torch.bfloat16, None),
        (Flux(str(TINY_MODELS / "flux"), text_tokens=16, guidance=3.0), torch.bfloat16, None),
        (Flux(str(TINY_MODELS / "flux"), text_tokens=16), torch.float32, "bfloat16 there, torch.float32 here"),
        (Flux(str(TINY_MODELS / "flux"), text_tokens=8), torch.bfloat16, "text_tokens 16 there, 8 here"),
        (SD(str(TINY_MODELS / "sd")), torch.bfloat16, "family flux there, sd here"),
    ],
)
def test_another_model_than_encoded_the_data_is_refused(prepared, model, precision, told):
    policy = model.load(placement(precision))
    if told is None:
        check_encoders(prepared / "train.jsonl", policy.encoders)
        return
    with pytest.raises(InputError, match="was prepared with another model or other settings") as error:
        check_encoders(prepared / "train.jsonl", policy.encoders)
    assert told in str(error.value)


@pytest.mark.parametrize("part", ["vae", "text_encoder_2", "tokenizer"])
def test_another_part_of_the_model_is_seen_by_its_content(prepared, tmp_path, part):
    model = shutil.copytree(TINY_MODELS / "flux", tmp_path / "flux")
    file = next(file for file in sorted((model / part).iterdir()) if file.suffix in (".safetensors", ".json"))
    file.write_bytes(file.read_bytes() + b" ")
    encoders = Flux(str(TINY_MODELS / "flux"), text_tokens=16).load(placement(torch.bfloat16)).encoders
    check_encoders(prepared / "train.jsonl", encoders)
    policy = replace(Flux(str(TINY_MODELS / "flux"), text_tokens=16).load(placement(torch.bfloat16)), folder=model)
    with pytest.raises(InputError, match=rf"settings: {part} \w+ there, \w+ here\."):
        check_encoders(prepared / "train.jsonl", policy.encoders)


def test_files_are_never_compared_with_a_model(photos):
    check_encoders(photos / "train.jsonl", None)


def test_what_was_prepared_is_what_the_policy_makes_of_the_files(prepared, photos):
    policy = Flux(str(TINY_MODELS / "flux"), text_tokens=16).load(placement(torch.bfloat16))
    files = load(read_rows(photos / "few.jsonl", Framing(32)))
    cached = load(read_rows(prepared / "train.jsonl", Framing(32)))
    assert cached.ids == files.ids
    assert cached.prompts == files.prompts
    wanted, wanted_latents = encode(policy, files, torch.device("cpu"), originals=True)
    found, found_latents = encode(policy, cached, torch.device("cpu"), originals=True)
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name
    assert torch.equal(found_latents, wanted_latents)


def test_a_prepared_dataset_can_be_moved_and_needs_no_pictures(prepared, tmp_path):
    moved = shutil.copytree(prepared, tmp_path / "elsewhere")
    index = [json.loads(line) | {"image": "/gone.png"} for line in (moved / "train.jsonl").read_text().splitlines()]
    (moved / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in index))
    here, there = (load(read_rows(folder / "train.jsonl", Framing(32))) for folder in (prepared, moved))
    assert torch.equal(here.encoded.latents_BCHW, there.encoded.latents_BCHW)
