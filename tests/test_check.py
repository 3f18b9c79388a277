"""Knowing before running: the command, the cost of a model's calls, its memory, and what to change."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY_MODELS
from model_helpers import two_triples
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from ds_inpaint import check
from ds_inpaint.adapters import LoRA
from ds_inpaint.costs import Call, Costs
from ds_inpaint.distributed import Ranks
from ds_inpaint.duration import Assumptions, Machine, phases
from ds_inpaint.engine_memory import Part
from ds_inpaint.gpus import GPUS
from ds_inpaint.memory import Memory, estimate
from ds_inpaint.models.flux import Flux
from ds_inpaint.models.sd import SD
from ds_inpaint.plan import make_plan, read_sizes
from ds_inpaint.recipe import load_recipe
from ds_inpaint.remedies import remedies
from ds_inpaint.tracing import Tally, fused_attention, trace
from ds_inpaint.trainer import place
from ds_inpaint.zero_config import EngineSection

FLUX_PARAMETERS, SD_PARAMETERS = 11_902_391_360, 859_535_364


def flux(**keys):
    """The published shape of FLUX.1 Fill, as it would be trained."""
    model = Flux("no/where", **keys)
    return model.outline(model.published("flux-12b"), torch.bfloat16, True)


@pytest.fixture(scope="module")
def whole_flux():
    """All weights of the published shape."""
    return flux()


@pytest.fixture(scope="module")
def plans(recipes):
    """Makes the plan of a very small recipe."""

    def of(name, *overrides, ranks=2, utilisation=0.3):
        recipe = load_recipe(recipes[name], ["data.size=32", *overrides], ranks)
        machine = Machine(GPUS["h100"], ranks, Assumptions(utilisation))
        return make_plan(recipe, recipe.model.configs(), read_sizes(recipe), machine)

    return of


def test_published_shapes_have_the_published_numbers_of_weights(whole_flux):
    assert (whole_flux.trained, whole_flux.frozen) == (FLUX_PARAMETERS, 0)
    assert whole_flux.largest_block(Flux.leaf_blocks) == 339_831_296
    model = SD("no/where")
    unet = model.outline(model.published("sd15"), torch.bfloat16, True)
    assert (unet.trained, unet.frozen) == (SD_PARAMETERS, 0)


@pytest.mark.parametrize(("family", "part"), [("flux", "transformer"), ("sd", "unet")])
def test_an_outline_has_the_shapes_of_the_stored_weights(family, part):
    model = {"flux": Flux, "sd": SD}[family](str(TINY_MODELS / family))
    outline = model.outline(model.configs(), torch.float32, True)
    for module, folder in ((outline.denoiser, part), (outline.vae, "vae")):
        with safe_open(TINY_MODELS / family / folder / "diffusion_pytorch_model.safetensors", "pt") as stored:
            shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118  it is no dict
        assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == shapes


@pytest.mark.parametrize("family", [Flux, SD])
def test_random_weights_make_a_working_model(family):
    """ZeRO-3 is tried by the test of the bench."""
    model = family(str(TINY_MODELS / family.__name__.lower()), lora=LoRA(rank=2))
    alone = Ranks(0, 1, torch.device("cpu"))
    policies = [model.drawn(model.configs(), place(EngineSection(zero_stage=2), alone)) for _ in range(2)]
    first, second = (dict(policy.denoiser.named_parameters()) for policy in policies)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    batch = two_triples(32, 32)
    latents = torch.randn(2, *policies[0].latent_shape(32, 32))
    with torch.no_grad():
        predicted = policies[0].predict(latents, torch.full((2,), 0.5), policies[0].encode(batch), guided=True)
        pictures = policies[0].decode(latents)
    assert predicted.shape == latents.shape
    assert 0.1 < predicted.std() < 10
    assert pictures.isfinite().all()


def test_adapters_of_an_outline_are_the_only_trained_weights():
    outline = flux(lora=LoRA(rank=4, targets=["attn.to_q"]))
    # 57 blocks, each with A of 4 x 3072 and B of 3072 x 4.
    assert (outline.trained, outline.frozen) == (57 * 2 * 4 * 3072, FLUX_PARAMETERS)
    assert {parameter.dtype for parameter in outline.denoiser.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("size", [256, 512])
def test_a_forward_of_flux_takes_what_its_layers_do(whole_flux, size):
    """Against the sum over its layers: 12.91e9 N + 0.7004e6 N^2 for N tokens, the text's among them."""
    tokens = 512 + (size // 16) ** 2
    # Attention: 57 blocks, two products of N x N x 3072 multiply-adds; the rest are linear layers.
    assert pytest.approx(57 * 2 * 2 * 3072, rel=1e-3) == 0.7004e6
    found = Costs(whole_flux, (size, size)).of(Call("predict", 1)).flops
    assert found == pytest.approx(12.91e9 * tokens + 0.7004e6 * tokens**2, rel=2e-3)


@pytest.mark.parametrize("name", ["grpo_flux", "grpo_sd"])
@pytest.mark.parametrize("call", [Call("predict", 2), Call("predict", 2, trained=True), Call("decode", 3)])
def test_operations_are_those_of_torchs_own_counter(plans, name, call):
    costs = plans(name, "model.guidance=1.0").costs
    compute = costs.computation(call)
    with fused_attention(), FlopCounterMode(display=False) as counter:
        compute()
    assert costs.of(call).flops == counter.get_total_flops() > 0


def test_checkpointing_takes_a_forward_more_and_less_memory(plans):
    kept, recomputed = (plans("grpo_flux", f"engine.activation_checkpointing={on}").costs for on in ("false", "true"))
    forward, trained = (kept.of(Call("predict", 2, trained=on)).flops for on in (False, True))
    again = recomputed.of(Call("predict", 2, trained=True))
    blocks = again.flops - trained
    assert 0.7 * forward < blocks < forward  # all blocks, without what is around them
    assert again.bytes < kept.of(Call("predict", 2, trained=True)).bytes


def test_the_math_kernel_of_attention_holds_all_scores(plans):
    auto, math = (plans("grpo_flux", f"engine.attention={kernel}").costs for kernel in ("auto", "math"))
    assert math.of(Call("predict", 4)).flops == auto.of(Call("predict", 4)).flops
    update = Call("predict", 4, trained=True)
    assert math.of(update).bytes > auto.of(update).bytes


def test_guidance_doubles_a_forward(plans):
    guided, plain = (plans("grpo_sd", f"model.guidance={w}").costs for w in ("2.0", "1.0"))
    assert (guided.rows_per_sample, plain.rows_per_sample) == (2, 1)
    assert guided.of(Call("predict", 1, guided=True)).flops == 2 * plain.of(Call("predict", 1, guided=True)).flops
    assert guided.of(Call("predict", 1)) == plain.of(Call("predict", 1))


def test_a_tally_counts_bytes_while_they_live():
    with Tally() as tally:
        first = torch.ones(100)
        second = first + first
        view = second[:50]
        assert tally.live == 800
        del second
        assert tally.live == 800  # the view holds it
        del view
        assert tally.live == 400
    assert tally.peak == 800


def test_a_trace_leaves_out_weights_and_their_gradients():
    layer = torch.nn.Linear(10, 20, bias=False, device="meta")
    inputs = torch.empty(3, 10, device="meta")
    cost = trace(lambda: layer(inputs), [layer])
    assert cost.flops == 2 * 3 * 10 * 20
    assert cost.bytes == 4 * 3 * 20
    trace(lambda: torch.autograd.backward(layer(inputs).sum()), [layer])
    assert layer.weight.grad is None


def test_a_trace_tells_what_a_graph_keeps():
    layers = [torch.nn.Linear(10, 20, device="meta"), torch.nn.Linear(20, 5, device="meta")]
    inputs = torch.empty(3, 10, device="meta")
    cost = trace(lambda: layers[1](layers[0](inputs).sigmoid()), layers)
    assert cost.left == 4 * 3 * (20 + 5)  # what sigmoid made, for itself and the layer behind, and the result


def test_lean_updates_keep_every_graph(plans):
    plain, lean = (
        plans("grpo_flux", "engine.zero_stage=2", "engine.micro_batch=1", f"algorithm.lean={on}")
        for on in ("false", "true")
    )
    batches = plain.iteration[0].denoiser[-1].batches
    graph = plain.costs.of(Call("graph", 1, guided=True, trained=True)).left
    kept = next(part for part in lean.memory().lasting if part.name == "kept graphs")
    assert kept.bytes == graph * len(batches) * lean.recipe.algorithm.trained_steps > 0
    update = {part.name: part.bytes for part in plain.memory().passing}["update"]
    assert {part.name: part.bytes for part in lean.memory().passing}["update"] == update - graph


@pytest.mark.parametrize(
    ("stage", "precision", "kept"),
    [
        # of N trained weights on 2 ranks, bytes: weights, gradient sums, masters, moments
        (0, "fp32", (4, 0, 0, 8)),
        (1, "bf16", (2, 4, 2, 4)),
        (2, "bf16", (2, 0, 2, 4)),
        (3, "bf16", (1, 2, 2, 4)),
        (3, "fp32", (2, 2, 2, 4)),
    ],
)
def test_states_are_divided_as_zero_does(plans, stage, precision, kept):
    plan = plans("grpo_sd", f"engine.zero_stage={stage}", f"engine.precision={precision}", "ema.decay=0.9")
    found = {part.name: part.bytes for part in plan.memory().lasting}
    names = ("weights", "gradient sums, fp32", "master weights, fp32", "optimizer state, fp32")
    n = plan.outline.trained
    assert [found.get(name, 0) for name in names] == pytest.approx([bytes_each * n for bytes_each in kept], abs=16)
    assert found["moving average, fp32"] == pytest.approx(4 * n / (2 if stage else 1), abs=8)
    assert ("gathered weights" in found) == (stage == 3)
    alone = plans("grpo_sd", f"engine.zero_stage={stage}", f"engine.precision={precision}", ranks=1)
    assert "gathered weights" not in {part.name for part in alone.memory().lasting}


def test_offloading_moves_what_the_optimizer_needs_to_the_host(plans):
    resident, offloaded = (
        plans("grpo_sd", "engine.zero_stage=3", "engine.precision=bf16", "ema.decay=0.9", *more)
        for more in ([], ["engine.offload_optimizer=true"])
    )
    moved = {part.name: part.bytes for part in resident.memory().lasting if part.name.endswith("fp32")}
    host = {part.name: part.bytes for part in offloaded.memory().host}
    own = host.pop("gradient of an update, fp32")
    assert own == pytest.approx(4 * resident.outline.trained / 2, abs=4)
    assert host == moved
    assert resident.memory().host == ()
    assert offloaded.memory().total == resident.memory().total - sum(moved.values())


def test_offloading_takes_the_way_over_pcie(plans):
    resident, offloaded = (
        {
            phase.name: phase.communicating
            for phase in plans("sft_flux", "engine.zero_stage=3", *more).iteration_phases()
        }
        for more in ([], ["engine.offload_optimizer=true"])
    )
    share = plans("sft_flux").outline.trained / 2
    link = 64e9 * 0.8
    # fp32 sums to the GPU and back for each backward and once more for the step, which sends new fp32 weights, too.
    assert offloaded["update"] - resident["update"] == pytest.approx(8 * share / link, rel=1e-5)
    assert offloaded["exchange at each step"] == pytest.approx(12 * share / link, rel=1e-5)
    assert "exchange at each step" not in resident


def test_adapters_need_neither_sums_nor_moments_of_the_frozen_weights(plans):
    whole, adapted = (plans("grpo_flux", "engine.zero_stage=2", *more) for more in ([], ["model.lora.rank=2"]))
    found = {part.name: part.bytes for part in adapted.memory().lasting}
    assert adapted.outline.frozen == whole.outline.trained
    assert found["optimizer state, fp32"] == pytest.approx(4 * adapted.outline.trained, abs=8)
    assert found["weights"] == 4 * (adapted.outline.trained + adapted.outline.frozen)


def test_prepared_data_need_no_text_encoders(plans):
    plan = plans("grpo_flux")
    workloads = plan.iteration[0], plan.evaluation[0]
    names = [
        [part.name for part in estimate(plan.recipe, plan.costs, 2, workloads, prepared=prepared).lasting]
        for prepared in (False, True)
    ]
    assert set(names[0]) - set(names[1]) == {"text encoders"}


def test_time_is_operations_over_what_is_reached(plans):
    plan = plans("sft_flux", "engine.zero_stage=3", utilisation=0.5)
    update = next(phase for phase in plan.iteration_phases() if phase.name == "update")
    call = Call("predict", sum(plan.iteration[0].denoiser[0].batches), trained=True)
    assert update.flops == plan.costs.of(call).flops
    assert update.computing == pytest.approx(update.flops / (66.9e12 * 0.5))
    # Weights are gathered for forward and for backward, and their gradients scattered: half of each by 2 ranks.
    assert update.communicating == pytest.approx(3 * 4 * plan.outline.trained / 2 / (450e9 * 0.8))
    assert update.seconds == max(update.computing, update.communicating)
    iteration, evaluation = (
        sum(phase.seconds for phase in found) for found in (plan.iteration_phases(), plan.evaluation_phases())
    )
    assert plan.evaluations == 2
    assert plan.seconds() == pytest.approx(3 * iteration + 2 * evaluation)


@pytest.mark.parametrize(("stage", "bytes_each"), [(0, 8), (1, 8 + 4), (2, 4)])
def test_what_is_exchanged_at_a_step(plans, stage, bytes_each):
    """Without ZeRO-2 fp32 gradients are summed, twice the way of a gather; with ZeRO new weights are gathered."""
    plan = plans("grpo_sd", f"engine.zero_stage={stage}", ranks=2)
    found = next(phase for phase in plan.iteration_phases() if phase.name == "exchange at each step")
    assert found.seconds == pytest.approx(bytes_each * plan.outline.trained / 2 / (450e9 * 0.8))


def test_one_gpu_has_nobody_to_talk_to(plans):
    plan = plans("grpo_sd", "engine.zero_stage=3", ranks=1)
    assert not any(phase.communicating for phase in plan.iteration_phases())
    everything = phases(plan.recipe, plan.costs, replace(plan.machine, count=8), plan.iteration[0])
    assert any(phase.communicating for phase in everything)


@pytest.mark.parametrize(("every", "evaluations"), [(1, 4), (2, 3), (3, 2), (100, 2)])
def test_evaluations_come_first_last_and_every_so_often(plans, every, evaluations):
    assert plans("sft_sd", f"evaluation.every={every}").evaluations == evaluations


def test_remedies_come_in_the_order_of_their_cost():
    engine = EngineSection(zero_stage=1, micro_batch=4, activation_checkpointing=False)
    bytes_of = {"micro_batch=2": 90, "micro_batch=1": 80, "activation_checkpointing=true": 60, "zero_stage=2": 50}

    def judge(settings, gpus):
        if "engine.offload_optimizer=true" in settings:
            return memory(15, 70)
        if "zero_stage=3" in " ".join(settings):
            return None  # not allowed
        lowered = [size for name, size in bytes_of.items() if any(name in setting for setting in settings)]
        if any("lora" in setting for setting in settings):
            return memory(20)
        return memory(min(lowered, default=100) * 8 // gpus)

    def memory(gpu, host=0):
        return Memory((Part("weights", gpu - 1),), (Part("step", 1),), (Part("sums", host),))

    def tried(limit):
        return list(remedies(engine, 8, 100, limit, judge, adapters=True))

    assert [(found.settings[-1], found.bytes) for found in tried(95)] == [("engine.micro_batch=2", 90)]
    assert [found.bytes for found in tried(55)] == [80, 60, 50]
    last = tried(24)
    assert [(found.bytes, found.gpus, found.fits) for found in last[-3:]] == [
        *((12, 32, True), (15, 8, True), (20, 8, True)),
    ]
    assert [found.host_bytes for found in last[-3:]] == [0, 8 * 70, 0]
    cheaper = ("engine.micro_batch=1", "engine.activation_checkpointing=true", "engine.zero_stage=2")
    assert last[-3].settings == cheaper
    assert last[-2].settings == ("engine.zero_stage=3", "engine.offload_optimizer=true")
    assert last[-1].settings == ("model.lora.rank=32",)


def test_offloading_replaces_the_stage_that_was_tried_before():
    def judge(settings, gpus):
        sizes = {
            (): 100,
            ("engine.zero_stage=2",): 90,
            ("engine.zero_stage=3", "engine.offload_optimizer=true"): 20,
        }
        size = sizes.get(settings)
        return size and Memory((), (Part("step", size),))

    found = list(remedies(EngineSection(zero_stage=1, micro_batch=1), 64, 100, 50, judge, adapters=False))
    assert [each.settings for each in found] == [
        ("engine.zero_stage=2",),
        ("engine.zero_stage=3", "engine.offload_optimizer=true"),
    ]


def test_the_command_tells_everything_and_writes_it(recipes, tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = [recipes["grpo_flux"], "data.size=32", "--num_gpus", 2, "--gpu", "a100", "--json", file]
    assert check.main([str(each) for each in (*arguments, "ema.decay=0.5", "engine.micro_batch=1")]) == 0
    told = capsys.readouterr().out
    for line in (
        'engine.precision: "fp32"',
        f"{recipes['grpo_flux']}:9",
        "override 'ema.decay=0.5'",
        "default",
        "update: forwards and backwards",
        "optimizer state, fp32",
        "fits: 76.0 GB can be used",
        "3 iterations and 2 evaluations",
        "engine.micro_batch=4 would fit, too",
    ):
        assert line in told
    written = json.loads(file.read_text())
    assert written["recipe"]["ema.decay"] == {"value": 0.5, "origin": "override 'ema.decay=0.5'"}
    assert written["recipe"]["ema.every"] == {"value": 1, "origin": "default"}
    assert [rank["optimizer steps"] for rank in written["iteration"]["ranks"]] == [1, 1]
    assert written["memory"]["total"] < written["memory"]["usable"] == 76e9
    assert written["seconds"] > 0
    assert written["remedies"] == []
    assert written["largest_micro_batch"]["micro_batch"] == 4


def test_the_difference_to_another_recipe_needs_no_plan(recipes, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(f"extends: {recipes['grpo_sd']}\nrun: {{seed: 7}}\n")
    assert check.main([str(recipes["grpo_sd"]), "optimizer.learning_rate=2.0e-5", "--diff", str(other)]) == 0
    seed, rate = capsys.readouterr().out.splitlines()
    assert seed == f"run.seed: 3 ({recipes['grpo_sd']}:1) -> 7 ({other}:2)"
    assert rate.startswith("optimizer.learning_rate: 2.0e-05 (override 'optimizer.learning_rate=2.0e-5') -> 0.0001 (")


def test_what_does_not_fit_is_told_with_cures(recipes, plans, capsys, monkeypatch):
    needed = plans("sft_sd", "model.lora.rank=2", ranks=1).memory().total
    monkeypatch.setitem(check.GPUS, "h100", replace(GPUS["h100"], memory_GB=4 + 0.999 * needed / 1e9))
    assert check.main([str(recipes["sft_sd"]), "data.size=32", "model.lora.rank=2"]) == 2
    told = capsys.readouterr()
    assert "DOES NOT FIT" in told.out
    assert "engine.micro_batch=1\n" in told.out
    assert "does not fit: it takes" in told.err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["model.path=nobody/nothing"], "'nobody/nothing' is not at hand"),
        (["--random-weights", "flux-12b"], "--random-weights: found 'flux-12b'; for a model with a unet give sd15."),
        (["--num_gpus", "0"], "give at least 1 GPU"),
        (["--num_gpus", "3"], "do not divide among 3 ranks"),
        (["engine.zero_stagee=1"], "Did you mean zero_stage?"),
    ],
)
def test_mistakes_are_told_by_a_sentence(recipes, capsys, monkeypatch, tmp_path, changes, sentence):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert check.main([str(recipes["grpo_sd"]), *changes]) == 2
    assert sentence in capsys.readouterr().err


def test_no_weights_are_read(recipes, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(TINY_MODELS / "sd", folder)
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"no weights")
    assert check.main([str(recipes["grpo_sd"]), f"model.path={folder}", "data.size=64"]) == 0
    assert "One iteration" in capsys.readouterr().out
