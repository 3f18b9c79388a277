"""Sampling a dataset: the pictures of a policy, the same on any number of ranks and after any kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import start_ranks
from diffusers import StableDiffusionInpaintPipeline
from model_helpers import draw_with_diffusers, placement

from ds_inpaint import sample
from ds_inpaint.data import load
from ds_inpaint.distributed import Ranks
from ds_inpaint.framing import Framing
from ds_inpaint.images import read_png, write_png
from ds_inpaint.models.sd import SD, SDPolicy
from ds_inpaint.noise import sample_noise
from ds_inpaint.outputs import safe_name
from ds_inpaint.rows import read_rows

WORKER = "tests/sample_worker.py"
STEPS = 3
KILLED_AT = 11
"""Pictures written before, raw and pasted ones; eight make a batch."""


@pytest.fixture(scope="module")
def data(photos, tmp_path_factory):
    """Eight photographs, two of them in another shape, an id that is no file name, and three rows that are bad."""
    folder = tmp_path_factory.mktemp("sampled")
    rows = [json.loads(line) for line in (photos / "heldout.jsonl").read_text().splitlines()[:8]]
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number, row in enumerate(rows):
        for column in ("image", "mask"):
            picture = read_png(photos / row[column])
            write_png(folder / row[column], picture[:, :32] if number in (2, 5) else picture)
    rows[0]["id"] = "a/b: ../c"
    cut = folder / "images" / "cut.png"
    cut.write_bytes((folder / rows[0]["image"]).read_bytes()[:500])
    bad = [{**rows[1], "id": "cut", "image": "images/cut.png"}, {**rows[1], "id": "gone", "mask": "masks/gone.png"}]
    lines = [json.dumps(row) for row in [*rows[:3], bad[0], *rows[3:], bad[1]]]
    (folder / "rows.jsonl").write_text("\n".join([*lines, "{"]))
    return folder / "rows.jsonl"


def arguments(data: Path, model: Path, out: Path) -> list[str]:
    return [
        *("--model", str(model), "--data", str(data), "--out", str(out)),
        *("data.size=96", "data.max_aspect=2", "data.shape_step=32", "engine.precision=fp32", "engine.micro_batch=4"),
        *("sampler.name=ddim", f"sampler.steps={STEPS}", "sampler.eta=0", "draw.seeds=2", "model.guidance=2"),
    ]


@pytest.fixture(scope="module")
def drawn(data, small_model, tmp_path_factory):
    """Folders by one rank, by two, and by one that was killed and started again; and what they said."""
    out = tmp_path_factory.mktemp("drawn")
    killing = ["--", str(KILLED_AT)]
    first = {"one": (1, []), "two": (2, []), "killed": (1, killing)}
    started = {name: start(name, *job, data, small_model, out) for name, job in first.items()}
    codes = {name: [rank.wait(300) for rank in ranks] for name, ranks in started.items()}
    assert 0 < len(list((out / "killed" / "pasted").glob("*.png"))) < 16
    codes["again"] = [rank.wait(300) for rank in start("killed", 1, [], data, small_model, out)]
    return out, codes


def start(name, ranks, more, data, model, out):
    return start_ranks(ranks, [WORKER, *arguments(data, model, out / name), *more], out / f"{name}.log")


def test_pictures_that_are_not_finite_are_not_written(data, small_model, tmp_path, monkeypatch, capsys):
    decode = SDPolicy.decode
    monkeypatch.setattr(SDPolicy, "decode", lambda self, latents: decode(self, latents) * torch.nan)
    monkeypatch.setattr(sample, "setup", lambda section: Ranks(0, 1, torch.device("cpu")))
    assert sample.main(arguments(data, small_model, tmp_path / "out")) == 8
    assert "are not finite: the model's weights or activations are broken" in capsys.readouterr().err
    assert list((tmp_path / "out" / "pasted").iterdir()) == []


def test_bad_rows_are_listed_and_the_others_filled(drawn):
    out, codes = drawn
    assert codes == {"one": [6], "two": [6, 0], "killed": [-9], "again": [6]}
    listed = [json.loads(line) for line in (out / "one" / "rejected.jsonl").read_text().splitlines()]
    rejected = {row["line"]: row for row in listed}
    assert rejected.keys() == {4, 10, 11}
    assert "cut.png cannot be read" in rejected[4]["reason"]
    assert [rejected[line]["kind"] for line in (10, 11)] == ["missing file", "bad JSON"]
    assert len(list((out / "one" / "pasted").iterdir())) == 16
    assert (out / "two.log").read_text().count("3 of 11 rows were rejected") == 1


@pytest.mark.parametrize("other", ["two", "killed"])
def test_ranks_and_kills_change_no_byte(drawn, other):
    out, _ = drawn
    files = {str(file.relative_to(out / "one")) for file in (out / "one").rglob("*") if file.is_file()}
    assert files == {str(file.relative_to(out / other)) for file in (out / other).rglob("*") if file.is_file()}
    for name in files:
        assert (out / "one" / name).read_bytes() == (out / other / name).read_bytes(), name


def test_pictures_are_those_of_the_stock_pipeline_on_the_noise_of_seed_and_id(drawn, data, small_model):
    out, _ = drawn
    framing = Framing(size=96, max_aspect=2, shape_step=32)
    good = data.with_name("good.jsonl")
    good.write_text(data.read_text().splitlines()[0])
    [triple] = read_rows(good, framing)
    batch = load([triple])
    policy = SD(str(small_model), guidance=2.0).load(placement())
    noise = sample_noise(1, "sample", 0, [triple.id], (STEPS + 1, *policy.latent_shape(96, 96)))[:, 0]
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(small_model, safety_checker=None)
    _, picture = draw_with_diffusers(pipeline, noise, batch, STEPS, guidance_scale=2.0)
    name = f"{safe_name('a/b: ../c')}-s1.png"
    raw, pasted = (read_png(out / "one" / kind / name).float() for kind in ("raw", "pasted"))
    assert (raw - picture[0] * 255).abs().max() <= 1
    hole = batch.holes_B1HW[0].expand(3, -1, -1)
    assert torch.equal(pasted[hole], raw[hole])
    assert torch.equal(pasted[~hole], batch.images_BCHW[0].float()[~hole])


def test_shapes_are_kept_and_seeds_differ(drawn):
    out, _ = drawn
    rows = [json.loads(line) for line in (out / "one" / "samples.jsonl").read_text().splitlines()]
    shapes = {tuple(row["pixels"]) for row in rows}
    assert shapes == {(96, 96), (64, 128)}
    for row in rows:
        assert read_png(out / "one" / row["pasted"]).shape[1:] == tuple(row["pixels"])
    first, second = (read_png(out / "one" / row["raw"]) for row in rows[:2])
    assert rows[0]["id"] == rows[1]["id"]
    assert not torch.equal(first, second)


def test_a_folder_of_other_pictures_is_not_mixed_with_these(drawn, data, small_model, capsys):
    out, _ = drawn
    assert sample.main([*arguments(data, small_model, out / "one"), "sampler.steps=4"]) == 2
    told = capsys.readouterr().err
    assert "was begun in another way (steps 3 there, 4 here)" in told


def test_a_setting_that_does_not_exist_is_told(data, small_model, tmp_path, capsys):
    assert sample.main([*arguments(data, small_model, tmp_path / "x"), "draw.sedes=3"]) == 2
    assert "draw.sedes: unknown key. Allowed here: seeds, seed, rows. Did you mean seeds?" in capsys.readouterr().err
