"""LPIPS, converted from the layouts of its two published files, against the paper's formula on those files' tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from clip_helpers import pictures
from safetensors.torch import load_file

from reward_servers.convert import main
from reward_servers.errors import SetupError
from reward_servers.loading import load
from reward_servers.scorer import Inputs, Need

FIRES = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128)} | {
    9: (256, 48, 192),
    10: (384, 48, 192),
    11: (384, 64, 256),
    12: (512, 64, 256),
}
"""Layer of torchvision's SqueezeNet 1.1 to the channels that come in, are squeezed to, and twice come out."""
POOLS = (2, 5, 8)
COMPARED = {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512}


def published():
    """Random tensors under the names and in the shapes of the two files, large enough that every layer shows."""
    draw = torch.Generator().manual_seed(0)
    convolutions = {"features.0": (64, 3, 3), "classifier.1": (1000, 512, 1)}
    for n, (channels, squeezed, expanded) in FIRES.items():
        convolutions |= {
            f"features.{n}.squeeze": (squeezed, channels, 1),
            f"features.{n}.expand1x1": (expanded, squeezed, 1),
            f"features.{n}.expand3x3": (expanded, squeezed, 3),
        }
    backbone = {}
    for name, (outputs, inputs, side) in convolutions.items():
        spread = (2 / (inputs * side * side)) ** 0.5
        backbone[f"{name}.weight"] = spread * torch.randn(outputs, inputs, side, side, generator=draw)
        backbone[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=draw)
    heads = {
        f"lin{n}.model.1.weight": torch.rand(1, width, 1, 1, generator=draw)
        for n, width in enumerate(COMPARED.values())
    }
    return backbone, heads


def convert(kind, tensors, folder):
    torch.save(tensors, folder / f"{kind}.pth")
    return main([kind, str(folder / f"{kind}.pth"), str(folder / kind)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both files, converted."""
    root = tmp_path_factory.mktemp("lpips")
    for kind, tensors in zip(("squeezenet", "lpips"), published(), strict=True):
        assert convert(kind, tensors, root) == 0
    return root


def loaded(folder, **settings):
    return load("lpips", {"weights": str(folder / "squeezenet"), "heads": str(folder / "lpips"), **settings}).scorer


def features(backbone, pixels_NCHW):
    """What is compared of pictures in [-1, 1], layer by layer, in float64."""

    def convolve(x, name, **how):
        return F.conv2d(x, backbone[f"{name}.weight"].double(), backbone[f"{name}.bias"].double(), **how).relu()

    # The shift and the scale that the authors' code gives for pictures in [-1, 1].
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).double()[:, :, None, None]
    x = convolve((pixels_NCHW.double() - shift) / scale, "features.0", stride=2)
    compared = [x]
    for n in range(2, 13):
        if n in POOLS:
            x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            continue
        fire = f"features.{n}"
        x = convolve(x, f"{fire}.squeeze")
        x = torch.cat([convolve(x, f"{fire}.expand1x1"), convolve(x, f"{fire}.expand3x3", padding=1)], 1)
        if n in COMPARED:
            compared.append(x)
    return compared


def by_formula(images_NCHW, references_NCHW):
    """The distance of arXiv 1801.03924 for pictures in [-1, 1], layer by layer, [layers, N]."""
    backbone, heads = published()
    pairs = zip(features(backbone, images_NCHW), features(backbone, references_NCHW), strict=True)
    layers = []
    for head, (a, b) in zip(heads.values(), pairs, strict=True):
        a, b = (x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10) for x in (a, b))
        layers.append(F.conv2d((a - b).square(), head.double()).mean((1, 2, 3)))
    return torch.stack(layers)


def items(count=3, height=75, width=98):
    images, masks = pictures(count, height, width), torch.zeros(count, 1, height, width)
    masks[:, :, 20:50, 30:70] = 1
    tensors = {
        Need.DECODED_IMAGES: images,
        Need.PASTED_IMAGES: images.flip(3),
        Need.REFERENCE_IMAGES: pictures(count, height, width, seed=1),
        Need.MASKS: masks,
    }
    return Inputs(tensors)


@pytest.mark.parametrize("region", ["known", "whole"])
@pytest.mark.parametrize("view", ["decoded", "pasted"])
def test_the_score_is_minus_the_distance_of_the_paper(folder, region, view):
    inputs = items()
    images = inputs.decoded_NCHW if view == "decoded" else inputs.pasted_NCHW
    # BrushBench multiplies by the known region in [0, 1], before it maps to [-1, 1]: the mask is black.
    seen = 1 - inputs.masks_N1HW if region == "known" else 1
    layers = by_formula(2 * images * seen - 1, 2 * inputs.references_NCHW * seen - 1)
    assert layers.min() > 0.01
    scored = loaded(folder, region=region, view=view).score(inputs)
    assert not scored.invalid
    assert scored.scores_N.dtype == torch.float32
    assert (scored.scores_N + layers.sum(0)).abs().max() < 1e-5
    assert torch.equal(scored.components["distance"], -scored.scores_N)


def test_an_item_is_scored_alike_alone_and_in_a_batch(folder):
    scorer, inputs = loaded(folder), items(4)
    alone_N = torch.cat([scorer.score(inputs.rows(n, n + 1)).scores_N for n in range(4)])
    assert (scorer.score(inputs).scores_N - alone_N).abs().max() < 1e-6
    assert torch.pdist(alone_N[:, None]).min() > 1e-4


def test_only_the_known_region_counts_unless_told_otherwise(folder):
    inputs = items()
    repainted = torch.where(inputs.masks_N1HW == 1, inputs.decoded_NCHW, inputs.references_NCHW)
    repainted = Inputs({**inputs.tensors, Need.DECODED_IMAGES: repainted})
    assert loaded(folder).score(repainted).scores_N.abs().max() == 0
    assert loaded(folder, region="whole").score(repainted).scores_N.max() < -0.01


def test_masks_without_a_known_region_are_invalid_where_it_is_what_counts(folder):
    inputs = items()
    inputs.masks_N1HW[0], inputs.masks_N1HW[2] = 0, 1
    assert {n: reason[:17] for n, reason in loaded(folder).score(inputs).invalid.items()} == {
        0: "the mask is empty",
        2: "the mask is full:",
    }
    assert not loaded(folder, region="whole").score(inputs).invalid


def test_needs_follow_the_settings(folder):
    assert set(loaded(folder).info.needs) == {Need.DECODED_IMAGES, Need.MASKS, Need.REFERENCE_IMAGES}
    needs = loaded(folder, view="pasted", region="whole").info.needs
    assert set(needs) == {Need.PASTED_IMAGES, Need.REFERENCE_IMAGES}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"region": "hole"}, "region must be one of known, whole, found 'hole'"),
        ({"view": "mask_crop"}, "view must be one of decoded, pasted, found 'mask_crop'"),
        ({"weights": ""}, "convert squeezenet FILE FOLDER"),
        ({"heads": ""}, "convert lpips FILE FOLDER"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(folder, setting, sentence):
    with pytest.raises(SetupError, match=sentence):
        loaded(folder, **setting)


def test_exchanged_folders_are_refused(folder):
    scorer = loaded(folder, weights=str(folder / "lpips"), heads=str(folder / "squeezenet"))
    with pytest.raises(SetupError, match="lpips does not hold the 50 tensors of squeezenet"):
        scorer.score(items())
    with pytest.raises(SetupError, match="squeezenet does not hold the 7 tensors of lpips"):
        loaded(folder, heads=str(folder / "squeezenet")).score(items())


def test_conversion_keeps_every_tensor_but_the_classifier(folder):
    backbone, heads = published()
    kept = {name: tensor for name, tensor in backbone.items() if not name.startswith("classifier.")}
    for kind, expected in (("squeezenet", kept), ("lpips", heads)):
        found = load_file(folder / kind / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_other_networks_and_heads_are_refused(tmp_path, capsys):
    backbone, heads = published()
    version_0 = backbone | {"features.0.weight": torch.ones(96, 3, 7, 7)}
    assert convert("squeezenet", version_0, tmp_path) == 2
    assert "features.0.weight with shape [96, 3, 7, 7] instead of [64, 3, 3, 3]" in capsys.readouterr().err
    assert convert("squeezenet", heads, tmp_path) == 2
    assert "It looks like lpips." in capsys.readouterr().err
    of_alex = {name: tensor for name, tensor in heads.items() if name[:4] not in ("lin5", "lin6")}
    assert convert("lpips", of_alex, tmp_path) == 2
    assert "it lacks lin5.model.1.weight, lin6.model.1.weight" in capsys.readouterr().err
