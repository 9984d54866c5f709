"""The CLIP wrapper against open_clip's own preprocessing, and its refusals."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from schemas.errors import UserError
from stages.backbones.clip import clip_fingerprint, load_clip
from stages.backbones.weights import TANGRAM

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TANGRAM / "clip", tmp_path / "clip")


@pytest.mark.parametrize(("size", "tolerance"), [((64, 64), 1e-5), ((160, 120), 0.02)])
def test_features_are_those_of_open_clips_own_transform(models, size, tolerance):
    """At another size open_clip rounds the resized picture to 8 bits and we do not."""
    smooth = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(smooth).resize(size, Image.Resampling.BICUBIC)
    network, _, transform = open_clip.create_model_and_transforms(f"local-dir:{TANGRAM / 'clip'}")
    image_3hw = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    with torch.no_grad():
        theirs = network.eval().encode_image(transform(picture)[None])
        ours = models.clip("tangram").encode_image(image_3hw[None])
    assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_texts_are_encoded_as_open_clip_does_and_each_alone(models):
    clip, name = models.clip("tangram"), f"local-dir:{TANGRAM / 'clip'}"
    texts = ["a photo of a red star", "a photo of a heart"]
    with torch.no_grad():
        theirs = open_clip.create_model(name).eval().encode_text(open_clip.get_tokenizer(name)(texts))
    torch.testing.assert_close(clip.encode_text(texts), theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(clip.encode_text(texts)[1:], clip.encode_text(texts[1:]))


def test_the_gradient_reaches_the_pixels(models):
    image_B3hw = torch.rand(1, 3, 100, 80, generator=torch.Generator().manual_seed(0)).requires_grad_()
    models.clip("tangram").encode_image(image_B3hw).square().sum().backward()
    assert (image_B3hw.grad[:, :, 10:90] != 0).float().mean() > 0.99  # the centre square of 80 × 80
    assert torch.equal(image_B3hw.grad[:, :, :8], torch.zeros(1, 3, 8, 80))


def test_the_fingerprint_is_of_the_bytes(models, folder):
    identity = clip_fingerprint(f"local-dir:{folder}")
    assert identity == models.fingerprint("clip", "tangram") == models.clip("tangram").fingerprint
    other = shutil.copytree(folder, folder.with_name("other"))
    (other / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes() + b" ")
    assert clip_fingerprint(f"local-dir:{other}") != identity


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ViT-B-32", "unknown clip model 'ViT-B-32'; give tangram, local-dir:FOLDER"),
        ("ViT-B-32/laion", "unknown clip model ViT-B-32/laion; weights of ViT-B-32: .*laion2b_s34b_b79k"),
        ("ViT-Z/openai", "unknown clip model ViT-Z/openai; give tangram"),
        ("local-dir:/nowhere", "there is no folder /nowhere"),
    ],
)
def test_a_model_that_is_nowhere_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        clip_fingerprint(model)


def test_weights_that_cannot_be_had_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be downloaded") as caught:
        load_clip("ViT-B-32-256/datacomp_s34b_b86k", CPU)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(folder):
    weights = folder / "open_clip_model.safetensors"
    weights.rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match=r"lacks open_clip_model\.safetensors"):
        load_clip(f"local-dir:{folder}", CPU)


def test_code_that_comes_with_a_model_is_not_run(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="trust_remote_code"):
        load_clip(f"local-dir:{folder}", CPU)


def test_weights_of_another_shape_are_the_users_mistake(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] += 1
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_clip(f"local-dir:{folder}", CPU)
    assert "\n" not in str(caught.value)
