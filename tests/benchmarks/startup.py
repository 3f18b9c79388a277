"""Seconds from the command to the first rollout, and what they are spent on.

    python -m ds_inpaint.photos data/photos
    python tests/benchmarks/startup.py [RECIPE ...]

Runs tiny recipes (grpo_sd and grpo_flux if none is named) for one iteration on two ranks, a few times each, as
``deepspeed --num_gpus 2 -m ds_inpaint.run`` would, and prints a Markdown table of medians of rank 0.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

TIMES = 3
STARTED = "STARTED_AT"


def worker(file: Path, arguments: list[str]) -> int:
    """One rank of a run, which leaves the seconds of each phase before the first rollout."""
    entered = time.time()

    from ds_inpaint import run, trainer
    from ds_inpaint.engine import Engine
    from ds_inpaint.phases import Phases, wrapped
    from ds_inpaint.rollout import Rollout

    imported = time.time()
    phases, found = Phases(lambda: None), {}

    def until_rollout(call):
        def noted(*given, purpose, **named):
            if purpose == "rollout" and not found:
                before = {
                    "DeepSpeed's launcher": psutil.Process().create_time() - float(os.environ[STARTED]),
                    "start Python": entered - psutil.Process().create_time(),
                    "import PyTorch and DeepSpeed": imported - entered,
                }
                found.update(before | dict(phases.seconds), whole=time.time() - float(os.environ[STARTED]))
            return call(*given, purpose=purpose, **named)

        return noted

    def always(name):
        return phases.calls(lambda: name)

    with wrapped(
        [
            (run, "load_recipe", always("import diffusers and check the recipe")),
            (run, "setup", always("join the ranks")),
            (trainer, "read_rows", always("read the rows")),
            (trainer, "connect", phases.borders("reward server")),
            (trainer, "_build", always("load the model")),
            (Engine, "__init__", always("DeepSpeed's engine")),
            (trainer, "evaluate", always("evaluation of the untrained model")),
            (Rollout, "generate", until_rollout),
        ]
    ):
        code = run.main(arguments)
    if os.environ["RANK"] == "0":
        file.write_text(json.dumps(found))
    return code


def measure(recipe: str, folder: Path) -> dict[str, float]:
    """One run."""
    file = folder / "seconds.json"
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", __file__, "--worker", str(file)]
    command += [f"recipes/tiny/{recipe}.yaml", "run.iterations=1", f"run.dir={folder / 'run'}"]
    subprocess.run(command, env=os.environ | {STARTED: str(time.time())}, check=True, capture_output=True)
    return json.loads(file.read_text())


def main(recipes: list[str]) -> None:
    print("| seconds, by `python tests/benchmarks/startup.py` |", *(f"{recipe} |" for recipe in recipes))
    print("|---|" + "---|" * len(recipes))
    found = {}
    for recipe in recipes:
        each = []
        for _ in range(TIMES):
            with tempfile.TemporaryDirectory() as folder:
                each.append(measure(recipe, Path(folder)))
        found[recipe] = {name: statistics.median(one[name] for one in each) for name in each[0]}
        told = sum(seconds for name, seconds in found[recipe].items() if name != "whole")
        found[recipe]["everything else"] = found[recipe]["whole"] - told
        found[recipe]["from the command to the first rollout"] = found[recipe].pop("whole")
    for name in found[recipes[0]]:
        print(f"| {name} |", *(f"{found[recipe][name]:.2f} |" for recipe in recipes))


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # which the launcher puts there
    if words[:1] == ["--worker"]:
        sys.exit(worker(Path(words[1]), words[2:]))
    main(words or ["grpo_sd", "grpo_flux"])
