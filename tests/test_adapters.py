"""LoRA on both families: what is trained, merged and exported, against peft's and diffusers' own merging."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import FluxFillPipeline, StableDiffusionInpaintPipeline
from model_helpers import draw, draw_with_diffusers, noise_for, placement, two_triples
from peft.tuners.lora import LoraLayer

from ds_inpaint import schema
from ds_inpaint.adapters import LoRA, merged
from ds_inpaint.errors import InputError
from ds_inpaint.keys import door
from ds_inpaint.models.flux import Flux
from ds_inpaint.models.sd import SD

FAMILIES = {"sd": (SD, StableDiffusionInpaintPipeline), "flux": (Flux, FluxFillPipeline)}
TIMES = {"sd": torch.tensor([401.0, 20.0]), "flux": torch.tensor([0.9, 0.3])}
ADAPTED = LoRA(rank=4, alpha=6)

DOUBLE = {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff.net.2"} | {
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "ff_context.net.0.proj",
    "ff_context.net.2",
}
SINGLE = {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, small_model, small_flux):
    return {"sd": small_model, "flux": small_flux}[family]


@pytest.fixture(scope="module")
def load(family, folder):
    def load(lora, checkpointing=False):
        return FAMILIES[family][0](path=str(folder), lora=lora).load(placement(activation_checkpointing=checkpointing))

    return load


@pytest.fixture(scope="module")
def batch():
    return two_triples(64, 96)


@pytest.fixture(scope="module")
def trained(load):
    """With adapters that do something."""
    policy = load(ADAPTED)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.denoiser.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.1)
    return policy


def predict(family, policy, batch):
    return policy.predict(noise_for(policy, batch), TIMES[family], policy.encode(batch), guided=True)


def adapted_layers(policy):
    return {name.partition(".lora_A")[0] for name, _ in policy.denoiser.named_parameters() if ".lora_A." in name}


def test_only_adapters_are_trained_and_they_change_nothing_at_first(family, load, batch):
    policy = load(LoRA(rank=4))
    trained = [name for name, weight in policy.denoiser.named_parameters() if weight.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    with torch.no_grad():
        assert torch.equal(predict(family, policy, batch), predict(family, load(None), batch))


def test_every_rank_starts_from_the_same_adapters(load):
    first, second = load(LoRA(rank=4)).denoiser.state_dict(), load(LoRA(rank=4)).denoiser.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(first[name].std() > 0 for name in first if ".lora_A." in name)


def test_switched_off_adapters_leave_the_base_model(family, load, trained, batch):
    with torch.no_grad():
        adapted = predict(family, trained, batch)
        trained.denoiser.disable_adapters()
        assert torch.equal(predict(family, trained, batch), predict(family, load(None), batch))
        trained.denoiser.enable_adapters()
        assert torch.equal(predict(family, trained, batch), adapted)
    assert (adapted - predict(family, load(None), batch)).abs().max() > 1e-2


def test_flux_adapts_attention_and_feed_forward_of_its_blocks(small_flux):
    policy = Flux(path=str(small_flux), lora=LoRA(rank=4)).load(placement())
    double = {f"transformer_blocks.0.{layer}" for layer in DOUBLE}
    assert adapted_layers(policy) == double | {f"single_transformer_blocks.0.{layer}" for layer in SINGLE}


def test_sd_adapts_attention_and_feed_forward_of_its_blocks(small_model):
    layers = adapted_layers(SD(path=str(small_model), lora=LoRA(rank=4)).load(placement()))
    kinds = {name.partition("transformer_blocks.0.")[2] for name in layers}
    attention = {f"attn{i}.{layer}" for i in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    assert kinds == attention | {"ff.net.0.proj", "ff.net.2"}


def test_named_targets_are_adapted_and_no_others(load):
    layers = adapted_layers(load(LoRA(rank=4, targets=["to_q", "ff.net.2"])))
    assert layers
    assert all(name.endswith((".to_q", ".ff.net.2")) for name in layers)


@pytest.mark.parametrize(
    ("target", "told"),
    [("to_qq", "ending in 'to_qq'. Did you mean to_q"), ("ff.net.3", "Did you mean ff.net.2"), ("x_embedder", "")],
)
def test_a_target_that_does_not_exist_is_told_before_any_weights_are_read(family, folder, target, told):
    unread = replace(placement(), create=lambda build, folder: pytest.fail("the weights were read"))
    section = FAMILIES[family][0](path=str(folder), lora=LoRA(targets=["to_k", target]))
    with pytest.raises(InputError, match=r"model\.lora\.targets: no linear layer in the blocks") as caught:
        section.load(unread)
    assert told in str(caught.value)


def test_checkpointing_changes_no_gradient_and_every_adapter_has_one(family, load, batch):
    gradients = []
    for checkpointing in (False, True):
        policy = load(LoRA(rank=4), checkpointing)
        block_input = []
        block = policy.denoiser.get_submodule({"sd": "down_blocks.0.resnets.0", "flux": "transformer_blocks.0"}[family])
        block.register_forward_pre_hook(lambda _, inputs, seen=block_input: seen.append(inputs[0].requires_grad))
        predict(family, policy, batch).square().mean().backward()
        assert all(block_input)
        gradients.append({n: w.grad for n, w in policy.denoiser.named_parameters() if ".lora_B." in n})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name])


def test_alpha_is_twice_the_rank_unless_it_is_given(small_flux):
    for lora, scale in ((LoRA(rank=8), 2), (LoRA(rank=3), 2), (LoRA(rank=4, alpha=1), 0.25)):
        assert lora.scale == scale
        denoiser = Flux(path=str(small_flux), lora=lora).load(placement()).denoiser
        scales = {module.scaling["default"] for module in denoiser.modules() if isinstance(module, LoraLayer)}
        assert scales == {scale}


def test_merging_is_that_of_diffusers(load, trained):
    ours = merged(trained.denoiser.state_dict(), ADAPTED)
    fused = load(ADAPTED).denoiser
    fused.load_state_dict(trained.denoiser.state_dict())
    fused.fuse_lora()
    fused.unload_lora()
    theirs = fused.state_dict()
    assert ours.keys() == theirs.keys() == load(None).denoiser.state_dict().keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-7)


def test_exports_merged_and_as_adapter_draw_the_picture_of_the_policy(family, folder, trained, load, batch, tmp_path):
    trained.export(trained.denoiser.state_dict(), tmp_path)
    stock = FAMILIES[family][1]
    merged_pipeline, base = stock.from_pretrained(tmp_path), stock.from_pretrained(folder, torch_dtype=torch.float32)
    base.load_lora_weights(tmp_path / "lora")
    _, expected = draw(family, trained, batch, 4)
    settings = {"guidance_scale": trained.guidance}
    for pipeline in (merged_pipeline, base):
        _, picture = draw_with_diffusers(pipeline, noise_for(trained, batch), batch, 4, **settings)
        assert (picture - expected).abs().max() < 1e-4
    assert (expected - draw(family, load(None), batch, 4)[1]).abs().max() > 1e-2


@dataclass(frozen=True)
class Recipe:
    model: Any = door("ds_inpaint.models", "Model.")


@pytest.mark.parametrize(
    ("text", "overrides", "lora"),
    [
        ("", [], None),
        (", lora: {}", [], LoRA()),
        (", lora: {rank: 8, targets: [to_q]}", ["model.lora.alpha=8"], LoRA(8, 8, ["to_q"])),
        ("", ["model.lora.rank=8"], LoRA(rank=8, alpha=None)),
        (", lora: {rank: 8}", ["model.lora="], None),
    ],
)
def test_recipes_have_an_optional_section(tmp_path, text, overrides, lora):
    path = tmp_path / "x.yaml"
    path.write_text(f"model: {{name: flux, path: a/b{text}}}")
    recipe = schema.load(path, overrides, Recipe).value
    assert recipe.model == Flux(path="a/b", lora=lora)
    path.write_text(schema.dump(recipe))
    assert schema.load(path, [], Recipe).value == recipe


@pytest.mark.parametrize(
    ("lora", "complaint"),
    [
        ("{targets: []}", "model.lora.targets: an empty list adapts nothing"),
        ("{dropout: 0.1}", "model.lora.dropout: unknown key. Allowed here: rank, alpha, targets."),
        ("{alpha: 0}", "model.lora.alpha: expected a number above 0, or null; found 0"),
        ("{rank: 0}", "model.lora.rank: expected an integer of at least 1"),
    ],
)
def test_recipes_with_impossible_adapters_are_refused(tmp_path, lora, complaint):
    path = tmp_path / "x.yaml"
    path.write_text(f"model: {{name: sd, path: a/b, lora: {lora}}}")
    with pytest.raises(InputError) as caught:
        schema.load(path, [], Recipe)
    assert complaint in str(caught.value)
