"""The training loop; blind to the model family and to the algorithm."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ds_inpaint.alarms import holdout_alarms
from ds_inpaint.cache import check_encoders
from ds_inpaint.checkpoint_files import at, drop_old
from ds_inpaint.collapse import Watch
from ds_inpaint.data import rows_of_iteration
from ds_inpaint.distributed import Ranks
from ds_inpaint.engine import Engine
from ds_inpaint.errors import InputError, NonFinite, RewardsUnavailable, Stopped
from ds_inpaint.framing import Pixels
from ds_inpaint.heldout import evaluate
from ds_inpaint.meter import Meter, over_updates
from ds_inpaint.model_card import write_card
from ds_inpaint.recipe import Recipe
from ds_inpaint.results import draw_results
from ds_inpaint.reward_client import RewardClient
from ds_inpaint.reward_connection import connect
from ds_inpaint.rollout import Rollout
from ds_inpaint.rows import read_rows
from ds_inpaint.run_folder import CHECKPOINTS, METRICS, SAMPLES
from ds_inpaint.schema import dump, plain
from ds_inpaint.sharded_load import create
from ds_inpaint.slots import EMA
from ds_inpaint.stopping import TimeLimit
from ds_inpaint.tracking import Tracker, read_metrics
from ds_inpaint.values import Experiences, Placement, Policy, Sampler, Triple
from ds_inpaint.zero_config import EngineSection


def train(recipe: Recipe, ranks: Ranks, start: Path | None) -> None:
    """Run a recipe to its last iteration.

    Args:
        recipe: of the run.
        ranks: that train.
        start: checkpoint to go on from, if any.

    Raises:
        DsInpaintError: on all ranks together. When rewards or data failed, or the run was asked to stop, the weights
            up to the last finished iteration are checkpointed first.
    """
    limit = TimeLimit(recipe.run.max_hours)
    with assembled(recipe, ranks) as run:
        progress = Progress() if start is None else run.resume(start)
        with Tracker(
            recipe.tracking,
            run.folder,
            recipe.run.name,
            progress.logged,
            recipe.run.iterations,
            plain(recipe),
            ranks.is_main,
        ) as tracker:
            run.go(progress, tracker, limit)
        run.finish()


@contextmanager
def assembled(recipe: Recipe, ranks: Ranks, load: Callable[[Placement], Policy] | None = None) -> Iterator[TrainingRun]:
    """Within this context a run stands ready: its data, its reward servers, its model in an engine. Collective.

    Args:
        recipe: of the run.
        ranks: that train.
        load: makes the model, if not the recipe does.
    """
    with ranks.together():
        train_rows, heldout_rows = (
            read_rows(file, recipe.data, recipe.data.root) for file in (recipe.data.train, recipe.data.heldout)
        )
    folder = recipe.run.dir
    with ExitStack() as stack:
        rewards = stack.enter_context(connect(recipe.rewards, folder / "reward_server.log", ranks, stack))
        policy, engine = _build(recipe, ranks, load or recipe.model.load)
        stack.enter_context(engine)
        yield TrainingRun(recipe, folder, ranks, rewards, policy, engine, train_rows, heldout_rows)


def place(engine: EngineSection, ranks: Ranks) -> Placement:
    """Where a model goes of which an engine of that section will train a part."""
    return Placement(
        ranks.device,
        engine.dtype,
        engine.activation_checkpointing,
        engine.channels_last,
        lambda build, folder: create(build, folder, engine, ranks),
    )


def _build(recipe: Recipe, ranks: Ranks, load: Callable[[Placement], Policy]) -> tuple[Policy, Engine]:
    """Load the model and put its denoiser into a ZeRO engine."""
    with ranks.together():
        policy: Any = load(place(recipe.engine, ranks))
        for pixels in recipe.data.shapes:
            policy.latent_shape(*pixels)
        if ranks.is_main:
            for file in (recipe.data.train, recipe.data.heldout):
                check_encoders(file, policy.encoders)
    engine = Engine(
        policy.denoiser,
        recipe.engine,
        recipe.optimizer,
        ranks,
        total_steps=recipe.run.iterations * recipe.algorithm.updates_per_rollout,
        leaf_classes=recipe.model.leaf_blocks,
        ema=recipe.ema,
    )
    if recipe.algorithm.uses_reference:
        engine.save_slot("reference")
    return replace(policy, denoiser=engine), engine


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    done: int = 0
    """Iterations whose update is in the weights."""
    unlogged: dict[str, float] = field(default_factory=dict)
    """Metrics of the last of them, when the run was stopped before its evaluation let it log them."""
    skipped: int = 0
    """Updates at the end of them that were skipped, one after the other."""

    @property
    def logged(self) -> int:
        """Number of the last logged row; -1 while even that of the untrained model is missing."""
        return self.done if self.done > 0 and not self.unlogged else self.done - 1


@dataclass
class TrainingRun:
    """The parts of a run in progress."""

    recipe: Recipe
    folder: Path
    ranks: Ranks
    rewards: RewardClient
    policy: Policy
    engine: Engine
    train_rows: list[Triple]
    heldout_rows: list[Triple]
    skipped: int = 0
    """Updates that were skipped since the last one that was applied."""

    def __post_init__(self) -> None:
        self.rollouts = self._rollouts(self.recipe.sampler)
        self.evaluations = self._rollouts(self.recipe.evaluation.sampler or self.recipe.sampler)
        self.watch = Watch(self.recipe.alarms, self.folder / METRICS)

    def _rollouts(self, sampler: Sampler) -> dict[Pixels, Rollout]:
        """Rollouts for every size of pictures."""
        return {
            pixels: Rollout(
                self.policy,
                sampler.schedule(self.policy.process(*pixels)),
                self.ranks,
                self.recipe.run.seed,
                pixels,
                self.recipe.engine.micro_batch,
            )
            for pixels in self.recipe.data.shapes
        }

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / CHECKPOINTS

    def resume(self, checkpoint: Path) -> Progress:
        """Load a checkpoint.

        Raises:
            InputError: it is damaged, or a scorer has changed since it was saved and the recipe does not allow that.
        """
        state = self.engine.load(checkpoint)
        with self.ranks.together():
            self.rewards.require_same_scorers(state["scorers"])
        progress = Progress(**state["progress"])
        self.skipped = progress.skipped
        return progress

    def go(self, progress: Progress, tracker: Tracker, limit: TimeLimit) -> None:
        """Iterate from what is done to the last iteration.

        Raises:
            Stopped: the run was asked to; what was trained is checkpointed.
        """
        with self.ranks.listening():
            if progress.unlogged:
                self.end_iteration(progress.done, progress.unlogged, tracker)
            elif progress.done == 0:
                tracker.log({"iteration": 0, **self.evaluate(Progress())})
            for iteration in range(progress.done, self.recipe.run.iterations):
                if self.ranks.is_main and not limit.has_room():
                    self.ranks.stop.ask(f"another iteration might not end within run.max_hours={limit.hours:g}")
                started = time.monotonic()
                self.iterate(iteration, tracker)
                limit.longest = max(limit.longest, time.monotonic() - started)
            self.evaluate_if_cut_short()

    def iterate(self, iteration: int, tracker: Tracker) -> None:
        """Collect experiences, learn from them, and see to what is due afterwards."""
        started = time.perf_counter()
        batch = rows_of_iteration(self.train_rows, iteration, self.recipe.data.batch, self.recipe.run.seed)
        with self.saved_if_stopped(Progress(iteration, skipped=self.skipped)):
            self.ranks.stop_if_asked()
            rollout = self.rollouts[batch[0].pixels]
            experiences = self.recipe.algorithm.collect(batch, iteration, rollout, self.rewards)
        metrics = self.update(experiences, first=iteration == 0)
        seconds = time.perf_counter() - started
        samples = self.recipe.data.batch * self.recipe.algorithm.samples_per_triple
        metrics |= {"seconds/total": seconds, "samples_per_second": samples / seconds}
        self.end_iteration(iteration + 1, metrics, tracker)

    def update(self, experiences: Experiences, first: bool) -> dict[str, float]:
        """Take the optimizer steps of one iteration; on the very first, the doctor looks before the step."""
        started = time.perf_counter()
        totals: list[dict[str, float]] = []
        maxima: set[str] = set()
        before: int | None = None
        for micro_batches in experiences.updates:
            self.ranks.agree("update", micro_batches=len(micro_batches))
            meter = Meter()
            for experience in micro_batches:
                loss = self.recipe.algorithm.loss(self.policy, experience)
                self.engine.backward(loss.value)
                meter.add(loss)
            total = meter.total(self.ranks)
            maxima |= meter.maxima.keys()
            if first and not totals:
                self.recipe.algorithm.doctor(total)
            step = self.engine.step()
            self.skipped = 0 if step.applied else self.skipped + 1
            before = step.updates - step.applied if before is None else before
            totals.append(
                {
                    **total,
                    "grad_norm": step.grad_norm,
                    "learning_rate": step.learning_rate,
                    "update/skipped": float(not step.applied),
                }
            )
        every = self.recipe.algorithm.reference_every
        # Not between the updates of an iteration, all of which were prepared with one reference.
        if every and step.updates // every > before // every:
            self.engine.save_slot("reference")
        return {
            **experiences.metrics,
            **over_updates(totals, maxima),
            "seconds/update": time.perf_counter() - started,
        }

    def end_iteration(self, done: int, metrics: dict[str, float], tracker: Tracker) -> None:
        """Evaluate, log and checkpoint when due.

        Raises:
            NonFinite: too many updates in a row were skipped; nothing is saved, so that what was saved before stays.
        """
        last = done == self.recipe.run.iterations
        if last or done % self.recipe.evaluation.every == 0:
            metrics |= self.evaluate(Progress(done, metrics, self.skipped))
        alarms = self.watch.alarms(done, metrics) if self.ranks.is_main else {}
        tracker.log({"iteration": done, **metrics, **alarms})
        if self.skipped >= self.recipe.run.max_skipped:
            raise NonFinite(
                f"Up to iteration {done} the last {self.skipped} updates had gradients that are not finite and were "
                f"skipped, as many as run.max_skipped allows. The newest checkpoint is from before or amid them, and "
                f"its weights are good. To go on from there with a lower learning rate add optimizer.learning_rate=... "
                f"'run.allow_changes=[optimizer.learning_rate]'; or try engine.precision: fp32 in a new run.dir."
            )
        every = self.recipe.checkpoint.every
        if every and (last or done % every == 0):
            self.save(Progress(done, skipped=self.skipped))

    def deployed_weights(self) -> AbstractContextManager[None]:
        """A context in which the engine computes with what users will get: the moving average, if there is one."""
        return self.engine.weights(EMA) if self.recipe.ema.decay > 0 else nullcontext()

    def evaluate(self, progress: Progress) -> dict[str, float]:
        """Held-out metrics of the current weights."""
        with self.saved_if_stopped(progress), self.deployed_weights():
            heldout = evaluate(
                self.evaluations,
                self.rewards,
                self.heldout_rows,
                self.recipe.evaluation,
                self.folder / SAMPLES,
                progress.done,
            )
        alarms = {}
        with self.ranks.together():
            if self.ranks.is_main:  # the scores of every sample lie where it wrote them
                alarms = holdout_alarms(self.folder / SAMPLES, progress.done, self.recipe.rewards)
        return {**heldout.metrics(), **alarms}

    def evaluate_if_cut_short(self) -> None:
        """Evaluate the last iteration of a run whose iterations were lowered to what is done already."""
        total = self.recipe.run.iterations
        if not self.ranks.broadcast((self.folder / SAMPLES / f"{total:06d}.json").exists()):
            self.evaluate(Progress(total))

    @contextmanager
    def saved_if_stopped(self, progress: Progress) -> Iterator[None]:
        """Save, if anything was trained, before rewards, data or a request end the run; the same command goes on."""
        try:
            yield
        except (RewardsUnavailable, InputError):
            if progress.done > 0:
                self.save(progress)
            raise
        except Stopped as error:
            if progress.done > 0:
                self.save(progress)
                self.engine.finish_save()
            saved = progress.done == 0 or self.is_saved(progress.done)
            raise Stopped(
                f"Stopped after iteration {progress.done} of {self.recipe.run.iterations}, since {error}. "
                + ("The same command goes on from there." if saved else "It could not be saved; see above.")
            ) from error

    def is_saved(self, done: int) -> bool:
        """Whether the weights after so many iterations have a checkpoint."""
        return self.ranks.broadcast(at(self.checkpoints, done).exists())

    def save(self, progress: Progress) -> None:
        """Checkpoint the weights, where the run stands, who scored it and the recipe; drop the oldest checkpoints.

        Weights that have a checkpoint already, since the run was stopped before they were evaluated, get no second.
        """
        self.engine.finish_save()
        if self.is_saved(progress.done):
            return
        recipe = dump(self.recipe)
        state = {
            "progress": asdict(progress),
            "scorers": self.rewards.fingerprints,
            "recipe": recipe,
            "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
        }
        section = self.recipe.checkpoint
        drop = partial(drop_old, self.checkpoints, section.keep, section.keep_every)
        self.engine.save(at(self.checkpoints, progress.done), state, background=section.asynchronous, then=drop)

    def finish(self) -> None:
        """Export the model, draw the pictures and say what was reached and where it lies."""
        self.engine.finish_save()
        with self.deployed_weights():
            weights = self.engine.state_dict()
        if weights is None:
            return
        last, name, rows = self.recipe.run.iterations, self.recipe.run.name, read_metrics(self.folder / METRICS)
        self.policy.export(weights, self.folder / "export")
        write_card(self.folder / "export", self.recipe, rows, last, averaged=self.recipe.ema.decay > 0)
        print(draw_results(self.folder, last, name, self.heldout_rows), flush=True)
