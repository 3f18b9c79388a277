"""Strict recipes: what loads, and that each mistake is told with its place, what was found and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from ds_inpaint import schema
from ds_inpaint.errors import InputError
from ds_inpaint.keys import REQUIRED, Impossible, door, key


@dataclass(frozen=True)
class Data:
    train: Path = key(REQUIRED, "JSONL of rows.")
    size: int = key(512, "Side in pixels.", at_least=16, at_most=4096)
    columns: list[str] = key(lambda: ["image", "mask"], "Columns to read.")


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = key(1e-5, "Step size.", above=0)
    betas: tuple[float, float] = key((0.9, 0.999), "Decay rates.", at_least=0, below=1)
    milestones: tuple[int, ...] = key((), "Steps at which to decay.", at_least=1)
    clip: float | None = key(1.0, "Largest gradient norm; null never clips.", above=0)
    kind: Literal["adam", "sgd"] = key("adam", "Update rule.")
    warmup: int = key(0, "Steps of warm-up.", choices=(0, 10, 100))


@dataclass(frozen=True)
class Scorer:
    weight: float = key(REQUIRED, "Weight in the sum.", at_least=0)
    servers: str | list[str] = key("embedded", "Where it runs.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    data: Data
    sampler: Any = door("doors", "Which sampler.")
    optimizer: Optimizer = key(Optimizer, "Update rule.")
    scorers: dict[str, Scorer] = key(dict, "Scorers by name.")
    servers: Literal["embedded"] | list[str] = key("embedded", "Where scorers run.")
    other_sampler: Any = door("doors", "Another sampler.", optional=True)
    extra: Data | None = key(None, "More data.")
    note: str | None = key(None, "Free text.")
    resume: bool = key(False, "Continue.")
    seed: int = key(0, "Seeds every draw.")

    def __post_init__(self) -> None:
        if self.seed == 13:
            raise Impossible("optimizer.kind", "cannot be used with seed 13.")


FLOW_SDE = """
from __future__ import annotations
from dataclasses import dataclass
from ds_inpaint.keys import Impossible, key

@dataclass(frozen=True)
class Helper:
    other: int = 0

@dataclass(frozen=True)
class FlowSDE:
    steps: int = key(10, "Steps.", at_least=1)
    trained: int = key(5, "Steps that are trained.", at_least=1)

    def __post_init__(self) -> None:
        if self.trained > self.steps:
            raise Impossible("trained", f"{self.trained} of {self.steps} steps cannot be trained. Lower it.")
"""

GOOD = """\
data:
  train: rows.jsonl
sampler:
  name: flow_sde
"""


@pytest.fixture(autouse=True, scope="module")
def doors(tmp_path_factory):
    """A folder of choices: one sound, one whose import fails, one without its class, and a helper."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "doors").mkdir()
    for name, text in {
        "__init__": "",
        "flow_sde": FLOW_SDE,
        "broken": "raise RuntimeError('imported though not chosen')",
        "empty": "",
        "_helper": "",
    }.items():
        (folder / "doors" / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads YAML text as ``x.yaml``."""
    monkeypatch.chdir(tmp_path)

    def load_text(text: str | bytes, *overrides: str) -> schema.Loaded[Recipe]:
        Path("x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return schema.load(Path("x.yaml"), overrides, Recipe)

    return load_text


@pytest.fixture
def complaints(load):
    """The lines of the error that YAML text gives; the headline that counts them is checked and left out."""

    def complaints_of(text: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(InputError) as caught:
            load(text, *overrides)
        lines = str(caught.value).split("\n")
        if len(lines) > 1:
            assert lines.pop(0) == f"x.yaml has {len(lines)} problems:"
        return lines

    return complaints_of


def test_every_type_loads_as_declared(load):
    recipe = load(
        GOOD
        + """\
  steps: 20
optimizer: {learning_rate: 1, betas: [0, 0.5], milestones: [10, 20], clip: null, kind: sgd, warmup: 100}
scorers:
  seam: {weight: 2}
  edge: {weight: .5, servers: ["a:1", "b:2"]}
extra: {train: more.jsonl, columns: []}
note: "yes"
resume: yes
"""
    ).value
    assert recipe.data == Data(Path("rows.jsonl"), 512, ["image", "mask"])
    assert (type(recipe.sampler).__name__, recipe.sampler.steps, recipe.sampler.trained) == ("FlowSDE", 20, 5)
    assert recipe.optimizer == Optimizer(1.0, (0.0, 0.5), (10, 20), None, "sgd", 100)
    assert isinstance(recipe.optimizer.learning_rate, float)
    assert recipe.scorers == {"seam": Scorer(2.0), "edge": Scorer(0.5, ["a:1", "b:2"])}
    assert recipe.extra == Data(Path("more.jsonl"), 512, [])
    assert (recipe.note, recipe.resume, recipe.seed) == ("yes", True, 0)


def test_an_empty_section_takes_its_defaults(load):
    assert load(GOOD + "optimizer:\n").value.optimizer == Optimizer()


def test_text_that_yaml_takes_for_dates_or_base_sixty_stays_text(load):
    assert load(GOOD + "note: 2024-01-01\n").value.note == "2024-01-01"
    assert load(GOOD + "note: 16:9\n").value.note == "16:9"


def test_aliases_work(load):
    recipe = load("data: &rows {train: a.jsonl}\nextra: *rows\nsampler: {name: flow_sde}\n").value
    assert recipe.data == recipe.extra


TELLS = {
    "unknown key": (
        GOOD + "  stepz: 3",
        "x.yaml:5: sampler.stepz: unknown key. Allowed here: steps, trained. Did you mean steps?",
    ),
    "unknown section": (
        GOOD + "optimiser: {}",
        "x.yaml:5: optimiser: unknown key. Allowed here: data, sampler, optimizer, scorers, servers, "
        "other_sampler, extra, note, resume, seed. Did you mean optimizer?",
    ),
    "repeated key": (GOOD + "seed: 1\nseed: 2", "x.yaml:6: seed: given twice, first at x.yaml:5. Delete one of them."),
    "missing key": (
        "data:\n  size: 64\nsampler: {name: flow_sde}",
        "x.yaml:1: data.train: missing. Give a path. Meaning: JSONL of rows.",
    ),
    "missing section": (
        "sampler: {name: flow_sde}",
        "x.yaml:1: data.train: missing. Give a path. Meaning: JSONL of rows.",
    ),
    "wrong type": (
        GOOD + "seed: one",
        "x.yaml:5: seed: expected an integer; found 'one' (text). Meaning: Seeds every draw.",
    ),
    "fraction for an integer": (
        GOOD + "seed: 2.0",
        "x.yaml:5: seed: expected an integer; found 2.0 (a number). Write 2. Meaning: Seeds every draw.",
    ),
    "boolean for an integer": (
        GOOD + "seed: true",
        "x.yaml:5: seed: expected an integer; found true (a boolean). Meaning: Seeds every draw.",
    ),
    "integer for a boolean": (
        GOOD + "resume: 1",
        "x.yaml:5: resume: expected true or false; found 1 (an integer). Meaning: Continue.",
    ),
    "exponent without a dot": (
        GOOD + "optimizer:\n  learning_rate: 1e-4",
        "x.yaml:6: optimizer.learning_rate: expected a number above 0; found '1e-4' (text). YAML reads 1e-4 as "
        "text: write 1.0e-4 without quotes. Meaning: Step size.",
    ),
    "exponent without a sign": (
        GOOD + "optimizer: {clip: 2.5e3}",
        "x.yaml:5: optimizer.clip: expected a number above 0, or null; found '2.5e3' (text). YAML reads 2.5e3 as "
        "text: write 2.5e+3 without quotes. Meaning: Largest gradient norm; null never clips.",
    ),
    "exponent of an integer": (
        GOOD + "seed: 1e3",
        "x.yaml:5: seed: expected an integer; found '1e3' (text). YAML reads 1e3 as text: write 1000 without "
        "quotes. Meaning: Seeds every draw.",
    ),
    "quoted number": (
        GOOD + "seed: '7'",
        "x.yaml:5: seed: expected an integer; found '7' (text). YAML reads 7 as text: write 7 without quotes. "
        "Meaning: Seeds every draw.",
    ),
    "no read as a boolean": (
        GOOD + "note: no",
        "x.yaml:5: note: expected text, or null; found no (a boolean). Put it in quotes: 'no'. Meaning: Free text.",
    ),
    "number for text": (
        GOOD + "note: 3",
        "x.yaml:5: note: expected text, or null; found 3 (an integer). Put it in quotes: '3'. Meaning: Free text.",
    ),
    "below the range": (
        "data: {train: a, size: 8}\nsampler: {name: flow_sde}",
        "x.yaml:1: data.size: expected an integer of at least 16 and at most 4096; found 8 (an integer). "
        "Meaning: Side in pixels.",
    ),
    "at an open end": (
        GOOD + "optimizer: {learning_rate: 0}",
        "x.yaml:5: optimizer.learning_rate: expected a number above 0; found 0 (an integer). Meaning: Step size.",
    ),
    "not a number": (
        GOOD + "optimizer: {learning_rate: .nan}",
        "x.yaml:5: optimizer.learning_rate: expected a number above 0; found .nan (not finite). Meaning: Step size.",
    ),
    "item out of range": (
        GOOD + "optimizer:\n  betas:\n  - 0.9\n  - 1",
        "x.yaml:8: optimizer.betas[1]: expected a number of at least 0 and below 1; found 1 (an integer). "
        "Meaning: Decay rates.",
    ),
    "too few items": (
        GOOD + "optimizer: {betas: [0.9]}",
        "x.yaml:5: optimizer.betas: expected a list of 2: a number of at least 0 and below 1, a number of at least "
        "0 and below 1; found a list of 1. Meaning: Decay rates.",
    ),
    "one item bare": (
        "data: {train: a, columns: image}\nsampler: {name: flow_sde}",
        "x.yaml:1: data.columns: expected a list with every item text; found 'image' (text). Put it in brackets: "
        "[image]. Meaning: Columns to read.",
    ),
    "one item where a choice is text": (
        GOOD + "servers: host:1",
        "x.yaml:5: servers: expected one of embedded, or a list with every item text; found 'host:1' (text). "
        "Put it in brackets: [host:1]. Meaning: Where scorers run.",
    ),
    "a choice nearly": (
        GOOD + "servers: embeded",
        "x.yaml:5: servers: expected one of embedded, or a list with every item text; found 'embeded' (text). "
        "Did you mean embedded? Meaning: Where scorers run.",
    ),
    "item of a union": (
        GOOD + "scorers: {seam: {weight: 1, servers: [1]}}",
        "x.yaml:5: scorers.seam.servers[0]: expected text; found 1 (an integer). Put it in quotes: '1'. "
        "Meaning: Where it runs.",
    ),
    "no alternative": (
        GOOD + "scorers: {seam: {weight: 1, servers: {a: 1}}}",
        "x.yaml:5: scorers.seam.servers: expected text, or a list with every item text; found a section with the "
        "keys a. Meaning: Where it runs.",
    ),
    "key of a mapping's section": (
        GOOD + "scorers:\n  seam: {}",
        "x.yaml:6: scorers.seam.weight: missing. Give a number of at least 0. Meaning: Weight in the sum.",
    ),
    "inside an optional section": (
        GOOD + "extra: {train: a, size: 1}",
        "x.yaml:5: extra.size: expected an integer of at least 16 and at most 4096; found 1 (an integer). "
        "Meaning: Side in pixels.",
    ),
    "not a choice": (
        GOOD + "optimizer: {warmup: 11}",
        "x.yaml:5: optimizer.warmup: expected one of 0, 10, 100; found 11 (an integer). Meaning: Steps of warm-up.",
    ),
    "not a literal": (
        GOOD + "optimizer: {kind: adan}",
        "x.yaml:5: optimizer.kind: expected one of adam, sgd; found 'adan' (text). Did you mean adam? "
        "Meaning: Update rule.",
    ),
    "scalar for a section": (
        GOOD + "optimizer: adam",
        "x.yaml:5: optimizer: expected a section of keys; found 'adam' (text).",
    ),
    "unknown file behind a door": (
        "data: {train: a}\nsampler:\n  name: flow_ode",
        "x.yaml:3: sampler.name: found 'flow_ode' (text). Did you mean flow_sde? Give a section whose `name` is a "
        "file of doors: broken, empty, flow_sde. Meaning: Which sampler.",
    ),
    "helper behind a door": (
        "data: {train: a}\nsampler: {name: _helper}",
        "x.yaml:2: sampler.name: found '_helper' (text). Give a section whose `name` is a file of doors: broken, "
        "empty, flow_sde. Meaning: Which sampler.",
    ),
    "file without its class": (
        "data: {train: a}\nsampler: {name: empty}",
        "x.yaml:2: sampler.name: doors.empty lacks a dataclass named like the file: empty, in any case.",
    ),
    "door without a name": (
        "data: {train: a}\nsampler: {steps: 3}",
        "x.yaml:2: sampler: found a section with the keys steps. Give a section whose `name` is a file of doors: "
        "broken, empty, flow_sde. Meaning: Which sampler.",
    ),
    "door left out": (
        "data: {train: a}",
        "x.yaml:1: sampler: missing. Give a section whose `name` is a file of doors: broken, empty, flow_sde. "
        "Meaning: Which sampler.",
    ),
    "rule of a section": (
        GOOD + "  trained: 11",
        "x.yaml:5: sampler.trained: 11 of 10 steps cannot be trained. Lower it.",
    ),
    "rule on a key left out": (
        GOOD + "  steps: 2",
        "x.yaml:3: sampler.trained: 5 of 2 steps cannot be trained. Lower it.",
    ),
    "rule between sections": (
        GOOD + "optimizer: {clip: 2}\nseed: 13",
        "x.yaml:5: optimizer.kind: cannot be used with seed 13.",
    ),
    "merge key": (
        "data: &a {train: a}\nsampler: {name: flow_sde}\nextra:\n  <<: *a\n  train: b",
        "x.yaml:4: extra: merge keys (`<<`) are not supported. Write the keys out.",
    ),
    "tag": (
        GOOD + "note: !!python/name:os.system x",
        "x.yaml:5: note: tags such as `!!python/name:os.system` are not supported. Write the plain value.",
    ),
    "key that is no text": (
        GOOD + "scorers: {on: {weight: 1}}",
        "x.yaml:5: scorers: YAML does not read the key `on` as text. Quote it.",
    ),
    "tab": (
        "data:\n\ttrain: a",
        "x.yaml:2: column 1: not valid YAML: while scanning for the next token, found character '\\t' that cannot "
        "start any token. Look at the indentation (spaces, no tabs), the colons, the brackets and the quotes there "
        "and on the line above.",
    ),
    "empty file": ("# nothing\n", "x.yaml is empty. A recipe is a mapping of sections, such as `algorithm:`."),
    "list file": ("- 1\n", "x.yaml is not a mapping. A recipe is a mapping of sections, such as `algorithm:`."),
}


@pytest.mark.parametrize("mistake", TELLS)
def test_a_mistake_is_told(complaints, mistake):
    text, complaint = TELLS[mistake]
    assert complaints(text) == [complaint]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1\n", "x.yaml:2: column 1: not valid YAML: while parsing a flow sequence"),
        ("a: 'b\n", "found unexpected end of stream"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2: column 1: not valid YAML: expected a single document"),
        ("a: *b\n", "x.yaml:1: column 4: not valid YAML: found undefined alias 'b'"),
        (b"a: \xff\n", "x.yaml:1: not a text file in UTF-8"),
        (b"a: \0\n", "x.yaml:1: not a text file in UTF-8"),
        ("scorers: &a {b: *a}", "x.yaml:1: scorers.b: contains itself through an alias (`*name`)"),
    ],
)
def test_what_is_no_yaml_is_told(complaints, text, reason):
    assert reason in complaints(text)[0]


def test_all_problems_are_told_at_once(complaints):
    lines = complaints(
        "data: {size: 1}\nsampler: {name: flow_sde, steps: 0}\nsede: 1\nresume: maybe\nseed: 1\nseed: 2\n"
    )
    places = [line.split(": ")[0:2] for line in lines]
    assert places == [
        ["x.yaml:6", "seed"],
        ["x.yaml:1", "data.size"],
        ["x.yaml:1", "data.train"],
        ["x.yaml:2", "sampler.steps"],
        ["x.yaml:3", "sede"],
        ["x.yaml:4", "resume"],
    ]


def test_a_missing_file_names_the_recipes_there_are(load, tmp_path):
    load(GOOD)
    with pytest.raises(InputError, match=r"^y\.yaml does not exist\. .* folder: x\.yaml\. Did you mean x\.yaml\?$"):
        schema.load(Path("y.yaml"), [], Recipe)
    with pytest.raises(InputError, match="is not a file"):
        schema.load(tmp_path, [], Recipe)


def test_overrides_win_over_the_file_and_make_sections(load):
    recipe = load(
        GOOD + "seed: 1\nscorers:\n",
        "seed=2",
        "seed=3",
        "optimizer.learning_rate=1.0e-3",
        "optimizer.betas=[0.5, 0.6]",
        "scorers.seam.weight=2",
        "sampler={name: flow_sde, steps: 7}",
        "note=",
        "data.train=a=b.jsonl",
    ).value
    assert (recipe.seed, recipe.note, recipe.data.train, recipe.sampler.steps) == (3, None, Path("a=b.jsonl"), 7)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.betas) == (1e-3, (0.5, 0.6))
    assert recipe.scorers == {"seam": Scorer(2.0)}


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("seed", "override 'seed': write it as section.key=value."),
        ("data.=3", "override 'data.=3': write it as section.key=value."),
        ("=3", "override '=3': write it as section.key=value."),
        (
            "data.siez=64",
            "override 'data.siez=64': data.siez: unknown key. Allowed here: train, size, columns. Did you mean size?",
        ),
        (
            "seed=1e3",
            "override 'seed=1e3': seed: expected an integer; found '1e3' (text). YAML reads 1e3 as text: write 1000 "
            "without quotes. Meaning: Seeds every draw.",
        ),
        (
            "seed.x=1",
            "override 'seed.x=1': seed is not a section at x.yaml:5, so it has no keys to set. Override it as a whole.",
        ),
        (
            "sampler.trained=11",
            "override 'sampler.trained=11': sampler.trained: 11 of 10 steps cannot be trained. Lower it.",
        ),
    ],
)
def test_a_wrong_override_is_told(complaints, override, complaint):
    assert complaints(GOOD + "seed: 1", override) == [complaint]


def test_a_broken_override_is_told(complaints):
    [line] = complaints(GOOD, "optimizer.betas=[0.5")
    assert line.startswith("override 'optimizer.betas=[0.5': column 5: not valid YAML")


def test_later_checks_are_told_at_the_line_of_their_key(load):
    loaded = load(GOOD + "scorers:\n  seam: {weight: 1, servers: [a, b]}\n", "seed=4")
    for path, place in {
        "data.train": "x.yaml:2",
        "data.size": "x.yaml:1",
        "sampler.name": "x.yaml:4",
        "scorers.seam.servers[1]": "x.yaml:6",
        "scorers.seam.absent.too": "x.yaml:6",
        "optimizer.clip": "x.yaml:1",
        "seed": "override 'seed=4'",
    }.items():
        assert str(loaded.error(path, "is wrong.")) == f"{place}: {path}: is wrong."


def test_a_dump_loads_to_an_equal_recipe(load):
    recipe = load(
        GOOD,
        "optimizer={learning_rate: 1.0e-07, milestones: [3], clip: null}",
        "scorers={'yes': {weight: 1.0e+30}, b: {weight: 2, servers: ['1:30', '1e-4', 'no', '007', 'ü: #']}}",
        "extra.train=m.jsonl",
    ).value
    text = schema.dump(recipe)
    assert load(text).value == recipe
    assert schema.dump(load(text).value) == text
    assert [line for line in text.splitlines() if not line.startswith((" ", "-"))] == [
        "data:",
        "sampler:",
        "optimizer:",
        "scorers:",
        "servers: embedded",
        "other_sampler: null",
        "extra:",
        "note: null",
        "resume: false",
        "seed: 0",
    ]
    assert "sampler:\n  name: flow_sde\n  steps: 10\n" in text
    assert "learning_rate: 1.0e-07" in text
    assert schema.plain(recipe)["sampler"] == {"name": "flow_sde", "steps": 10, "trained": 5}


def test_an_optional_door_may_stay_shut(load):
    shut, opened = load(GOOD).value, load(GOOD, "other_sampler={name: flow_sde, steps: 7}").value
    assert shut.other_sampler is None
    assert opened.other_sampler.steps == 7
    assert [load(schema.dump(recipe)).value for recipe in (shut, opened)] == [shut, opened]


def test_a_type_that_keys_cannot_have_is_a_bug_of_the_section(tmp_path):
    @dataclass(frozen=True)
    class Odd:
        things: Any = key(REQUIRED, "Things.")

    (tmp_path / "x.yaml").write_text("things: 1")
    with pytest.raises(TypeError, match="is not a type that a recipe key can have"):
        schema.load(tmp_path / "x.yaml", [], Odd)
