"""Feature extractors: whose features they give, their identity, and their refusals."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from schemas.errors import UserError
from stages.backbones import extractor as extractors
from stages.backbones.models import LoadedModels
from stages.backbones.weights import TANGRAM

IMAGE_B3hw = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Rows(torch.nn.Module):
    """Three features: the means of the channels."""

    fingerprint = "channel means"

    def forward(self, image_B3hw):
        return F.dropout(image_B3hw.mean(dim=(2, 3)), training=self.training)


class Unnamed(Rows):
    fingerprint = None


class Numbered(Rows):
    fingerprint = 7


class Maps(torch.nn.Module):
    def forward(self, image_B3hw):
        return image_B3hw


class Squeezed(torch.nn.Module):
    """Forgets the batch when it holds one image, so that one image alone would not tell."""

    def forward(self, image_B3hw):
        return image_B3hw.mean(dim=(0, 2, 3))[None]


class Whole(torch.nn.Module):
    def forward(self, image_B3hw):
        return image_B3hw.mean(dim=(2, 3)).round().long()


class Pair(torch.nn.Module):
    def forward(self, image_B3hw):
        return image_B3hw.mean(dim=(2, 3)), image_B3hw


class Large(torch.nn.Module):
    """Wants images of 224 pixels."""

    def forward(self, image_B3hw):
        return image_B3hw.reshape(-1, 3, 224, 224).mean(dim=(2, 3))


def number():
    return 3


def broken():
    raise OSError("the weights are on another disk")


def module(name):
    return f"tests.stages.backbones.test_extractor:{name}"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TANGRAM / "classifier", tmp_path / "classifier")


def headless(folder):
    """The folder without names for its logits."""
    config = json.loads((folder / "config.json").read_text())
    del config["classes"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_features_of_a_network_are_what_its_last_layer_is_given(models, folder):
    config = json.loads((folder / "config.json").read_text())
    network = timm.create_model(config["architecture"], **config["args"]).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    given = []
    network.get_classifier().register_forward_hook(lambda layer, inputs, out: given.append(inputs[0]))
    with torch.no_grad():
        logits_BK = network(IMAGE_B3hw)  # tangram's mean and s.d. are 0.5
        for name in ("tangram", str(folder)):
            features_BE = models.extractor(name).features(IMAGE_B3hw)
            torch.testing.assert_close(features_BE, given[0])
            torch.testing.assert_close(network.get_classifier()(features_BE), logits_BK)
    torch.testing.assert_close(models.classifier("tangram").logits(IMAGE_B3hw), logits_BK)


def test_a_folder_without_classes_gives_the_same_features(models, folder):
    found = models.extractor(str(headless(folder))).features(IMAGE_B3hw)
    assert torch.equal(found, models.extractor("tangram").features(IMAGE_B3hw))


def test_features_of_clip_are_those_of_the_model_that_others_share(models):
    found = models.extractor("clip:tangram").features(IMAGE_B3hw)
    assert torch.equal(found, models.clip("tangram").encode_image(IMAGE_B3hw))
    assert models.fingerprint("extractor", "clip:tangram") == models.fingerprint("clip", "tangram")


def test_clip_is_loaded_once_for_all_who_want_it(models, monkeypatch):
    loaded = []

    def load(model, device):
        loaded.append(model)
        return models.clip(model)

    monkeypatch.setattr("stages.backbones.models.load_clip", load)
    fresh = LoadedModels(torch.device("cpu"))
    fresh.extractor("clip:tangram")
    fresh.clip("tangram")
    assert loaded == ["tangram"]


def test_a_module_gives_what_it_gives_and_is_trained_no_more(models):
    found = models.extractor(module("Rows"))
    assert torch.equal(found.features(IMAGE_B3hw), IMAGE_B3hw.mean(dim=(2, 3)))  # no dropout
    elsewhere = extractors.load_extractor(module("Rows"), torch.device("meta"), models.clip)
    assert elsewhere.features(IMAGE_B3hw).device.type == "meta"  # the images are on the CPU


def test_gradients_reach_the_image(models):
    for name in ("tangram", "clip:tangram"):
        image_B3hw = IMAGE_B3hw.clone().requires_grad_()
        models.extractor(name).features(image_B3hw).square().sum().backward()
        assert image_B3hw.grad.abs().sum() > 0


def test_the_size_is_known_before_the_weights_are_loaded(models, folder, monkeypatch):
    sizes = {n: models.extractor(n).features(IMAGE_B3hw).shape[1] for n in ("tangram", "clip:tangram")}
    (folder / "model.safetensors").write_bytes(b"")
    assert models.feature_size(str(headless(folder))) == sizes["tangram"]
    for name in ("load_clip", "load_extractor"):
        monkeypatch.setattr(f"stages.backbones.models.{name}", None)
    models = LoadedModels(torch.device("cpu"))
    assert {name: models.feature_size(name) for name in sizes} == sizes
    assert models.feature_size(module("Rows")) is None
    assert models.feature_size("clip:ViT-B-32/laion2b_s34b_b79k") == 512  # of OpenAI's ViT-B/32


def test_the_identity_of_files_is_their_bytes(models, folder):
    identity = models.fingerprint("extractor", str(folder))
    assert identity == models.extractor(str(folder)).fingerprint
    assert identity == models.fingerprint("extractor", "tangram") == models.extractor("tangram").fingerprint
    other = headless(shutil.copytree(folder, folder.with_name("other")))
    assert models.fingerprint("extractor", str(other)) != identity


def test_the_identity_of_a_module_is_its_path_and_what_it_says(models, monkeypatch):
    identity = models.fingerprint("extractor", module("Rows"))
    assert identity == models.extractor(module("Rows")).fingerprint
    assert identity != models.fingerprint("extractor", module("Unnamed"))
    extractors._module_fingerprint.cache_clear()
    monkeypatch.setattr(Rows, "fingerprint", "other weights")
    imported = Path(__file__).stem  # pytest's own copy of this module is not the one that a path imports
    monkeypatch.setattr(f"tests.stages.backbones.{imported}.Rows.fingerprint", "other weights")
    assert models.fingerprint("extractor", module("Rows")) != identity
    extractors._module_fingerprint.cache_clear()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", r"unknown extractor 'resnet50'; give tangram, clip:NAME, a folder with .*, or package"),
        ("clip:none", "unknown clip model 'none'"),
        ("no_such_package:Net", "cannot be imported .No module named 'no_such_package'"),
        (module("Nothing"), "cannot be imported .*no attribute 'Nothing'"),
        (module("broken"), "cannot be made .OSError: the weights are on another disk"),
        (module("number"), "gives a int; it must be a callable without arguments"),
        (module("Numbered"), "its fingerprint is a int; it must be a string"),
    ],
)
def test_what_is_no_extractor_is_refused_in_one_line_before_anything_is_loaded(models, name, message):
    with pytest.raises(UserError, match=message) as caught:
        models.fingerprint("extractor", name)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        models.extractor(name)


def test_a_folder_that_lacks_something_is_refused(models, folder):
    headless(folder)
    with pytest.raises(UserError, match="has no list of classes"):
        models.classifier(str(folder))
    (folder / "config.json").write_text("{}")
    for ask in (models.extractor, models.feature_size):
        with pytest.raises(UserError, match=r"extractor .*config.json lacks 'architecture'"):
            ask(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"extractor .*lacks config.json"):
        models.fingerprint("extractor", str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Maps", r"gives float32 of shape \(2, 3, 64, 64\) for 2 images; it must give a row of features"),
        ("Squeezed", r"gives float32 of shape \(1, 3\) for 2 images"),
        ("Whole", r"gives int64 of shape \(2, 3\) for 2 images"),
        ("Pair", "gives a tuple for 2 images"),
        ("Large", "fails on images of 64 x 64 pixels .RuntimeError: .*; mend it"),
    ],
)
def test_a_module_that_gives_no_rows_is_found_by_two_images(models, name, message):
    extractor = models.extractor(module(name))
    with pytest.raises(UserError, match=message) as caught:
        extractors.probe(extractor, module(name), IMAGE_B3hw[0])
    assert "\n" not in str(caught.value)
    extractors.probe(models.extractor(module("Rows")), module("Rows"), IMAGE_B3hw[0])
