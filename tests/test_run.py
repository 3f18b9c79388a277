"""Whole runs by the command: what ends them, with which exit code and words, and how they go on afterwards.

Two ranks run by the ``deepspeed`` command lose their reward server for good; two ranks of ``run_worker.py``
then go through everything that does not end their processes; single ranks run without a launcher.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from run_helpers import DEEPSPEED, ENVIRONMENT, codes, is_alive, rows, run_jobs, wait_for, wait_for_iteration

from ds_inpaint import run
from ds_inpaint.checkpoint_files import numbers
from ds_inpaint.data import rows_of_iteration
from ds_inpaint.distributed import Ranks
from ds_inpaint.framing import Framing
from ds_inpaint.images import read_png
from ds_inpaint.rows import read_rows
from ds_inpaint.stored_checkpoint import read_weights
from ds_inpaint.tracking import read_metrics
from ds_inpaint.values import Triple

SCORERS = ("seam", "ring_texture", "known_fidelity")
SEED, BATCH = 3, 2
"""Those of the recipe."""


class Server:
    """A reward server as a process that can be killed and started again on its port."""

    def __init__(self, log: Path) -> None:
        self.log, self.port = log, 0
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "reward_servers", *SCORERS, "--port", str(self.port)]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.address = self.process.stdout.readline().split()[1]
        self.port = int(self.address.split(":")[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def server_of(trainer: subprocess.Popen) -> psutil.Process:
    """The embedded reward server of a run, once it has been started."""

    def servers() -> list[psutil.Process]:
        running = psutil.process_iter(["ppid", "cmdline"])
        return [
            process
            for process in running
            if process.info["ppid"] == trainer.pid and "reward_servers" in (process.info["cmdline"] or ())
        ]

    wait_for(servers, "no reward server was started")
    [server] = servers()
    return server


def iterations(folder: Path) -> list[int]:
    return [row["iteration"] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that holds all runs."""
    return tmp_path_factory.mktemp("whole_runs")


@pytest.fixture(scope="module")
def server(out):
    running = Server(out / "server.log")
    yield running
    running.kill()


@pytest.fixture(scope="module")
def losing(out, recipe, server):
    """The arguments of a run whose server went away for longer than the recipe puts up with."""
    options = [f"run.dir={out / 'lost'}", f"rewards.servers=[{server.address}]", "rewards.retry_seconds=1"]
    return [str(recipe), *options, "checkpoint.asynchronous=true"]


@pytest.fixture(scope="module")
def lost(out, losing, server):
    """How that run ended under the ``deepspeed`` command; the server is back afterwards."""
    with (out / "lost.log").open("wb") as log:
        command = [DEEPSPEED, "--num_gpus", "2", "-m", "ds_inpaint.run", *losing]
        launcher = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    try:
        wait_for_iteration(out / "lost", 1)
        server.kill()
        killed = time.monotonic()
        code, seconds = launcher.wait(120), time.monotonic() - killed
    finally:
        launcher.terminate()
        launcher.wait()
    found = numbers(out / "lost" / "checkpoints")[-1], iterations(out / "lost")
    server.start()
    return code, seconds, (out / "lost.log").read_text(), found


def corrupt_one_image(photos: Path, out: Path) -> Path:
    """A dataset with a broken image that only rank 1 reads, in the second iteration."""
    folder = shutil.copytree(photos, out / "corrupt_photos")
    bad = second_of_iteration_1(folder / "train.jsonl")
    bad.image.write_bytes(bad.image.read_bytes()[:200])
    return folder / "train.jsonl"


def second_of_iteration_1(dataset: Path) -> Triple:
    """The triple whose samples rank 1 draws; rank 0 has those of the first."""
    return rows_of_iteration(read_rows(dataset, Framing(size=64)), 1, BATCH, SEED)[1]


@pytest.fixture(scope="module")
def ended(out, recipe, photos, server, lost, losing):
    """How each command given to two ranks ended, as (rank 0, rank 1)."""
    two = out / "two.jsonl"
    two.write_text("".join((photos / "heldout.jsonl").read_text().splitlines(keepends=True)[:2]))
    for child in ("images", "masks"):
        (out / child).symlink_to(photos / child)
    corrupt = corrupt_one_image(photos, out)
    whole = [str(recipe), f"run.dir={out / 'whole'}", "checkpoint.every=2"]
    short = [
        str(recipe),
        f"run.dir={out / 'short'}",
        "run.iterations=1",
        f"data.heldout={two}",
        "evaluation.pictures=3",
    ]
    killed = [str(recipe), f"run.dir={out / 'killed'}", f"rewards.servers=[{server.address}]"]
    nan = [str(recipe), "checkpoint.every=1", "run.max_skipped=2"]
    jobs = {
        "killed": killed,
        "lost": losing,
        "whole": whole,
        "again": whole,
        "longer": [*whole, "run.iterations=4"],
        "shorter": [*whole, "run.iterations=2"],
        "other_scorers": [*whole, "run.iterations=4"],
        "other": [*whole, "algorithm.group_size=8", "rewards.scorers.seam=2.0", "rewards.retry_seconds=7"],
        "disagreeing": short,
        "unscored": short,
        "rescored": short,
        "corrupt": [str(recipe), f"run.dir={out / 'corrupt'}", f"data.train={corrupt}"],
        "nan_reward": [*nan, f"run.dir={out / 'nan_reward'}", "rewards.max_invalid_fraction=0.3"],
        "nan_gradient": [*nan, f"run.dir={out / 'nan_gradient'}"],
        "nan_gradients": [*nan, f"run.dir={out / 'nan_gradients'}"],
        "nan_weight": [*nan, f"run.dir={out / 'nan_weight'}"],
        "healed": [*nan, f"run.dir={out / 'nan_weight'}"],
    }

    def restart_server() -> None:
        wait_for_iteration(out / "killed", 1)
        server.kill()
        server.start()

    return run_jobs(out, jobs, restart_server)


def test_a_run_without_rewards_stops_with_code_3_and_says_why_once(lost):
    code, seconds, log, (latest, logged) = lost
    assert code == 3, log
    assert seconds < 30
    assert log.count("ds_inpaint: ") == log.count("No reward server among") == 1
    assert log.count("does not answer") == 1
    assert "Traceback" not in log
    assert (latest, logged) == (logged[-1], list(range(logged[-1] + 1)))


def test_the_same_command_goes_on_and_ends_as_if_nothing_had_happened(ended, out):
    assert codes(ended["lost"]) == [0, 0]
    assert rows(out / "lost") == rows(out / "whole")[:4]


def test_a_server_that_is_killed_and_comes_back_changes_no_number(ended, out):
    assert codes(ended["killed"]) == [0, 0]
    assert "does not answer and is asked again" in ended["killed"][0]["err"]
    assert ended["killed"][1]["err"] == ""
    assert rows(out / "killed") == rows(out / "whole")[:4]


def test_a_finished_run_says_again_what_it_reached(ended):
    assert codes(ended["whole"]) == codes(ended["again"]) == [0, 0]
    assert ended["again"][0]["out"] == ended["whole"][0]["out"]
    assert ended["again"][0]["out"].startswith("held-out reward ")
    assert ended["again"][1]["out"] == ""


def test_a_finished_run_may_be_made_longer_but_not_shorter(ended, out):
    assert codes(ended["longer"]) == [0, 0]
    assert iterations(out / "whole") == [0, 1, 2, 3, 4]
    assert codes(ended["shorter"]) == [2, 2]
    assert f"run.iterations: found 2, but the run in {out / 'whole'} has done 4" in ended["shorter"][0]["err"]


def test_another_recipe_does_not_touch_the_run_it_finds(ended, out):
    assert codes(ended["other"]) == [2, 2]
    assert ended["other"][0]["err"] == (
        f"ds_inpaint: Rank 0: run.dir: {out / 'whole'}/checkpoints/000004 is of another recipe:\n"
        "  algorithm.group_size: 4 there, 8 here\n"
        "  rewards.scorers.seam: 1.0 there, 2.0 here\n"
        "Give another run.dir to begin anew; or, to go on with these changes, add "
        "'run.allow_changes=[algorithm.group_size, rewards.scorers.seam]'.\n"
    )
    assert ended["other"][1]["err"] == ended["other"][0]["err"]  # no launcher here ends rank 1 before it speaks
    assert "group_size: 4" in (out / "whole" / "recipe.yaml").read_text()


def test_a_run_whose_scorers_changed_is_not_continued(ended):
    assert codes(ended["other_scorers"]) == [2, 2]
    assert "; seam was " in ended["other_scorers"][0]["err"]
    assert " and is 000000000000. Start the servers as they were; or, " in ended["other_scorers"][0]["err"]


def test_the_doctor_stops_a_training_forward_that_disagrees_with_sampling(ended, out):
    assert codes(ended["disagreeing"]) == [4, 4]
    assert "the largest |ratio - 1| is" in ended["disagreeing"][0]["err"]
    assert "Nothing was trained." in ended["disagreeing"][0]["err"]
    assert iterations(out / "short.1") == [0]
    assert list((out / "short.1" / "checkpoints").iterdir()) == []


def test_a_run_without_a_checkpoint_is_moved_aside(ended, out):
    assert (
        f"{out / 'short'} held a run that is not continued; it was moved to {out / 'short.1'}."
        in (ended["unscored"][0]["out"])
    )


def test_a_run_stopped_in_its_last_evaluation_goes_on_with_it(ended, out):
    assert codes(ended["unscored"]) == [3, 3]
    assert codes(ended["rescored"]) == [0, 0]
    first, last = rows(out / "short")
    assert (first["iteration"], last["iteration"]) == (0, 1)
    assert {"loss", "heldout/reward"} <= last.keys()


def test_held_out_triples_may_be_fewer_than_the_pictures_drawn_of_them(ended, out):
    assert codes(ended["rescored"]) == [0, 0]
    assert read_png(out / "short" / "before_after.png").shape == (3, 3 * 128 + 16, 4 * 128)


def test_a_broken_image_that_one_rank_meets_stops_both_and_loses_nothing(ended, out):
    assert codes(ended["corrupt"]) == [2, 2]
    source = second_of_iteration_1(out / "corrupt_photos" / "train.jsonl").source
    told = ended["corrupt"][0]["err"].split("ds_inpaint: ")[1]
    assert told.startswith(f"Rank 1: {source}: ")
    assert "cannot be read as an image" in told
    assert numbers(out / "corrupt" / "checkpoints") == [1]


def test_a_reward_that_is_not_finite_costs_its_sample(ended, out):
    assert codes(ended["nan_reward"]) == [0, 0]
    learned = rows(out / "nan_reward")[1:]
    assert [row["reward/invalid_fraction"] for row in learned] == [1 / 8] * 3
    assert [row["update/skipped"] for row in learned] == [0] * 3


def test_a_gradient_that_is_not_finite_on_one_rank_costs_the_update_on_all(ended, out):
    assert codes(ended["nan_gradient"]) == [0, 0]
    learned = rows(out / "nan_gradient")[1:]
    assert [row["update/skipped"] for row in learned] == [0, 1, 0]
    assert learned[1]["grad_norm"] is None
    assert learned[0] == rows(out / "whole")[1]
    assert learned[2]["reward/mean"] != rows(out / "whole")[3]["reward/mean"]


def test_too_many_of_them_end_the_run_with_the_weights_from_before(ended, out):
    assert codes(ended["nan_gradients"]) == [8, 8]
    assert "Up to iteration 3 the last 2 updates had gradients that are not finite" in ended["nan_gradients"][0]["err"]
    assert numbers(out / "nan_gradients" / "checkpoints") == [1, 2]
    assert iterations(out / "nan_gradients") == [0, 1, 2, 3]
    [good, later] = [read_weights(out / "nan_gradients" / "checkpoints" / f"{n:06d}", None) for n in (1, 2)]
    assert all(weight.equal(later[name]) and weight.isfinite().all() for name, weight in good.items())


def test_weights_that_are_not_finite_end_the_run_and_the_same_command_goes_on_from_good_ones(ended, out):
    assert codes(ended["nan_weight"]) == [8, 8]
    assert "pictures that the model drew are not finite" in ended["nan_weight"][0]["err"]
    assert codes(ended["healed"]) == [0, 0]
    assert rows(out / "nan_weight") == rows(out / "whole")[:4]


def test_single_ranks_need_no_launcher_and_leave_no_server_behind(out, recipe):
    """One runs to its end; one is killed, which its reward server must notice by itself."""
    with ExitStack() as stack:
        trainers = {}
        for name, count in (("alone", 1), ("shot", 100)):
            options = [f"run.dir={out / name}", f"run.iterations={count}", "rewards.servers=embedded"]
            log = stack.enter_context((out / f"{name}.log").open("wb"))
            command = [sys.executable, "-m", "ds_inpaint.run", str(recipe), *options]
            trainers[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
            stack.callback(trainers[name].kill)
        servers = [server_of(trainer) for trainer in trainers.values()]
        wait_for_iteration(out / "shot", 0)
        trainers["shot"].kill()
        assert trainers["shot"].wait() == -signal.SIGKILL
        assert trainers["alone"].wait(240) == 0, (out / "alone.log").read_text()
    assert iterations(out / "alone") == [0, 1]
    wait_for(lambda: not any(map(is_alive, servers)), "a reward server outlived its trainer")


def test_an_unknown_scorer_ends_the_run_before_a_model_is_loaded(out, recipe, monkeypatch, capsys):
    monkeypatch.setattr(run, "setup", lambda section: Ranks(0, 1, "cpu"))
    monkeypatch.setattr("ds_inpaint.models.sd.SD.load", None)
    options = [f"run.dir={out / 'unknown'}", "rewards.servers=embedded", "rewards.scorers={seem: 1.0}"]
    assert run.main([str(recipe), *options]) == 2
    told = capsys.readouterr().err
    assert "rewards.scorers" in told
    assert "There is no scorer 'seem'. Did you mean 'seam'?" in told
