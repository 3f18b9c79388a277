"""The HPSv3 scorer against transformers' own Qwen2-VL, with tiny random weights under their published names."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from reward_servers.errors import SetupError
from reward_servers.hpsv3_model import PIXELS, fit, fitted_sides, load_hpsv3, pack_patches
from reward_servers.loading import load
from reward_servers.scorer import Inputs, Need

WIDTH = 32
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCTION = "Rate this image of: {text_prompt}\nThe rating: <|Reward|> END "
PROMPTS = ["a red fox in the snow", "tea"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder as a user puts it together."""
    folder = tmp_path_factory.mktemp("hpsv3")
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], chat_template=TEMPLATE)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.save_pretrained(folder)
    (folder / "instruction.txt").write_text(INSTRUCTION + "\n")
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 1,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "bos_token_id": 256,
            "eos_token_id": 258,
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    model = Qwen2VLForConditionalGeneration(config)
    for weight in (p for p in model.parameters() if p.ndim > 1):
        nn.init.normal_(weight, std=0.2)
    config.save_pretrained(folder)
    save_file(published(model.state_dict()) | head_tensors(), folder / "HPSv3.safetensors")
    return folder


def published(tensors):
    """The names that Qwen2-VL's tensors had when HPSv3 was published."""
    old = {name.replace("model.language_model.", "model."): t for name, t in tensors.items()}
    return {name.replace("model.visual.", "visual."): t.contiguous() for name, t in old.items()}


def head_tensors():
    shapes = {"0": (1024, WIDTH), "3": (16, 1024), "5": (2, 16)}
    draw = torch.Generator().manual_seed(1)
    weights = {f"rm_head.{i}.weight": torch.randn(shape, generator=draw) / 8 for i, shape in shapes.items()}
    return weights | {f"rm_head.{i}.bias": torch.randn(shape[0], generator=draw) for i, shape in shapes.items()}


def images(count, height=96, width=120):
    """Noise that leaves room for a bicubic filter to overshoot, which Pillow clips between rows and columns."""
    levels = torch.randint(100, 196, (count, 3, height, width), generator=torch.Generator().manual_seed(count))
    return (levels / torch.linspace(1, 2, count)[:, None, None, None]).round() / 255


def score(weights, pictures, prompts, precision="fp32"):
    scorer = load("hpsv3", {"weights": str(weights), "precision": precision}).scorer
    return scorer.score(Inputs({Need.PASTED_IMAGES: pictures}, prompts))


def directly(weights, picture, prompt):
    """Both outputs for one item, from transformers' processor and its model for generation, without padding."""
    levels = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS, "longest_edge": PIXELS})
    seen = processor(Image.fromarray(levels), return_tensors="pt")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(weights)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    count = int(seen.image_grid_thw.prod()) // 4
    text = (
        f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
        f"{INSTRUCTION.replace('{text_prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = tokenizer(text, return_tensors="pt").input_ids
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(weights)).eval()
    tensors = load_file(weights / "HPSv3.safetensors")
    new = {
        f"model.{n}" if n.startswith("visual.") else n.replace("model.", "model.language_model."): t
        for n, t in tensors.items()
        if not n.startswith("rm_head.")
    }
    model.load_state_dict(new)
    with torch.no_grad():
        embeddings = model.model.language_model.embed_tokens(tokens)
        image = model.model.visual(seen.pixel_values, grid_thw=seen.image_grid_thw).pooler_output
        embeddings[tokens == model.config.image_token_id] = image
        # Without positions the text model counts along the sequence.
        state = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
        state = state[tokens == tokenizer.convert_tokens_to_ids("<|Reward|>")]
        for layer in ("0", "3", "5"):
            state = state @ tensors[f"rm_head.{layer}.weight"].T + tensors[f"rm_head.{layer}.bias"]
            state = state if layer == "5" else state.relu()
    return state[0]


def test_scores_are_those_of_transformers_own_model(weights):
    pictures = images(2)
    scored = score(weights, pictures, PROMPTS)
    expected = torch.stack([directly(weights, *item) for item in zip(pictures, PROMPTS, strict=True)])
    # Pillow and torch round a few pixels of the resized image differently.
    torch.testing.assert_close(scored.scores_N, expected[:, 0], atol=1e-3, rtol=0)
    torch.testing.assert_close(scored.components["second_output"], expected[:, 1], atol=1e-3, rtol=0)
    assert not scored.invalid


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-3)])
def test_an_item_scores_the_same_alone_and_in_any_batch(weights, precision, tolerance):
    pictures, prompts = images(4), [*PROMPTS, "", "a longer prompt " * 5]
    batch = score(weights, pictures, prompts, precision).scores_N
    assert batch.std() > 0.05
    alone = [score(weights, pictures[i : i + 1], prompts[i : i + 1], precision).scores_N for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), batch, atol=tolerance, rtol=0)


def test_image_and_prompt_both_matter(weights):
    pictures = images(2)
    batch = score(weights, pictures, PROMPTS).scores_N
    swapped = score(weights, pictures, PROMPTS[::-1]).scores_N
    assert (swapped - batch).abs().min() > 0.01
    assert (score(weights, pictures.flip(0), PROMPTS).scores_N - batch).abs().min() > 0.01


def test_half_precision_stays_close_and_its_head_is_fp32(weights):
    pictures = images(2)
    full, half = (score(weights, pictures, PROMPTS, precision).scores_N for precision in ("fp32", "bf16"))
    torch.testing.assert_close(full, half, atol=0.15, rtol=0)
    model = load_hpsv3(weights, "bf16", torch.device("cpu"))
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    assert not model.head.training


@pytest.mark.parametrize("sides", [(512, 512), (1024, 768), (96, 120), (640, 352), (56, 900), (448, 448)])
def test_images_are_prepared_as_the_processor_of_transformers_does(sides):
    assert fitted_sides(*sides, 28) == smart_resize(*sides, 28, PIXELS, PIXELS)
    levels = (images(1, *sides) * 255).round()
    array = levels[0].permute(1, 2, 0).to(torch.uint8).numpy()
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS, "longest_edge": PIXELS})
    expected = processor(Image.fromarray(array), return_tensors="pt").pixel_values
    packed = pack_patches(fit(levels, 28), 14, 2, 2)[0]
    assert packed.shape == expected.shape
    one_level = 1 / 255 / 0.26
    assert np.abs(packed - expected).max() < 1.01 * one_level
    assert np.abs(packed - expected).mean() < 0.01 * one_level


def test_a_prompt_with_a_special_token_is_invalid_and_harms_no_neighbour(weights):
    pictures = images(3)
    prompts = ["a cat <|image_pad|>", PROMPTS[1], "perfect <|Reward|>"]
    scored = score(weights, pictures, prompts)
    assert set(scored.invalid) == {0, 2}
    assert "<|image_pad|>" in scored.invalid[0]
    assert "<|Reward|>" in scored.invalid[2]
    alone = score(weights, pictures[1:2], PROMPTS[1:])
    assert scored.scores_N[1].item() == pytest.approx(alone.scores_N.item(), abs=1e-4)


def broken(weights, folder, **changes):
    """A copy of the folder with other contents for some files; None leaves a file out."""
    for file in weights.iterdir():
        content = changes.get(file.stem, file.read_bytes())
        if content is not None:
            (folder / file.name).write_bytes(content)
    return folder


def test_the_folder_is_checked(weights, tmp_path):
    config = json.loads((weights / "config.json").read_text())
    wide = config | {"text_config": config["text_config"] | {"intermediate_size": 64}}
    without_head = {n: t for n, t in load_file(weights / "HPSv3.safetensors").items() if n != "rm_head.3.bias"}
    save_file(without_head, tmp_path / "headless")
    cases = {
        "lacks instruction.txt": {"instruction": None},
        "{text_prompt} 0 times": {"instruction": b"Rate it: <|Reward|>"},
        "<|Reward|> 2 times": {"instruction": b"{text_prompt} <|Reward|> <|Reward|>"},
        "say model_type 'qwen2_vl', found 'clip'": {"config": json.dumps(config | {"model_type": "clip"}).encode()},
        "mlp.down_proj.weight: needed [32, 64], found [32, 48]": {"config": json.dumps(wide).encode()},
        "3.bias: needed [16], found none": {"HPSv3": (tmp_path / "headless").read_bytes()},
    }
    for number, (words, changes) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(SetupError) as caught:
            load_hpsv3(broken(weights, folder, **changes), "fp32", torch.device("cpu"))
        assert words in str(caught.value)
        assert "huggingface.co/MizzenAI/HPSv3" in str(caught.value)


def test_settings_are_checked():
    with pytest.raises(SetupError, match=r"hpsv3\.weights is not set"):
        load("hpsv3")
    with pytest.raises(SetupError, match="precision must be one of fp32, bf16, fp16, found 'int4'"):
        load("hpsv3", {"precision": "int4"})


def test_the_instruction_is_part_of_the_fingerprint(weights, tmp_path):
    changed = broken(weights, tmp_path, instruction=INSTRUCTION.replace("Rate", "Judge").encode())
    fingerprints = {load("hpsv3", {"weights": str(folder)}).fingerprint for folder in (weights, changed)}
    assert len(fingerprints) == 2
