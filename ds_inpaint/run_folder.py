"""The folder of a run: whether a recipe may use it, and what is found in it."""

from __future__ import annotations

from pathlib import Path

from ds_inpaint import schema
from ds_inpaint.errors import InputError
from ds_inpaint.recipe import Recipe

CHANGEABLE = {"run.iterations", "run.name"}
"""Keys that may differ when a run is continued, together with the sections below."""
CHANGEABLE_SECTIONS = ("evaluation", "checkpoint", "tracking")


def open_run_folder(recipe: Recipe) -> None:
    """Make the run folder, or see that the run found there is the one this recipe would continue.

    A run that never reached a checkpoint is moved aside, to ``DIR.1`` and so on, and begun anew.

    Raises:
        InputError: another recipe's run is there, or the folder cannot be made.
    """
    folder, file = recipe.run.dir, recipe.run.dir / "recipe.yaml"
    if file.exists():
        _refuse_other_recipe(file, recipe)
        if not (folder / "checkpoints" / "latest").exists():
            aside = _move_aside(folder)
            print(f"{folder} held a run without a checkpoint; it was moved to {aside}.", flush=True)
    try:
        for child in ("samples", "checkpoints"):
            (folder / child).mkdir(parents=True, exist_ok=True)
        file.write_text(schema.dump(recipe))
    except OSError as error:
        raise InputError(f"run.dir: {folder} cannot be written ({error}); give another folder.") from error


def _refuse_other_recipe(file: Path, recipe: Recipe) -> None:
    before, now = _flat(schema.plain(schema.load(file, [], Recipe).value)), _flat(schema.plain(recipe))
    changes = [
        f"  {name}: {before.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not _may_change(name)
    ]
    if changes:
        raise InputError(
            f"run.dir: {file.parent} holds a run of another recipe:\n"
            + "\n".join(changes)
            + "\nGive another run.dir, or delete that folder."
        )


def _may_change(name: str) -> bool:
    return name in CHANGEABLE or name.split(".")[0] in CHANGEABLE_SECTIONS


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
