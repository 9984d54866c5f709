"""No refinement is the identity."""

import torch

from stages.contract import Order, Sampler
from stages.refine.none import NoRefinement


def test_seeds_stay_as_they_are(gaussian_backbone, models):
    z_BCHW = torch.randn(2, 4, 4, 4)
    refined = NoRefinement(NoRefinement.Config())(
        gaussian_backbone(), models, Order("", z_BCHW), Sampler(1, 1.0)
    )
    assert torch.equal(refined.z_BCHW, z_BCHW)
    assert refined.losses == [[], []]
