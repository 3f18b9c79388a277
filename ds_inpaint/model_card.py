"""The model card of an exported model: README.md, whose front matter the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_inpaint import schema, yaml_tree
from ds_inpaint.outputs import write_text
from ds_inpaint.recipe import Recipe

CARD = "README.md"


def write_card(
    folder: Path,
    recipe: Recipe,
    rows: Sequence[dict[str, Any]],
    iteration: int,
    *,
    averaged: bool,
    adapter_only: bool = False,
) -> None:
    """Write the card of a model.

    Args:
        folder: the exported model.
        recipe: of its run.
        rows: of the run's ``metrics.jsonl``.
        iteration: whose weights it has.
        averaged: whether they are the moving average.
        adapter_only: whether the folder holds adapters without a model.
    """
    front = yaml_tree.write(_front_matter(recipe, adapter_only))
    parts = (
        f"# {recipe.run.name}, iteration {iteration}",
        _what(recipe, iteration, averaged, adapter_only),
        _figures(recipe, rows, iteration, averaged),
        _use(recipe, adapter_only),
        f"## Recipe\n\n```yaml\n{schema.dump(recipe)}```",
        "## Licence\n\nThat of the base model holds for what was made of it; look it up there before you publish or "
        "use this.",
    )
    write_text(folder / CARD, f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n")


def _front_matter(recipe: Recipe, adapter_only: bool) -> dict[str, Any]:
    plain, path = schema.plain(recipe), recipe.model.path
    # The hub refuses a base model that is none of its own names.
    based = {} if Path(path).is_dir() else {"base_model": path}
    lora = [] if recipe.model.lora is None else ["lora"]
    return {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        **based,
        **({"base_model_relation": "adapter" if adapter_only else "finetune"} if based else {}),
        "tags": ["inpainting", "ds_inpaint", plain["algorithm"]["name"], plain["model"]["name"], *lora],
    }


def _what(recipe: Recipe, iteration: int, averaged: bool, adapter_only: bool) -> str:
    plain, model = schema.plain(recipe), recipe.model
    trained = "all weights of the denoiser"
    if model.lora is not None:
        place = "here without the model" if adapter_only else "merged into the denoiser here, and alone in `lora/`"
        trained = f"low-rank adapters of rank {model.lora.rank}, {place}"
    revision = "" if model.revision is None else f" (revision `{model.revision}`)"
    denoiser = "" if model.denoiser is None else f" with the denoiser of `{model.denoiser}`"
    scorers = ", ".join(f"{name} x {weight:g}" for name, weight in recipe.rewards.weights.items()) or "none"
    average = f"the moving average (decay {recipe.ema.decay:g})" if averaged else "the weights of the last update"
    return (
        f"The inpainting model `{model.path}`{revision}{denoiser}, trained by ds_inpaint with "
        f"{plain['algorithm']['name']}: {trained}.\n\n"
        f"- iterations: {iteration} of {recipe.run.iterations}, {recipe.data.batch} triples of image, hole and prompt "
        f"in each\n"
        f"- rewards: {scorers}\n"
        f"- optimizer: {recipe.optimizer.name}, learning rate {recipe.optimizer.learning_rate:g}\n"
        f"- precision: {recipe.engine.precision}\n"
        f"- seed: {recipe.run.seed}\n"
        f"- exported: {average}"
    )


def _figures(recipe: Recipe, rows: Sequence[dict[str, Any]], iteration: int, averaged: bool) -> str:
    measured = {row["iteration"]: row for row in rows}
    lines = [
        f"| {name} | {_figure(measured.get(0, {}), name)} | {_figure(measured.get(iteration, {}), name)} |"
        for name in ("reward", "loss")
    ]
    other = "\n\nThey were measured with the moving average, which is not what was exported."
    return (
        f"## Held-out figures\n\nMean and standard error over {recipe.evaluation.samples} samples, the same pictures "
        f"and noise at each evaluation.\n\n| | before (iteration 0) | iteration {iteration} |\n|---|---|---|\n"
        + "\n".join(lines)
        + (other if recipe.ema.decay > 0 and not averaged else "")
    )


def _figure(row: dict[str, Any], name: str) -> str:
    mean, error = row.get(f"heldout/{name}"), row.get(f"heldout/{name}_error")
    if mean is None:
        return "not measured"
    return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"


def _use(recipe: Recipe, adapter_only: bool) -> str:
    model = recipe.model
    pipeline = model.pipelines[0]
    load = f'pipeline = {pipeline}.from_pretrained("FOLDER", torch_dtype=torch.bfloat16)'
    if adapter_only:
        load = load.replace("FOLDER", model.path) + '\npipeline.load_lora_weights("FOLDER")'
    return (
        f"## Use\n\nFOLDER is where this file lies. White in the mask is what is filled.\n\n```python\nimport torch\n"
        f"from diffusers import {pipeline}\n\n{load}\n"
        f'filled = pipeline(prompt="...", image=image, mask_image=mask, guidance_scale={model.guidance:g}).images[0]'
        f"\n```"
    )
