"""What is known of reference seeds: which are combined, how they correlate, and what a person is told."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from jobs.build import make_runner
from pipeline.build import build, repack
from pipeline.config import load, method_of
from pipeline.seeds import Seeds, remark
from pipeline.store import Store
from pipeline.tasks import SeedsReceipt
from pipeline.tensors import read_measured
from schemas.errors import UserError
from stages.contract import Inverted
from stages.invert.ddim import DdimInversion
from tests.small_build import make_config, seeds_recipe


@pytest.fixture(autouse=True)
def one_backbone(monkeypatch, tangram):
    """Loading it takes longer than most of these builds."""
    monkeypatch.setattr("pipeline.worker.load_backbone", lambda settings, device: tangram)


class Heard:
    """Telemetry that remembers what was said."""

    def __init__(self):
        self.lines = []

    def say(self, text, **facts):
        self.lines.append(text)

    def __getattr__(self, name):
        return lambda *arguments, **facts: None


def config(folder: Path, references: Path, typical: dict | None = None, **combine) -> Path:
    invert = {"method": "ddim", "steps": 2, "typical": typical}
    recipe = seeds_recipe(invert=invert, combine={"method": "cog", **combine})
    return make_config(folder, references, recipes={"mixed": recipe}, filter=[])


def run(path: Path):
    heard = Heard()
    return build(load(path), heard, make_runner), heard.lines


def kept(output: Path) -> dict[str, tuple[torch.Tensor, dict]]:
    """Hash of a reference → its seed and what was measured of it."""
    store = Store(str(output))
    found = {}
    for path in output.glob("seeds/*/*.safetensors"):
        tensors, measures = read_measured(store, str(path.relative_to(output)))
        found[path.stem] = tensors.get("z_CHW"), measures
    return found


def samples(output: Path) -> list[dict]:
    return [r for p in sorted(output.glob("builds/*/shards/*.parquet")) for r in pq.read_table(p).to_pylist()]


def deviation(measures: dict) -> float:
    return abs(measures["norm_ratio"] - 1)


def test_a_row_says_what_combining_did_to_the_norm_and_how_alike_the_parents_are(tmp_path, references):
    run(config(tmp_path, references))
    seeds = kept(tmp_path / "out")
    for row in samples(tmp_path / "out"):
        a, b = (seeds[parent][0].double().flatten() for parent in row["parents"])
        assert row["parents_cosine"] == pytest.approx(float(F.cosine_similarity(a, b, dim=0)))
        w, v = row["weights"]
        combined = (w * a + v * b) / math.hypot(w, v)  # COG
        assert row["combined_norm"] == pytest.approx(float(combined.norm()) / len(a) ** 0.5, rel=1e-6)


def test_seeds_that_are_not_typical_are_never_combined_and_the_reason_is_kept(tmp_path, references):
    run(config(tmp_path / "all", references))
    measured = {name: deviation(measures) for name, (_, measures) in kept(tmp_path / "all" / "out").items()}
    lines = {}
    for row in samples(tmp_path / "all" / "out"):
        lines.setdefault(row["class"], set()).update(row["parents"])
    # three of the four seeds of each class pass: the limit lies between the third and the fourth
    ranked = {label: sorted(measured[p] for p in parents) for label, parents in lines.items()}
    label = max(ranked, key=lambda name: ranked[name][-1] - ranked[name][-2])
    limit = (ranked[label][-1] + ranked[label][-2]) / 2
    gate = {"norm": limit, "kurtosis": None, "autocorrelation": None}
    path = config(tmp_path, references, gate)
    content = path.read_text().replace("- circle\n  - gear\n  - ring", f"- {label}")
    path.write_text(content)
    result, said = run(path)
    refused = {name for name, (_, measures) in kept(tmp_path / "out").items() if measures["refused"]}
    assert refused == {name for name in lines[label] if measured[name] > limit}
    used = {parent for row in samples(tmp_path / "out") for parent in row["parents"]}
    assert not used & refused
    account = result.manifest.targets[label].recipes["mixed"].seeds
    assert (account.used, len(account.refused)) == (3, 1)
    assert result.manifest.targets[label].admitted == account.used + len(account.refused)
    (reason,) = account.refused.values()
    assert reason.startswith("norm ")
    assert any("1 of 4 seeds are not typical" in line for line in said)


def test_packing_again_accounts_for_the_seeds_as_building_did(tmp_path, references):
    built, _ = run(config(tmp_path, references))
    again = repack(load(config(tmp_path, references), ["shard.samples=5"]), Heard())
    assert again.made
    assert again.manifest.targets == built.manifest.targets
    assert built.manifest.targets["circle"].recipes["mixed"].seeds.used == 4


def test_too_few_typical_seeds_are_one_line_and_nothing_is_generated(tmp_path, references):
    path = config(tmp_path, references, {"norm": 1e-9})
    with pytest.raises(UserError, match=r"class 'circle': 0 of 4 seeds are typical, but cog .* needs 2"):
        run(path)
    assert not (tmp_path / "out" / "parts").exists()


def test_a_reference_whose_inversion_is_not_finite_is_left_out_with_the_reason(
    tmp_path, references, monkeypatch
):
    class Sudden(DdimInversion):
        """DDIM inversion that comes to nothing for the first image it meets."""

        first: list[torch.Tensor] = []  # noqa: RUF012

        def __call__(self, backbone, image_B3hw, prompt):
            if not self.first:
                self.first.append(image_B3hw[0].clone())
            inverted = super().__call__(backbone, image_B3hw, prompt)
            bad_B = torch.tensor([torch.equal(row, self.first[0]) for row in image_B3hw])
            z_BCHW = torch.where(bad_B[:, None, None, None], float("nan"), inverted.z_BCHW)
            return Inverted(z_BCHW, inverted.measures)

    path = config(tmp_path, references)
    monkeypatch.setattr(
        "pipeline.worker.method_of",
        lambda kind, given: Sudden(given) if kind == "invert" else method_of(kind, given),
    )
    result, said = run(path)
    accounts = [target.recipes["mixed"].seeds for target in result.manifest.targets.values()]
    assert sorted(account.used for account in accounts) == [3, 4, 4]
    (origin, reason), *others = [item for account in accounts for item in account.refused.items()]
    assert (reason, others) == ("its inversion is not finite", [])
    refused = next(name for name, (_, measures) in kept(tmp_path / "out").items() if measures["refused"])
    assert all(refused not in row["parents"] for row in samples(tmp_path / "out"))
    assert any(origin in line and reason in line for line in said)


def test_what_was_refused_may_be_inverted_again_with_more_steps(tmp_path, references):
    """The gate lets nothing pass at 2 steps; the seeds that are kept are those of 20."""
    run(config(tmp_path / "plain", references, None))
    gate = {"norm": 1e-9, "kurtosis": None, "autocorrelation": None, "steps": 20}
    with pytest.raises(UserError, match="0 of 4 seeds are typical"):
        run(config(tmp_path, references, gate))
    first, again = kept(tmp_path / "plain" / "out"), kept(tmp_path / "out")
    for name, (z_CHW, measures) in again.items():
        assert measures["steps"] == 20
        assert first[name][1]["steps"] == 2
        assert measures["latent_mse"] < first[name][1]["latent_mse"]
        assert not torch.equal(z_CHW, first[name][0])


def receipt(correlation: float | None, used: int = 5, **changes) -> SeedsReceipt:
    facts = {"refused": {}, "dimensions": 1024, "combined": 5}
    return SeedsReceipt(used=used, correlation=correlation, **{**facts, **changes})


def test_only_a_correlation_that_chance_does_not_explain_is_worth_a_line():
    chance = 1 / math.sqrt(1024 * 10)  # s.d. of the mean cosine of ten pairs
    assert remark("x", receipt(2 * chance)) is None
    assert remark("x", receipt(None, used=1, combined=1)) is None
    line = remark("x", receipt(0.1))
    assert "correlate by 0.100" in line
    assert f"{math.sqrt(1 + 4 * 0.1):.3f}" in line
    assert "whiten: true" in line


def test_the_correlation_of_a_choice_is_the_mean_over_its_pairs():
    z_KCHW = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    seeds = Seeds((), z_KCHW, ())
    cosine = [
        float(F.cosine_similarity(z_KCHW[a].flatten().double(), z_KCHW[b].flatten().double(), dim=0))
        for a, b in ((0, 1), (0, 3), (1, 3))
    ]
    assert seeds.correlation((0, 1, 3)) == pytest.approx(sum(cosine) / 3)
    assert seeds.correlation((2,)) is None
