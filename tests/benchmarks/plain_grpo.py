"""Samples per second of GRPO as public trainers often write it, against ``ds_inpaint.bench``, on the tiny SD recipe.

    python -m ds_inpaint.photos data/photos
    OMP_NUM_THREADS=1 python tests/benchmarks/plain_grpo.py [PAIRS]

The plain one draws one image at a time, asks for its reward over HTTP (JSON with base64 PNGs) before it draws the next,
goes through image after image and step after step again to learn, and averages all weights after each update. It is
plain PyTorch without an engine, which ours pays for. Both are processes of one rank on the same cores, with the same
model, samples and reward, in turns; and both compute the same: log-probs, advantages and gradient norm of the first
iteration must agree. On shared cores more threads would let small calls wait for each other.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import torch
from reward_throughput import http_process, png
from torch import Tensor

from ds_inpaint.data import load, rows_of_iteration
from ds_inpaint.distributed import Ranks
from ds_inpaint.noise import sample_noise
from ds_inpaint.pixels import paste_known, to_bytes
from ds_inpaint.recipe import Recipe, load_recipe
from ds_inpaint.regions import latent_holes
from ds_inpaint.rows import read_rows
from ds_inpaint.trainer import assembled, place
from ds_inpaint.values import Triple
from ds_inpaint.zero_config import setup

RECIPE = Path("recipes/tiny/grpo_sd.yaml")
KEYS = ["data.batch=5", "rewards.scorers={seam: 1.0}", "ema.decay=0.99", "optimizer.schedule=constant"]
WARMUP, ITERATIONS = 2, 3
CPU = torch.device("cpu")


class PlainGRPO:
    """The plain trainer of a recipe; one HTTP server scores."""

    def __init__(self, recipe: Recipe, port: int) -> None:
        whole = replace(recipe.engine, zero_stage=0, precision="fp32")
        self.recipe, self.port = recipe, port
        self.policy = recipe.model.load(place(whole, Ranks(0, 1, CPU)))
        self.weights = list(self.policy.denoiser.parameters())
        self.average = [weight.detach().clone() for weight in self.weights]
        rule = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.weights, rule.learning_rate, (rule.beta1, rule.beta2), rule.eps, rule.weight_decay
        )
        size = (recipe.data.size, recipe.data.size)
        self.schedule = recipe.sampler.schedule(self.policy.process(*size))
        self.latent_shape = self.policy.latent_shape(*size)
        self.trained = self.schedule.trainable_steps[: recipe.algorithm.trained_steps]
        self.rows = read_rows(recipe.data.train, recipe.data, recipe.data.root)

    def iterate(self, iteration: int) -> dict[str, Any]:
        """One rollout and one update; returns what is compared with ds_inpaint."""
        data, algorithm = self.recipe.data, self.recipe.algorithm
        triples = rows_of_iteration(self.rows, iteration, data.batch, self.recipe.run.seed)
        samples = [each for group, triple in enumerate(triples) for each in self.rollout(triple, group, iteration)]
        rewards_BG = torch.tensor([sample["reward"] for sample in samples], dtype=torch.float64).view(data.batch, -1)
        centred_BG = rewards_BG - rewards_BG.mean(1, keepdim=True)
        relative_BG = centred_BG / (rewards_BG.std(1, keepdim=True) + algorithm.advantage_eps)
        advantages_N = relative_BG.clamp(-algorithm.advantage_bound, algorithm.advantage_bound).flatten().float()
        for sample, advantage in zip(samples, advantages_N, strict=True):
            for step, (latents, following, old) in sample["steps"].items():
                log_prob = self.step(sample, latents, step, following=following)[1]
                ratio = (log_prob - old).exp()
                clipped = ratio.clamp(1 - algorithm.clip_range, 1 + algorithm.clip_range)
                loss = torch.maximum(-advantage * ratio, -advantage * clipped).sum()
                (loss / (len(samples) * len(self.trained))).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.recipe.engine.max_grad_norm)
        factor = min(1.0, (iteration + 1) / self.recipe.optimizer.warmup_steps)
        self.optimizer.param_groups[0]["lr"] = self.recipe.optimizer.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average, weight in zip(self.average, self.weights, strict=True):
            average.mul_(self.recipe.ema.decay).add_(weight.detach(), alpha=1 - self.recipe.ema.decay)
        log_probs = [float(old) for step in self.trained for sample in samples for old in [sample["steps"][step][2]]]
        return {"log_probs": log_probs, "advantages": advantages_N.tolist(), "grad_norm": float(norm)}

    @torch.no_grad()
    def rollout(self, triple: Triple, group: int, iteration: int) -> list[dict[str, Any]]:
        """The samples of a group, drawn and scored one after the other."""
        batch = load([triple])
        condition = self.policy.encode(batch)
        hole = latent_holes(batch.holes_B1HW, *self.latent_shape[1:], dilation=0)
        samples = []
        for member in range(self.recipe.algorithm.group_size):
            number, shape = group * self.recipe.algorithm.group_size + member, self.latent_shape
            count = len(self.schedule.steps) + 1
            noise = sample_noise(self.recipe.run.seed, "rollout", iteration, [number], (count, *shape))
            sample = {"condition": condition, "hole": hole, "steps": {}}
            latents = noise[:, 0]
            for step in range(len(self.schedule.steps)):
                following, log_prob = self.step(sample, latents, step, noise=noise[:, step + 1])
                if step in self.trained:
                    sample["steps"][step] = latents, following, log_prob
                latents = following
            picture = to_bytes(self.policy.decode(latents))
            pasted = paste_known(picture, batch.images_BCHW, batch.holes_B1HW)
            samples.append(sample | {"reward": self.score(pasted, batch.holes_B1HW, triple.prompt)})
        return samples

    def step(
        self, sample: dict[str, Any], latents: Tensor, step: int, *, noise: Tensor = None, following: Tensor = None
    ) -> tuple[Tensor, Tensor]:
        """The next latents, drawn unless they are given, and their log-prob, a mean over the hole."""
        times = torch.full((1,), float(self.schedule.times_T[step]))
        prediction = self.policy.predict(latents, times, sample["condition"], guided=True)
        table = self.schedule.steps[step]
        mean = table.keep * latents + table.push * prediction
        following = mean + table.std * noise if following is None else following
        if table.std == 0:
            return following, torch.zeros(1)
        errors = ((following - mean) ** 2 * sample["hole"]).sum() / (sample["hole"].sum() * latents.shape[1])
        log_prob = -errors / (2 * table.std**2) - math.log(table.std) - 0.5 * math.log(2 * math.pi)
        return following, log_prob.view(1)

    def score(self, pasted: Tensor, holes: Tensor, prompt: str) -> float:
        """Ask for the reward of one image."""
        masks = holes[:, 0].to(torch.uint8) * 255
        pictures = {"pasted_images": [png(pasted[0].movedim(0, -1))], "masks": [png(masks[0])]}
        connection = HTTPConnection("127.0.0.1", self.port)
        connection.request("POST", "/score", json.dumps({"pictures": pictures, "prompts": [prompt]}))
        return json.loads(connection.getresponse().read())["scores"][0]


def plain() -> dict[str, Any]:
    """What the plain trainer computes at first, and its samples per second."""
    recipe = load_recipe(RECIPE, KEYS, 1)
    with tempfile.TemporaryDirectory() as nothing, http_process("seam", nothing) as port:
        trainer, seconds, first = PlainGRPO(recipe, port), [], {}
        for iteration in range(WARMUP + ITERATIONS):
            started = time.perf_counter()
            first = trainer.iterate(iteration) if iteration == 0 else first | {"last": trainer.iterate(iteration)}
            seconds.append(time.perf_counter() - started)
    samples = recipe.data.batch * recipe.algorithm.group_size
    return first | {"samples_per_second": samples / statistics.median(seconds[WARMUP:])}


def ours() -> dict[str, Any]:
    """What ds_inpaint computes in the first iteration."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(RECIPE, [*KEYS, f"run.dir={folder}"], 1)
        ranks = setup(recipe.engine)
        with assembled(recipe, ranks) as run:
            triples = rows_of_iteration(run.train_rows, 0, recipe.data.batch, recipe.run.seed)
            experiences = recipe.algorithm.collect(triples, 0, run.rollouts[triples[0].pixels], run.rewards)
            [steps] = experiences.updates
            norm = run.update(experiences, first=True)["grad_norm"]
    columns = sorted({each.step for each in steps})
    by_step = [[each for each in steps if each.step == column] for column in columns]
    return {
        "log_probs": [value for step in by_step for each in step for value in each.old_log_probs_n.tolist()],
        "advantages": [value for each in by_step[0] for value in each.advantages_n.tolist()],
        "grad_norm": norm,
    }


def main() -> int:
    """Compare the first iterations, then measure both in turns."""
    if sys.argv[1:] in (["plain"], ["ours"]):
        print(json.dumps({"plain": plain, "ours": ours}[sys.argv[1]]()))
        return 0
    reference, rates = in_process(__file__, "ours"), []
    for _ in range(int(sys.argv[1]) if sys.argv[1:] else 2):
        found = in_process(__file__, "plain")
        for name, bound in (("log_probs", 1e-5), ("advantages", 1e-2), ("grad_norm", 1e-3)):
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(reference[name]), rtol=bound, atol=bound)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "bench.json"
            flags = [f"--iterations={ITERATIONS}", f"--warmup={WARMUP}", "--no-module", f"--json={file}"]
            in_process("-m", "ds_inpaint.bench", str(RECIPE), *KEYS, f"run.dir={folder}/run", *flags)
            rates.append((found["samples_per_second"], json.loads(file.read_text())["samples_per_second"]))
    print("| samples per second | plain | ds_inpaint | ratio |\n|---|---|---|---|")
    for number, (slow, fast) in enumerate(rates, 1):
        print(f"| pair {number} | {slow:.2f} | {fast:.2f} | {fast / slow:.2f} |")
    return 0


def in_process(*arguments: str) -> Any:
    """The last line that ``python ARGUMENTS`` prints, read as JSON if it is."""
    output = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, env=os.environ).stdout
    last = output.decode().splitlines()[-1]
    return json.loads(last) if last.startswith("{") else last


if __name__ == "__main__":
    sys.exit(main())
