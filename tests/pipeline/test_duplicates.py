"""Duplicates and leakage in builds."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.distinct import told_of
from pipeline.ledger import replan
from pipeline.store import Store
from schemas.errors import UserError
from schemas.settings import Settings
from stages.contract import Backbone, Generate, Generated, Models, Order, Sampler
from tests.local_build import accounts, config, fresh, packed, rows, run
from tests.small_build import listing, noise_recipe, parts_of, shard_hashes

pytestmark = pytest.mark.usefixtures("one_backbone")

TARGET = [{"classes": ["circle"], "accepted": 4, "attempts": 4}]
DUPLICATES = {"method": "duplicates", "bits": 12, "cosine": 0.99}


def picture(number: int, noise: float = 0) -> np.ndarray:
    """Coarse blocks of colour, 64 × 64 bytes RGB, with a little noise that goes by its own strength."""
    blocks = np.random.default_rng(number).uniform(-1, 1, (4, 4, 3))
    smooth = np.kron(blocks, np.ones((16, 16, 1)))
    grain = np.random.default_rng(int(noise * 1e6)).normal(0, 1, smooth.shape)
    return np.clip(127.5 * (smooth + noise * grain + 1), 0, 255).astype(np.uint8)


class Repeating(Generate):
    """Candidate i shows picture ⌊i / 2⌋, of all classes the same; the second time with a little noise."""

    class Config(Settings):
        method: str
        noise: float = 0
        first: int = 0

    def sampler(self) -> Sampler:
        return Sampler(steps=1, guidance=1.0)

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        shown = [
            picture(self.config.first + c.index // 2, self.config.noise * (c.index % 2))
            for c in order.chances
        ]
        return Generated(torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).float() / 127.5 - 1)


def repeating(**settings) -> dict:
    return noise_recipe(generate={"method": "tests.pipeline.test_duplicates:Repeating", **settings})


def blocks(tmp_path, references=None, **changes):
    standard = {"recipes": {"plain": repeating()}, "targets": TARGET, "filter": [DUPLICATES]}
    return config(tmp_path, references, **{**standard, **changes})


def indices(output) -> list[int]:
    return sorted(row["index"] for row in rows(output, "builds/*/shards"))


def save(folder, number: int, noise: float = 0):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(number, noise)).save(folder / f"{number}.png")


@pytest.mark.parametrize("noise", [0, 0.02])
def test_exact_and_near_duplicates_are_rejected_with_the_name_of_the_first(tmp_path, noise):
    result = run(blocks(tmp_path, recipes={"plain": repeating(noise=noise)}))
    (account,) = accounts(result).values()
    assert indices(tmp_path / "out") == [0, 2, 4, 6]
    assert account.rejected == {"duplicates.candidate": 3}
    assert account.surplus == 1  # candidate 7 comes after the last that was asked for
    told = told_of(Store(str(tmp_path / "out")), result.manifest.build_id)
    keys = {row["index"]: row["key"] for row in rows(tmp_path / "out")}
    for later in (1, 3, 5):
        assert told.rejected[keys[later]].reason.endswith(f"to {keys[later - 1]}")
    assert result.manifest.files.keys() == {"config.yaml", "references.lock", "duplicates.json"}


def test_without_the_filter_all_of_them_are_in(tmp_path):
    run(blocks(tmp_path, filter=[]))
    assert indices(tmp_path / "out") == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_two_workers_in_any_order_make_the_same_bytes(tmp_path, workers, seedloom):
    path = blocks(tmp_path, targets=[{"classes": ["circle", "gear"], "accepted": 6, "attempts": 8}])
    here, _ = fresh(tmp_path, path)
    other = f"output={tmp_path / 'ray'}"
    ended = seedloom("build", path, "--set", other, "--runner", "ray", "--workers", workers)
    assert ended.code == 0, ended.err
    assert not run(path, other).made
    assert shard_hashes(run(path, other).manifest) == shard_hashes(here.manifest)
    assert run(path, other).manifest.files == here.manifest.files


def test_a_build_is_resumed_extended_and_packed_again_with_the_same_choice(tmp_path):
    path = blocks(tmp_path)
    run(path)
    more = "targets.0.accepted=7"
    other, other_parts = fresh(tmp_path, path, more)
    extended = run(path, more)
    assert (extended.manifest, shard_hashes(extended.manifest)) == (
        other.manifest, shard_hashes(other.manifest),
    )  # fmt: skip
    assert parts_of(tmp_path / "out") == other_parts
    scored = listing(tmp_path / "out" / "scores")
    shutil.rmtree(tmp_path / "out" / "builds")
    shutil.rmtree(tmp_path / "out" / "history")
    assert packed(path, more).manifest == other.manifest
    loose = run(path, "filter.0.cosine=1", "filter.0.bits=0")  # thresholds score nothing again
    assert loose.units == 0
    assert listing(tmp_path / "out" / "scores") == scored


def test_recipes_of_one_target_are_compared_in_the_order_of_its_slots(tmp_path):
    path = blocks(
        tmp_path,
        recipes={"a": repeating(), "b": repeating(noise=0.02)},
        targets=[{"classes": ["circle"], "accepted": 6, "attempts": 8, "recipe": {"a": 1, "b": 1}}],
    )
    result = run(path)
    keys = {(row["recipe"], row["index"]) for row in rows(tmp_path / "out", "builds/*/shards")}
    # a takes picture 0; b finds it taken, and takes 1; a finds that taken, and takes 2; and so on
    assert keys == {("a", 0), ("a", 4), ("a", 8), ("b", 2), ("b", 6), ("b", 10)}
    assert result.manifest.shortfall == 0


def test_a_candidate_like_a_reference_is_rejected_with_its_name(tmp_path):
    save(tmp_path / "references" / "circle", 1)
    save(tmp_path / "references" / "gear", 0)  # another class has none of it
    result = run(blocks(tmp_path, tmp_path / "references"))
    (account,) = accounts(result).values()
    assert indices(tmp_path / "out") == [0, 4, 6, 8]
    assert account.rejected == {"duplicates.candidate": 3, "duplicates.reference": 2}
    told = told_of(Store(str(tmp_path / "out")), result.manifest.build_id)
    assert sum(v.reason.endswith("to the reference circle/1.png") for v in told.rejected.values()) == 2


def test_other_targets_may_look_the_same_and_it_is_told(tmp_path, seedloom):
    path = blocks(tmp_path, targets=[{"classes": ["circle", "gear"], "accepted": 2, "attempts": 4}])
    ended = seedloom("build", path)
    assert ended.code == 0
    assert "2 accepted images look like one of another target" in ended.out + ended.err
    told = told_of(Store(str(tmp_path / "out")), run(path).manifest.build_id)
    assert [(one[:4], other[:6]) for one, other, _ in told.across] == [("gear", "circle")] * 2
    assert seedloom("verify", tmp_path / "out").code == 0


def test_a_page_shows_the_reason(tmp_path, seedloom):
    path = blocks(tmp_path)
    assert seedloom("build", path).code == 0
    page = tmp_path / "page.html"
    ended = seedloom("report", tmp_path / "out", "--out", page)
    assert ended.code == 0, ended.err
    data = json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])
    cards = {card["key"]: card for card in data["cards"]}
    told = told_of(Store(str(tmp_path / "out")), run(path).manifest.build_id)
    assert len(told.rejected) == 3
    assert {k for k, card in cards.items() if card["rule"] == "duplicates.candidate"} == told.rejected.keys()
    assert all(cards[key]["reason"] == verdict.reason for key, verdict in told.rejected.items())


def test_a_held_out_image_is_no_candidate(tmp_path):
    save(tmp_path / "test" / "ring", 1, noise=0.01)
    leakage = {"method": "leakage", "held_out": {"uri": str(tmp_path / "test")}, "cosine": 0.99}
    path = blocks(tmp_path, filter=[leakage])
    result = run(path)
    (account,) = accounts(result).values()
    assert account.rejected == {"leakage.cosine": 2}
    assert indices(tmp_path / "out") == [0, 1, 4, 5]
    samples = rows(tmp_path / "out", "builds/*/shards")
    assert all(row["leakage_cosine"] < 0.99 for row in samples)
    plan = replan(Store(str(tmp_path / "out")), result.manifest.build_id)
    (chosen,) = plan.streams[0].filters
    (low,) = {row["nearest"] for row in rows(tmp_path / "out", "scores")}
    reason = chosen.method.decide({"cosine": 1.0, "nearest": low}).reason
    assert reason.endswith("to the held-out image ring/1.png")
    # another held-out image is another question, and nothing is generated for it
    save(tmp_path / "test" / "ring", 0)
    again = run(path, "targets.0.accepted=2")
    assert again.units == 0
    assert indices(tmp_path / "out")[-2:] == [5, 5]
    assert again.manifest.build_id != result.manifest.build_id


def test_a_held_out_set_that_cannot_be_read_is_told_in_one_line(tmp_path, seedloom):
    gone = {"method": "leakage", "held_out": {"uri": str(tmp_path / "gone")}}
    ended = seedloom("build", blocks(tmp_path, filter=[gone]))
    assert ended.code == 2
    assert "held_out" in ended.err
    assert "does not exist" in ended.err
    assert not (tmp_path / "out" / "parts").exists()


def test_a_filter_for_duplicates_needs_a_threshold(tmp_path):
    with pytest.raises(UserError, match="must set bits or cosine"):
        run(blocks(tmp_path, filter=[{"method": "duplicates", "bits": None, "cosine": None}]))


def test_the_file_is_json_that_people_can_read(tmp_path):
    run(blocks(tmp_path))
    (file,) = (tmp_path / "out" / "builds").glob("*/duplicates.json")
    assert {"rejected", "across", "pairs", "sha256"} == json.loads(file.read_text()).keys()
