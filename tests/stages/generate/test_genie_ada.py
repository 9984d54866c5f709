"""GeNIe-Ada: its rule on trajectories made by hand, and against plain GeNIe run at every ratio."""

import pytest
import torch
import torch.nn.functional as F

from schemas.errors import UserError
from stages.backbones.diffusion.load import BackboneFacts
from stages.backbones.diffusion.settings import BackboneSettings
from stages.contract import DUMMY, Material, Order
from stages.generate.genie import Genie
from stages.generate.genie_ada import GenieAda, choose, trajectory
from stages.sampling import steps_of

RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9)
FACTS = BackboneFacts(BackboneSettings())


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("d", "ratio"),
    [
        ((0.1, 0.2, 1.4, 1.6, 1.9), 0.7),
        ((1.5, 0.1, 0.2, 0.9, 1.0), 0.6),  # a jump back; by the signed jump it would be 0.8
        ((0.0, 0.5, 1.0, 1.5, 2.0), 0.6),  # of equals the first
        ((0.0, 0.0, 0.0, 0.0, 0.0), 0.6),
        ((9.0, 9.1, 9.1, 9.1, 9.3), 0.9),
    ],
)
def test_the_ratio_after_the_largest_jump_is_chosen(d, ratio):
    (chosen,) = choose(torch.tensor([d], dtype=torch.float64))
    assert RATIOS[chosen] == ratio


def test_each_row_chooses_for_itself():
    d_BM = torch.tensor([[0.1, 0.2, 1.4, 1.6, 1.9], [1.5, 0.1, 0.2, 0.9, 1.0]])
    assert choose(d_BM).tolist() == [2, 1]


def test_distance_is_along_the_way_from_the_source_to_the_target():
    source_BE, target_E = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([1.0, 3.0, 6.0])  # 5 apart
    path_MBE = torch.stack([source_BE + t * (target_E - source_BE) for t in (0, 0.2, 1, -0.4)])
    torch.testing.assert_close(trajectory(path_MBE, source_BE, target_E), torch.tensor([[0.0, 1, 5, -2]]))


def test_what_is_orthogonal_to_that_way_changes_nothing():
    z_MBE, source_BE, target_E = noise(5, 3, 8).double(), noise(3, 8, seed=1).double(), noise(8).double()
    away_BE = F.normalize(target_E - source_BE, dim=1)
    other_MBE = noise(5, 3, 8, seed=2).double() * 10
    other_MBE -= (other_MBE * away_BE).sum(dim=2, keepdim=True) * away_BE
    plain = trajectory(z_MBE, source_BE, target_E)
    torch.testing.assert_close(trajectory(z_MBE + other_MBE, source_BE, target_E), plain)
    assert (trajectory(z_MBE + away_BE, source_BE, target_E) - plain - 1).abs().max() < 1e-12


def test_a_target_that_is_the_source_gives_no_direction_and_no_nan():
    d_BM = trajectory(noise(3, 1, 8), noise(1, 8, seed=1), noise(1, 8, seed=1)[0])
    assert torch.equal(d_BM, torch.zeros(1, 3))


def material(backbone, count=3):
    side = backbone.image_size
    return Material(noise(count, 3, side, side, seed=50).tanh(), "red star", "a red star", DUMMY)


def order(backbone, artifact, batch=2, seed=0):
    z = noise(batch, *backbone.latent_shape, seed=seed)
    image = noise(batch, 3, backbone.image_size, backbone.image_size, seed=seed + 1).tanh()
    return Order("a red star", z, source_B3hw=image, artifact=artifact)


def test_the_artifact_is_the_mean_of_normalised_features(load_tiny, models):
    for name in ("tangram", "clip:tangram"):
        wanted = material(load_tiny())
        made = GenieAda(GenieAda.Config(extractor=name)).prepare(load_tiny(), models, wanted)
        with torch.no_grad():
            z_NE = models.extractor(name).features(wanted.image_N3hw)
        mean_E = (z_NE / z_NE.norm(dim=1, keepdim=True)).mean(dim=0)
        torch.testing.assert_close(made["target_E"], mean_E, rtol=1e-5, atol=1e-6)
        assert made["target_E"].norm() < 0.999  # not normalised again


def test_the_artifact_depends_on_the_extractor_alone():
    one, other = GenieAda(GenieAda.Config()), GenieAda(GenieAda.Config(ratios=(0.2, 1), steps=7, guidance=1))
    assert one.prepared() == other.prepared()
    assert one.models() == other.models() == {"extractor": "tangram"}
    assert GenieAda(GenieAda.Config(extractor="clip:tangram")).models() != one.models()


def test_an_extractor_that_gives_no_rows_is_found_before_anything_is_made(load_tiny, models):
    method = GenieAda(GenieAda.Config(extractor="tests.stages.backbones.test_extractor:Squeezed"))
    with pytest.raises(UserError, match=r"Squeezed: gives float32 of shape \(1, 3\) for 2 images"):
        method.prepare(load_tiny(), models, material(load_tiny()))


def test_rule_and_image_are_those_of_separate_runs_at_every_ratio(backbone, models):
    settings, ratios = {"steps": 5, "guidance": 2.0}, (0.4, 0.6, 0.8, 1.0)
    method = GenieAda(GenieAda.Config(ratios=ratios, **settings))
    wanted = order(backbone, method.prepare(backbone, models, material(backbone)), batch=4)
    made = method(backbone, models, wanted)

    def features(image_B3hw):
        with torch.no_grad():
            return F.normalize(models.extractor("tangram").features(image_B3hw).double(), dim=1)

    images = {
        r: Genie(Genie.Config(ratio=r, **settings))(backbone, models, wanted).image_B3hw for r in ratios
    }
    z, source_BE = {r: features(image_B3hw) for r, image_B3hw in images.items()}, features(wanted.source_B3hw)
    way_BE = wanted.artifact["target_E"].double() - source_BE
    for row in range(4):
        way_E = way_BE[row]
        d = [float((z[r][row] - source_BE[row]) @ way_E / way_E.norm()) for r in ratios]
        assert made.traces[row] == pytest.approx(d, abs=1e-5)
        jumps = {r: abs(d[m] - d[m - 1]) for m, r in enumerate(ratios) if m}
        chosen = max(jumps, key=jumps.get)
        assert made.noise_ratios[row] == chosen
        # single pixels of tangram differ by up to 3e-5: other batches round otherwise
        assert (made.image_B3hw[row] - images[chosen][row]).square().mean().sqrt() < 1e-5
    assert len(set(made.noise_ratios)) > 1  # or the choice would not be tested


class Recorder:
    """A backbone that counts what it is asked."""

    def __init__(self, backbone):
        self._backbone, self.encoded, self.predicted = backbone, [], []

    def __getattr__(self, name):
        return getattr(self._backbone, name)

    def embed_words(self, prompt, words):
        raise NotImplementedError

    def encode(self, image_B3hw):
        self.encoded.append(len(image_B3hw))
        return self._backbone.encode(image_B3hw)

    def predict(self, z_BCHW, t, text):
        self.predicted.append(len(z_BCHW))
        return self._backbone.predict(z_BCHW, t, text)


def test_a_source_is_encoded_once_and_its_ratios_share_their_calls(load_tiny, models):
    backbone = Recorder(load_tiny())
    method = GenieAda(GenieAda.Config(ratios=(0.6, 0.7, 0.8), steps=10, guidance=1))
    method(backbone, models, order(backbone, method.prepare(backbone, models, material(backbone))))
    assert backbone.encoded == [2]
    assert backbone.predicted == [2] + [4] + [6] * 6


def test_a_row_knows_neither_its_neighbours_nor_its_slot(backbone, models):
    method = GenieAda(GenieAda.Config(ratios=(0.25, 0.5, 0.75), steps=4, guidance=2.0))
    artifact = method.prepare(backbone, models, material(backbone))
    wanted = order(backbone, artifact, 3)

    def drawn(rows, poison, row):
        z, image = wanted.z_BCHW[rows].clone(), wanted.source_B3hw[rows].clone()
        z[poison] = torch.nan
        made = method(backbone, models, Order("a red star", z, source_B3hw=image, artifact=artifact))
        assert not torch.isfinite(made.image_B3hw[poison]).any()
        return made.image_B3hw[row], made.noise_ratios[row], made.traces[row]

    one, other = drawn([0, 1, 2], 2, 0), drawn([2, 1, 0], 1, 2)
    assert torch.equal(one[0], other[0])
    assert one[1:] == other[1:]


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ((), "at least 2 to choose from, given none"),
        ((0.8,), "at least 2 to choose from, given 0.8; genie has one `ratio`"),
        ((0.0, 0.5), "above 0 to 1, given 0, 0.5"),
        ((0.5, 1.1), "above 0 to 1, given 0.5, 1.1"),
        ((0.5, 0.7, 0.5), "must all be different, given 0.5, 0.7, 0.5"),
    ],
)
def test_ratios_that_leave_no_choice_are_refused(ratios, message):
    with pytest.raises(ValueError, match=message):
        GenieAda.Config(ratios=ratios)


def test_the_order_in_which_ratios_are_given_does_not_matter():
    assert GenieAda.Config(ratios=(0.9, 0.5, 0.7)) == GenieAda.Config(ratios=(0.5, 0.7, 0.9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratios": (0.5, 0.55), "steps": 10}, r"noise ratios 0.5 and 0.55 both make 5 of 10 steps"),
        ({"ratios": (0.1, 0.5), "steps": 4}, r"noise ratio 0.1 of 4 steps makes none"),
        ({"extractor": "no_such_network"}, r"unknown extractor 'no_such_network'; give tangram"),
        ({"extractor": "clip:no_such_network"}, r"unknown clip model 'no_such_network'"),
    ],
)
def test_a_plan_refuses_what_cannot_work(models, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        GenieAda(GenieAda.Config(**settings)).check(FACTS, models, "star", "a star")
    assert "\n" not in str(caught.value)


def test_the_published_settings_pass(models):
    config = GenieAda.Config()
    GenieAda(config).check(FACTS, models, "star", "a star")
    assert [steps_of(ratio, config.steps) for ratio in config.ratios] == [25, 30, 35, 40, 45]
