"""Scorers found, run and set up by name, their weights found or downloaded, and what their fingerprints cover."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from reward_servers import fingerprint, loading, weights
from reward_servers.__main__ import main
from reward_servers.errors import SetupError
from reward_servers.loading import load, scorer_files
from reward_servers.scorer import Weights

SCORER = """
from dataclasses import dataclass
from pathlib import Path

import torch

from reward_servers.scorer import Info, Inputs, Need, Scored, operational, weights_from


@dataclass(frozen=True)
class Scorer:
    picture: Path = Path("a.png")
    patience: int = operational(3)

    info = Info("Constant.", (Need.MASKS,), (0, 1), "none")

    def score(self, inputs):
        return Scored(torch.zeros(inputs.count))
"""


@pytest.fixture
def write(tmp_path):
    """Writes a scorer's file; returns what loads it."""

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        return partial(load, name, folder=tmp_path)

    return write


# Names and settings


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("seem", {}, ["'seem'", "Did you mean 'seam'?", "ring_texture"]),
        ("seam", {"near": "3"}, ["'near'", "Did you mean 'near_px'?"]),
        ("seam", {"near_px": "3.5"}, ["seam.near_px", "int", "'3.5'"]),
        ("ring_texture", {"floor": "high"}, ["ring_texture.floor", "float", "'high'"]),
    ],
)
def test_loading_errors_name_the_cause_and_the_cure(name, settings, words):
    with pytest.raises(SetupError) as caught:
        load(name, settings)
    assert all(word in str(caught.value) for word in words)


def test_folder_of_scorers_must_exist_and_not_shadow(tmp_path):
    with pytest.raises(SetupError, match="does not exist"):
        load("seam", folder=tmp_path / "nowhere")
    (tmp_path / "seam.py").write_text("")
    with pytest.raises(SetupError, match="repeats the built-in seam"):
        load("seam", folder=tmp_path)


# A user's file


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def score(:\n", r"cannot be run: SyntaxError: .*line 1"),
        ("import no_such_library\n", "cannot be run: ModuleNotFoundError: No module named 'no_such_library'"),
        ("1 / 0\n", "cannot be run: ZeroDivisionError: division by zero"),
        ("scorer = 1\n", "must define a frozen dataclass Scorer"),
        ("class Scorer: pass\n", "must define a frozen dataclass Scorer"),
        ("Scorer = 3\n", "must define a frozen dataclass Scorer"),
    ],
)
def test_a_file_that_defines_no_scorer_is_explained(write, source, words):
    with pytest.raises(SetupError, match=rf"broken\.py {words}"):
        write("broken", source)()


def test_the_command_ends_with_code_2_on_a_broken_file(write, tmp_path, capsys):
    write("broken", "import no_such_library\n")
    assert main(["broken", "--scorers-from", str(tmp_path)]) == 2
    assert "broken.py cannot be run: ModuleNotFoundError" in capsys.readouterr().err


def test_a_file_runs_once_however_often_it_is_served(write, tmp_path):
    write("counted", f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n" + SCORER)
    one, two = (load(name, folder=tmp_path, file="counted") for name in ("one", "two"))
    assert (tmp_path / "runs").read_text() == "x"
    assert type(one.scorer) is type(two.scorer)
    assert (one.name, one.fingerprint) == ("one", two.fingerprint)


# Fingerprints


def test_the_fingerprint_follows_settings_and_code(write):
    assert load("seam").fingerprint == load("seam").fingerprint
    assert load("seam").fingerprint != load("seam", {"near_px": "4"}).fingerprint
    edge = write("edge", scorer_files()["seam"].read_text())
    before = edge().fingerprint
    write("edge", scorer_files()["seam"].read_text() + "\n# changed\n")
    assert before != edge().fingerprint


def test_a_path_that_names_no_weights_counts_as_text_and_operational_settings_not_at_all(write):
    edge = write("edge", SCORER)
    before = edge().fingerprint
    assert edge({"picture": "b.png"}).fingerprint != before
    patient = edge({"patience": "9"})
    assert patient.scorer.patience == 9
    assert patient.fingerprint == before


@pytest.mark.parametrize(
    "imports",
    [
        "import reward_servers.pixels",
        "from reward_servers import pixels",
        "from reward_servers import views as eyes",
        "from reward_servers.scorers import seam",
        "def later():\n    from reward_servers.pixels import dilate",
    ],
)
def test_the_code_is_all_that_is_imported_of_this_package(write, tmp_path, imports):
    write("edge", SCORER + imports + "\nimport reward_servers.layouts\nimport torch.nn.functional\n")
    code = fingerprint._code_of(tmp_path / "edge.py")
    package = Path(loading.__file__).parent
    assert {tmp_path / "edge.py", package / "pixels.py", package / "scoring.py", package / "scorer.py"} <= code
    assert all(file.parent in (tmp_path, package, package / "scorers") for file in code)


def test_a_change_of_how_inputs_are_made_changes_every_fingerprint(monkeypatch, tmp_path):
    before = load("seam").fingerprint
    changed = tmp_path / "scoring.py"
    changed.write_text(fingerprint.MAKES_INPUTS.read_text().replace("MASK_THRESHOLD = 127", "MASK_THRESHOLD = 1"))
    monkeypatch.setattr(fingerprint, "MAKES_INPUTS", changed)
    assert load("seam").fingerprint != before


def test_a_relative_import_is_refused(write):
    with pytest.raises(SetupError, match=r"edge\.py:2 is a relative import.* Write reward_servers\.MODULE in full"):
        write("edge", '"""Edge."""\nfrom ..pixels import dilate\n' + SCORER)()


def test_releases_of_libraries_count_where_they_are_imported(write, monkeypatch):
    plain, learned = write("plain", SCORER), write("learned", "import transformers\n" + SCORER)
    releases = {"torch": "2.9.0+cpu", "transformers": "5.1.0"}
    monkeypatch.setattr(fingerprint, "version", releases.__getitem__)
    before = [plain().fingerprint, learned().fingerprint]
    releases["torch"] = "2.9.0+cu128"
    assert [plain().fingerprint, learned().fingerprint] == before
    releases["transformers"] = "5.1.1"
    assert plain().fingerprint == before[0]
    assert learned().fingerprint != before[1]
    releases["torch"] = "2.9.1"
    assert plain().fingerprint != before[0]


# Weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose answers are in ``on_disk`` and ``online``, and which tells who was asked."""

    class Hub:
        on_disk: Path | None = None
        online: Path = tmp_path / "online"
        asked: list[str]

    def snapshot_download(repository, allow_patterns, local_files_only=False):
        hub.asked.append("disk" if local_files_only else "hub")
        if not local_files_only:
            return str(hub.online)
        if hub.on_disk is None:
            raise LocalEntryNotFoundError("nothing is there")
        return str(hub.on_disk)

    hub = Hub()
    hub.asked = []
    for folder in ("online", "older", "configuration"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    for folder in ("online", "older"):
        save_file({"weight": torch.zeros(1)}, tmp_path / folder / "model.safetensors")
    monkeypatch.setattr(weights, "snapshot_download", snapshot_download)
    return hub


def test_what_was_downloaded_before_is_used_and_only_what_is_not_there_is_fetched(hub, tmp_path):
    find = partial(weights.find_weights, "clip_score", "weights", Path("owner/name"), Weights("owner/name", ""))
    assert find() == hub.online
    hub.on_disk = tmp_path / "older"
    assert find() == hub.on_disk
    hub.on_disk = tmp_path / "configuration"
    assert find() == hub.online
    assert hub.asked == ["disk", "hub", "disk", "disk", "hub"]
