"""Captioners: tangram's names what was drawn, a transformers model writes what the library writes."""

import json
import shutil

import pytest
import torch
from PIL import Image

from jobs.tangram.drawings import COLOURS, RARE, TEXTURES, draw, generator
from schemas.errors import UserError
from stages import images
from stages.backbones import tangram_captions
from stages.backbones.captioner import captioner_fingerprint, load_captioner

CPU = torch.device("cpu")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{n}" for n in range(12))]


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    """An untrained BLIP in the layout of the published ones."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("blip") / "model"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    marks = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    torch.manual_seed(3)
    model = BlipForConditionalGeneration(
        BlipConfig(
            text_config={
                **sizes, **marks, "vocab_size": len(WORDS), "encoder_hidden_size": 16,
                "max_position_embeddings": 32, "initializer_range": 1.0,
            },
            vision_config={**sizes, "image_size": 16, "patch_size": 8, "initializer_range": 1.0},
            projection_dim=16,
        )
    )  # fmt: skip
    model.generation_config.update(max_length=8, do_sample=True, **marks)
    model.save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)})
    BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return folder


def picture(seed=0):
    return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_words_are_those_of_the_drawings():
    assert tuple(COLOURS) == tangram_captions.COLOURS
    assert TEXTURES == tangram_captions.TEXTURES


def test_tangram_names_what_was_drawn(models):
    """n = 24 drawings of the rare classes that no model has seen; by chance 3 colours and 6 textures."""
    captioner = models.captioner("tangram")
    right = {"colour": 0, "shape": 0, "texture": 0}
    for shape in RARE:
        for index in range(3):
            image, what = draw(shape, generator("references", shape, 7000 + index))
            said = captioner.caption(images.to_tensor(image, 64))
            article, texture, colour, *noun = said.split()
            assert article == "a"
            right["colour"] += colour == what.colour
            right["shape"] += " ".join(noun) == what.noun
            right["texture"] += texture == what.texture
    assert right["colour"] >= 22
    assert right["shape"] >= 22
    assert right["texture"] >= 12


def test_a_transformers_model_says_what_the_library_says(blip_folder):
    from transformers import BlipForConditionalGeneration, BlipProcessor

    model = BlipForConditionalGeneration.from_pretrained(blip_folder).eval()
    processor = BlipProcessor.from_pretrained(blip_folder)
    captioner = load_captioner(str(blip_folder), CPU)
    said = []
    for seed in range(4):
        pixels = images.to_uint8(picture(seed)[None])[0]
        inputs = processor(images=Image.fromarray(pixels), return_tensors="pt")
        wanted = processor.decode(model.generate(**inputs, do_sample=False)[0], skip_special_tokens=True)
        said.append(captioner.caption(picture(seed)))
        assert said[-1] == wanted.strip()
        assert captioner.caption(picture(seed)) == said[-1]  # though its settings ask for sampling
    assert any(said)


def test_its_identity_is_its_files(blip_folder, tmp_path):
    copy = shutil.copytree(blip_folder, tmp_path / "elsewhere")
    before = captioner_fingerprint(str(blip_folder))
    assert captioner_fingerprint(str(copy)) == before == load_captioner(str(copy), CPU).fingerprint
    other = shutil.copytree(blip_folder, tmp_path / "other")
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**config, "max_length": 5}))
    assert captioner_fingerprint(str(other)) != before
    assert captioner_fingerprint("tangram") != before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "model.bin"), r"no \*.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"?"), "is not a whole safetensors"),
    ],
)
def test_a_folder_that_is_no_captioner_is_the_users_mistake(blip_folder, tmp_path, damage, said):
    folder = shutil.copytree(blip_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=said):
        load_captioner(str(folder), CPU)


def test_code_that_comes_with_a_model_is_not_run(blip_folder, tmp_path):
    folder = shutil.copytree(blip_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": code}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_captioner(str(folder), CPU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["nothing", "./nowhere", "/no/where", "a/b/c"])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match=r"give tangram, a local folder .* or a hub id"):
        captioner_fingerprint(name)
