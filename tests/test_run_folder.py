"""Which recipe may continue the run found in a folder."""

from __future__ import annotations

import pytest

from ds_inpaint.errors import InputError
from ds_inpaint.recipe import load_recipe
from ds_inpaint.run_folder import open_run_folder


@pytest.fixture
def reopen(recipe, tmp_path):
    """Opens the folder of a run with a checkpoint after 2 iterations, then again with other settings."""

    def open_twice(first: list[str], second: list[str]) -> None:
        settings = [f"run.dir={tmp_path / 'run'}", "run.iterations=4"]
        open_run_folder(load_recipe(recipe, [*settings, *first], 1))
        (tmp_path / "run" / "checkpoints" / "000002").mkdir()
        open_run_folder(load_recipe(recipe, [*settings, *first, *second], 1))

    return open_twice


@pytest.mark.parametrize(
    "change", ["run.iterations=9", "engine.zero_stage=1", "rewards.retry_seconds=7", "checkpoint.asynchronous=true"]
)
def test_what_changes_nothing_that_is_learned_may_change(reopen, change):
    reopen([], [change])


@pytest.mark.parametrize(
    ("first", "change", "told"),
    [
        ([], "algorithm.clip_range=0.5", r"algorithm.clip_range: 0.0001 there, 0.5 here"),
        ([], "run.iterations=1", r"found 1, but the run in .* has done 2"),
        (["optimizer.schedule=cosine"], "run.iterations=9", r"run.iterations: 4 there, 9 here"),
    ],
)
def test_what_would_make_it_another_run_is_refused(reopen, first, change, told):
    with pytest.raises(InputError, match=told):
        reopen(first, [change])


def test_a_folder_that_cannot_be_written_is_told_before_anything_else(recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"run\.dir: .*file/run cannot be written \(.*\); give another folder"):
        open_run_folder(load_recipe(recipe, [f"run.dir={tmp_path / 'file' / 'run'}"], 1))
