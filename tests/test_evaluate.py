"""Comparing models by their pictures: figures, pairs, failures, and the report that tells of them."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import start_ranks
from skimage.metrics import peak_signal_noise_ratio

from ds_inpaint import evaluate
from ds_inpaint.comparison import ALL, Comparison, Item, Metric
from ds_inpaint.data import load
from ds_inpaint.framing import Framing
from ds_inpaint.images import read_png, write_png
from ds_inpaint.outputs import safe_name
from ds_inpaint.report import pictured, ranked, write_report
from ds_inpaint.report_text import digits, figure
from ds_inpaint.rows import read_rows
from ds_inpaint.statistics import Estimate, compare, estimate

ITEMS, SEEDS = 6, 2
NASTY = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def data(photos, tmp_path_factory):
    """Six photographs, one with an id that a page must not believe."""
    folder = tmp_path_factory.mktemp("evaluated")
    lines = (photos / "heldout.jsonl").read_text().splitlines()[: ITEMS * 20 : 20]
    rows = [json.loads(line) for line in lines]
    rows = [{**row, "image": str(photos / row["image"]), "mask": str(photos / row["mask"])} for row in rows]
    rows[0] |= {"prompt": NASTY, "id": "é/<b>"}
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def batch(data, photos):
    return load(read_rows(data, Framing(size=64), root=photos))


@pytest.fixture(scope="module")
def results(data, batch, tmp_path_factory):
    """Pictures of two tools, two seeds each: noisy ones, and the originals with a little noise; one is missing."""
    folder = tmp_path_factory.mktemp("results")
    draw = torch.Generator().manual_seed(0)
    for model, strength in (("noisy", 60), ("close", 6)):
        (folder / model).mkdir()
        for identity, image in zip(batch.ids, batch.images_BCHW, strict=True):
            for seed in range(SEEDS):
                noise = torch.randn(image.shape, generator=draw) * strength
                write_png(
                    folder / model / f"{safe_name(identity)}-s{seed}.png", (image + noise).clamp(0, 255).to(torch.uint8)
                )
    (folder / "close" / f"{batch.ids[3]}-s1.png").unlink()
    write_png(folder / "close" / f"{batch.ids[4]}-s0.png", torch.zeros(3, 32, 32, dtype=torch.uint8))
    return folder


def arguments(data: Path, photos: Path, server: str, out: Path) -> list[str]:
    return [
        *(
            "--data",
            str(data),
            "--out",
            str(out),
            "data.size=64",
            f"layout.root={photos}",
            f'rewards.servers=["{server}"]',
        ),
        *(
            "rewards.scorers={seam: 1.0, ring_texture: 0.5}",
            "rewards.holdout=[known_fidelity]",
            "measure.brushnet=true",
        ),
    ]


@pytest.fixture(scope="module")
def reports(data, photos, results, reward_server, tmp_path_factory):
    """The reports of one rank and of two."""
    out = tmp_path_factory.mktemp("reports")
    given = ["--results", str(results / "noisy"), str(results / "close")]
    started = [
        rank
        for ranks in (1, 2)
        for rank in start_ranks(
            ranks,
            ["-m", "ds_inpaint.evaluate", *given, *arguments(data, photos, reward_server, out / str(ranks))],
            out / f"{ranks}.log",
        )
    ]
    assert [rank.wait(300) for rank in started] == [0, 0, 0], [(out / f"{n}.log").read_text() for n in (1, 2)]
    return out


@pytest.fixture(scope="module")
def found(reports):
    return json.loads((reports / "1" / "results.json").read_text())


def test_the_number_of_ranks_changes_no_figure(reports, found):
    other = json.loads((reports / "2" / "results.json").read_text())
    for model in found["models"]:
        for metric, sizes in found["summary"][model].items():
            for size, value in sizes.items():
                assert other["summary"][model][metric][size] == pytest.approx(value, abs=1e-5, nan_ok=True), metric


def test_measures_are_those_of_scikit_image(reports, batch, results):
    rows = list(csv.DictReader((reports / "1" / "results.csv").open()))
    assert len(rows) == 2 * ITEMS * SEEDS - 2
    for row in rows:
        number = batch.ids.index(row["id"])
        picture = read_png(results / row["model"] / f"{safe_name(row['id'])}-s{row['seed']}.png").numpy()
        hole = batch.holes_B1HW[number, 0].numpy()
        original = batch.images_BCHW[number].numpy()
        known = peak_signal_noise_ratio(original[:, ~hole], picture[:, ~hole])
        assert float(row["known/psnr"]) == pytest.approx(known, abs=1e-6)
        assert float(row["brushnet/psnr"]) == pytest.approx(known - 10 * np.log10(3), abs=1e-6)
        assert float(row["hole/psnr"]) == pytest.approx(
            peak_signal_noise_ratio(original[:, hole], picture[:, hole]), abs=1e-6
        )
        assert float(row["pasted/psnr"]) == 100
        assert float(row["reward"]) == pytest.approx(float(row["seam"]) + 0.5 * float(row["ring_texture"]), abs=1e-6)


def test_means_are_over_items_and_differences_over_pairs(reports, found):
    rows = list(csv.DictReader((reports / "1" / "results.csv").open()))
    values = {(row["model"], row["id"], row["seed"]): float(row["hole/mse"]) for row in rows}
    ids = sorted({row["id"] for row in rows})
    of = {
        model: np.array([[values.get((model, each, str(seed)), np.nan) for seed in range(SEEDS)] for each in ids])
        for model in ("noisy", "close")
    }
    for model in of:
        summary = found["summary"][model]["hole/mse"][ALL]
        assert summary["mean"] == pytest.approx(np.nanmean(np.nanmean(of[model], 1)))
    gain = found["gains"]["close"]["hole/mse"][ALL]
    assert gain["difference"]["mean"] == pytest.approx(np.nanmean(np.nanmean(of["close"] - of["noisy"], 1)))
    assert gain["won"] == 0  # of being higher, which for an error is worse
    assert gain["difference"]["high"] < 0
    assert found["summary"]["close"]["hole/mse"][ALL]["failed"] == 2


def test_missing_and_unfit_pictures_are_failures_with_their_reason(found, batch):
    told = {(each["model"], each["id"], each["seed"]): each["reason"] for each in found["failures"]}
    assert told.keys() == {("close", batch.ids[3], 1), ("close", batch.ids[4], 0)}
    assert told["close", batch.ids[3], 1] == "it is missing"
    assert "has 32x32 pixels, but the pictures of the data are used at 64x64" in told["close", batch.ids[4], 0]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images, self.open, self.scripts = [], [], 0

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        if tag == "img":
            self.images.append(unquote(dict(attributes)["src"]))
        elif tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_shows_pictures_and_believes_nothing(reports):
    text = (reports / "1" / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.scripts == 0
    assert "&lt;script&gt;" in text
    assert len(page.images) == 4 * ITEMS
    assert all((reports / "1" / name).is_file() for name in page.images)


def test_the_table_marks_what_is_beyond_chance(reports):
    lines = (reports / "1" / "table.md").read_text().splitlines()
    [row] = [line for line in lines if line.startswith("| hole/psnr") and "won" in line]
    assert row.split("|")[2].strip().startswith("**+")
    assert row.endswith("won 100% |")
    [row] = [line for line in lines if line.startswith("| hole/mse") and "won" in line]
    assert row.endswith("won 100% |")
    assert any("missing" in line for line in lines if line.startswith("| hole/mse"))


def test_models_are_sampled_on_the_same_noise_and_compared(data, photos, small_model, reward_server, tmp_path, capsys):
    again = tmp_path / "again"
    again.symlink_to(small_model)
    steps = ["sampler.name=ddim", "sampler.steps=2", "sampler.eta=0", "model.guidance=1", "engine.precision=fp32"]
    given = ["--model", str(small_model), str(again), *steps, "draw.rows=3"]
    assert evaluate.main([*given, *arguments(data, photos, reward_server, tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(found["items"]) == 3
    gain = found["gains"]["again"]["hole/mse"][ALL]
    assert (gain["difference"]["mean"], gain["won"]) == (0, 0.5)
    assert "difference to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "Nothing to evaluate: give --results FOLDER"),
        (["--results", "nowhere"], "--results: nowhere is no folder"),
        (["--results", "recipes"], "no picture in recipes is named after a row of the data"),
    ],
)
def test_bad_input_is_told(given, told, data, photos, reward_server, tmp_path, capsys):
    assert evaluate.main([*given, *arguments(data, photos, reward_server, tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err


# The report alone


def comparison(values, better="higher", models=("base", "ours")):
    """Items with one value of each model."""
    table = {
        model: torch.tensor(column, dtype=torch.float64)[:, None] for model, column in zip(models, values, strict=True)
    }
    base = table[models[0]]
    return Comparison(
        settings={},
        models=models,
        metrics=[Metric("m", better, "a measure")],
        main="m",
        summary={model: {"m": {ALL: estimate(column, 0)}} for model, column in table.items()},
        gains={model: {"m": {ALL: compare(table[model], base, 0)}} for model in models[1:]},
        items=[
            Item(str(n), "a cat", 0.2, "small", "a.png", "b.png", dict.fromkeys(models, "c.png"),
                 {model: {"m": float(column[n])} for model, column in table.items()})
            for n in range(len(base))
        ],
        samples=[],
        failures=[],
    )  # fmt: skip


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_gains_and_losses_go_by_the_better_direction(better):
    sign = 1 if better == "higher" else -1
    values = [[0.0] * 5, [sign * each for each in (1.0, -2.0, 3.0, 0.0, float("nan"))]]
    gained, lost = ranked(comparison(values, better), "ours")
    assert [item.id for item in gained] == ["2", "0"]
    assert [item.id for item in lost] == ["1"]
    assert pictured(comparison(values, better)) == {"0", "1", "2"}


def test_one_model_alone_has_its_best_and_its_worst(tmp_path):
    alone = comparison([[3.0, 1.0, 2.0]], models=("base",))
    best, worst = ranked(alone, "base")
    assert [item.id for item in best] == ["0", "2"]
    assert [item.id for item in worst] == ["1"]
    write_report(tmp_path, alone)
    assert "difference" not in (tmp_path / "table.md").read_text()


def test_numbers_have_the_digits_they_deserve():
    assert figure(Estimate(21.3412, 21.1, 21.6, 0.1, 9, 0)) == "21.34 [21.10, 21.60]"
    assert figure(Estimate(0.0123456, 0.0120, 0.0127, 0.0002, 9, 0)) == "0.01235 [0.01200, 0.01270]"
    assert figure(Estimate(1234.5, 1000, 1500, 100, 9, 0)) == "1234 [1000, 1500]"
    assert figure(Estimate(*[float("nan")] * 4, 0, 5)) == "none"
    assert digits(Estimate(0.0, 0.0, 0.0, 0.0, 9, 0)) == 4


def test_what_is_not_finite_is_null_in_json(tmp_path):
    write_report(tmp_path, comparison([[1.0, float("nan")], [2.0, 3.0]]))
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert found["items"][1]["values"]["base"]["m"] is None
