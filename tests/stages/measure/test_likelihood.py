"""The likelihood against Gaussian data, whose probability flow and density are known in closed form."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from schemas.errors import UserError
from stages.backbones.models import LoadedModels
from stages.contract import Question, Text
from stages.measure.likelihood import Likelihood, epsilon_and_trace, grid, log_likelihood, probes
from tests.levels import at

CPU = torch.device("cpu")
STAR = Question("star", "one star")


def scores(backbone, image_B3hw, question=STAR, **settings):
    method = Likelihood(Likelihood.Config(**settings))
    found = method.score(LoadedModels(CPU, backbone), image_B3hw, question)
    assert set(found) == set(method.columns())
    return torch.tensor(found["log2p_per_dim"], dtype=torch.float64)


def log2_normal(z_BCHW, mean, variance):
    log_p = -((z_BCHW - mean) ** 2 / variance + math.log(2 * math.pi * variance)) / 2
    return log_p.mean(dim=(1, 2, 3)) / math.log(2)


def first_and_last(backbone):
    return [backbone.schedule.level(backbone.schedule.ladder[end]).signal ** 2 for end in (0, -1)]


def of_the_flow(backbone, z_BCHW, prompt):
    """The density that the flow gives to latents: that of noise where they end, times how it widens."""
    first, last = first_and_last(backbone)
    noise_BCHW = backbone.transport(z_BCHW, at(first), at(last), prompt)
    width = [(a * backbone.deviation**2 + 1 - a) ** 0.5 for a in (first, last)]
    return log2_normal(noise_BCHW, 0, 1) + math.log2(width[1] / width[0])


def of_the_data(backbone, z_BCHW, prompt):
    first, _ = first_and_last(backbone)
    mean = first**0.5 * (backbone.mean + 0.01 * len(prompt))
    return log2_normal(z_BCHW, mean, first * backbone.deviation**2 + 1 - first)


def images_of(backbone, n=4, seed=0):
    noise = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return backbone.mean + 0.01 * len(STAR.prompt) + backbone.deviation * noise


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("deviation", [0.2, 0.4, 1.0])
def test_the_closed_form_is_reached_at_second_order(gaussian_backbone, prediction_type, deviation):
    backbone = gaussian_backbone(prediction_type, deviation=deviation)
    image_B3hw = images_of(backbone)
    exact_B = of_the_flow(backbone, backbone.encode(image_B3hw), STAR.prompt)
    error = {n: (scores(backbone, image_B3hw, steps=n) - exact_B).abs().max() for n in (10, 20, 40)}
    assert error[20] < 0.025
    assert error[40] < 0.007
    assert 3 < error[10] / error[20] < 5
    assert 3 < error[20] / error[40] < 5


def test_it_is_the_density_of_the_data(gaussian_backbone):
    """But for z_T, whose mean and width are only nearly those of N(0, I)."""
    backbone = gaussian_backbone()
    z_BCHW = backbone.encode(image_B3hw := images_of(backbone))
    data_B, flow_B = (of(backbone, z_BCHW, STAR.prompt) for of in (of_the_data, of_the_flow))
    assert (flow_B - data_B).abs().max() < 0.02
    torch.testing.assert_close(scores(backbone, image_B3hw, steps=80), data_B, rtol=0, atol=0.02)


def test_three_deviations_from_the_mode_cost_what_they_should(gaussian_backbone):
    """As much on either side in the mean: that z_T is not quite centred favours one."""
    backbone = gaussian_backbone()
    first, _ = first_and_last(backbone)
    variance = first * backbone.deviation**2 + 1 - first
    mode = first**0.5 * (backbone.mean + 0.01 * len(STAR.prompt))
    deviations = torch.tensor([-3.0, 0, 3])[:, None, None, None]
    below, at_mode, above = scores(
        backbone, mode + variance**0.5 * deviations.expand(-1, 3, 4, 4), steps=40
    ).tolist()
    assert at_mode - (below + above) / 2 == pytest.approx(4.5 * math.log2(math.e), rel=0.01)
    assert at_mode > max(below, above) + 6


def test_an_image_is_likelier_under_the_prompt_that_describes_it(gaussian_backbone):
    backbone = gaussian_backbone(deviation=0.1)
    first, _ = first_and_last(backbone)
    shift = 0.01 * len(STAR.prompt)  # of the mean, by the prompt
    gain = first * shift**2 / (first * backbone.deviation**2 + 1 - first) / 2 * math.log2(math.e)
    gains = []
    for mean, better, worse in [(shift, "class", "none"), (0, "none", "class")]:
        image_B3hw = torch.full((1, 3, 4, 4), first**0.5 * (backbone.mean + mean))
        found = [float(scores(backbone, image_B3hw, prompt=prompt, steps=80)) for prompt in (better, worse)]
        gains.append(found[0] - found[1])
    assert min(gains) > 0.8 * gain
    assert sum(gains) / 2 == pytest.approx(gain, rel=0.02)  # in the mean: z_T is not quite centred


class Correlated:
    """Wraps the Gaussian denoiser: data x_0 ~ N(mean, Σ) with Σ = Q·diag(s²)·Qᵀ and a Q that mixes all."""

    def __init__(self, backbone, deviation_d):
        self._backbone = backbone
        square = torch.randn(64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.axes_dd, self.variance_d = torch.linalg.qr(square).Q, deviation_d.square()

    def __getattr__(self, name):
        return getattr(self._backbone, name)

    def predict(self, z_BCHW, t, text):
        a = float(self.schedule.alphas_cumprod[t])
        centred_Bd = (z_BCHW - a**0.5 * self.mean).flatten(1)
        precision_d = 1 / (a * self.variance_d + 1 - a)
        whitened_Bd = (centred_Bd @ self.axes_dd * precision_d) @ self.axes_dd.T
        return (1 - a) ** 0.5 * whitened_Bd.reshape(z_BCHW.shape)

    def trace(self, t):
        a = float(self.schedule.alphas_cumprod[t])
        return (1 - a) ** 0.5 * (1 / (a * self.variance_d + 1 - a)).sum()

    def log_p(self, z_BCHW):
        first, last = first_and_last(self)
        wide = [a * self.variance_d + 1 - a for a in (first, last)]
        centred_Bd = (z_BCHW - first**0.5 * self.mean).flatten(1) @ self.axes_dd
        mean_d = torch.full((64,), last**0.5 * self.mean, dtype=torch.float64) @ self.axes_dd
        noise_Bd = mean_d + centred_Bd * (wide[1] / wide[0]).sqrt()
        log_prior_B = -(noise_Bd.square() + math.log(2 * math.pi)).sum(dim=1) / 2
        return log_prior_B + (wide[1] / wide[0]).log().sum() / 2


def test_directions_of_any_width_and_slant_are_counted(gaussian_backbone):
    """The 64 rows of a Hadamard matrix are probes that give a trace in 64 dimensions exactly."""
    backbone = Correlated(gaussian_backbone(), torch.logspace(-2, 0.3, 64, dtype=torch.float64))
    probe_PCHW = torch.from_numpy(hadamard(64)).double().reshape(64, 4, 4, 4)
    first, _ = first_and_last(backbone)
    noise_Bd = torch.randn(2, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise_Bd *= (first * backbone.variance_d + 1 - first).sqrt()
    z_BCHW = first**0.5 * backbone.mean + (noise_Bd @ backbone.axes_dd.T).reshape(2, 4, 4, 4)
    exact_B, bits = backbone.log_p(z_BCHW), 64 * math.log(2)

    def error(steps, probe_PCHW):
        found_B = log_likelihood(backbone, z_BCHW, Text(torch.zeros(2, 1, 1)), steps, probe_PCHW)
        return float((found_B - exact_B).abs().max() / bits)

    assert error(20, probe_PCHW) < 0.025
    assert 3 < error(10, probe_PCHW) / error(20, probe_PCHW) < 5
    assert error(20, probe_PCHW[1:2]) > 0.1  # one of them does not


def test_the_probes_see_the_trace_with_the_error_that_they_must_have(gaussian_backbone):
    backbone = Correlated(gaussian_backbone(), torch.logspace(-2, 0.3, 64, dtype=torch.float64))
    z_BCHW, text = torch.zeros(1, 4, 4, 4, dtype=torch.float64), Text(torch.zeros(1, 1, 1))
    a = float(backbone.schedule.alphas_cumprod[300])
    jacobian_dd = backbone.axes_dd / (a * backbone.variance_d + 1 - a) @ backbone.axes_dd.T * (1 - a) ** 0.5
    spread = float((2 * (jacobian_dd - jacobian_dd.diag().diag()).square().sum()).sqrt())
    for count in (1, 256):
        _, trace_B = epsilon_and_trace(backbone, z_BCHW, 300, text, probes(count, (4, 4, 4)))
        error = abs(float(trace_B) - float(backbone.trace(300)))
        assert 0 < error < 3 * spread / count**0.5


def test_probes_are_signs_that_never_change():
    probe_PCHW = probes(400, (2, 3, 3))
    assert set(probe_PCHW.unique().tolist()) == {-1.0, 1.0}
    assert probe_PCHW.flatten(1).mean(dim=0).abs().max() < 4 / 20
    assert torch.equal(probes(3, (2, 3, 3)), probe_PCHW[:3])


def test_every_step_has_a_timestep_of_its_own_from_first_to_last(gaussian_backbone):
    backbone = gaussian_backbone()
    for steps in (1, 2, 20, 500, 998, 999):
        times = grid(backbone, steps)
        assert (len(times), times[0], times[-1]) == (steps + 1, 0, 999)
        assert np.diff(times).min() >= 1
    level = [
        0.5 * math.log((1 - a) / a) for a in backbone.schedule.alphas_cumprod[grid(backbone, 20)].tolist()
    ]
    assert max(np.diff(level)) < 1.4 * (level[-1] - level[0]) / 20
    for steps in (0, 1000):
        with pytest.raises(UserError, match=f"{steps} steps given; this backbone has 1 to 999"):
            grid(backbone, steps)


def test_a_row_knows_neither_its_neighbours_nor_its_slot(backbone):
    size = backbone.image_size
    image_B3hw = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    poisoned = image_B3hw.flip(0).clone()
    poisoned[1] = torch.nan
    first, other = (scores(backbone, x, steps=2, probes=2) for x in (image_B3hw, poisoned))
    assert torch.equal(first[[0, 1, 3]], other.flip(0)[[0, 1, 3]])
    assert torch.isfinite(first).all()
    assert torch.equal(first, scores(backbone, image_B3hw, steps=2, probes=2))


def test_drawings_of_a_common_class_are_likelier_than_noise(tangram):
    from jobs.tangram.drawings import HEAD, draw, generator
    from stages.images import to_tensor

    drawings = [draw(HEAD[0], generator("likelihood", HEAD[0], n))[0] for n in range(4)]
    drawn_B3hw = torch.stack([to_tensor(drawing, 64) for drawing in drawings])
    noise_B3hw = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    question = Question(HEAD[0], f"a photo of a {HEAD[0]}")
    drawn_B, noise_B = (scores(tangram, x, question, steps=4) for x in (drawn_B3hw, noise_B3hw))
    assert drawn_B.min() > noise_B.max() + 1
