"""Direction: what an edit does to the seeds of some images, done to the seed of another.

Ramachandran et al., "Understanding the generalization of pretrained diffusion models on out-of-distribution
data", AAAI 2024, §5. Images and their edited copies are inverted; the directions from seed to edited seed
point nearly the same way for one edit (Table 3), so their mean is taken for the edit itself and applied to
seeds of images that were never edited. `seedloom evaluate directions` measures whether they do.

Departures:
- The paper subtracts seeds. An edited image inverts to a seed of another norm, and the difference then holds
  a part along the seed itself, which is no direction of travel and differs from image to image. Here seeds
  are points of the sphere of radius √d and a direction is a tangent vector: the log map takes it at the
  source, parallel transport along the geodesic carries it to where it is compared, averaged and applied, the
  exp map goes along it. Differences serve for the paper's own measure alone, the angles of its Table 3.
- The result has the norm of the seed that it started from, which need not be √d.
- The paper gives no sizes; those of the edits below are fractions of the image's side, so an edit means the
  same at every resolution.

Independent seeds are nearly orthogonal, and transport from one to the other turns only their common plane: it
changes a direction by a few 1/√d of its length. It is here because directions at different seeds have no
other sum that stays on the sphere, and because seeds of one class are not quite independent.

Shape letters: B any batch, N images, C H W seed, h w image. d = C·H·W, R = √d.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from schemas.records import Combination
from schemas.settings import Settings
from stages import registry
from stages.combine.latents import LATENT, dimensions, norms, to_norm
from stages.combine.slerp import OPPOSITE
from stages.contract import Chance, Combine

BLUR = 1 / 32  # σ, of the image's side: 2 pixels of 64
BOX = 1 / 4  # side, of the image's side
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


# --- edits -------------------------------------------------------------------------------------------------


def blur(image_B3hw: Float[Tensor, "*B 3 h w"]) -> Float[Tensor, "*B 3 h w"]:
    """Gaussian blur of σ = side/32; the picture is mirrored at its edges."""
    height, width = image_B3hw.shape[-2:]
    sigma = BLUR * min(height, width)
    reach = min(math.ceil(4 * sigma), min(height, width) - 1)
    place = torch.arange(-reach, reach + 1, dtype=torch.float64, device=image_B3hw.device)
    line = torch.exp(-place.square() / (2 * sigma**2))
    line = line / line.sum()
    plane_N1hw = image_B3hw.double().reshape(-1, 1, height, width)
    plane_N1hw = F.pad(plane_N1hw, (reach,) * 4, mode="reflect")
    plane_N1hw = F.conv2d(F.conv2d(plane_N1hw, line[None, None, None]), line[None, None, :, None])
    return plane_N1hw.reshape(image_B3hw.shape).to(image_B3hw.dtype)


def grey(image_B3hw: Float[Tensor, "*B 3 h w"]) -> Float[Tensor, "*B 3 h w"]:
    """Every pixel's luminance (BT.601) in all three channels."""
    luma_3 = torch.tensor(LUMA, dtype=torch.float64, device=image_B3hw.device)
    grey_B1hw = (image_B3hw.double() * luma_3[:, None, None]).sum(dim=-3, keepdim=True)
    return grey_B1hw.expand(image_B3hw.shape).to(image_B3hw.dtype)


def box(image_B3hw: Float[Tensor, "*B 3 h w"], side: float = BOX) -> Float[Tensor, "*B 3 h w"]:
    """A white square in the middle; its side is a fraction of the image's shorter one."""
    height, width = image_B3hw.shape[-2:]
    pixels = max(1, round(side * min(height, width)))
    top, left = (height - pixels) // 2, (width - pixels) // 2
    boxed_B3hw = image_B3hw.clone()
    boxed_B3hw[..., top : top + pixels, left : left + pixels] = 1
    return boxed_B3hw


EDITS: Mapping[str, Callable[[Tensor], Tensor]] = {"blur": blur, "grey": grey, "box": box}


# --- the sphere of radius √d -------------------------------------------------------------------------------


def log_map(
    z0_BCHW: Float[Tensor, "*B C H W"], z1_BCHW: Float[Tensor, "*B C H W"]
) -> Float[Tensor, "*B C H W"]:
    """The tangent vector at z0 that points along the geodesic to z1; its length is that of the way, R·θ."""
    u, v = to_norm(z0_BCHW.double(), 1.0), to_norm(z1_BCHW.double(), 1.0)
    _refuse_opposite(u, v)
    # the angle of the halves keeps its digits where the seeds are close
    theta = 2 * torch.arctan2(norms(v - u), norms(v + u))
    aside = v - _dot(u, v) * u
    length = norms(aside)
    return (_radius(z0_BCHW) * theta * aside / torch.where(length > 0, length, 1)).to(z0_BCHW.dtype)


def exp_map(
    z_BCHW: Float[Tensor, "*B C H W"], direction_BCHW: Float[Tensor, "*B C H W"]
) -> Float[Tensor, "*B C H W"]:
    """Where a walk of |direction| along the geodesic from z ends, at norm R. Undoes `log_map`."""
    u, radius = to_norm(z_BCHW.double(), 1.0), _radius(z_BCHW)
    along = direction_BCHW.double() / radius
    theta = norms(along)
    return (radius * (torch.cos(theta) * u + torch.sinc(theta / math.pi) * along)).to(z_BCHW.dtype)


def transport(
    z0_BCHW: Float[Tensor, "*B C H W"],
    z1_BCHW: Float[Tensor, "*B C H W"],
    direction_BCHW: Float[Tensor, "*B C H W"],
) -> Float[Tensor, "*B C H W"]:
    """A tangent vector at z0 carried to z1 along the geodesic; lengths and angles are kept."""
    u, v = to_norm(z0_BCHW.double(), 1.0), to_norm(z1_BCHW.double(), 1.0)
    along = direction_BCHW.double()
    _refuse_opposite(u, v)
    return (along - _dot(v, along) / (1 + _dot(u, v)) * (u + v)).to(direction_BCHW.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=LATENT, keepdim=True)


def _radius(z_BCHW: Tensor) -> float:
    return math.sqrt(dimensions(z_BCHW))


def _refuse_opposite(u: Tensor, v: Tensor) -> None:
    if not bool((_dot(u, v) > OPPOSITE).all()):
        raise ValueError("no one geodesic between opposite seeds")


# --- directions --------------------------------------------------------------------------------------------


def pairwise_angles(direction_NCHW: Float[Tensor, "N C H W"]) -> Float[Tensor, "N N"]:
    """Angles in radians, float64: 0 between parallel directions, π/2 ± 1/√d between independent ones."""
    flat_Nd = direction_NCHW.double().flatten(1)
    length_N1 = flat_Nd.norm(dim=1, keepdim=True)
    if not bool((length_N1 > 0).all()):
        raise ValueError("a direction of length 0 has no angle")
    unit_Nd = flat_Nd / length_N1
    return (unit_Nd @ unit_Nd.T).clamp(-1, 1).arccos().fill_diagonal_(0)


def mean_angle(direction_NCHW: Float[Tensor, "N C H W"]) -> float:
    """The paper's parallelism: the angle between two directions, averaged over all pairs."""
    n = len(direction_NCHW)
    if n < 2:
        raise ValueError(f"{n} directions given: an angle needs two")
    return float(pairwise_angles(direction_NCHW).sum() / (n * (n - 1)))


def gathered(
    z_NCHW: Float[Tensor, "N C H W"], edited_NCHW: Float[Tensor, "N C H W"]
) -> tuple[Float[Tensor, "C H W"], Float[Tensor, "N C H W"]]:
    """The middle of the source seeds, at norm R, and each one's way to its edited seed, carried there."""
    base_CHW = to_norm(to_norm(z_NCHW.double(), 1.0).mean(dim=0), _radius(z_NCHW))
    direction_NCHW = log_map(z_NCHW.double(), edited_NCHW.double())
    gathered_NCHW = transport(z_NCHW.double(), base_CHW.expand(z_NCHW.shape), direction_NCHW)
    return base_CHW.to(z_NCHW.dtype), gathered_NCHW.to(z_NCHW.dtype)


def apply_direction(
    z_BCHW: Float[Tensor, "*B C H W"],
    base_CHW: Float[Tensor, "C H W"],
    direction_CHW: Float[Tensor, "C H W"],
    strength: float = 1.0,
) -> Float[Tensor, "*B C H W"]:
    """Seeds moved by `strength` times a direction given at the base, each at its own norm."""
    z = z_BCHW.double()
    base_BCHW, direction_BCHW = (x_CHW.double().expand(z.shape) for x_CHW in (base_CHW, direction_CHW))
    moved_BCHW = exp_map(z, strength * transport(base_BCHW, z, direction_BCHW))
    return (moved_BCHW * norms(z) / _radius(z)).to(z_BCHW.dtype)


def one_seed(chance: Chance, seeds: int, weight: float) -> Combination:
    """One seed, each as often as any other: an order of all of them is drawn for every round."""
    order = chance.shared("seed", chance.index // seeds).permutation(seeds)
    return Combination((int(order[chance.index % seeds]),), (weight,))


@registry.method("direction")
class Direction(Combine):
    """One seed, moved as the edit moves the class's references on average. The weight is the strength."""

    class Config(Settings):
        method: Literal["direction"] = "direction"
        edit: Literal["blur", "grey", "box"] = "grey"
        """blur: Gaussian of σ = side/32; grey: luminance only; box: a white square of side/4 in the middle.
        The edits of the OOD paper's Table 3."""
        strength: float | None = 1.0
        """How far, in lengths of the mean direction; below 0 the other way. 1 in the paper. Not set: drawn
        uniformly from 0 to 1 for each candidate, because N seeds at one strength are only N images."""

    def seeds_needed(self) -> int:
        return 2  # the mean direction of one image is that image's own

    def draw(self, chance: Chance, seeds: int) -> Combination:
        strength = self.config.strength
        return one_seed(chance, seeds, float(chance.own().random()) if strength is None else strength)

    def prepare(
        self,
        invert: Callable[[Float[Tensor, "N 3 h w"]], Float[Tensor, "N C H W"]],
        image_N3hw: Float[Tensor, "N 3 h w"],
        z_NCHW: Float[Tensor, "N C H W"],
    ) -> dict[str, Tensor]:
        edited_NCHW = invert(EDITS[self.config.edit](image_N3hw))
        base_CHW, direction_NCHW = gathered(z_NCHW, edited_NCHW)
        return {"base_CHW": base_CHW, "direction_CHW": direction_NCHW.mean(dim=0)}

    def __call__(
        self, z_KCHW: Float[Tensor, "K C H W"], weights: Sequence[float], artifact: Mapping[str, Tensor]
    ) -> Float[Tensor, "C H W"]:
        return apply_direction(z_KCHW[0], artifact["base_CHW"], artifact["direction_CHW"], weights[0])
