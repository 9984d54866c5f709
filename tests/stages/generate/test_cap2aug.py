"""Cap2Aug: prompts of class and caption, captions made once, and rows that draw by themselves."""

from collections import Counter

import pytest
import torch
from pydantic import ValidationError

from pipeline.store import Store
from pipeline.tensors import read_tensors, to_safetensors
from schemas.errors import UserError
from stages.backbones.models import LoadedModels
from stages.contract import DUMMY, Chance, Material, Order
from stages.generate.cap2aug import Cap2Aug, captioned, from_bytes, to_bytes
from stages.generate.image_to_image import ImageToImage

SETTINGS = {"steps": 4, "guidance": 2.0}
CAPTIONS = ("a dotted red gear", "a plain blue gear", "a striped pink gear")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def order(backbone, rows, prompt="a photo of a gear", captions=CAPTIONS, **changes):
    """Candidates by their index: the same index is the same candidate, in any batch."""
    size = backbone.image_size
    return Order(
        prompt,
        changes.get("z", torch.stack([noise(*backbone.latent_shape, seed=i) for i in rows])),
        target="gear",
        chances=[Chance(i, ("test",)) for i in rows],
        source_B3hw=torch.stack([noise(3, size, size, seed=100 + i).tanh() for i in rows]),
        artifact={f"caption_{n:06d}": to_bytes(caption) for n, caption in enumerate(captions)},
    )


class Naming:
    """A captioner that names each image by its brightness, and counts how often it is asked."""

    fingerprint = "naming"

    def __init__(self):
        self.asked = 0

    def caption(self, image_3hw):
        self.asked += 1
        return f"brightness {round(float(image_3hw.mean()), 1)}"


class OneCaptioner(LoadedModels):
    def __init__(self, captioner):
        super().__init__(torch.device("cpu"))
        self._one = captioner

    def captioner(self, model):
        return self._one


@pytest.mark.parametrize("text", ["", "a gear", "naïve “Ø” 小さな星 🌟", "two\nlines"])
def test_a_text_comes_back_from_its_bytes_and_from_a_file(text, tmp_path):
    store = Store(str(tmp_path))
    store.put_new("artifact.safetensors", to_safetensors({"caption_000000": to_bytes(text)}))
    (tensor,) = read_tensors(store, "artifact.safetensors").values()
    assert tensor.dtype == torch.uint8
    assert from_bytes(tensor) == text


def test_each_reference_is_captioned_once(gaussian_backbone):
    image_N3hw = torch.stack([torch.full((3, 4, 4), value) for value in (0.5, -0.5, 0.1)])
    captioner = Naming()
    method, material = Cap2Aug(Cap2Aug.Config()), Material(image_N3hw, "gear", "a gear", DUMMY)
    made = method.prepare(gaussian_backbone(), OneCaptioner(captioner), material)
    assert captioner.asked == 3
    assert [from_bytes(text) for _, text in sorted(made.items())] == [
        "brightness 0.5", "brightness -0.5", "brightness 0.1",
    ]  # fmt: skip


def test_prompts_are_the_class_and_a_caption(gaussian_backbone, models):
    backbone = gaussian_backbone()
    asked = order(backbone, range(300), "a photo of a gear.", z=noise(300, *backbone.latent_shape).double())
    made = Cap2Aug(Cap2Aug.Config(**SETTINGS))(backbone, models, asked)
    counts = Counter(made.prompts)
    assert counts.keys() == {f"a photo of a gear and {caption}" for caption in CAPTIONS}
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 13.8  # 2 degrees, p = 0.001
    assert made.noise_ratios == [0.75] * 300


def test_a_row_is_the_image_to_image_of_its_prompt(tangram, models):
    asked = order(tangram, range(4))
    made = Cap2Aug(Cap2Aug.Config(**SETTINGS))(tangram, models, asked)
    different = [made.prompts.index(prompt) for prompt in dict.fromkeys(made.prompts)]
    assert len(different) > 1
    for row in different[:2]:
        alone = Order(made.prompts[row], asked.z_BCHW, source_B3hw=asked.source_B3hw)
        plain = ImageToImage(ImageToImage.Config(ratio=0.75, **SETTINGS))(tangram, models, alone)
        torch.testing.assert_close(made.image_B3hw[row], plain.image_B3hw[row], rtol=0, atol=1e-5)


def test_a_long_prompt_ends_with_the_last_word_that_fits(tangram, load_tiny):
    """tangram reads 18 tokens, and knows each of these words as one."""
    caption = "a dotted red gear on a blue plain background with a star and a ring in it"
    text = captioned(tangram, "a photo of a gear.", caption)
    assert text == "a photo of a gear and a dotted red gear on a blue plain background with a star"
    with pytest.raises(UserError, match="21 tokens"):
        tangram.embed([f"{text} and"])
    assert captioned(load_tiny(), "a b c d e f g h", "red") == "a b c d e f g h"  # there is no room
    assert captioned(tangram, "a gear", " a \n red\tgear ") == "a gear and a red gear"
    with pytest.raises(UserError, match="shorten"):
        captioned(load_tiny(), "a b c d e f g h i j k", "red") and load_tiny().embed(
            ["a b c d e f g h i j k"]
        )


def test_a_row_knows_neither_its_neighbours_nor_its_slot(backbone, models):
    captions, prompt = (("a", "b", "c"), "x") if backbone.latent_shape[1] == 8 else (CAPTIONS, "a gear")
    method = Cap2Aug(Cap2Aug.Config(**SETTINGS))
    first = method(backbone, models, order(backbone, [3, 4, 5], prompt, captions))
    for rows, poison in (([6, 9, 3], 0), ([0, 3, 7], 2), ([11, 3, 1], 0)):
        z = torch.stack([noise(*backbone.latent_shape, seed=i) for i in rows])
        z[poison] = torch.nan
        other = method(backbone, models, order(backbone, rows, prompt, captions, z=z))
        slot = rows.index(3)
        assert torch.equal(other.image_B3hw[slot], first.image_B3hw[0])
        assert other.prompts[slot] == first.prompts[0]


def test_the_captions_are_shared_by_all_settings_of_one_captioner():
    one, other = Cap2Aug(Cap2Aug.Config()), Cap2Aug(Cap2Aug.Config(ratio=0.5, steps=9))
    assert one.prepared() == other.prepared()
    assert one.models() == {"captioner": "tangram"}


def test_an_unknown_captioner_is_refused_by_its_fingerprint(models):
    with pytest.raises(UserError, match="captioner nothing: no such folder"):
        models.fingerprint("captioner", "nothing")


def test_a_ratio_outside_its_range_is_refused():
    with pytest.raises(ValidationError, match="ratio"):
        Cap2Aug.Config(ratio=0)
