"""Datasets prepared by any number of ranks, killed anywhere, asked for in other ways, and made of bad rows."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_MODELS, prepare_here
from PIL import Image
from prepare_worker import KILLED

from ds_inpaint.cache import read_manifest
from ds_inpaint.data import load
from ds_inpaint.datasets.jsonl import Jsonl
from ds_inpaint.errors import RowsRejected
from ds_inpaint.framing import Framing
from ds_inpaint.outputs import read_json_lines
from ds_inpaint.rows import read_rows

FLUX = ["--model", TINY_MODELS / "flux", "model.text_tokens=16", "engine.precision=fp32", "data.size=32"]
SPLITS = ("train", "heldout", "gold")
SPLIT = ["split.rows_per_shard=8", "split.heldout=0.3", "split.gold=0.1"]


BAD = {21: "not an image", 22: "missing file"}
"""Lines of ``data``."""


@pytest.fixture(scope="module")
def data(photos):
    """Every sixth of the photographs, and BAD rows among them."""
    file = photos / "some.jsonl"
    rows = (photos / "train.jsonl").read_text().splitlines()[::6]
    whole = json.loads(rows[0]) | {"id": "whole"}
    bad = [whole | {"mask": "train.jsonl"}, whole | {"id": "gone", "mask": "gone.png"}]
    file.write_text("\n".join([*rows[:20], *map(json.dumps, bad), *rows[20:]]))
    return file


@pytest.fixture(scope="module")
def prepared(data, run_ranks, tmp_path_factory):
    """The folder that holds what ``prepare_worker.py`` prepared."""
    out = tmp_path_factory.mktemp("prepared")
    run_ranks(2, ["tests/prepare_worker.py", str(out), "--data", str(data), *map(str, [*FLUX, *SPLIT])])
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["together", *KILLED])
def test_ranks_and_kills_change_no_byte(prepared, name):
    wanted, found = contents(prepared / "alone"), contents(prepared / name)
    assert found.keys() == wanted.keys()
    assert [file for file in wanted if found[file] != wanted[file]] == []


def test_what_was_prepared_is_complete_and_listed(prepared, data):
    out = prepared / "alone"
    found = contents(out)
    assert {name for name in found if "/" not in name} == {
        *("manifest.json", "plan.json", "previews.png", "prompts.jsonl", "rejected.jsonl"),
        *(f"{split}.jsonl" for split in SPLITS),
    }
    manifest = read_manifest(out)
    shards = {shard["file"]: shard for shard in manifest["shards"]}
    assert shards.keys() == {name for name in found if name.endswith(".safetensors")}
    for name, shard in shards.items():
        assert (shard["bytes"], shard["sha256"]) == (len(found[name]), hashlib.sha256(found[name]).hexdigest())
    rows = {split: read_json_lines(out / f"{split}.jsonl") for split in SPLITS}
    assert manifest["rows"] == {split: len(members) for split, members in rows.items()}
    lines = data.read_text().splitlines()
    given = [json.loads(line) for number, line in enumerate(lines, 1) if number not in BAD]
    everything = [row for members in rows.values() for row in members]
    assert sorted(row["id"] for row in everything) == sorted(row["id"] for row in given)
    assert {row["prompt"] for row in read_json_lines(out / "prompts.jsonl")} == {"", *(row["prompt"] for row in given)}
    assert {row["line"]: row["kind"] for row in read_json_lines(out / "rejected.jsonl")} == BAD
    for shard in shards.values():
        if shard["file"].startswith("rows"):
            assert shard["rows"] == sum(row["shard"] == shard["file"] for row in everything)


def test_the_pictures_are_those_of_the_files(prepared, data):
    files = {row.id: row for row in Jsonl().scan(data, Framing(32)).triples}
    for row in read_rows(prepared / "alone" / "train.jsonl", Framing(32)):
        found, wanted = row.picture.read(row), files[row.id].picture.read(files[row.id])
        assert found.image_3HW.equal(wanted.image_3HW)
        assert found.hole_1HW.equal(wanted.hole_1HW)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("data.size=64", "size 32 there, 64 here"),
        ("data.fit=pad", "fit crop there, pad here"),
        ("split.heldout=0.5", "heldout 0.3 there, 0.5 here"),
        ("split.rows_per_shard=4", "rows_per_shard 8 there, 4 here"),
        ("model.text_tokens=8", "text_tokens 16 there, 8 here"),
        ("engine.precision=bf16", "precision torch.float32 there, torch.bfloat16 here"),
    ],
)
def test_other_settings_do_not_mix_with_what_is_there(prepared, data, capsys, setting, told):
    out = prepared / "alone"
    before = contents(out)
    assert prepare_here("--data", data, "--out", out, *FLUX, *SPLIT, setting) == 2
    message = capsys.readouterr().err
    assert f"was begun in another way ({told}" in message
    assert message.count(" there, ") == 1 + message.count("rows_sha256")  # a row knows its size and fit
    assert contents(out) == before


def test_another_model_or_other_rows_do_not_mix_with_what_is_there(prepared, data, capsys):
    out = prepared / "alone"
    sd = ["--model", TINY_MODELS / "sd", "engine.precision=fp32", "data.size=32"]
    assert prepare_here("--data", data, "--out", out, *sd, *SPLIT) == 2
    message = capsys.readouterr().err
    assert "family flux there, sd here" in message
    assert "vae " in message
    assert prepare_here("--data", data.with_name("heldout.jsonl"), "--out", out, *FLUX, *SPLIT) == 2
    message = capsys.readouterr().err
    assert f"data {data} there, {data.with_name('heldout.jsonl')} here; rows_sha256 " in message


def test_another_mask_of_a_row_is_another_dataset(tmp_path, capsys):
    write_good(tmp_path, 1)
    rows = [{"id": "a", "image": "good-0.png", "mask": "mask-0.png", "prompt": "a cat"}]
    out = tmp_path / "out"
    assert prepare_here("--data", write_lines(tmp_path, rows), "--out", out, *FLUX) == 0
    shutil.copy(tmp_path / "mask-0.png", tmp_path / "other.png")
    assert prepare_here("--data", write_lines(tmp_path, [rows[0] | {"mask": "other.png"}]), "--out", out, *FLUX) == 2
    assert "(rows_sha256 " in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["deleted", "cut", "unlisted"])
def test_a_shard_that_is_not_whole_is_made_again(prepared, data, tmp_path, damage):
    out = shutil.copytree(prepared / "alone", tmp_path / "out")
    shard = out / "rows" / "00001.safetensors"
    if damage == "cut":
        os.truncate(shard, 1000)
    else:
        (shard if damage == "deleted" else shard.with_suffix(".json")).unlink()
    assert prepare_here("--data", data, "--out", out, *FLUX, *SPLIT) == RowsRejected.exit_code
    assert contents(out) == contents(prepared / "alone")


def test_foreign_folders_and_files_are_left_alone(data, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert prepare_here("--data", data, "--out", tmp_path, *FLUX) == 2
    assert "is not empty and is not the work of this command" in capsys.readouterr().err
    assert prepare_here("--data", data, "--out", tmp_path / "notes.txt", *FLUX) == 2
    assert "notes.txt is a file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "notes.txt"]


def test_what_is_prepared_already_is_not_prepared_again(prepared, tmp_path, capsys):
    assert prepare_here("--data", prepared / "alone" / "train.jsonl", "--out", tmp_path / "out", *FLUX) == 2
    assert "is prepared already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_rows_of_a_picture_lie_in_one_split_that_hangs_on_its_place_in_the_dataset(tmp_path):
    found = []
    for place in ("here", "there"):
        folder = tmp_path / place
        folder.mkdir()
        write_good(folder, 20)
        detour = f"../{place}/" if place == "there" else ""
        rows = [
            {"id": f"{i}-{twin}", "image": f"{detour}good-{i}.png", "mask": f"mask-{i}.png", "prompt": "a cat"}
            for i in range(20)
            for twin in "ab"
        ]
        settings = [*FLUX, "split.heldout=0.4", "split.gold=0.2"]
        assert prepare_here("--data", write_lines(folder, rows), "--out", folder / "out", *settings) == 0
        found.append(
            {split: {row["id"] for row in read_json_lines(folder / "out" / f"{split}.jsonl")} for split in SPLITS}
        )
    here, there = found
    assert here == there
    assert all(here.values())
    for ids in here.values():
        assert {name.replace("a", "b") for name in ids} == {name for name in ids if name.endswith("b")}


def write_lines(folder: Path, rows: list[object]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def write_good(folder: Path, count: int) -> list[dict[str, str]]:
    """Pictures ``good-0.png`` ... with masks, and their rows."""
    generator = np.random.default_rng(0)
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[10:20, 10:30] = 255
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"good-{i}.png")
        Image.fromarray(mask).save(folder / f"mask-{i}.png")
    return [row(f"good-{i}.png", f"mask-{i}.png") for i in range(count)]


def row(image: str, mask: str, prompt: str = "a cat") -> dict[str, str]:
    return {"id": image, "image": image, "mask": mask, "prompt": prompt}


def png_that_claims(side: int) -> bytes:
    """A PNG of a few bytes whose header speaks of ``side`` x ``side`` pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def write_bad(folder: Path, i: int) -> dict[str, object]:
    """One row of every kind that cannot be used, in a folder with good ones."""
    Image.effect_noise((40, 40), 90).convert("RGB").save(folder / f"whole-{i}.jpg")
    jpeg = (folder / f"whole-{i}.jpg").read_bytes()
    (folder / f"cut-{i}.jpg").write_bytes(jpeg[: len(jpeg) * (i + 3) // 8])
    Image.new("L", (40 + i, 39)).save(folder / f"small-{i}.png")
    Image.new("L", (40, 40), 127).save(folder / f"black-{i}.png")
    (folder / f"text-{i}.png").write_bytes([b"", b"<html>404</html>", b"\x89PNG", bytes(100), b"GIF"][i])
    (folder / f"huge-{i}.png").write_bytes(png_that_claims([20_000, 9_300, 2**31 - 1, 14_000, 100_000][i]))
    return {
        "missing file": row(f"gone-{i}.png", "mask-0.png") if i % 2 else row("good-1.png", f"gone-{i}.png") | {"id": i},
        "damaged image": row(f"cut-{i}.jpg", "mask-0.png"),
        "wrong-size mask": row("good-0.png", f"small-{i}.png") | {"id": f"small-{i}"},
        "empty mask": row("good-0.png", f"black-{i}.png") | {"id": f"black-{i}"},
        "outside the root": row(["../up.png", "/etc/hostname", "a/../../b.png", "..", "../out/x.png"][i], "mask-0.png"),
        "not an image": row(f"text-{i}.png", "mask-0.png"),
        "huge image": row(f"huge-{i}.png", "mask-0.png"),
        "duplicate id": row("good-0.png", "mask-0.png"),
        "bad JSON": ["{", '{"image": "a.png",}', "not JSON", '{"id": ' + "9" * 5000 + "}", "[" * 100_000][i],
        "empty prompt": row("good-0.png", "mask-0.png", [" ", "", "\t", "\n", "\u2003"][i]) | {"id": f"mute-{i}"},
    }


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's, of the huge ones
@pytest.mark.parametrize("shapes", [[], ["data.max_aspect=2", "data.size=64", "data.shape_step=16"]])
def test_fifty_bad_rows_of_ten_kinds_are_each_listed_and_the_good_ones_kept(tmp_path, capsys, shapes):
    good = write_good(tmp_path, 15)
    rows: list[object] = []
    kinds: dict[int, str] = {}
    for i in range(5):
        rows += good[3 * i : 3 * i + 3]
        for kind, bad in write_bad(tmp_path, i).items():
            rows.append(bad)
            kinds[len(rows)] = kind
    file = write_lines(tmp_path, rows)
    settings = [*FLUX, "split.rows_per_shard=8", *shapes]
    for _ in range(2):  # what was rejected is so again when there is nothing left to do
        assert prepare_here("--data", file, "--out", tmp_path / "out", *settings) == 6
        told = capsys.readouterr().err
        rejected = read_json_lines(tmp_path / "out" / "rejected.jsonl")
        assert {each["line"]: each["kind"] for each in rejected} == kinds
        assert len(rejected) == 50
        for each in rejected:
            assert each.keys() == {"file", "line", "kind", "reason"}
            assert each["file"] == str(file)
            assert each["reason"].endswith(".")
            assert not each["reason"].startswith(str(file))
        assert "50 of 65 rows were rejected" in told
        assert all(f"5 {kind}" in told for kind in kinds.values())
        assert len([line for line in told.splitlines() if line.startswith("  ")]) == 10
        assert [each["id"] for each in read_json_lines(tmp_path / "out" / "train.jsonl")] == [
            each["id"] for each in good
        ]
    assert read_manifest(tmp_path / "out")["rejected"] == 50


def test_a_dataset_of_bad_rows_alone_is_told_as_one(tmp_path, capsys):
    write_good(tmp_path, 1)
    rows = [row(f"text-{i}.png", "mask-0.png") for i in range(3)]
    for each in rows:
        (tmp_path / each["image"]).write_bytes(b"")
    assert prepare_here("--data", write_lines(tmp_path, rows), "--out", tmp_path / "out", *FLUX) == 6
    captured = capsys.readouterr()
    assert "no row could be used" in captured.out
    assert "3 of 3 rows were rejected (3 not an image)" in captured.err
    assert not (tmp_path / "out" / "train.jsonl").exists()
    assert prepare_here("--data", write_lines(tmp_path, ["", " "]), "--out", tmp_path / "other", *FLUX) == 2
    assert "holds no rows" in capsys.readouterr().err


def test_the_mark_that_some_editors_put_first_is_no_part_of_a_row(tmp_path):
    write_good(tmp_path, 1)
    found = Jsonl().scan(write_lines(tmp_path, ["\ufeff" + json.dumps(row("good-0.png", "mask-0.png"))]), Framing(32))
    assert (len(found.triples), found.problems) == (1, ())


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ('{"image": "' + "x" * 300 + '.png", "mask": "mask-0.png", "prompt": "a"}', "missing file"),
        ('{"image": "a\\u0000.png", "mask": "mask-0.png", "prompt": "a"}', "missing file"),
        ('{"image": ".", "mask": "mask-0.png", "prompt": "a"}', "missing file"),
        ('{"image": "good-0.png", "mask": "mask-0.png", "prompt": "half a \\ud83d"}', "bad prompt"),
        ('{"image": "good-0.png", "mask": "mask-0.png", "prompt": 3}', "bad row"),
        ('{"image": "good-0.png", "mask": "mask-0.png", "prompt": "a", "id": null}', "bad row"),
        ('{"image": "good-0.png", "mask": "mask-0.png", "prompt": "a", "id": ["b"]}', "bad row"),
        ('{"image": "good-0.png", "mask": null, "prompt": "a"}', "bad row"),
        ("3", "bad row"),
    ],
)
def test_odd_rows_are_refused_by_a_sentence(tmp_path, line, kind):
    write_good(tmp_path, 1)
    found = Jsonl().scan(write_lines(tmp_path, [line, row("good-0.png", "mask-0.png")]), Framing(32))
    assert [(problem.source, problem.kind) for problem in found.problems] == [(f"{tmp_path}/rows.jsonl:1", kind)]
    assert len(found.triples) == 1


def test_every_prompt_and_name_comes_back_as_it_was(tmp_path):
    """Line ends of Unicode, quotes, and a file name that is not UTF-8."""
    rows = write_good(tmp_path, 6)
    prompts = ["a\u2028b", "a\x85b\x0c\x1cc", 'a\n"b"\\', "猫と犬 🐈", "\u202eabc\ufeff", "ordinary"]
    rows = [each | {"prompt": prompt} for each, prompt in zip(rows, prompts, strict=True)]
    os.rename(tmp_path / "good-5.png", os.fsencode(tmp_path) + b"/\xff.png")
    rows[5]["image"] = "\udcff.png"
    file = write_lines(tmp_path, [json.dumps(each, ensure_ascii=i == 5) for i, each in enumerate(rows)])
    assert prepare_here("--data", file, "--out", tmp_path / "out", *FLUX) == 0
    found = read_rows(tmp_path / "out" / "train.jsonl", Framing(32))
    assert [each.prompt for each in found] == prompts
    assert found[5].image == tmp_path / "\udcff.png"
    assert load(found).encoded is not None
