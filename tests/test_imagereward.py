"""ImageReward, converted from its published layout, against that layout computed in plain torch."""

from __future__ import annotations

import shutil

import pytest
import torch
from clip_helpers import item_inputs, pictures
from published_helpers import imagereward_scores, tiny_imagereward, write_bert_tokenizer

from reward_servers.blip import load_blip
from reward_servers.convert import main
from reward_servers.errors import SetupError
from reward_servers.loading import load
from reward_servers.scorer import Need
from reward_servers.views import preprocess

PROMPTS = ["a red fox", "two cats on a sofa " * 5, "sea", "a red fox"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagereward")
    torch.save(tiny_imagereward(), root / "ImageReward.pt")
    tokenizer = write_bert_tokenizer(root / "bert")
    arguments = [root / "ImageReward.pt", root / "weights", "--tokenizer", tokenizer]
    assert main(["imagereward", *map(str, arguments)]) == 0
    return root / "weights"


def scores(folder, inputs, **settings):
    return load("imagereward", {"weights": str(folder), **settings}).scorer.score(inputs)


def test_the_scores_are_those_of_the_published_layout(folder):
    inputs = item_inputs(pictures(4), PROMPTS)
    tokenizer = load_blip(folder, "fp32", torch.device("cpu")).tokenizer
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert (tokens.input_ids[:, 0] == tokenizer.cls_token_id).all()
    assert tokens.attention_mask.sum(1).tolist() == [9, 35, 5, 9]
    expected_N = imagereward_scores(
        tiny_imagereward(), preprocess(inputs, "pasted", "crop", 32), tokens.input_ids, tokens.attention_mask.bool()
    )
    scored = scores(folder, inputs)
    assert not scored.invalid
    assert (scored.scores_N - expected_N).abs().max() < 1e-5
    assert torch.pdist(expected_N[:, None]).min() > 0.02


def test_an_item_is_scored_alike_alone_and_in_a_batch(folder):
    inputs = item_inputs(pictures(4), PROMPTS)
    alone_N = torch.cat([scores(folder, inputs.rows(n, n + 1)).scores_N for n in range(4)])
    assert (scores(folder, inputs).scores_N - alone_N).abs().max() < 1e-5


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.05), ("fp16", 0.005)])
def test_half_precision_stays_close(folder, precision, error):
    inputs = item_inputs(pictures(4), PROMPTS)
    half_N = scores(folder, inputs, precision=precision).scores_N
    assert half_N.dtype == torch.float32
    assert 0 < (half_N - scores(folder, inputs).scores_N).abs().max() < error


def test_the_view_decides_what_is_needed_and_seen(folder):
    inputs = item_inputs(pictures(2), PROMPTS[:2])
    inputs.masks_N1HW[1] = 0
    cropped = load("imagereward", {"weights": str(folder), "view": "mask_crop"}).scorer
    assert cropped.info.needs == (Need.PASTED_IMAGES, Need.MASKS, Need.PROMPTS)
    scored = cropped.score(inputs)
    assert scored.invalid.keys() == {1}
    assert scored.scores_N[0] != scores(folder, inputs).scores_N[0]


def test_weights_that_do_not_fit_are_refused(folder, tmp_path):
    incomplete = shutil.copytree(folder, tmp_path / "incomplete")
    (incomplete / "vocab.txt").unlink()
    with pytest.raises(SetupError, match="The tokenizer in"):
        scores(incomplete, item_inputs(pictures(1)))
    (incomplete / "config.json").unlink()
    with pytest.raises(SetupError, match=r"config\.json must be there .* Make an ImageReward"):
        load_blip(incomplete, "bf16", torch.device("cpu"))
    with pytest.raises(SetupError, match="convert imagereward"):
        load("imagereward")
