"""The classifier wrapper against timm, and its refusals."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

from schemas.errors import UserError
from stages.backbones.classifier import classifier_fingerprint, load_classifier
from stages.backbones.weights import TANGRAM

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TANGRAM / "classifier", tmp_path / "classifier")


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_logits_are_those_of_the_network(models, folder):
    config = json.loads((folder / "config.json").read_text())
    network = timm.create_model(config["architecture"], **config["args"]).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    image_B3hw = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        theirs = network(image_B3hw)  # tangram's mean and s.d. are 0.5
        torch.testing.assert_close(models.classifier("tangram").logits(image_B3hw), theirs)
    assert models.classifier("tangram").classes == tuple(config["classes"])


def test_pixels_are_normalised_as_the_configuration_says(folder):
    plain = load_classifier(str(folder), CPU)
    edit(folder, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.5])
    image_B3hw = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.5]))
    by_hand = ((image_B3hw + 1) / 2 - mean) / std  # plain's own normalisation is the identity
    with torch.no_grad():
        shifted = load_classifier(str(folder), CPU).logits(image_B3hw)
        torch.testing.assert_close(shifted, plain.logits(by_hand), rtol=1e-4, atol=1e-5)


def test_the_fingerprint_is_of_the_bytes(models, folder):
    identity = classifier_fingerprint(str(folder))
    assert identity == models.fingerprint("classifier", "tangram") == models.classifier("tangram").fingerprint
    other = shutil.copytree(folder, folder.with_name("other"))
    edit(other, mean=[0.4, 0.5, 0.6])
    assert classifier_fingerprint(str(other)) != identity


def test_a_classifier_that_is_nowhere_is_refused():
    with pytest.raises(UserError, match="unknown classifier 'resnet50'; give tangram, or a folder"):
        load_classifier("resnet50", CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["circle"]}, "names 1 classes, the network has 24"),
        ({"classes": None}, "lacks 'classes'"),
        ({"architecture": "no_such_net"}, "cannot be loaded: Unknown model"),
        ({"architecture": "resnet18"}, "cannot be loaded"),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_line(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_classifier(str(folder), CPU)
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_or_torn_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_classifier(str(folder), CPU)
    weights.unlink()
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        load_classifier(str(folder), CPU)
