"""The safety checker against diffusers' own, on untrained checkpoints, and its refusals."""

import shutil

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from schemas.errors import UserError
from stages.backbones.pretrained import preprocessing_of
from stages.backbones.safety_checker import (
    CARE,
    load_safety_checker,
    margin_to_concepts,
    safety_checker_fingerprint,
)
from stages.contract import Question
from stages.filter.safety_checker import SafetyCheckerFilter
from tests.tiny_safety_checker import save_safety_checker

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos():
    """Smooth 40×30 pictures of many colours, 48 of them."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (48, 3, 4, 3), dtype=np.uint8)
    return [Image.fromarray(block).resize((40, 30), Image.Resampling.BICUBIC) for block in blocks]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_safety_checker(folder, photos)
    return folder


def tensors(photos):
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in photos]) / 127.5 - 1


def theirs(folder, photos):
    """What diffusers says of each picture."""
    checker = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker").eval()
    processor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor")
    pixels = processor(photos, return_tensors="pt").pixel_values
    blackened, flags = checker(clip_input=pixels, images=[np.ones(1) for _ in photos])
    assert [bool((image == 0).all()) for image in blackened] == flags
    return flags


def test_verdicts_are_those_of_diffusers(models, checkpoint, photos):
    """All but those within 1e-3 of the line, because they round the resized picture to 8 bits."""
    flags = theirs(checkpoint, photos)
    method = SafetyCheckerFilter(SafetyCheckerFilter.Config(model=str(checkpoint)))
    scores = method.score(models, tensors(photos), Question("star", "a photo of a star"))
    margins = scores["margin"]
    judged = [method.decide({"margin": margin}).passed for margin in margins]
    clear = [abs(margin) > 1.5e-3 for margin in margins]  # margins have three digits
    assert [passed for passed, sure in zip(judged, clear, strict=True) if sure] == [
        not flag for flag, sure in zip(flags, clear, strict=True) if sure
    ]
    assert 5 < sum(flags) < 43
    assert sum(clear) > 36


def test_pixels_are_those_of_the_processor_but_for_rounding(checkpoint, photos):
    """Two steps of 8 bits at the most; they round after each of two passes."""
    processor = CLIPImageProcessor.from_pretrained(checkpoint / "feature_extractor")
    theirs_B3SS = processor(photos, return_tensors="pt").pixel_values
    ours_B3SS = preprocessing_of(processor, "x", CPU)(tensors(photos))
    step = 1 / 255 / min(processor.image_std)
    assert (ours_B3SS - theirs_B3SS).abs().max() < 2 * step
    assert (ours_B3SS - theirs_B3SS).abs().mean() < step / 2


def test_at_the_size_of_the_network_all_verdicts_are_those_of_diffusers(checkpoint, photos):
    square = [photo.resize((32, 32)) for photo in photos]
    flags = theirs(checkpoint, square)
    assert 5 < sum(flags) < 43
    assert (load_safety_checker(str(checkpoint), CPU).margin(tensors(square)) > 0).tolist() == flags


def test_an_image_is_judged_alone(checkpoint, photos):
    checker, image_B3hw = load_safety_checker(str(checkpoint), CPU), tensors(photos)[:4]
    assert torch.equal(checker.margin(image_B3hw)[2:], checker.margin(image_B3hw[2:]))


def test_special_care_makes_every_concept_count_more():
    axis_EE = torch.eye(3)
    image_BE = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 1.0, 0]])
    concept_KE, threshold_K = axis_EE[:1], torch.tensor([0.6])
    never = margin_to_concepts(image_BE, concept_KE, threshold_K, axis_EE[2:], torch.tensor([0.5]))
    assert never.tolist() == pytest.approx([0.4, 0.0, -0.6])
    care = margin_to_concepts(image_BE, concept_KE, threshold_K, axis_EE[1:2], torch.tensor([0.5]))
    assert care.tolist() == pytest.approx([0.4, CARE, -0.6 + CARE])


def test_a_checker_is_found_wherever_checkpoints_have_it(stub_hub, checkpoint, photos, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(checkpoint / "safety_checker", alone)
    shutil.copy(checkpoint / "feature_extractor" / "preprocessor_config.json", alone)
    half = shutil.copytree(checkpoint, tmp_path / "half")
    (half / "safety_checker" / "model.safetensors").rename(half / "safety_checker" / "model.fp16.safetensors")
    stub_hub.add("owner/model", checkpoint)
    stub_hub.add("owner/alone", alone)
    image_B3hw = tensors(photos)
    wanted = load_safety_checker(str(checkpoint), CPU)
    for name in (str(alone), str(half), "owner/model", "hf-hub:owner/model", "owner/alone"):
        checker = load_safety_checker(name, CPU)
        assert torch.equal(checker.margin(image_B3hw), wanted.margin(image_B3hw))
        assert checker.fingerprint == safety_checker_fingerprint(name)
        if name != str(half):  # the name of the file is part of the identity
            assert checker.fingerprint == wanted.fingerprint
    assert ("GET", "model_index.json") not in stub_hub.asked


def test_weights_as_they_were_published_are_read(checkpoint, photos, tmp_path):
    """Under the names of 2022: another prefix, and positions saved along."""
    folder = shutil.copytree(checkpoint, tmp_path / "old")
    file = folder / "safety_checker" / "model.safetensors"
    weights = load_file(file)
    old = {f"vision_model.{n}" if n.startswith("vision_model.") else n: t for n, t in weights.items()}
    old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(old, file, metadata={"format": "pt"})
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(
        '{"crop_size": 32, "do_center_crop": true, "do_normalize": true, "do_resize": true, "size": 32,'
        ' "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3,'
        ' "image_mean": [0.48145466, 0.4578275, 0.40821073],'
        ' "image_std": [0.26862954, 0.26130258, 0.27577711]}'
    )
    ours, image_B3hw = load_safety_checker(str(checkpoint), CPU), tensors(photos)
    assert torch.equal(load_safety_checker(str(folder), CPU).margin(image_B3hw), ours.margin(image_B3hw))


def weights_of(folder):
    return folder / "safety_checker" / "model.safetensors"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: shutil.rmtree(f / "safety_checker"), "has no safety checker: neither safety_checker/ nor"),
        (
            lambda f: shutil.rmtree(f / "feature_extractor"),
            r"lacks preprocessor_config\.json; is it the right",
        ),
        (lambda f: weights_of(f).rename(f / "safety_checker" / "pytorch_model.bin"), "but pickles are never"),
        (lambda f: weights_of(f).write_bytes(b"half"), "is not a whole safetensors file .*download it again"),
        (lambda f: drop(f, "concept_embeds"), "has no weights for concept_embeds; it holds another kind"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_refused(checkpoint, tmp_path, damage, said):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        load_safety_checker(str(folder), CPU)
    assert "\n" not in str(caught.value)


def drop(folder, name):
    weights = load_file(weights_of(folder))
    del weights[name]
    save_file(weights, weights_of(folder), metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["tangram", "./nowhere", "/no/where", "a/b/c"])
def test_other_names_are_refused(name):
    with pytest.raises(
        UserError, match=r"no such folder; give a folder in the diffusers layout .* or a hub id"
    ):
        safety_checker_fingerprint(name)
