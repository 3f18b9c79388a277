"""Who may use the folder of a run, and from which checkpoint the run goes on."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from ds_inpaint import run_folder, schema
from ds_inpaint.checkpoint_files import Layout, Manifest, at, begin, finish
from ds_inpaint.errors import InputError
from ds_inpaint.recipe import Recipe, load_recipe
from ds_inpaint.run_folder import opened


@pytest.fixture
def load(recipe, tmp_path):
    """A recipe for the folder ``run``, with settings."""

    def loaded(*settings: str) -> Recipe:
        return load_recipe(recipe, [f"run.dir={tmp_path / 'run'}", "run.iterations=9", *settings], 1)

    return loaded


def leave_checkpoint(recipe: Recipe, done: int) -> Path:
    """What a run leaves in its folder after some iterations, but for the weights."""
    target = at(recipe.run.dir / "checkpoints", done)
    begin(target, 0)
    state = {"progress": {"done": done}, "recipe": schema.dump(recipe)}
    finish(target, Manifest(Layout(0, 1, "fp32", "sgd", (), ()), {}, {}, state, {}))
    rows = [json.dumps({"iteration": number}) + "\n" for number in range(done + 1)]
    (recipe.run.dir / "metrics.jsonl").write_text("".join(rows))
    for number in (0, done):
        (recipe.run.dir / "samples" / f"{number:06d}").mkdir(exist_ok=True)
        (recipe.run.dir / "samples" / f"{number:06d}.json").write_text("[]")
    return target


@pytest.fixture
def found(load):
    """A run of 4 iterations with two checkpoints."""
    with opened(load()) as start:
        assert start is None
        leave_checkpoint(load(), 2)
        return leave_checkpoint(load(), 4)


def test_a_run_goes_on_from_its_newest_checkpoint(load, found):
    with opened(load()) as start:
        assert start == found


@pytest.mark.parametrize(
    "change", ["run.iterations=12", "engine.zero_stage=1", "alarms.kl=7", "checkpoint.keep_every=4"]
)
def test_what_changes_nothing_that_is_learned_may_change_and_is_listed(load, found, change, capsys):
    name, value = change.split("=")
    with opened(load(change)) as start:
        assert start == found
    [told, listed] = capsys.readouterr().out.splitlines()
    assert told == f"The run goes on from {found} with changes:"
    assert listed.startswith(f"  {name}: ")
    assert listed.endswith(f" there, {float(value) if name == 'alarms.kl' else value} here")


def test_what_would_make_it_another_run_is_refused_unless_it_is_forced(load, found):
    with pytest.raises(InputError, match=r"algorithm.clip_range: 0.0001 there, 0.5 here") as refused:
        opened(load("algorithm.clip_range=0.5")).__enter__()
    assert str(refused.value).endswith("add 'run.allow_changes=[algorithm.clip_range]'.")
    for forced in ("algorithm.clip_range", "algorithm"):
        with opened(load("algorithm.clip_range=0.5", f"run.allow_changes=[{forced}]")) as start:
            assert start == found


def test_the_length_of_a_run_belongs_to_it_where_the_learning_rate_follows_it(load):
    with opened(load("optimizer.schedule=cosine")):
        leave_checkpoint(load("optimizer.schedule=cosine"), 2)
    with pytest.raises(InputError, match=r"run.iterations: 9 there, 10 here"):
        opened(load("optimizer.schedule=cosine", "run.iterations=10")).__enter__()


def test_a_run_cannot_become_shorter_than_it_is(load, found):
    with pytest.raises(InputError, match=r"found 3, but the run in .* has done 4"):
        opened(load("run.iterations=3")).__enter__()


def test_a_run_that_is_not_wanted_is_moved_aside(load, found, capsys):
    folder = load().run.dir
    with opened(load("run.resume=never")) as start:
        assert start is None
        assert not (folder / "metrics.jsonl").exists()
    assert capsys.readouterr().out == f"{folder} held a run that is not continued; it was moved to {folder}.1.\n"
    assert at(Path(f"{folder}.1") / "checkpoints", 4).exists()


@pytest.mark.parametrize("names", ["checkpoint", "run"])
def test_a_branch_begins_in_a_folder_of_its_own_and_then_goes_on_from_there(load, found, tmp_path, names):
    given = at(found.parent, 2) if names == "checkpoint" else load().run.dir
    done = 2 if names == "checkpoint" else 4
    branch = load(f"run.dir={tmp_path / 'branch'}", f"run.resume={given}")
    with opened(branch) as start:
        assert start == at(found.parent, done)
        rows = [json.loads(row) for row in (tmp_path / "branch" / "metrics.jsonl").read_text().splitlines()]
        assert rows == [{"iteration": number} for number in range(done + 1)]
        drawn = {path.name for path in (tmp_path / "branch" / "samples").iterdir()}
        assert drawn == {name for number in {0, 2, done} for name in (f"{number:06d}", f"{number:06d}.json")}
    with opened(branch) as start:  # it was killed before its first checkpoint
        assert start == at(found.parent, done)
        own = leave_checkpoint(branch, 5)
    with opened(branch) as start:
        assert start == own


def test_a_branch_inside_its_own_run_is_refused(load, found):
    older = at(found.parent, 2)
    with pytest.raises(InputError, match=r"is not the newest checkpoint of .* To branch off"):
        opened(load(f"run.resume={older}")).__enter__()


def test_a_branch_of_nothing_is_refused(load, tmp_path):
    with pytest.raises(InputError, match=r"run.resume: .*nothing is neither a checkpoint nor a run folder"):
        opened(load(f"run.resume={tmp_path / 'nothing'}")).__enter__()


def test_a_checkpoint_outside_of_any_run_has_no_history_to_go_on_from(load, found, tmp_path):
    lost = found.rename(tmp_path / "best")
    with pytest.raises(InputError, match=r"lies in no run: .*metrics.jsonl has no rows"):
        opened(load(f"run.dir={tmp_path / 'branch'}", f"run.resume={lost}")).__enter__()


def test_a_folder_that_cannot_be_written_is_told_before_anything_else(load, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"run\.dir: .*file/run cannot be written \(.*\); give another folder"):
        opened(load(f"run.dir={tmp_path / 'file' / 'run'}")).__enter__()


HOLDER = """
import sys, time
from pathlib import Path
from ds_inpaint.run_folder import _locked
with _locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(folder: Path, seconds: float) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_two_runs_cannot_use_one_folder(load):
    holder = hold(load().run.dir, 600)
    with patch.object(run_folder, "LOCK_SECONDS", 0), pytest.raises(InputError) as refused:
        opened(load()).__enter__()
    assert f"is in use by process {holder.pid} of " in str(refused.value)
    holder.kill()
    holder.communicate()
    with opened(load()) as start:  # the lock ended with the process
        assert start is None


def test_a_run_waits_for_one_that_is_about_to_leave(load, caplog):
    holder = hold(load().run.dir, 0.5)
    with caplog.at_level(logging.WARNING), opened(load()) as start:
        assert start is None
    assert f"is in use by process {holder.pid}" in caplog.text
    holder.communicate()
