"""Traversal: a network that goes from the seed of a degraded image to the seed of the whole one.

Ramachandran et al., "Understanding the generalization of pretrained diffusion models on out-of-distribution
data", AAAI 2024, §5: a five-layer MLP f with two bottlenecks of 256 and ReLU, whose output is projected to
the sphere, √d·f/|f|, before the L1 loss against the inverted ground truth. Tasks: colourisation (grey input),
super-resolution (8 pixels a side, enlarged) and inpainting (a box of an eighth of the side).
`seedloom train-traversal` trains it.

Departures:
- f(z) = z + MLP(z). A seed is all but independent noise in d dimensions, and 256 numbers cannot carry it:
  with d = 1,024 three quarters of its energy would be lost, and the image with it. The MLP is left to learn
  what changes. Its last layer begins at 0, so that training begins at the identity.
- The input is brought to norm √d: the network maps the sphere to itself, whatever norm an inversion gives.
- The paper does not give the other two widths; here they are 1,024. Nor does it say what fills the hole; here
  it is white, as the box of its Table 3.

Shape letters: B any batch, C H W seed, d = C·H·W, h w image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from schemas.errors import UserError
from schemas.ids import sha256
from schemas.records import Combination
from schemas.settings import Settings
from stages import registry
from stages.backbones.resize import resize_crop
from stages.combine.direction import box, grey, one_seed
from stages.combine.latents import dimensions, to_norm
from stages.contract import Chance, Combine

BOTTLENECK, HIDDEN = 256, 1024
COARSE = 8  # pixels a side
HOLE = 1 / 8  # of the image's side


def coarse(image_B3hw: Float[Tensor, "*B 3 h h"]) -> Float[Tensor, "*B 3 h h"]:
    """What 8 pixels a side tell of an image: made smaller, and larger again, by bicubic interpolation."""
    image_N3hw = image_B3hw.double().reshape(-1, *image_B3hw.shape[-3:])
    large_N3hw = resize_crop(resize_crop(image_N3hw, COARSE), image_B3hw.shape[-1])
    return large_N3hw.clamp(-1, 1).reshape(image_B3hw.shape).to(image_B3hw.dtype)


TASKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "colourise": grey,
    "super_resolve": coarse,
    "inpaint": partial(box, side=HOLE),
}


class TraversalNetwork(nn.Module):
    """√d·f/|f| with f(z) = z + MLP(z)."""

    def __init__(self, d: int):
        super().__init__()
        self.d = d
        last = nn.Linear(BOTTLENECK, d)
        self.mlp = nn.Sequential(
            *(nn.Linear(d, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, BOTTLENECK), nn.ReLU()),
            *(nn.Linear(BOTTLENECK, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, BOTTLENECK), nn.ReLU()),
            last,
        )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, z_BCHW: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B C H W"]:
        if dimensions(z_BCHW) != self.d:
            raise ValueError(f"seeds of {dimensions(z_BCHW)} numbers given, those of training had {self.d}")
        source_BCHW = to_norm(z_BCHW.double(), math.sqrt(self.d))
        change_Bd = self.mlp(source_BCHW.flatten(-3).float())
        moved_BCHW = source_BCHW + change_Bd.double().unflatten(-1, z_BCHW.shape[-3:])
        return to_norm(moved_BCHW, math.sqrt(self.d)).to(z_BCHW.dtype)


def to_bytes(network: TraversalNetwork, about: Mapping[str, Any]) -> bytes:
    """A safetensors file: the weights, and as JSON in its metadata what they were trained for and on."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    described = json.dumps({"d": network.d, **about}, sort_keys=True)
    return save_tensors(weights, metadata={"traversal": described})


def from_bytes(data: bytes) -> tuple[TraversalNetwork, dict[str, Any]]:
    """The network and what is told of it. Raises `ValueError` when the bytes are no such file."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["traversal"])
        network = TraversalNetwork(about["d"])
        network.load_state_dict(load_tensors(data))
    except Exception as error:  # safetensors, json and torch each have errors of their own
        raise ValueError("it is no traversal that seedloom train-traversal wrote") from error
    return network.eval().requires_grad_(False), about


@lru_cache(maxsize=4)
def load_traversal(file: str, digest: str) -> TraversalNetwork:
    """The network of a file whose bytes have this SHA-256. Raises `UserError`."""
    try:
        data = Path(file).expanduser().read_bytes()
        if (found := sha256(data)) != digest:
            raise ValueError(f"its SHA-256 is {found[:12]}…, and {digest[:12]}… was planned with")
        return from_bytes(data)[0]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"traversal {file} cannot be used: {reason}; give the file that was trained"
        ) from error


@registry.method("traversal")
class Traversal(Combine):
    """One seed, taken where the network sends it; the references are degraded images."""

    class Config(Settings):
        method: Literal["traversal"] = "traversal"
        file: str = Field(min_length=1)
        """What `seedloom train-traversal` wrote, trained on the build's own backbone and inversion."""
        sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
        """Of the file's bytes; another one is refused. Not set: that of the file as it is when the config is
        read. Part of the method's identity, so a file that was trained again makes other candidates."""

        @model_validator(mode="after")
        def _identified(self) -> Traversal.Config:
            if self.sha256 is None:
                try:
                    data = Path(self.file).expanduser().read_bytes()
                except OSError as error:
                    raise PydanticCustomError(
                        "said",
                        "file: {file} cannot be read ({reason}); give what seedloom train-traversal wrote",
                        {"file": self.file, "reason": error.strerror},
                    ) from error
                object.__setattr__(self, "sha256", sha256(data))
            return self

    def seeds_needed(self) -> int:
        return 1

    def draw(self, chance: Chance, seeds: int) -> Combination:
        return one_seed(chance, seeds, 1.0)

    def __call__(
        self, z_KCHW: Float[Tensor, "K C H W"], weights: Sequence[float], artifact: Mapping[str, Tensor]
    ) -> Float[Tensor, "C H W"]:
        network = load_traversal(self.config.file, self.config.sha256)
        if dimensions(z_KCHW) != network.d:
            raise UserError(
                f"traversal {self.config.file} was trained on seeds of {network.d} numbers, and this"
                f" backbone's have {dimensions(z_KCHW)}; train one with seedloom train-traversal"
            )
        return network(z_KCHW[0])
