"""Converting published weights: bit for bit, and nothing but what is known."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from clip_helpers import TOKENIZER, item_inputs, pictures
from published_helpers import (
    HEAD_LAYERS,
    blip_config,
    clip_config,
    imagereward_layout,
    mlp_head,
    open_clip_embeddings,
    open_clip_layout,
    randomise,
    tiny_clip,
    tiny_imagereward,
    write_bert_tokenizer,
)
from safetensors.torch import load_file
from transformers import BlipTextModel, BlipVisionModel, CLIPModel

from reward_servers.clip import load_clip
from reward_servers.convert import main
from reward_servers.published import Published, layout
from reward_servers.views import preprocess

PROMPTS = ["a red fox", "two cats on a sofa, oil on canvas", "sea"]


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


def save(content, path):
    torch.save(content, path)
    return path


def convert(kind, source, folder, *more):
    return main([kind, str(source), str(folder), *map(str, more)])


@pytest.mark.parametrize("wrapped", [True, False])
def test_hps_comes_back_bit_for_bit(clip, tmp_path, wrapped):
    state = open_clip_layout(clip)
    source = save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "hps.pt")
    assert convert("hps_v2", source, tmp_path / "hps", "--tokenizer", TOKENIZER) == 0
    model, report = CLIPModel.from_pretrained(tmp_path / "hps", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert model.state_dict().keys() == clip.state_dict().keys()
    assert all(torch.equal(tensor, clip.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.config.text_config.eos_token_id == clip.config.text_config.vocab_size - 1


def test_hps_computes_what_the_published_layout_does(clip, tmp_path):
    state = open_clip_layout(clip)
    assert convert("hps_v2", save(state, tmp_path / "h.pt"), tmp_path / "hps", "--tokenizer", TOKENIZER) == 0
    loaded, inputs = load_clip(tmp_path / "hps", "fp32", torch.device("cpu")), item_inputs(pictures(3), PROMPTS)
    tokens = loaded.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    images_ND, texts_ND = open_clip_embeddings(state, preprocess(inputs, "pasted", "letterbox", 32), tokens.input_ids)
    assert (loaded.image_embeddings(inputs, "pasted", "letterbox") - images_ND).abs().max() < 1e-6
    assert (loaded.text_embeddings(PROMPTS) - texts_ND).abs().max() < 1e-6
    assert torch.pdist(images_ND).min() > 0.02
    assert torch.pdist(texts_ND).min() > 0.02


def test_imagereward_comes_back_bit_for_bit(tmp_path):
    state, tokenizer = tiny_imagereward(), write_bert_tokenizer(tmp_path / "bert")
    source = save(state, tmp_path / "ImageReward.pt")
    assert convert("imagereward", source, tmp_path / "ir", "--tokenizer", tokenizer) == 0
    found, config = load_file(tmp_path / "ir" / "model.safetensors"), blip_config()
    encoders = (BlipVisionModel(config.vision_config), BlipTextModel(config.text_config, add_pooling_layer=False))
    for name, encoder in zip(("vision_model.", "text_model."), encoders, strict=True):
        encoder.load_state_dict({key.removeprefix(name): found.pop(key) for key in list(found) if key.startswith(name)})
    assert found.keys() == {"head.weight", "head.bias"}
    back = imagereward_layout(*encoders, mlp_head(192, 32, 16, 8, 4))
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items() if not name.startswith("mlp."))


def test_a_real_clip_h_is_recognised():
    with torch.device("meta"):
        model = CLIPModel(
            clip_config((1280, 32, 5120), (1024, 24, 4096), image=224, patch=14, tokens=49408, shared=1024)
        )
    state = open_clip_layout(model)
    assert len(state) == 32 * 12 + 24 * 12 + 14
    converted = layout("hps_v2").convert(Published(Path("HPS_v2.1_compressed.pt"), "hps_v2", state))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.tensors.items()} == shapes
    config = layout("hps_v2").read_config(Published(Path(), "hps_v2", state))
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1280, 5120, 32)
    assert (vision.num_attention_heads, vision.patch_size, vision.image_size) == (16, 14, 224)
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (1024, 4096, 24)
    assert (text.num_attention_heads, text.max_position_embeddings, text.vocab_size) == (16, 77, 49408)
    assert (text.bos_token_id, text.eos_token_id, config.projection_dim) == (49406, 49407, 1024)
    assert vision.hidden_act == text.hidden_act == "gelu"


def test_a_real_imagereward_is_recognised():
    real = blip_config((1024, 24, 4096), (768, 12, 3072), image=224, patch=16, tokens=30524, positions=512)
    with torch.device("meta"):
        state = imagereward_layout(
            BlipVisionModel(real.vision_config),
            BlipTextModel(real.text_config, add_pooling_layer=False),
            mlp_head(768, 1024, 128, 64, 16),
        )
    assert len(state) == (24 * 12 + 6) + (12 * 26 + 4) + 10 + 5
    published = Published(Path("ImageReward.pt"), "imagereward", state)
    assert len(layout("imagereward").convert(published).tensors) == (24 * 12 + 6) + (12 * 26 + 4) + 2
    config = layout("imagereward").read_config(published)
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1024, 4096, 24)
    assert (vision.num_attention_heads, vision.patch_size, vision.image_size) == (16, 16, 224)
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (768, 3072, 12)
    assert (text.num_attention_heads, text.max_position_embeddings, text.vocab_size) == (12, 512, 30524)
    assert (text.encoder_hidden_size, vision.layer_norm_eps, text.layer_norm_eps) == (1024, 1e-6, 1e-12)


def test_the_improved_aesthetic_head_folds_to_one_vector(tmp_path):
    torch.manual_seed(0)
    head = mlp_head(768, 1024, 128, 64, 16)
    randomise(head)
    state = {f"layers.{name}": tensor for name, tensor in head.state_dict().items()}
    assert {name.split(".")[1] for name in state} == {str(n) for n in HEAD_LAYERS}
    assert convert("aesthetic", save(state, tmp_path / "v2.pth"), tmp_path / "v2") == 0
    folded = load_file(tmp_path / "v2" / "model.safetensors")
    assert {name: (list(t.shape), t.dtype) for name, t in folded.items()} == {
        "weight": ([768], torch.float32),
        "bias": ([], torch.float32),
    }
    embeddings_ND = F.normalize(torch.randn(256, 768), dim=1)
    scores_N = embeddings_ND @ folded["weight"] + folded["bias"]
    layered_N = head(embeddings_ND)[:, 0]
    exact_N = head.double()(embeddings_ND.double())[:, 0]
    assert exact_N.std() > 0.5
    assert (scores_N - layered_N).abs().max() < 2e-5
    assert (scores_N - exact_N).abs().max() < 2e-6


def test_the_first_aesthetic_head_is_kept_as_it_is(tmp_path):
    state = {"weight": torch.randn(1, 768), "bias": torch.randn(1)}
    # The older format of torch.save, in which such small files are still found.
    torch.save(state, tmp_path / "v1.pth", _use_new_zipfile_serialization=False)
    assert convert("aesthetic", tmp_path / "v1.pth", tmp_path / "v1") == 0
    folded = load_file(tmp_path / "v1" / "model.safetensors")
    assert torch.equal(folded["weight"], state["weight"][0])
    assert torch.equal(folded["bias"], state["bias"][0])


def test_the_hashes_are_printed_and_kept(tmp_path, capsys):
    source = save({"weight": torch.ones(1, 4), "bias": torch.ones(1)}, tmp_path / "v1.pth")
    assert convert("aesthetic", source, tmp_path / "out" / "v1") == 0
    record = json.loads((tmp_path / "out" / "v1" / "conversion.json").read_text())
    read = hashlib.sha256(source.read_bytes()).hexdigest()
    wrote = hashlib.sha256((tmp_path / "out" / "v1" / "model.safetensors").read_bytes()).hexdigest()
    assert record == {"kind": "aesthetic", "source_sha256": read, "model_sha256": wrote}
    printed = capsys.readouterr().out
    assert read in printed
    assert wrote in printed
    assert os.listdir(tmp_path / "out") == ["v1"]


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys, zipped):
    bad = {"weight": torch.ones(1, 4), "bias": Trap(tmp_path / "mark")}
    torch.save(bad, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    assert convert("aesthetic", tmp_path / "bad.pth", tmp_path / "out") == 2
    assert "would run code" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["bad.pth"]


def small(**changes):
    state = {"weight": torch.ones(1, 4), "bias": torch.ones(1)} | changes
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def clip_with(clip, **changes):
    state = open_clip_layout(clip) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


REFUSED = {
    "an unknown tensor": ("aesthetic", lambda clip: small(scale=torch.ones(1)), "it should not have scale."),
    "a missing tensor": ("aesthetic", lambda clip: small(bias=None), "it lacks bias."),
    "another shape": (
        "aesthetic",
        lambda clip: small(bias=torch.ones(2)),
        "it has bias with shape [2] instead of [1].",
    ),
    "another number of axes": ("aesthetic", lambda clip: small(weight=torch.ones(4)), "shape [4], but needs 2 axes"),
    "another kind": ("aesthetic", lambda clip: open_clip_layout(clip), "it lacks weight. It looks like hps_v2."),
    "no kind": (
        "hps_v2",
        lambda clip: {"a": torch.ones(1)},
        "like none of aesthetic, hps_v2, imagereward, lpips, squeezenet.",
    ),
    "OpenAI's own CLIP": (
        "hps_v2",
        lambda clip: clip_with(clip, input_resolution=torch.tensor(32)),
        "it should not have input_resolution.",
    ),
    "a CLIP of other heads": (
        "hps_v2",
        lambda clip: clip_with(clip, visual__conv1__weight=torch.ones(1024, 3, 8, 8)),
        "shows 1024 channels, no multiple of the 80",
    ),
    "a layer cut out": (
        "hps_v2",
        lambda clip: {k: v for k, v in open_clip_layout(clip).items() if "transformer.resblocks.1.ln" not in k},
        "it lacks transformer.resblocks.1.ln_1.weight, ",
    ),
    "a number": ("aesthetic", lambda clip: {"weight": 1.0}, "holds no dictionary of tensors"),
    "one tensor": ("aesthetic", lambda clip: torch.ones(1), "holds no dictionary of tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused(clip, tmp_path, capsys, case):
    kind, content, sentence = REFUSED[case]
    source = save(content(clip), tmp_path / "file.pt")
    more = ["--tokenizer", TOKENIZER] if kind == "hps_v2" else []
    assert convert(kind, source, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert str(source) in error
    assert os.listdir(tmp_path) == ["file.pt"]


def test_nothing_is_overwritten(tmp_path, capsys):
    source = save(small(), tmp_path / "v1.pth")
    (tmp_path / "out").mkdir()
    assert convert("aesthetic", source, tmp_path / "out") == 2
    assert "exists, and nothing is overwritten" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("kind", "tokenizer", "sentence"),
    [
        ("hps_v2", [], "--tokenizer is not given. hps_v2 reads text"),
        ("hps_v2", ["--tokenizer", "tests"], "tests holds no tokenizer"),
        ("aesthetic", ["--tokenizer", TOKENIZER], "aesthetic reads no text"),
    ],
)
def test_a_tokenizer_is_there_when_needed(tmp_path, capsys, kind, tokenizer, sentence):
    assert convert(kind, save(small(), tmp_path / "v1.pth"), tmp_path / "out", *tokenizer) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02.", b"PK\x03\x04 half a zip"])
def test_a_broken_file_is_refused(tmp_path, capsys, content):
    (tmp_path / "broken.pt").write_bytes(content)
    assert convert("aesthetic", tmp_path / "broken.pt", tmp_path / "out") == 2
    assert "broken.pt is not a file of tensors" in capsys.readouterr().err
    assert convert("aesthetic", tmp_path / "absent.pt", tmp_path / "out") == 2
    assert "There is no file" in capsys.readouterr().err
