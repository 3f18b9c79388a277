"""The DINOv2 scorer against a plain loop over windows, on a tiny random DINOv2."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model

from reward_servers.errors import SetupError
from reward_servers.loading import load
from reward_servers.scorer import Inputs, Need

PATCH, SIZE, GRID = 4, 64, 16


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=PATCH, mlp_ratio=2
    )
    folder = tmp_path_factory.mktemp("dino")
    model = Dinov2Model(config)
    torch.nn.init.normal_(model.embeddings.patch_embeddings.projection.weight, std=0.3)
    model.save_pretrained(folder)
    return folder


def scorer(weights, **settings):
    settings = {"weights": str(weights), "size": str(SIZE)} | {key: str(value) for key, value in settings.items()}
    return load("region_coherence", settings).scorer


def box_mask(top, bottom, left, right, height=80, width=96):
    mask = torch.zeros(1, 1, height, width)
    mask[:, :, top:bottom, left:right] = 1
    return mask


def texture(height=80, width=96, seed=0):
    """Fine noise on a slope, whole grey levels."""
    noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return ((0.3 * noise + torch.linspace(0.1, 0.6, width)) * 255).round() / 255


def inputs(images, masks):
    return Inputs({Need.PASTED_IMAGES: images, Need.MASKS: masks})


def by_hand(weights, image, mask, box, window=8, stride=4):
    """Distance and global cosine of one item, in float64, window by window."""
    top, left, side = box
    crop = image[:, :, top : top + side, left : left + side] * 255
    crop = F.interpolate(crop, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255).round()
    hole = mask[0, 0, top : top + side, left : left + side]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    model = Dinov2Model.from_pretrained(weights).eval()
    with torch.no_grad():
        tokens = model((crop / 255 - mean) / std).last_hidden_state[0, 1:].double()
    features = tokens.view(GRID, GRID, -1)
    # The crops of these tests need no scaling of the mask.
    masked = hole.view(GRID, PATCH, GRID, PATCH).amax((1, 3)) > 0
    known_everywhere = features[~masked]

    def kernel(a, b):
        distance = torch.cdist(
            F.normalize(a, dim=1), F.normalize(b, dim=1), compute_mode="donot_use_mm_for_euclid_dist"
        )
        return torch.exp(-(distance**2) / 200).mean()

    distances = []
    for y in range(0, GRID - window + 1, stride):
        for x in range(0, GRID - window + 1, stride):
            here, where = features[y : y + window, x : x + window], masked[y : y + window, x : x + window]
            inside, outside = here[where], here[~where]
            if len(inside) > 5 and len(outside) == 0:
                outside = known_everywhere
            if len(inside) > 5 and len(outside) > 5:
                mmd = kernel(inside, inside) + kernel(outside, outside) - 2 * kernel(inside, outside)
                distances.append(1000 * mmd.item())
    cosine = F.cosine_similarity(features[masked].mean(0), known_everywhere.mean(0), dim=0).item()
    return sum(distances) / len(distances), cosine


@pytest.mark.parametrize(
    ("mask_box", "square"),
    [
        ((20, 58, 30, 68), (7, 17, 64)),  # 1.4 * 1.2 * 38 = 63.84 -> 64, around the middle (39, 49)
        ((0, 38, 58, 96), (0, 32, 64)),  # in a corner: shifted inside, (-13, 45) -> (0, 32)
        ((26, 30, 20, 58), (0, 0, 0)),
    ],
    ids=["inner", "corner", "thin"],
)
def test_distance_agrees_with_a_loop_over_windows(weights, mask_box, square):
    image, mask = texture(), box_mask(*mask_box)
    if square[2] == 0:
        square = (max(0, 28 - 32), 39 - 32, 64)
    scored = scorer(weights).score(inputs(image, mask))
    distance, cosine = by_hand(weights, image, mask, square)
    assert not scored.invalid
    assert distance > 0.05
    assert scored.components["distance"].item() == pytest.approx(distance, rel=1e-3)
    assert scored.components["remove_like"].item() == pytest.approx(cosine, abs=1e-5)
    assert scored.scores_N.item() == pytest.approx(math.exp(-distance / 3), rel=1e-3)


def test_windows_inside_the_mask_are_compared_with_all_that_is_known(weights):
    image, mask = texture(64, 64), box_mask(8, 56, 8, 56, 64, 64)
    distance, _ = by_hand(weights, image, mask, (0, 0, 64))
    assert scorer(weights).score(inputs(image, mask)).components["distance"].item() == pytest.approx(distance, rel=1e-3)


def test_a_foreign_fill_scores_below_the_untouched_image(weights):
    image, mask = texture(), box_mask(20, 58, 30, 68)
    fills = [image, torch.where(mask > 0, 1 - image, image), torch.where(mask > 0, 0.9, image)]
    scores = scorer(weights).score(inputs(torch.cat(fills), mask.expand(3, -1, -1, -1))).scores_N
    assert scores[0] > scores[1]
    assert scores[0] > scores[2]


def test_an_item_scores_the_same_alone_and_in_any_batch(weights):
    images = torch.cat([texture(seed=seed) for seed in range(4)])
    masks = torch.cat([box_mask(10 + 5 * n, 40 + 6 * n, 12, 50 + 9 * n) for n in range(4)])
    batch = scorer(weights).score(inputs(images, masks))
    for i in range(4):
        alone = scorer(weights).score(inputs(images, masks).rows(i, i + 1))
        torch.testing.assert_close(alone.scores_N, batch.scores_N[i : i + 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            alone.components["remove_like"], batch.components["remove_like"][i : i + 1], atol=1e-5, rtol=0
        )


def test_masks_that_leave_nothing_to_compare_are_invalid_with_the_reason(weights):
    image, good = texture(), box_mask(20, 58, 30, 68)
    sieve = torch.zeros(1, 1, 80, 96)
    sieve[..., ::4, ::4] = 1  # a masked pixel in every patch
    masks = torch.cat([torch.zeros_like(good), good, torch.ones_like(good), sieve])
    scored = scorer(weights).score(inputs(image.expand(4, -1, -1, -1), masks))
    assert set(scored.invalid) == {0, 2, 3}
    assert "empty" in scored.invalid[0]
    assert "full" in scored.invalid[2]
    assert "no window of 8x8 patches" in scored.invalid[3]
    assert scored.scores_N[1].item() == pytest.approx(scorer(weights).score(inputs(image, good)).scores_N.item())


def test_half_precision_stays_close(weights):
    batch = inputs(texture(), box_mask(20, 58, 30, 68))
    full, half = (scorer(weights, precision=precision).score(batch) for precision in ("fp32", "bf16"))
    assert half.scores_N.dtype == torch.float32
    assert half.scores_N.item() != full.scores_N.item()
    assert half.scores_N.item() == pytest.approx(full.scores_N.item(), abs=0.02)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precision": "fp8"}, ["precision", "bf16", "'fp8'"]),
        ({"context": 0.5}, ["context", "at least 1", "0.5"]),
        ({"size": 66}, ["multiple of 4", "size=66"]),
        ({"window": 17}, ["window=17"]),
        ({"stride": 9}, ["stride=9"]),
    ],
)
def test_impossible_settings_are_explained(weights, settings, words):
    with pytest.raises(SetupError) as caught:
        scorer(weights, **settings).score(inputs(texture(), box_mask(20, 58, 30, 68)))
    assert all(word in str(caught.value) for word in words)


def test_another_model_in_the_folder_is_refused(weights, tmp_path):
    for file in weights.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    batch = inputs(texture(), box_mask(20, 58, 30, 68))
    with pytest.raises(SetupError, match=r"lacks \d+ weights, encoder\.layer"):
        scorer(tmp_path).score(batch)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    with pytest.raises(SetupError, match="found 'clip'"):
        scorer(tmp_path).score(inputs(texture(), box_mask(20, 58, 30, 68)))
