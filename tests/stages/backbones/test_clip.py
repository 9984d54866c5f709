"""The CLIP wrapper against open_clip's own preprocessing, and its refusals."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from jobs.tangram.drawings import CLASSES, draw, generator
from schemas.errors import UserError
from stages.backbones.clip import OPEN_CLIP, clip_feature_size, clip_fingerprint, load_clip
from stages.backbones.device import tower_precision_on
from stages.backbones.pretrained import map_weights
from stages.backbones.weights import TANGRAM
from stages.contract import Question
from stages.filter.clip import ClipFilter
from stages.images import to_tensor

CPU = torch.device("cpu")


def picture(seed):
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


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


@pytest.fixture(scope="module")
def drawings():
    """One of each kind."""
    kinds = [draw(word, generator("references", word, 0))[0] for word in CLASSES]
    return torch.stack([to_tensor(drawing, 64) for drawing in kinds])


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_leaves_features_and_cosines(models, drawings, dtype, error):
    """Measured: 2e-4 and 2e-3 of a cosine with a text; the cosine with the feature itself is above 0.9999."""
    full, half = models.clip("tangram"), load_clip("tangram", CPU, dtype)
    text_KE = F.normalize(full.encode_text([f"a photo of a {word}" for word in CLASSES]), dim=1)
    with torch.no_grad():
        one_NE, other_NE = full.encode_image(drawings), half.encode_image(drawings)
    assert other_NE.dtype == torch.float32
    assert not torch.equal(one_NE, other_NE)
    assert F.cosine_similarity(one_NE, other_NE, dim=1).min() > 0.9999
    cosine_NK, rounded_NK = (F.normalize(each_NE, dim=1) @ text_KE.T for each_NE in (one_NE, other_NE))
    assert (cosine_NK - rounded_NK).abs().max() < error
    assert torch.equal(half.encode_text(["a ring"]), full.encode_text(["a ring"]))  # once for all: in full
    assert half.fingerprint == full.fingerprint


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_small_gradients_come_through_half_precision(models, drawings, size):
    """float16 has nothing below 6e-8; and no row's bits depend on how large another's gradient is."""
    half = load_clip("tangram", CPU, torch.float16)

    def gradients(clip, size_B):
        image_B3hw = drawings[:4].clone().requires_grad_()
        features_BE = clip.encode_image(image_B3hw)
        loss = (size_B * F.cosine_similarity(features_BE, features_BE.detach().roll(1, 0), dim=1)).sum()
        return torch.autograd.grad(loss, [image_B3hw, features_BE])

    size_B = torch.tensor([size] * 4)
    (one_B3hw, one_BE), (other_B3hw, other_BE) = (
        gradients(clip, size_B) for clip in (models.clip("tangram"), half)
    )
    assert F.cosine_similarity(one_B3hw.flatten(1), other_B3hw.flatten(1), dim=1).min() > 0.95
    norm_B, rounded_B = (each_B3hw.flatten(1).norm(dim=1) for each_B3hw in (one_B3hw, other_B3hw))
    torch.testing.assert_close(rounded_B, norm_B, rtol=0.05, atol=0)
    torch.testing.assert_close(other_BE, one_BE, rtol=0.05, atol=0.02 * float(one_BE.abs().max()))
    mixed = gradients(half, size_B * torch.tensor([1.0, 1e-35, torch.nan, 0.0]))[0]
    assert torch.equal(mixed[0], other_B3hw[0])
    assert mixed[1].isfinite().all()
    assert torch.equal(mixed[3], torch.zeros_like(mixed[3]))


def test_a_cpu_looks_in_full_precision_and_a_gpu_in_half():
    assert tower_precision_on(CPU) == torch.float32
    assert tower_precision_on(torch.device("cuda")) == torch.float16


def test_the_fingerprint_is_of_the_bytes(models, folder):
    identity = clip_fingerprint(f"local-dir:{folder}")
    assert identity == models.fingerprint("clip", "tangram") == models.clip("tangram").fingerprint
    other = shutil.copytree(folder, folder.with_name("other"))
    (other / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes() + b" ")
    assert clip_fingerprint(f"local-dir:{other}") != identity


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ViT-B-32", "unknown clip model 'ViT-B-32'; give tangram, a folder, hf-hub:owner/name, ARCH"),
        ("ViT-B-32/laion", "unknown clip model ViT-B-32/laion; weights of ViT-B-32: .*laion2b_s34b_b79k"),
        ("ViT-Z/openai", "unknown clip model ViT-Z/openai; give tangram, .*; is it hf-hub:ViT-Z/openai?"),
        ("RN50/yfcc15m", "has no open_clip_model.safetensors; it has open_clip_pytorch_model.bin, but"),
        ("local-dir:/nowhere", "there is no folder /nowhere"),
        ("./nowhere", "there is no folder .*nowhere"),
    ],
)
def test_a_model_that_is_nowhere_is_refused(stub_hub, tmp_path, model, message):
    (tmp_path / "pickled").mkdir()
    for name in ("open_clip_config.json", "open_clip_pytorch_model.bin"):
        (tmp_path / "pickled" / name).write_text("{}")
    stub_hub.add("timm/resnet50_clip.yfcc15m", tmp_path / "pickled")
    with pytest.raises(UserError, match=message):
        clip_fingerprint(model)


def test_weights_that_cannot_be_had_are_refused_in_one_line(stub_hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"cannot be downloaded: the hub cannot be reached.*`hf down"
    ) as caught:
        load_clip("ViT-B-32-256/datacomp_s34b_b86k", CPU)
    assert "\n" not in str(caught.value)


def test_a_model_of_open_clips_list_is_the_one_it_lists(stub_hub, tmp_path, monkeypatch):
    """A small architecture and weights for it, listed as open_clip lists its own."""
    config = json.loads((TANGRAM / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = str(TANGRAM / "clip")
    listed = {"hf_hub": "owner/listed/", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small", config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Small", {"drawn": listed})
    stub_hub.add("owner/listed", TANGRAM / "clip")
    clip, image_B3hw = load_clip("Small/drawn", CPU), picture(2)
    assert torch.equal(clip.encode_image(image_B3hw), load_clip("tangram", CPU).encode_image(image_B3hw))
    assert stub_hub.asked["GET", "open_clip_model.safetensors"] == 1
    assert clip.fingerprint == clip_fingerprint("Small/drawn") != clip_fingerprint("tangram")
    assert clip_feature_size("Small/drawn") == config["embed_dim"]


def test_a_folder_and_a_repository_give_the_same_model(stub_hub, folder):
    stub_hub.add("owner/name", folder)
    names = (str(folder), f"local-dir:{folder}", "hf-hub:owner/name")
    image_B3hw, texts = picture(2), ["a photo of a ring"]
    ours = load_clip("tangram", CPU)
    for name in names:
        clip = load_clip(name, CPU)
        assert torch.equal(clip.encode_image(image_B3hw), ours.encode_image(image_B3hw))
        assert torch.equal(clip.encode_text(texts), ours.encode_text(texts))
        assert clip.fingerprint == clip_fingerprint(name) == ours.fingerprint
        assert clip_feature_size(name) == clip_feature_size("tangram")


def test_other_weights_in_a_folder_do_not_matter(folder):
    """A cache has what others fetched."""
    (folder / "model.safetensors").write_bytes(b"of another library")
    assert clip_fingerprint(str(folder)) == clip_fingerprint("tangram")


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory):
    """An untrained CLIPModel with processor and tokenizer, as transformers saves them."""
    import transformers

    folder = tmp_path_factory.mktemp("transformers") / "clip"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TANGRAM / "clip")
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(5)
    transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**sizes, **marks, "vocab_size": len(tokenizer), "max_position_embeddings": 12},
            vision_config={**sizes, "image_size": 32, "patch_size": 8},
            projection_dim=24,
        )
    ).save_pretrained(folder)
    transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer
    ).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("size", "tolerance"), [((32, 32), 1e-5), ((80, 60), 0.02)])
def test_a_model_of_transformers_gives_what_transformers_gives(
    stub_hub, transformers_folder, size, tolerance
):
    """At another size the library rounds the resized picture to 8 bits and we do not."""
    import transformers

    smooth = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    photo = Image.fromarray(smooth).resize(size, Image.Resampling.BICUBIC)
    texts = ["a photo of a red star", "star", "a photo " * 20]
    network = transformers.CLIPModel.from_pretrained(transformers_folder).eval()
    process = transformers.CLIPImageProcessor.from_pretrained(transformers_folder)
    tokenize = transformers.CLIPTokenizer.from_pretrained(transformers_folder)
    stub_hub.add("owner/name", transformers_folder)
    for name in (str(transformers_folder), "hf-hub:owner/name"):
        clip = load_clip(name, CPU)
        with torch.no_grad():
            theirs_BE = network.get_image_features(**process(photo, return_tensors="pt")).pooler_output
            tokens = tokenize(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")
            written_BE = network.get_text_features(**tokens).pooler_output
        image_3hw = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 127.5 - 1
        ours_BE = clip.encode_image(image_3hw[None])
        assert (ours_BE - theirs_BE).norm() < tolerance * theirs_BE.norm()
        torch.testing.assert_close(clip.encode_text(texts), written_BE, rtol=1e-4, atol=1e-5)
        assert clip.logit_scale == pytest.approx(network.logit_scale.exp().item())
        assert clip.fingerprint == clip_fingerprint(str(transformers_folder))
        assert clip_feature_size(name) == 24 == ours_BE.shape[1]
        half_BE = load_clip(name, CPU, torch.float16).encode_image(image_3hw[None])
        assert half_BE.dtype == torch.float32
        assert torch.equal(half_BE.half().float(), half_BE)
        assert 0 < (half_BE - ours_BE).norm() < 5e-3 * ours_BE.norm()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: save(f, {"model_type": "siglip"}), "of type siglip; of these only clip is read"),
        (lambda f: [p.unlink() for p in f.glob("*processor_config.json")], "cannot be loaded"),
        (lambda f: drop(f, "text_projection.weight"), "has no weights for text_projection.weight; it holds"),
        (lambda f: (f / "config.json").unlink(), "lacks open_clip_config.json; is it the right folder?"),
    ],
)
def test_a_folder_of_transformers_that_is_no_clip_is_refused(
    transformers_folder, tmp_path, caplog, monkeypatch, damage, said
):
    folder = shutil.copytree(transformers_folder, tmp_path / "clip")
    damage(folder)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(UserError, match=said) as caught:
        load_clip(str(folder), CPU)
    assert "\n" not in str(caught.value)
    assert not caplog.records  # no table of weights beside the line


def save(folder, changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def drop(folder, name):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class Own:
    """Two features: how red an image is and how blue; what a text asks for."""

    logit_scale = 100.0
    fingerprint = "colours"

    def encode_image(self, image_B3hw):
        return image_B3hw.mean(dim=(2, 3))[:, ::2]

    def encode_text(self, texts):
        return torch.tensor([[float("red" in text), float("blue" in text)] for text in texts])


class Careless(Own):
    def encode_image(self, image_B3hw):
        return image_B3hw

    def encode_text(self, texts):
        return torch.zeros(7, 2)


class Textless:
    def encode_image(self, image_B3hw): ...


def own(name):
    return f"tests.stages.backbones.test_clip:{name}"


def test_a_users_own_class_filters_as_any_other(models):
    red_B3hw = torch.stack([torch.ones(8, 8), -torch.ones(8, 8), -torch.ones(8, 8)])[None]
    method = ClipFilter(ClipFilter.Config(model=own("Own")))
    question = Question("red", "a red one", {"blue": "a blue one"})
    scores = method.score(models, torch.cat([red_B3hw, red_B3hw.flip(1)]), question)
    assert scores["margin"] == pytest.approx([2**0.5, -(2**0.5)])
    assert models.fingerprint("clip", own("Own")) == models.clip(own("Own")).fingerprint
    assert models.fingerprint("clip", own("Own")) != models.fingerprint("clip", own("Careless"))
    assert clip_feature_size(own("Own")) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Nothing", "cannot be imported .*; give tangram"),
        ("Textless", r"gives a Textless without encode_text\(\), logit_scale; it must offer encode_image"),
    ],
)
def test_a_users_own_class_must_offer_what_is_used(name, said):
    with pytest.raises(UserError, match=f"clip '{own(name)}' {said}"):
        load_clip(own(name), CPU)


def test_what_a_users_own_class_gives_is_looked_at():
    clip = load_clip(own("Careless"), CPU)
    with pytest.raises(
        UserError, match=r"gives float32 of shape \(1, 3, 8, 8\) for 1 images; .* a row of feat"
    ):
        clip.encode_image(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match=r"gives float32 of shape \(7, 2\) for 1 texts"):
        clip.encode_text(["red"])


def test_weights_on_the_cpu_are_pages_of_the_file(tmp_path):
    """So the processes of a node share them. Only single precision can be used as it lies there."""
    folder = shutil.copytree(TANGRAM / "clip", tmp_path / "clip")
    halves = load_file(folder / OPEN_CLIP[1]).items()
    whole = {name: value.float() if value.is_floating_point() else value for name, value in halves}
    save_file(whole, folder / OPEN_CLIP[1])
    network = open_clip.create_model(f"local-dir:{folder}")
    image_B3ss, before = picture(1), network.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    map_weights(network, folder / OPEN_CLIP[1])
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    pages = mapped(folder / OPEN_CLIP[1])
    assert all(any(value.data_ptr() in page for page in pages) for value in after.values())
    assert network.eval().encode_image(image_B3ss).isfinite().all()


def mapped(file):
    """The addresses at which this process sees a file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(file.resolve()))]
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


def test_pickled_weights_are_not_read(folder):
    weights = folder / "open_clip_model.safetensors"
    weights.rename(folder / "open_clip_pytorch_model.bin")
    said = (
        r"lacks open_clip_model\.safetensors; it has open_clip_pytorch_model\.bin, but pickles are never read"
    )
    with pytest.raises(UserError, match=said):
        load_clip(f"local-dir:{folder}", CPU)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda data: data[: len(data) // 2],
            "is not a whole safetensors file .*; copy or download it again",
        ),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid ", "run `git lfs pull`"),
    ],
)
def test_half_of_the_weights_are_told_before_anything_is_loaded(folder, damage, said):
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(UserError, match=f"{weights}.* {said}"):
        clip_fingerprint(str(folder))


def test_a_download_that_was_cut_off_is_told(folder):
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_model.safetensors.incomplete")
    with pytest.raises(UserError, match="a download was cut off: download it again"):
        clip_fingerprint(str(folder))


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
