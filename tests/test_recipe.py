"""Broken recipes through the command: exit code 2 and one message that says where, what, and what to do.

Nothing is set up and no model is loaded for any of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_inpaint import commands, run

PARTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "tokenizer": "tokenizer.json",
    "scheduler": "scheduler_config.json",
}

GOOD = """\
run:
  name: test
  dir: run
  iterations: 3
model:
  name: sd
  path: model
data:
  train: train.jsonl
  heldout: heldout.jsonl
  size: 64
  batch: 2
sampler:
  name: ddim
  steps: 4
algorithm:
  name: grpo
  group_size: 4
  trained_steps: 2
rewards:
  servers: ["127.0.0.1:50051"]
  scorers:
    seam: 1.0
optimizer:
  learning_rate: 1.0e-4
"""

BROKEN = {
    "unknown key": (
        ("  group_size: 4", "  gruop_size: 4"),
        "grpo.yaml:18: algorithm.gruop_size: unknown key. Allowed here: group_size, trained_steps, step_fraction, "
        "window, window_every, window_stride, noisy_steps, clip_range, hole_aware, hole_dilation, same_start, "
        "advantage_spread, advantage_bound, advantage_eps, kl_weight, kl_form, updates_per_rollout, lean. "
        "Did you mean group_size?",
    ),
    "unknown section": (
        ("optimizer:", "optimiser:"),
        "grpo.yaml:24: optimiser: unknown key. Allowed here: run, model, data, sampler, algorithm, rewards, "
        "optimizer, ema, engine, evaluation, checkpoint, alarms, tracking. Did you mean optimizer?",
    ),
    "wrong type": (
        ("  iterations: 3", "  iterations: many"),
        "grpo.yaml:4: run.iterations: expected an integer of at least 1; found 'many' (text). Meaning: Iterations "
        "(rollout and update) in all.",
    ),
    "exponent that YAML reads as text": (
        ("1.0e-4", "1e-4"),
        "grpo.yaml:25: optimizer.learning_rate: expected a number above 0; found '1e-4' (text). YAML reads 1e-4 as "
        "text: write 1.0e-4 without quotes. Meaning: Learning rate after warm-up.",
    ),
    "missing key": (
        ("  train: train.jsonl\n", ""),
        "grpo.yaml:8: data.train: missing. Give a path. Meaning: JSONL of {image, mask, prompt} rows to train on, "
        "paths relative to it; or train.jsonl of a prepared dataset.",
    ),
    "out of range": (
        ("  size: 64", "  size: 8"),
        "grpo.yaml:11: data.size: expected an integer of at least 16, or a list of 2: an integer of at least 16, an "
        "integer of at least 16; found 8 (an integer). Meaning: Pixels of the images: the side of squares, or [height, "
        "width]; a picture is scaled, then cropped or padded.",
    ),
    "images that the model cannot take": (
        ("  size: 64", "  size: [64, 72]"),
        "grpo.yaml:11: data.size: images of 64x72 pixels do not fit this model; both sides must be multiples of 64.",
    ),
    "group of one": (
        ("group_size: 4", "group_size: 1"),
        "grpo.yaml:18: algorithm.group_size: expected an integer of at least 2; found 1 (an integer). Meaning: "
        "Samples G per triple; the advantage compares them, so more is steadier and dearer.",
    ),
    "missing data file": (
        ("train: train.jsonl", "train: trian.jsonl"),
        "grpo.yaml:9: data.train: trian.jsonl does not exist (looked in <here>). Did you mean train.jsonl? Give a "
        "JSONL file.",
    ),
    "folder for a data file": (
        ("heldout: heldout.jsonl", "heldout: model"),
        "grpo.yaml:10: data.heldout: model is not a file (looked in <here>). Give a JSONL file.",
    ),
    "model that is nothing": (
        ("path: model", "path: modle"),
        "grpo.yaml:7: model.path: 'modle' is neither an existing folder (looked in <here>) nor a hub name of the "
        "form organisation/model.",
    ),
    "folder without a model": (
        ("path: model", "path: ."),
        "grpo.yaml:7: model.path: . is no Stable Diffusion inpainting folder: it lacks model_index.json, unet, "
        "vae, text_encoder, tokenizer, scheduler; it must hold model_index.json, unet, vae, text_encoder, tokenizer, "
        "scheduler as diffusers saves them.",
    ),
    "unknown algorithm": (
        ("name: grpo", "name: gpro"),
        "grpo.yaml:17: algorithm.name: found 'gpro' (text). Did you mean grpo? Give a section whose `name` is a file "
        "of ds_inpaint/algorithms: <algorithms>. Meaning: What is learned from.",
    ),
    "unknown sampler": (
        ("name: ddim", "name: dimm"),
        "grpo.yaml:14: sampler.name: found 'dimm' (text). Did you mean ddim? Give a section whose `name` is a file "
        "of ds_inpaint/samplers: <samplers>. Meaning: How rollouts and evaluations go from noise to image.",
    ),
    "more trained steps than trainable": (
        ("trained_steps: 2", "trained_steps: 4"),
        "grpo.yaml:19: algorithm.trained_steps: 4 steps are to be trained, but the sampler has 3 trainable ones "
        "(those that draw noise, without the last). Train fewer, or give the sampler more steps or noise.",
    ),
    "GRPO without noise": (
        ("  steps: 4", "  steps: 4\n  eta: 0"),
        "grpo.yaml:20: algorithm.trained_steps: 2 steps are to be trained, but the sampler has 0 trainable ones "
        "(those that draw noise, without the last). Train fewer, or give the sampler more steps or noise.",
    ),
    "a window without room": (
        ("trained_steps: 2", "trained_steps: 2\n  window: random\n  step_fraction: 0.0"),
        "grpo.yaml:20: algorithm.window: random has no room to move in: with step_fraction=0 only 2 of the sampler's "
        "steps may be trained, as many as trained_steps. Raise step_fraction, train fewer steps, or set window: none.",
    ),
    "graphs kept in ZeRO-3": (
        ("trained_steps: 2", "trained_steps: 2\n  lean: true"),
        "grpo.yaml:20: algorithm.lean: true with engine.zero_stage=3, where DeepSpeed drops the gradients of forwards "
        "that wait for their backward. Set engine.zero_stage to 0, 1 or 2 if the weights fit a GPU, or lean: false.",
    ),
    "graphs kept for several updates": (
        ("trained_steps: 2", "trained_steps: 2\n  lean: true\n  updates_per_rollout: 2"),
        "grpo.yaml:20: algorithm.lean: true with updates_per_rollout=2 would give later updates the gradients of "
        "weights that are gone. Set updates_per_rollout: 1, or lean: false.",
    ),
    "batch that does not divide": (
        ("batch: 2", "batch: 3"),
        "grpo.yaml:12: data.batch: 3 triples x 4 samples = 12 do not divide among 8 ranks x 1 updates per rollout. "
        "Give a multiple of 2, or change the samples per triple, the updates per rollout or the number of ranks.",
    ),
    "sampler of the other family": (
        ("name: ddim", "name: flow_sde"),
        "grpo.yaml:14: sampler.name: this sampler is for models of RectifiedFlow, but the model given is one of "
        "DiscreteDiffusion. Use ddim for Stable Diffusion; flow_sde, dance_sde, cps or ode for Flux.",
    ),
    "pairs that do not divide": (
        ("name: grpo\n  group_size: 4\n  trained_steps: 2", "name: dpo\n  group_size: 4"),
        "grpo.yaml:12: data.batch: 2 triples do not divide among 8 ranks x 1 updates per rollout. Give a multiple of "
        "8, or change the samples per triple, the updates per rollout or the number of ranks.",
    ),
    "server without a port": (
        ('"127.0.0.1:50051"', '"localhost:http"'),
        "grpo.yaml:21: rewards.servers: found ['localhost:http']; name at least one HOST:PORT such as "
        "127.0.0.1:50051, or write embedded.",
    ),
    "bare server": (
        ('["127.0.0.1:50051"]', "localhost:50051"),
        "grpo.yaml:21: rewards.servers: expected one of embedded, or a list with every item text; found "
        "'localhost:50051' (text). Put it in brackets: [localhost:50051]. Meaning: 'embedded' starts a server on "
        "this machine's CPU; otherwise a list of HOST:PORT.",
    ),
    "unknown combiner": (
        ("    seam: 1.0", "    seam: 1.0\n  combine: {name: cane}"),
        "grpo.yaml:24: rewards.combine.name: found 'cane' (text). Did you mean caen? Give a section whose `name` is a "
        "file of ds_inpaint/combiners: <combiners>. Meaning: How weighted scores become what is learned from.",
    ),
    "combiner for other scorers": (
        ("    seam: 1.0", "    seam: 1.0\n  combine:\n    name: scale_aware\n    boundary: [rim]"),
        "grpo.yaml:26: rewards.combine.boundary: found rim, which rewards.scorers does not reward; name some of seam.",
    ),
    "floor of a scorer that is not rewarded": (
        ("    seam: 1.0", "    seam: 1.0\n  floors:\n    raem: 1.0e-4"),
        "grpo.yaml:24: rewards.floors: found raem, which rewards.scorers does not reward; name some of seam.",
    ),
    "scorer with the name of a metric": (
        ("seam: 1.0", "std: 1.0"),
        "grpo.yaml:22: rewards.scorers: found std, but metrics and columns of that name are something else. Have the "
        "scorer served under another, as ANOTHER=std, and name that here.",
    ),
    "hold-out that is trained on": (
        ("    seam: 1.0", "    seam: 1.0\n  holdout: [seam]"),
        "grpo.yaml:24: rewards.holdout: found seam, which rewards.scorers weighs or rewards.guards names; a hold-out "
        "must stand outside of training. Take it out of one of them.",
    ),
    "nothing rewarded": (
        ("seam: 1.0", "seam: 0"),
        "grpo.yaml:22: rewards.scorers: found {'seam': 0.0}; at least one scorer must have a weight other than 0.",
    ),
}
"""What is changed in GOOD, and the message; the same recipe without the change would run on eight ranks."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder in which GOOD is valid, as one of eight ranks sees it; the test fails if a run is begun."""
    monkeypatch.chdir(tmp_path)
    for part, weights in PARTS.items():
        Path("model", part).mkdir(parents=True)
        Path("model", part, weights).touch()
    Path("model", "model_index.json").touch()
    Path("model", "unet", "config.json").write_text('{"in_channels": 9, "block_out_channels": [32, 64, 128, 128]}')
    Path("model", "vae", "config.json").write_text('{"block_out_channels": [32, 64, 128, 128]}')
    Path("model", "scheduler", "scheduler_config.json").write_text("{}")
    for name in ("train.jsonl", "heldout.jsonl"):
        Path(name).touch()
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(run, "setup", begun)
    return tmp_path


def begun(section):
    """Stands in for joining the other ranks, which comes before anything heavy."""
    raise AssertionError("the run was begun")


def complaint(capsys, *overrides: str) -> str:
    """What the command prints about grpo.yaml, which it must refuse."""
    assert run.main(["grpo.yaml", *overrides]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ds_inpaint: ")
    return printed.err.removeprefix("ds_inpaint: ").removesuffix("\n")


def files_of(package: str) -> str:
    names = sorted(file.stem for file in Path(run.__file__).with_name(package).glob("*.py"))
    return ", ".join(name for name in names if not name.startswith("_"))


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_broken_recipe_is_refused_in_a_sentence(mistake, folder, capsys):
    (old, new), message = BROKEN[mistake]
    assert old in GOOD
    Path("grpo.yaml").write_text(GOOD.replace(old, new))
    for name in ("algorithms", "samplers", "combiners"):
        message = message.replace(f"<{name}>", files_of(name))
    assert complaint(capsys) == message.replace("<here>", str(folder))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed", "override 'run.seed': write it as section.key=value."),
        (
            "run.sed=1",
            "override 'run.sed=1': run.sed: unknown key. Allowed here: name, dir, iterations, seed, resume, "
            "allow_changes, max_hours, max_skipped. Did you mean seed?",
        ),
        (
            "data.batch=3",
            "override 'data.batch=3': data.batch: 3 triples x 4 samples = 12 do not divide among 8 ranks x 1 updates "
            "per rollout. Give a multiple of 2, or change the samples per triple, the updates per rollout or the "
            "number of ranks.",
        ),
    ],
)
def test_a_broken_override_is_named(override, message, capsys):
    Path("grpo.yaml").write_text(GOOD)
    assert complaint(capsys, override) == message


def test_every_problem_is_told_at_once(capsys):
    Path("grpo.yaml").write_text(GOOD.replace("size: 64", "size: 8").replace("name: ddim", "nmae: ddim"))
    told = complaint(capsys).splitlines()
    assert told[0] == "grpo.yaml has 2 problems:"
    assert [line.split(": ")[0] for line in told[1:]] == ["grpo.yaml:11", "grpo.yaml:13"]


def test_a_recipe_that_does_not_exist_is_told_with_its_neighbours(capsys):
    Path("grpo_sd.yaml").write_text(GOOD)
    assert complaint(capsys) == (
        "grpo.yaml does not exist. Recipes in that folder: grpo_sd.yaml. Did you mean grpo_sd.yaml?"
    )


def test_the_other_ranks_let_rank_0_speak_first(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    said_before = []
    monkeypatch.setattr(commands.time, "sleep", lambda seconds: said_before.append((seconds, capsys.readouterr().err)))
    assert run.main(["grpo.yaml"]) == 2
    assert said_before == [(commands.SECONDS_FOR_RANK_0, "")]
    assert capsys.readouterr().err == "ds_inpaint: grpo.yaml does not exist.\n"


def test_the_unbroken_recipe_runs(capsys):
    Path("grpo.yaml").write_text(GOOD)
    assert run.main(["grpo.yaml"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("ds_inpaint: rank 0 failed:\nTraceback")
    assert told.endswith("AssertionError: the run was begun\n")
