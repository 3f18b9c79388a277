"""The folder of a run: who may use it, what is found in it, and from which checkpoint the run goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from uuid import uuid4

from ds_inpaint import schema
from ds_inpaint.checkpoint_files import is_checkpoint, newest
from ds_inpaint.collapse import Alarms
from ds_inpaint.distributed import Ranks
from ds_inpaint.errors import InputError
from ds_inpaint.recipe import Recipe
from ds_inpaint.recipe_diff import differences
from ds_inpaint.stored_checkpoint import StoredCheckpoint
from ds_inpaint.tracking import read_metrics

LOG = logging.getLogger(__name__)

RECIPE, CHECKPOINTS, METRICS, SAMPLES, LOCK = "recipe.yaml", "checkpoints", "metrics.jsonl", "samples", "run.lock"
"""What lies in the folder of a run."""

LOCK_SECONDS = 60.0
"""How long to wait for a run in the same folder to leave, such as one whose launcher was killed."""

CHANGEABLE = {
    *("run.name", "run.dir", "run.iterations", "run.resume", "run.allow_changes", "run.max_hours", "run.max_skipped"),
    *("rewards.servers", "rewards.timeout_seconds", "rewards.retry_seconds", "rewards.max_invalid_fraction"),
    *("rewards.tls_ca", "rewards.tls_certificate", "rewards.tls_key", "rewards.token_file"),
    "rewards.allow_changed_scorers",
    *("engine.zero_stage", "engine.micro_batch", "engine.activation_checkpointing", "engine.gather_once"),
    *("engine.compile", "engine.attention", "engine.channels_last", "engine.offload_optimizer"),
    *("engine.timeout_minutes", "engine.reduce_bucket", "engine.prefetch_bucket"),
    *(f"alarms.{bound.name}" for bound in fields(Alarms)),
    *("evaluation.every", "tracking.wandb", "tracking.project"),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.keep_every", "checkpoint.asynchronous"),
}
"""Keys that a continued run may change: they alter neither what is learned nor what is compared at the end."""


@contextmanager
def opened(recipe: Recipe) -> Iterator[Path | None]:
    """Within this context the run folder is this process's alone; it is made, or holds a run that the recipe continues.

    A run that never reached a checkpoint, or is not wanted (``run.resume: never``), is moved aside, to ``DIR.1`` and
    so on.

    Yields:
        the checkpoint that the run goes on from, if any.

    Raises:
        InputError: another process uses the folder, another recipe's run is there, or a longer one, or the folder
            cannot be made.
    """
    folder = recipe.run.dir
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(folder))
            start = _start(recipe)
            done = 0 if start is None else _check(start, recipe)
            if start is None or folder not in start.parents:
                if read_metrics(folder / METRICS) or newest(folder / CHECKPOINTS):
                    print(
                        f"{folder} held a run that is not continued; it was moved to {_move_aside(folder)}.", flush=True
                    )
                    folder.mkdir()
                    stack.enter_context(_locked(folder))
                if start is not None:
                    _copy_history(start, done, folder)
            for child in (SAMPLES, CHECKPOINTS):
                (folder / child).mkdir(exist_ok=True)
            (folder / RECIPE).write_text(schema.dump(recipe))
        except OSError as error:
            raise InputError(f"run.dir: {folder} cannot be written ({error}); give another folder.") from error
        yield start


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


def _start(recipe: Recipe) -> Path | None:
    """The checkpoint that a run begins from."""
    if recipe.run.resume == "never":
        return None
    own = newest(recipe.run.dir / CHECKPOINTS)
    if recipe.run.resume == "auto":
        return own
    given = Path(recipe.run.resume)
    if own is None:
        return _checkpoint_at(given)
    if given.parent.resolve() == own.parent.resolve() and given.name != own.name:
        raise InputError(
            f"run.resume: {given} is not the newest checkpoint of {recipe.run.dir}, which is {own.name}. To branch off "
            f"there give another run.dir; to take the later iterations back delete the later checkpoints."
        )
    return own  # the same command goes on from the branch's own, even if what it began from is gone


def _checkpoint_at(place: Path) -> Path:
    """The checkpoint that ``run.resume`` names: its folder, or the newest of a run's folder."""
    found = place if is_checkpoint(place) else newest(place / CHECKPOINTS)
    if found is None:
        raise InputError(
            f"run.resume: {place} is neither a checkpoint nor a run folder that has one. Give a folder such as "
            f"runs/a/checkpoints/000050, or runs/a for its newest; or auto, or never."
        )
    return found


def _check(start: Path, recipe: Recipe) -> int:
    """See that the recipe continues what the checkpoint is of, and tell what has changed; returns iterations done."""
    state = StoredCheckpoint.open(start).manifest.state
    there, done = schema.load_text(state["recipe"], f"recipe of {start}", Recipe), state["progress"]["done"]
    changed = {each.key: f"  {each.key}: {each.before} there, {each.after} here" for each in differences(there, recipe)}
    refused = [name for name in changed if not _may_change(name, recipe)]
    if refused:
        raise InputError(
            f"run.dir: {start} is of another recipe:\n"
            + "\n".join(changed[name] for name in refused)
            + "\nGive another run.dir to begin anew; or, to go on with these changes, add "
            + f"'run.allow_changes=[{', '.join([*recipe.run.allow_changes, *refused])}]'."
        )
    if done > recipe.run.iterations:
        raise InputError(
            f"run.iterations: found {recipe.run.iterations}, but the run in {start.parents[1]} has done {done}. Give "
            f"at least {done}, or another run.dir."
        )
    if changed:
        print(f"The run goes on from {start} with changes:\n" + "\n".join(changed.values()), flush=True)
    return int(done)


def _may_change(name: str, recipe: Recipe) -> bool:
    if any(name == allowed or name.startswith(f"{allowed}.") for allowed in recipe.run.allow_changes):
        return True
    if name == "run.iterations" and recipe.optimizer.schedule == "cosine":
        return False  # the learning rate falls to 0 over these iterations, so others are another run
    return name in CHANGEABLE


def _copy_history(start: Path, done: int, folder: Path) -> None:
    """What the run of another folder has logged and drawn up to the checkpoint that is begun from."""
    other = start.parents[1]
    rows = [row for row in read_metrics(other / METRICS) if row["iteration"] <= done]
    if not rows:
        raise InputError(f"run.resume: {start} lies in no run: {other / METRICS} has no rows. Copy whole run folders.")
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / SAMPLES).mkdir()
    for drawn in (other / SAMPLES).iterdir():
        if int(drawn.stem) <= done:
            copy = shutil.copytree if drawn.is_dir() else shutil.copy2
            copy(drawn, folder / SAMPLES / drawn.name)


def _move_aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(aside)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out; the operating system ends the lock with this process, however that ends."""
    with (folder / LOCK).open("a+") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        told = False
        while not _try_lock(file.fileno()):
            file.seek(0)
            if time.monotonic() > deadline:
                raise InputError(
                    f"run.dir: {folder} is in use by {file.read()}. Wait for it, stop it, or give another run.dir."
                )
            if not told:
                LOG.warning("%s is in use by %s; waiting up to %.0f s for it.", folder, file.read(), LOCK_SECONDS)
                told = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            raise
        LOG.warning("This disk has no file locks (%s): see that no two runs use one run.dir.", error)
    return True
