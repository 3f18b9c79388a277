"""The CLIP scorers against transformers called directly on images that Pillow resized, and what they share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_helpers import item_inputs, pictures, tiny_clip_config, write_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel

from reward_servers.clip import MOST_PROMPTS, load_clip
from reward_servers.errors import SetupError
from reward_servers.loading import load
from reward_servers.scorer import Inputs, Need
from reward_servers.views import CLIP_MEAN, CLIP_STD, centre_crop, crop_and_resize, letterbox, mask_boxes, preprocess

NAMES = ("clip_score", "pickscore", "hps_v2", "aesthetic", "clip_iqa")
PROMPTED = ("clip_score", "pickscore", "hps_v2")
CPU = torch.device("cpu")
WIDTH = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny CLIP and an aesthetic head for it."""
    root = tmp_path_factory.mktemp("clip")
    write_clip(root / "clip")
    (root / "head").mkdir()
    torch.manual_seed(1)
    save_file({"weight": torch.randn(WIDTH), "bias": torch.tensor(5.0)}, root / "head" / "model.safetensors")
    return root


def loaded(name, folders, **settings):
    settings = {"weights": str(folders / "clip"), **settings}
    if name == "aesthetic":
        settings.setdefault("head", str(folders / "head"))
    return load(name, settings)


def score(name, folders, inputs, **settings):
    return loaded(name, folders, **settings).scorer.score(inputs)


def levels(images):
    return (images * 255).round()


def to_pillow(image_CHW):
    return Image.fromarray(levels(image_CHW).byte().permute(1, 2, 0).numpy())


def from_pillow(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def pillow_resize(image, width, height):
    """The width first; Pillow 13 chooses the order by the size, which earlier versions did not."""
    bicubic = Image.Resampling.BICUBIC
    return image.resize((width, image.height), bicubic).resize((width, height), bicubic)


def pillow_crop(image, size):
    short = min(image.size)
    width, height = size * image.width // short, size * image.height // short
    left, top = (width - size) // 2, (height - size) // 2
    return pillow_resize(image, width, height).crop((left, top, left + size, top + size))


def pillow_letterbox(image, size):
    scale = size / max(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    canvas = Image.new("RGB", (size, size))
    canvas.paste(pillow_resize(image, width, height), ((size - width) // 2, (size - height) // 2))
    return canvas


def embeddings(folder, images, prompts, resize=pillow_crop):
    """What transformers computes when called as its manual says, on images that Pillow resized."""
    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
        list(prompts), padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    small = torch.stack([from_pillow(resize(to_pillow(image), 32)) for image in images]) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        output = model(pixel_values=(small - mean) / std, **tokens)
    return output.image_embeds, output.text_embeds, model.logit_scale.exp().item()


# What a model is shown


@pytest.mark.parametrize(("height", "width"), [(300, 451), (700, 233), (100, 150), (448, 672)])
def test_resizing_is_that_of_pillow(height, width):
    images = pictures(2, height, width)
    for ours, theirs in ((centre_crop, pillow_crop), (letterbox, pillow_letterbox)):
        for resized, image in zip(ours(images * 255, 224), images, strict=True):
            difference = (resized - from_pillow(theirs(to_pillow(image), 224))).abs()
            assert difference.max() <= 1
            assert difference.mean() < 1e-3


@pytest.mark.parametrize(
    ("height", "width", "resize", "mean", "step"),
    [
        (300, 451, centre_crop, 122.505, 8.696),
        (300, 451, letterbox, 82.235, 7.304),
        (700, 233, centre_crop, 122.682, 6.809),
        (700, 233, letterbox, 41.717, 4.981),
        (100, 150, centre_crop, 122.728, 3.117),
        (100, 150, letterbox, 78.266, 3.023),
    ],
)
def test_resizing_stays_what_it_was(height, width, resize, mean, step):
    """The mean grey level of a picture at 224, and the mean difference of neighbours in a row."""
    small = resize(pictures(1, height, width) * 255, 224)
    assert small.mean().item() == pytest.approx(mean, abs=2e-3)
    assert small.diff(dim=3).abs().mean().item() == pytest.approx(step, abs=2e-3)


def test_boxes_around_masks():
    def boxes(least, *masks):
        stack = torch.zeros(len(masks), 1, 100, 80)
        for item, (top, bottom, left, right) in zip(stack, masks, strict=True):
            item[:, top:bottom, left:right] = 1
        return [tuple(box) for box in torch.stack(mask_boxes(stack, least), 1).tolist()]

    assert boxes(8, (40, 60, 30, 40)) == [(38, 23, 24)]  # 1.2 times 20, centred on (50, 35)
    assert boxes(32, (40, 60, 30, 40)) == [(34, 19, 32)]  # at least what the model takes
    assert boxes(8, (0, 20, 70, 80)) == [(0, 56, 24)]  # shifted inside, not grown
    assert boxes(8, (99, 100, 0, 1)) == [(92, 0, 8)]
    assert boxes(8, (0, 100, 30, 40)) == [(10, 0, 80)]  # no larger than the image
    assert boxes(224, (40, 60, 30, 40), (0, 5, 0, 5)) == [(10, 0, 80), (0, 0, 80)]
    stray = torch.zeros(1, 1, 100, 80)
    stray[0, 0, 10, 10] = stray[0, 0, 49, 29] = 1  # the box holds all of the mask, however scattered
    assert torch.stack(mask_boxes(stray, 8), 1).tolist() == [[6, 0, 48]]


@pytest.mark.parametrize("size", [32, 50])
def test_crops_of_any_size_are_those_that_pillow_cuts_and_resizes(size):
    images = pictures(4, 300, 260)
    boxes = torch.tensor([[0, 0, 260], [120, 31, 50], [83, 163, 97], [7, 150, 32]])
    crops = crop_and_resize(images * 255, *boxes.T, size)
    for crop, image, (top, left, side) in zip(crops, images, boxes.tolist(), strict=True):
        cut = image[:, top : top + side, left : left + side]
        difference = (crop - from_pillow(pillow_resize(to_pillow(cut), size, size))).abs()
        assert difference.max() <= 1
        assert difference.mean() < 1e-3
        torch.testing.assert_close(crop, centre_crop(255 * cut[None], size)[0], atol=1, rtol=0)


# The scores


@pytest.mark.parametrize("resize", ["crop", "letterbox"])
def test_scores_are_what_transformers_computes(folders, resize):
    images, prompts = pictures(3), ["a cat on a mat", "", "two dogs " * 40]
    by_hand = {"crop": pillow_crop, "letterbox": pillow_letterbox}[resize]
    image, text, scale = embeddings(folders / "clip", images, prompts, by_hand)
    cosine = (image * text).sum(1)
    assert cosine.std() > 0.05
    inputs = item_inputs(images, prompts)
    close = {"atol": 2e-3, "rtol": 0}  # a grey level here and there
    results = {name: score(name, folders, inputs, resize=resize) for name in NAMES}
    torch.testing.assert_close(results["clip_score"].scores_N, cosine, **close)
    torch.testing.assert_close(results["hps_v2"].scores_N, cosine, **close)
    torch.testing.assert_close(results["pickscore"].scores_N / scale, cosine, **close)
    head = load_file(folders / "head" / "model.safetensors")
    torch.testing.assert_close(results["aesthetic"].scores_N, image @ head["weight"] + head["bias"], atol=0.02, rtol=0)
    assert not any(scored.invalid for scored in results.values())


def test_the_form_of_the_clip_score_paper(tmp_path):
    write_clip(tmp_path / "clip", seed=10)  # some cosines are negative
    images, prompts = pictures(6), [f"scene {n}" for n in range(6)]
    image, text, _ = embeddings(tmp_path / "clip", images, [f"A photo depicts {prompt}" for prompt in prompts])
    cosine = (image * text).sum(1)
    assert cosine.min() < 0 < cosine.max()
    scores = score("clip_score", tmp_path, item_inputs(images, prompts), form="hessel").scores_N
    torch.testing.assert_close(scores, 2.5 * cosine.clamp(min=0), atol=5e-3, rtol=0)


def test_clip_iqa_by_hand(folders):
    words = ["Good photo.", "Bad photo.", "Sharp photo.", "Blurry photo.", "Natural photo.", "Synthetic photo."]
    image, text, _ = embeddings(folders / "clip", pictures(3), words)
    difference = 100 * (image @ text.T)
    by_hand = torch.sigmoid(difference[:, ::2] - difference[:, 1::2])
    scored = score("clip_iqa", folders, item_inputs(pictures(3)))
    for name, expected in zip(("quality", "sharpness", "naturalness"), by_hand.T, strict=True):
        torch.testing.assert_close(scored.components[name], expected, atol=0.05, rtol=0)
    torch.testing.assert_close(scored.scores_N, torch.stack(list(scored.components.values())).mean(0))


@pytest.mark.parametrize("view", ["pasted", "decoded", "mask_crop"])
@pytest.mark.parametrize("name", NAMES)
def test_an_item_scores_the_same_alone_and_in_any_batch(folders, name, view):
    scorer = loaded(name, folders, view=view).scorer
    masks = torch.zeros(8, 1, 96, 80)
    for n in range(8):
        masks[n, :, 8 * n : 11 * n + 10, 5 * n : 40 + 3 * n] = 1
    inputs = item_inputs(pictures(8), masks=masks)
    batch = scorer.score(inputs).scores_N
    assert batch.shape == (8,)
    assert batch.dtype == torch.float32
    assert batch.std() > 1e-3
    alone = torch.cat([scorer.score(inputs.rows(i, i + 1)).scores_N for i in range(8)])
    torch.testing.assert_close(alone, batch, atol=1e-5, rtol=0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    tensors = {need: tensor[order] for need, tensor in inputs.tensors.items()}
    shuffled = scorer.score(Inputs(tensors, [inputs.prompts[i] for i in order])).scores_N
    torch.testing.assert_close(shuffled, batch[order], atol=1e-5, rtol=0)


def test_views_show_what_they_say(folders):
    images = pictures(2)
    inputs = item_inputs(images)

    def clip_score(inputs, **settings):
        return score("clip_score", folders, inputs, **settings).scores_N

    mirrored = item_inputs(images.flip(3))
    assert torch.equal(clip_score(inputs, view="decoded"), clip_score(mirrored))
    top, left, side = (values[0].item() for values in mask_boxes(inputs.masks_N1HW, 32))
    cut = images[:, :, top : top + side, left : left + side]
    cropped = clip_score(inputs, view="mask_crop")
    torch.testing.assert_close(cropped, clip_score(item_inputs(cut)), atol=2e-3, rtol=0)
    assert (cropped - clip_score(inputs)).abs().min() > 0.01
    assert (clip_score(inputs, resize="letterbox") - clip_score(inputs)).abs().min() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_what_a_scorer_needs_follows_its_view(folders, name):
    prompts = (Need.PROMPTS,) if name in PROMPTED else ()
    assert loaded(name, folders).scorer.info.needs == (Need.PASTED_IMAGES, *prompts)
    assert loaded(name, folders, view="decoded").scorer.info.needs == (Need.DECODED_IMAGES, *prompts)
    crop = loaded(name, folders, view="mask_crop").scorer
    assert crop.info.needs == (Need.PASTED_IMAGES, Need.MASKS, *prompts)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_mask_is_invalid_where_the_crop_needs_it(folders, name):
    inputs = item_inputs(pictures(3))
    inputs.masks_N1HW[1] = 0
    inputs.masks_N1HW[2] = 1
    scored = score(name, folders, inputs, view="mask_crop")
    assert scored.invalid == {1: "the mask is empty: there is nothing to crop around"}
    assert scored.scores_N.isfinite().all()
    assert not score(name, folders, inputs).invalid


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_and_ends_in_fp32(folders, precision):
    inputs = item_inputs(pictures(6))
    exact = score("clip_score", folders, inputs).scores_N
    half = score("clip_score", folders, inputs, precision=precision).scores_N
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0)
    model = load_clip(folders / "clip", precision, CPU).model
    assert model.vision_model.embeddings.patch_embedding.weight.dtype != torch.float32
    assert model.visual_projection.weight.dtype == model.logit_scale.dtype == torch.float32


# What is shared


def test_scorers_that_look_alike_share_one_pass_of_the_tower(folders):
    clip = load_clip(folders / "clip", "fp32", CPU)
    passes = []
    hook = clip.model.vision_model.register_forward_pre_hook(lambda *_: passes.append(1))
    inputs = item_inputs(pictures(4))
    for name in ("clip_score", "aesthetic", "clip_iqa", "pickscore"):
        score(name, folders, inputs)
    assert len(passes) == 1
    score("clip_score", folders, inputs, view="decoded")
    score("hps_v2", folders, inputs)  # letterboxed
    assert len(passes) == 3
    hook.remove()


def test_prompts_are_embedded_once(tmp_path, monkeypatch):
    clip = load_clip(write_clip(tmp_path), "fp32", CPU)
    embedded = []
    clip.model.text_model.register_forward_pre_hook(lambda _, arguments: embedded.append(len(arguments[0])))
    first = clip.text_embeddings(["cat", "dog", "cat", "cat"])
    again = clip.text_embeddings(["dog", "bird", "cat"])
    assert embedded == [2, 1]
    assert torch.equal(first[[0, 1, 2, 3]], again[[2, 0, 2, 2]])
    monkeypatch.setattr("reward_servers.clip.MOST_PROMPTS", 2)
    clip.text_embeddings(["cat"])
    assert list(clip.text_cache) == ["bird", "cat"]  # of dog, bird, cat the one used longest ago went
    assert len(clip.text_embeddings(["a", "b", "c"])) == 3
    assert list(clip.text_cache) == ["b", "c"]
    assert MOST_PROMPTS > 1000


def test_models_of_one_size_are_shown_the_same_pixels(folders):
    inputs = item_inputs(pictures(2))
    assert preprocess(inputs, "pasted", "crop", 32) is preprocess(inputs, "pasted", "crop", 32)
    assert preprocess(inputs, "pasted", "crop", 32) is not preprocess(inputs, "pasted", "letterbox", 32)


# Loading


def test_fingerprint_follows_content_and_not_place(folders, tmp_path):
    before = loaded("aesthetic", folders).fingerprint
    shutil.copytree(folders / "clip", tmp_path / "moved")
    assert loaded("aesthetic", folders, weights=str(tmp_path / "moved")).fingerprint == before
    write_clip(tmp_path / "moved", seed=5)
    others = [
        loaded("aesthetic", folders, weights=str(tmp_path / "moved")).fingerprint,
        loaded("aesthetic", folders, view="decoded").fingerprint,
        loaded("aesthetic", folders, resize="letterbox").fingerprint,
        loaded("aesthetic", folders, precision="bf16").fingerprint,
    ]
    save_file({"weight": torch.zeros(WIDTH), "bias": torch.tensor(5.0)}, tmp_path / "head.safetensors")
    others.append(loaded("aesthetic", folders, head=str(tmp_path / "head.safetensors")).fingerprint)
    assert len({before, *others}) == 6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("view", "mask", ["pasted, decoded, mask_crop", "'mask'"]),
        ("resize", "cropped", ["crop, letterbox", "Did you mean 'crop'?"]),
        ("precision", "bf61", ["fp32, bf16, fp16", "Did you mean 'bf16'?"]),
    ],
)
def test_settings_have_named_values(folders, name, key, value, words):
    with pytest.raises(SetupError, match=f"The setting {key} ") as caught:
        loaded(name, folders, **{key: value})
    assert all(word in str(caught.value) for word in words)
    with pytest.raises(SetupError, match="cosine, hessel"):
        loaded("clip_score", folders, form="raw")


def test_only_a_complete_clip_is_loaded(tmp_path):
    def refusal(folder):
        with pytest.raises(SetupError) as caught:
            load_clip(folder, "fp32", CPU)
        return str(caught.value)

    folder = write_clip(tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    assert "say model_type 'clip', found 'siglip'" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json must be there" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    projection = weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "lacks weights, such as visual_projection.weight" in refusal(folder)
    save_file({**weights, "visual_projection.weight": projection}, folder / "other.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    assert "cannot be read" in refusal(folder)
    (folder / "other.safetensors").rename(folder / "model.safetensors")
    load_clip(folder, "fp32", CPU)


def test_a_clip_without_its_tokenizer_is_refused(tmp_path):
    folder = write_clip(tmp_path / "clip")
    for file in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(SetupError, match=r"lacks the tokenizer of its CLIP, in which token 513 ends a text"):
        load_clip(folder, "fp32", CPU)


def test_the_end_of_text_of_older_configurations(tmp_path, folders):
    older = write_clip(tmp_path / "older", config=tiny_clip_config(eos_token_id=2))
    prompts = ["a cat", "two dogs"]
    new, old = (load_clip(Path(folder), "fp32", CPU).text_embeddings(prompts) for folder in (folders / "clip", older))
    torch.testing.assert_close(old, new)


@pytest.mark.parametrize("tensors", [{"weight": (WIDTH + 1,), "bias": ()}, {"weight": (WIDTH,)}])
def test_a_head_must_fit_its_clip(folders, tmp_path, tensors):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(SetupError, match=r"\{'weight': \(16,\), 'bias': \(\)\} to fit this CLIP"):
        score("aesthetic", folders, item_inputs(pictures(1)), head=str(tmp_path))
