"""The report alone, of models whose every value is chosen here: its four files, and what is missing in them."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from torch import Tensor

from ds_inpaint.comparison import ALL, Comparison, Failure, Item, Metric, Sample
from ds_inpaint.errors import UnusablePicture
from ds_inpaint.images import write_png
from ds_inpaint.report import MOST, pictured, ranked, table, write_report
from ds_inpaint.report_page import TILE
from ds_inpaint.report_text import listed
from ds_inpaint.statistics import compare, estimate, rows_by_class

NASTY = """<img src=x onerror="alert('1')">&|`"""
METRICS = (
    Metric("m", "higher", f"a measure {NASTY}"),
    Metric("error", "lower", "the opposite of m"),
    Metric("spread", "", "neither is better"),
)


def comparison(
    values: Mapping[str, Sequence[float]],
    sizes: Sequence[str] = (),
    failures: Sequence[Failure] = (),
    main: str = "m",
) -> Comparison:
    """Models with one value of each item; ``error`` is its negative, ``spread`` the same."""
    columns = {model: torch.tensor(column, dtype=torch.float64)[:, None] for model, column in values.items()}
    tables = {model: {"m": column, "error": -column, "spread": column} for model, column in columns.items()}
    models, count = list(values), len(next(iter(values.values())))
    sizes = sizes or ["small"] * count
    rows = {ALL: torch.arange(count), **rows_by_class(sizes)}

    def each(told, model: str) -> dict[str, dict[str, object]]:
        return {name: {size: told(name, rows_n) for size, rows_n in rows.items()} for name in tables[model]}

    def gain(model: str, name: str, rows_n: Tensor):
        return compare(tables[model][name][rows_n], tables[models[0]][name][rows_n], 0)

    return Comparison(
        settings={"path": NASTY},
        models=models,
        metrics=METRICS,
        main=main,
        summary={m: each(lambda name, rows_n, m=m: estimate(tables[m][name][rows_n], 0), m) for m in models},
        gains={m: each(lambda name, rows_n, m=m: gain(m, name, rows_n), m) for m in models[1:]},
        items=[
            Item(
                id=f"row{n}",
                prompt=NASTY,
                area=0.25,
                size_class=sizes[n],
                masked=f"pictures/{n} é-masked.png",
                original=f"pictures/{n} é-original.png",
                pictures={model: f"pictures/{n} é-{place}.png" for place, model in enumerate(models)},
                values={m: {name: float(column[n, 0]) for name, column in tables[m].items()} for m in models},
            )
            for n in range(count)
        ],
        samples=[
            Sample(model, f"row{n}", 0, {name: float(column[n, 0]) for name, column in tables[model].items()})
            for model in models
            for n in range(count)
        ],
        failures=failures,
    )


def draw_pictures(folder: Path, told: Comparison, side: int = 8) -> None:
    (folder / "pictures").mkdir()
    ids = pictured(told)
    for item in told.items:
        if item.id in ids:
            for file in (item.masked, item.original, *item.pictures.values()):
                write_png(folder / file, torch.zeros(3, side, 2 * side, dtype=torch.uint8))


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and all text."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed((folder / "index.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def lines_of(told: Comparison, start: str) -> list[str]:
    return [line for line in table(told).splitlines() if line.startswith(start)]


SEVEN = {"base": [0.0] * 7, "ours": [1.0, -2.0, 3.0, 0.0, math.nan, 2.0, -1.0]}


def test_the_page_is_whole_and_every_picture_is_there(tmp_path):
    told = comparison(SEVEN)
    draw_pictures(tmp_path, told)
    write_report(tmp_path, told)
    page = Page(tmp_path)
    sources = [unquote(image["src"]) for image in page.all("img")]
    assert page.open == []
    assert len(sources) == 5 * 4
    assert all((tmp_path / source).is_file() for source in sources)
    links = {unquote(link["href"]) for link in page.all("a") if not link["href"].startswith("#")}
    assert links == {*sources, "table.md", "results.csv", "results.json"}
    assert all((image["loading"], image["width"], image["height"]) == ("lazy", "16", "8") for image in page.all("img"))
    anchors = {link["href"] for link in page.all("a") if link["href"].startswith("#")}
    assert anchors == {f"#{heading['id']}" for heading in page.all("h2") if "id" in heading}


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    write_report(tmp_path, comparison(SEVEN))
    page = Page(tmp_path)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    text = (tmp_path / "index.html").read_text()
    assert not re.search(r"https?:|@import|url\(", text)


def test_nothing_of_the_data_is_believed(tmp_path):
    failures = [Failure(NASTY, NASTY, 0, NASTY, NASTY)]
    told = comparison({NASTY: [1.0, 2.0], f"{NASTY}2": [3.0, 1.0]}, ["small", "large"], failures)
    draw_pictures(tmp_path, told)
    write_report(tmp_path, told)
    page = Page(tmp_path)
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert page.text.count(NASTY) >= 2 + len(failures) * 4 + len(told.items)
    assert any(attributes.get("title") == METRICS[0].description for attributes in page.all("span"))
    [head] = lines_of(told, "| metric")
    assert head.count(" | ") == 2  # the bars of the names are no columns
    assert "\\<img" in head


@pytest.mark.parametrize(("side", "sharp"), [(TILE // 4, True), (TILE, False)])
def test_small_pictures_are_drawn_with_sharp_pixels(side, sharp, tmp_path):
    told = comparison(SEVEN)
    draw_pictures(tmp_path, told, side)
    write_report(tmp_path, told)
    assert {image.get("class") for image in Page(tmp_path).all("img")} == {"sharp" if sharp else None}


def test_a_picture_that_is_not_there_is_told_and_not_linked(tmp_path):
    told = comparison(SEVEN)
    draw_pictures(tmp_path, told)
    (tmp_path / told.items[2].pictures["ours"]).unlink()
    write_report(tmp_path, told)
    page = Page(tmp_path)
    assert len(page.all("img")) == 5 * 4 - 1
    assert page.text.count("no picture") == 1


def test_a_damaged_picture_is_named(tmp_path):
    told = comparison(SEVEN)
    draw_pictures(tmp_path, told)
    (tmp_path / told.items[2].original).write_bytes(b"no PNG")
    with pytest.raises(UnusablePicture, match="2 é-original"):
        write_report(tmp_path, told)


@pytest.mark.parametrize("main", ["m", "error", "spread"])
def test_gains_come_before_losses_and_the_largest_first(main, tmp_path):
    """By an error, which is to be low, as by its opposite."""
    told = comparison(SEVEN, main=main)
    best, worst = ranked(told, "ours")
    assert [item.id for item in best] == ["row2", "row5", "row0"]
    assert [item.id for item in worst] == ["row1", "row6"]
    draw_pictures(tmp_path, told)
    write_report(tmp_path, told)
    text = Page(tmp_path).text
    assert re.findall(r"row\d", text) == ["row2", "row5", "row0", "row1", "row6"]
    assert text.index("row0") < text.index("Largest losses") < text.index("row1")


def test_only_so_many_are_shown():
    many = list(range(1, 2 * MOST))
    told = comparison({"base": [0.0] * len(many), "ours": [float(each) for each in many]})
    best, worst = ranked(told, "ours")
    assert ([item.id for item in best], worst) == ([f"row{n - 1}" for n in many[::-1][:MOST]], [])
    assert len(pictured(told)) == MOST


def test_one_model_alone_is_not_compared(tmp_path):
    told = comparison({"base": [3.0, 1.0, math.nan, 2.0]})
    draw_pictures(tmp_path, told)
    write_report(tmp_path, told)
    page, text = Page(tmp_path), table(told)
    assert len(page.all("img")) == 3 * 3
    assert page.text.index("Best") < page.text.index("row0") < page.text.index("Worst") < page.text.index("row1")
    for words in ("ifference", "Won", "Bold"):
        assert words not in page.text + text
    assert json.loads((tmp_path / "results.json").read_text())["gains"] == {}


def test_what_is_missing_is_counted(tmp_path):
    failures = [Failure("ours", "row4", 0, "seam", "timed out")] * 60
    told = comparison(SEVEN, failures=failures)
    write_report(tmp_path, told)
    [means, gains] = lines_of(told, "| m ↑")
    assert means.endswith("(n = 6, 1 missing) |")
    assert "(n = 6, 1 missing), won 58%" in gains  # three gains and half a tie of six
    page = Page(tmp_path)
    assert "60 missing: 60 seam of ours" in page.text
    assert "and 10 more, in results.json" in page.text
    assert page.text.count("n = 6, 1 missing") == 2 * len(METRICS)


def test_a_model_without_any_value_is_told_as_none(tmp_path):
    told = comparison({"base": [1.0, 2.0], "ours": [math.nan] * 2})
    write_report(tmp_path, told)
    [means, gains] = lines_of(told, "| m ↑")
    assert "none (n = 0, 2 missing)" in means
    assert gains == "| m ↑ | none (n = 0, 2 missing) |"
    assert "There are none." in Page(tmp_path).text
    assert Page(tmp_path).all("svg") == []


def test_only_the_sizes_that_occur_are_told_the_smallest_first():
    told = comparison({"base": [1.0, 2.0, 3.0, 4.0], "ours": [2.0] * 4}, ["large", "small", "large", "large"])
    starts = [line.split(" | ")[0] for line in table(told).splitlines()]
    assert starts.index("| small (1)") < starts.index("| large (3)")
    assert not any("medium" in start for start in starts)
    [small] = lines_of(told, "| small")
    assert "[" not in small  # one item has no interval
    assert "by mask size" not in table(comparison({"base": [1.0, 2.0]}))


@pytest.mark.parametrize(("shift", "bold"), [(1.0, True), (-1.0, True), (0.0, False)])
def test_bold_and_colour_mark_what_is_beyond_chance(shift, bold, tmp_path):
    spread = [0.1, -0.1, 0.3, -0.3, 0.2, -0.2]
    told = comparison({"base": [0.0] * 6, "ours": [shift + each for each in spread]})
    write_report(tmp_path, told)
    for name in ("m ↑", "error ↓", "spread"):
        assert ("**" in lines_of(told, f"| {name}")[1]) == bold
    colours = [attributes.get("class") for attributes in Page(tmp_path).all("span") if "title" not in attributes]
    colour = {1.0: "good", -1.0: "bad", 0.0: None}[shift]
    assert colours == [colour, colour, None]


def test_won_counts_the_better_direction():
    told = comparison(SEVEN)
    assert "won 58%" in lines_of(told, "| m ↑")[1]
    assert "won 58%" in lines_of(told, "| error ↓")[1]
    assert "won" not in lines_of(told, "| spread")[1]


def test_intervals_of_a_metric_share_a_scale(tmp_path):
    near = [0.9, 1.1, 1.0, 1.0]
    told = comparison({"base": [0.0] * 4, "near": near, "far": [2 * each for each in near]})
    write_report(tmp_path, told)
    page = Page(tmp_path)
    middles = [float(circle["cx"]) - 60 for circle in page.all("circle")]
    assert len(middles) == 2 * len(METRICS)
    for near_at, far_at in zip(middles[:3], middles[3:], strict=True):
        assert far_at == pytest.approx(2 * near_at, abs=0.2)
    assert middles[1] == pytest.approx(-middles[0], abs=0.1)


def test_json_has_every_figure_unrounded_and_null_for_what_is_missing(tmp_path):
    told = comparison(
        {"base": [1 / 3, math.nan], "ours": [2 / 3, 1.0]}, failures=[Failure("base", "row1", 0, "m", "x")]
    )
    write_report(tmp_path, told)
    text = (tmp_path / "results.json").read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert found.keys() == set(Comparison.__dataclass_fields__) - {"samples"}
    assert found["summary"]["base"]["m"][ALL] == {
        "mean": 1 / 3, "low": None, "high": None, "standard_error": None, "items": 1, "failed": 1,
    }  # fmt: skip
    assert found["gains"]["ours"]["m"][ALL]["difference"]["mean"] == 2 / 3 - 1 / 3
    assert found["items"][1]["values"] == {
        "base": {"m": None, "error": None, "spread": None},
        "ours": {"m": 1.0, "error": -1.0, "spread": 1.0},
    }
    assert found["failures"] == [{"model": "base", "id": "row1", "seed": 0, "what": "m", "reason": "x"}]
    write_report(tmp_path, told)
    assert (tmp_path / "results.json").read_text() == text


def test_csv_has_a_row_for_each_sample_and_nothing_for_what_is_missing(tmp_path):
    told = comparison({"a, b": [1 / 3, math.nan]})
    write_report(tmp_path, told)
    rows = list(csv.DictReader((tmp_path / "results.csv").open(encoding="utf-8", newline="")))
    assert [list(row) for row in rows] == [["model", "id", "seed", "m", "error", "spread"]] * 2
    assert (rows[0]["model"], float(rows[0]["m"]), float(rows[0]["error"])) == ("a, b", 1 / 3, -1 / 3)
    assert [rows[1][name] for name in ("m", "error", "spread")] == [""] * 3


@pytest.mark.parametrize(("names", "told"), [(["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")])
def test_names_in_a_sentence(names, told):
    assert listed(names) == told
