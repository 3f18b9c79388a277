"""The folder of a run: whether a recipe may use it, and what is found in it."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from ds_inpaint import schema
from ds_inpaint.checkpoint_files import numbers
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import InputError
from ds_inpaint.recipe import Recipe

RECIPE, CHECKPOINTS, METRICS = "recipe.yaml", "checkpoints", "metrics.jsonl"
"""What lies in the folder of a run."""

CHANGEABLE = {
    *("run.name", "run.dir", "run.iterations"),
    *("rewards.servers", "rewards.timeout_seconds", "rewards.retry_seconds", "rewards.max_invalid_fraction"),
    *("rewards.tls_ca", "rewards.tls_certificate", "rewards.tls_key", "rewards.token_file"),
    "rewards.allow_changed_scorers",
    *("engine.zero_stage", "engine.micro_batch", "engine.activation_checkpointing", "engine.gather_once"),
    *("engine.timeout_minutes", "engine.reduce_bucket", "engine.prefetch_bucket"),
    *("evaluation.every", "checkpoint.every", "checkpoint.keep", "tracking.wandb", "tracking.project"),
}
"""Keys that a continued run may change: they alter neither what is learned nor what is compared at the end."""


def open_run_folder(recipe: Recipe) -> None:
    """Make the run folder, or see that the run found there is one that this recipe continues.

    A run that never reached a checkpoint is moved aside, to ``DIR.1`` and so on, and begun anew.

    Raises:
        InputError: another recipe's run is there, or a longer one, or the folder cannot be made.
    """
    folder, file = recipe.run.dir, recipe.run.dir / RECIPE
    done, metrics = numbers(folder / CHECKPOINTS), folder / METRICS
    if done:
        _refuse_other_recipe(file, recipe)
        _refuse_longer_run(done[-1], recipe)
    try:
        if not done and metrics.exists() and metrics.read_text():
            print(f"{folder} held a run without a checkpoint; it was moved to {_move_aside(folder)}.", flush=True)
        for child in ("samples", CHECKPOINTS):
            (folder / child).mkdir(parents=True, exist_ok=True)
        file.write_text(schema.dump(recipe))
    except OSError as error:
        raise InputError(f"run.dir: {folder} cannot be written ({error}); give another folder.") from error


def require_shared(folder: Path, ranks: Ranks) -> None:
    """See that the run folder is the same for all ranks, also on other machines. Collective.

    Raises:
        InputError: on all ranks; a rank does not find there what rank 0 has put there.
    """
    name = f".{uuid4().hex}"  # that no disk remembers
    if ranks.is_main:
        (folder / name).touch()
    found = ranks.gather((folder / ranks.broadcast(name)).exists())
    if ranks.is_main:
        (folder / name).unlink()
    if not all(found):
        raise InputError(
            f"run.dir: rank {found.index(False)} does not see what rank 0 writes into {folder}. Give an absolute path "
            f"on a disk that all machines share."
        )


def _refuse_other_recipe(file: Path, recipe: Recipe) -> None:
    before, now = _flat(schema.plain(schema.load(file, [], Recipe).value)), _flat(schema.plain(recipe))
    changes = [
        f"  {name}: {before.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not _may_change(name, recipe)
    ]
    if changes:
        raise InputError(
            f"run.dir: {file.parent} holds a run of another recipe:\n"
            + "\n".join(changes)
            + "\nGive another run.dir, or delete that folder."
        )


def _may_change(name: str, recipe: Recipe) -> bool:
    if name == "run.iterations" and recipe.optimizer.schedule == "cosine":
        return False  # the learning rate falls to 0 over these iterations, so others are another run
    return name in CHANGEABLE


def _refuse_longer_run(done: int, recipe: Recipe) -> None:
    if done > recipe.run.iterations:
        raise InputError(
            f"run.iterations: found {recipe.run.iterations}, but the run in {recipe.run.dir} has done {done}. Give "
            f"at least {done}, or another run.dir."
        )


def _flat(section: object, path: str = "") -> dict[str, object]:
    if not isinstance(section, dict):
        return {path: section}
    return {
        name: value
        for key, inner in section.items()
        for name, value in _flat(inner, f"{path}.{key}" if path else key).items()
    }


def _move_aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(aside)
