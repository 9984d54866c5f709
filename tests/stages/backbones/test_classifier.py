"""The classifier wrapper against timm, and its refusals."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from schemas.errors import UserError
from stages.backbones.classifier import (
    class_index,
    classifier_classes,
    classifier_fingerprint,
    load_classifier,
)
from stages.backbones.weights import TANGRAM
from stages.contract import Question
from stages.filter.classifier import ClassifierFilter

CPU = torch.device("cpu")
BIRDS = ["robin", "kite", "crane"]


def pictures(size=48):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


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
    with pytest.raises(UserError, match=r"unknown classifier 'resnet50'; give tangram, a folder .*timm:NAME"):
        load_classifier("resnet50", CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["circle"]}, "names 1 classes, the network has 24"),
        ({"classes": None}, "has no list of classes; add them as `classes`"),
        ({"mean": None}, "lacks 'mean'"),
        ({"architecture": None}, "lacks 'architecture', .* and 'model_type', .*; is it the right folder?"),
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
    with pytest.raises(UserError, match=r"is not a whole safetensors file .*; copy or download it again"):
        classifier_fingerprint(str(folder))
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"lacks model\.safetensors; it has pytorch_model\.bin, but pickles are"
    ):
        load_classifier(str(folder), CPU)


def timm_folder(folder, classes=3, tag=None, **said):
    """A small network as timm saves it for its hub, which takes 48 pixels and normalises in its own way."""
    torch.manual_seed(1)
    network = timm.create_model("test_resnet", num_classes=classes).eval()
    network.pretrained_cfg["tag"] = tag
    pixels = {"input_size": (3, 48, 48), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.5)}
    timm.models._hub.save_for_hf(
        network, folder, safe_serialization=True, data_config=pixels, model_config=said
    )
    return network


def test_a_folder_of_timm_gives_what_timm_gives(stub_hub, models, tmp_path):
    network = timm_folder(tmp_path / "timm", label_names=BIRDS)
    stub_hub.add("owner/name", tmp_path / "timm")
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.5]))
    with torch.no_grad():
        theirs_BK = network(((pictures() + 1) / 2 - mean) / std)
        features_BE = network.forward_head(
            network.forward_features(((pictures() + 1) / 2 - mean) / std), pre_logits=True
        )
    for name in (str(tmp_path / "timm"), "hf-hub:owner/name"):
        classifier = load_classifier(name, CPU)
        torch.testing.assert_close(classifier.logits(pictures()), theirs_BK)
        assert classifier.classes == classifier_classes(name) == tuple(BIRDS)
        assert classifier.fingerprint == classifier_fingerprint(name)
        assert classifier_fingerprint(name) == classifier_fingerprint(str(tmp_path / "timm"))
        torch.testing.assert_close(models.extractor(name).features(pictures()), features_BE)
        assert models.feature_size(name) == features_BE.shape[1]
    assert {file for _, file in stub_hub.asked} == {"config.json", "model.safetensors"}


def test_a_network_of_timms_list_is_fetched_by_its_name(stub_hub, tmp_path):
    network = timm_folder(tmp_path / "timm", label_names=BIRDS)
    stub_hub.add("timm/test_resnet.r160_in1k", tmp_path / "timm")
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.5]))
    with torch.no_grad():
        theirs_BK = network(((pictures() + 1) / 2 - mean) / std)
    torch.testing.assert_close(
        load_classifier("timm:test_resnet.r160_in1k", CPU).logits(pictures()), theirs_BK
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "timm:resnet50.nothing",
            r"timm has no weights 'resnet50.nothing' on the hub; it has resnet50\.a1_in1k",
        ),
        ("timm:nothing", r"timm has no weights 'nothing' on the hub; timm.list_pretrained\(\) lists"),
        ("timm:resnet50.a1_in1k", r"the hub has no timm/resnet50.a1_in1k"),
        (
            "hf-hub:owner/pickled",
            r"owner/pickled has no model.safetensors; it has pytorch_model.bin, but pick",
        ),
    ],
)
def test_a_network_that_cannot_be_had_is_refused_in_one_line(stub_hub, tmp_path, name, said):
    timm_folder(tmp_path / "timm", label_names=BIRDS)
    (tmp_path / "timm" / "model.safetensors").rename(tmp_path / "timm" / "pytorch_model.bin")
    stub_hub.add("owner/pickled", tmp_path / "timm")
    with pytest.raises(UserError, match=said) as caught:
        load_classifier(name, CPU)
    assert "\n" not in str(caught.value)


def test_labels_of_timm_may_be_numbered_and_described(tmp_path):
    described = {"n01": "robin, redbreast", "n03": "crane"}
    numbered = {1: "n02", 0: "n01", 2: "n03"}
    timm_folder(tmp_path / "timm", label_names=numbered, label_descriptions=described)
    assert classifier_classes(str(tmp_path / "timm")) == ("robin, redbreast, n01", "n02", "crane, n03")


def test_imagenets_classes_have_all_their_names(tmp_path):
    timm_folder(tmp_path / "timm", classes=1000, tag="a1_in1k")
    model = str(tmp_path / "timm")
    classes = load_classifier(model, CPU).classes
    assert (len(classes), classes[0]) == (1000, "tench, Tinca tinca, n01440764")
    for name in ("tench", "tinca_tinca", "n01440764", "Tench, Tinca tinca, n01440764"):
        assert class_index(name, classes, model) == 0
    assert class_index("n02012849", classes, model) == 134  # the bird
    with pytest.raises(
        UserError, match="several classes of the name 'crane': crane, n02012849; crane, n0312"
    ):
        class_index("crane", classes, model)
    with pytest.raises(
        UserError, match=r"does not know the class 'goldfisch'; it knows 1000 .* goldfish, Cara"
    ):
        class_index("goldfisch", classes, model)


@pytest.mark.parametrize(("classes", "tag"), [(1000, "mine"), (7, "a1_in1k"), (1000, None)])
def test_a_thousand_classes_are_not_taken_for_imagenets(tmp_path, classes, tag):
    timm_folder(tmp_path / "timm", classes=classes, tag=tag)
    with pytest.raises(UserError, match="has no list of classes; add them as `label_names`"):
        classifier_classes(str(tmp_path / "timm"))


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """An untrained ViT classifier as transformers saves it."""
    import transformers

    folder = tmp_path_factory.mktemp("vit") / "model"
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=32, patch_size=8, id2label=dict(enumerate(BIRDS)))
    ).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(
        size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.5]
    ).save_pretrained(folder)
    return folder


def test_a_classifier_of_transformers_gives_what_transformers_gives(stub_hub, vit_folder):
    import transformers

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    process = transformers.AutoImageProcessor.from_pretrained(vit_folder)
    network = transformers.ViTForImageClassification.from_pretrained(vit_folder).eval()
    stub_hub.add("owner/vit", vit_folder)
    for name in (str(vit_folder), "hf-hub:owner/vit"):
        classifier = load_classifier(name, CPU)
        with torch.no_grad():
            theirs_BK = network(**process(Image.fromarray(pixels), return_tensors="pt")).logits
        image_B3hw = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
        torch.testing.assert_close(classifier.logits(image_B3hw), theirs_BK, rtol=1e-4, atol=1e-5)
        assert classifier.classes == classifier_classes(name) == tuple(BIRDS)
        assert classifier.fingerprint == classifier_fingerprint(str(vit_folder))


def test_how_pixels_are_normalised_is_part_of_the_identity(vit_folder, tmp_path):
    other = shutil.copytree(vit_folder, tmp_path / "other")
    config = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps({**config, "image_mean": [0.5, 0.5, 0.5]}))
    assert classifier_fingerprint(str(other)) != classifier_fingerprint(str(vit_folder))


def test_a_network_without_its_last_layer_is_no_classifier(models, vit_folder, tmp_path):
    import transformers

    folder = shutil.copytree(vit_folder, tmp_path / "headless")
    transformers.ViTModel(transformers.ViTConfig.from_pretrained(folder)).save_pretrained(folder)
    with pytest.raises(
        UserError, match=r"has no weights for classifier.bias and others; it holds another kind"
    ):
        load_classifier(str(folder), CPU)
    with pytest.raises(UserError, match="holds a transformers model; features are taken of timm networks"):
        models.extractor(str(vit_folder))


def test_code_that_comes_with_a_model_is_not_run(vit_folder, tmp_path):
    folder = shutil.copytree(vit_folder, tmp_path / "model")
    code = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    edit(folder, model_type="evil", auto_map=code)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_classifier(str(folder), CPU)
    assert not (tmp_path / "ran").exists()


class Own:
    """Says "red" of what is red, and "blue" of what is blue."""

    classes = ("red", "blue")
    fingerprint = "colours"

    def logits(self, image_B3hw):
        return 10 * image_B3hw.mean(dim=(2, 3))[:, ::2]


class Torn(Own):
    classes = ("red", "green", "blue")


class OneWord(Own):
    classes = "red"


class Classless:
    def logits(self, image_B3hw): ...


class Network(torch.nn.Module):
    classes = ("even", "odd")

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.drop = torch.nn.Dropout(0.9)

    def logits(self, image_B3hw):
        return self.drop(self.layer(image_B3hw.mean(dim=(2, 3))))


def own(name):
    return f"tests.stages.backbones.test_classifier:{name}"


def test_a_users_own_class_filters_as_any_other(models):
    red_B3hw = torch.stack([torch.ones(8, 8), -torch.ones(8, 8), -torch.ones(8, 8)])[None]
    method = ClassifierFilter(ClassifierFilter.Config(model=own("Own")))
    method.check(models, Question("blue", ""))
    scores = method.score(models, torch.cat([red_B3hw, red_B3hw.flip(1)]), Question("blue", ""))
    assert scores["probability"] == pytest.approx([0, 1], abs=1e-6)
    assert models.fingerprint("classifier", own("Own")) == models.classifier(own("Own")).fingerprint
    assert models.fingerprint("classifier", own("Own")) != models.fingerprint("classifier", own("Torn"))
    with pytest.raises(UserError, match="does not know the class 'green'; it knows red, blue"):
        method.check(models, Question("green", ""))


def test_a_users_own_network_is_trained_no_more():
    classifier = load_classifier(own("Network"), CPU)
    assert torch.equal(classifier.logits(pictures()), classifier.logits(pictures()))  # no dropout
    assert not classifier.logits(pictures()).requires_grad
    elsewhere = load_classifier(own("Network"), torch.device("meta"))
    assert elsewhere.logits(pictures()).device.type == "meta"  # the pictures are on the CPU


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Nothing", "cannot be imported .*; give tangram"),
        ("Classless", r"gives a Classless without classes; it must offer logits\(\), classes"),
        ("OneWord", "its classes are 'red'; they must be a sequence of names"),
    ],
)
def test_a_users_own_class_must_offer_what_is_used(name, said):
    with pytest.raises(UserError, match=f"classifier '{own(name)}':? {said}"):
        classifier_classes(own(name))


def test_what_a_users_own_class_gives_is_looked_at():
    with pytest.raises(UserError, match=r"gives float32 of shape \(2, 2\) for 2 images; .*\(images, 3\)"):
        load_classifier(own("Torn"), CPU).logits(pictures())
