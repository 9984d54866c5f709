"""Resizing by matrices against torch's and torchvision's own kernels."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from stages.backbones.resize import Preprocessing, resize_crop


def images(height, width, dtype=torch.float64):
    return torch.randn(2, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (97, 64), (33, 50), (200, 150)])
@pytest.mark.parametrize("size", [32, 64, 71])
def test_the_same_as_torchvision(height, width, size):
    transform = v2.Compose(
        [v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)]
    )
    image_B3hw = images(height, width)
    torch.testing.assert_close(resize_crop(image_B3hw, size), transform(image_B3hw), rtol=0, atol=1e-12)


def test_an_image_of_the_right_size_is_untouched():
    image_B3hw = images(64, 64, torch.float32)
    assert resize_crop(image_B3hw, 64) is image_B3hw


def test_images_come_to_the_device_of_the_network():
    """Scores are of decoded images, which are on the CPU; meta stands for a device that tests have not."""
    prepare = Preprocessing(32, [0.5] * 3, [0.5] * 3, torch.device("meta"))
    assert prepare(images(64, 48, torch.float32)).device.type == "meta"


def test_the_gradient_is_that_of_torchs_kernel():
    image_B3hw = images(50, 50).requires_grad_()
    weight_B3ss = images(21, 21)
    ours = torch.autograd.grad((resize_crop(image_B3hw, 21) * weight_B3ss).sum(), image_B3hw)[0]
    kernel = F.interpolate(image_B3hw, size=(21, 21), mode="bicubic", antialias=True)
    theirs = torch.autograd.grad((kernel * weight_B3ss).sum(), image_B3hw)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_row_knows_neither_its_neighbours_nor_its_slot():
    row, others = images(50, 70, torch.float32)[:1], 3 * images(50, 70, torch.float32).flip(0)
    first = resize_crop(torch.cat([row, others]), 32)[0]
    others[0] = torch.nan
    assert torch.equal(resize_crop(torch.cat([others, row]), 32)[2], first)
