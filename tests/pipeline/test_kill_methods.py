"""Whatever makes the images: killed and run again, a build gives the bytes of one that was left alone."""

from __future__ import annotations

import pytest

from tests.ray_build import Driver, packed
from tests.small_build import make_config, seeds_recipe

pytestmark = pytest.mark.timeout(900)  # several processes, on a machine that may be busy

TOKEN = {"steps": 3, "batch": 2}
FOUR = {"steps": 4, "guidance": 2}
METHODS = {
    "cads": FOUR,
    "null_prompt": FOUR,
    "sgms": {**FOUR, "every": 2},
    "minority_prompt": {**FOUR, "iterations": 2, "above": 0.5},
    "textual_inversion": {**FOUR, "token": TOKEN},
    "image_to_image": FOUR,
    "da_fusion": {**FOUR, "token": TOKEN},
    "cap2aug": FOUR,
    "genie": FOUR,
    "genie_ada": {**FOUR, "ratios": [0.5, 1.0]},
}
REFINED = seeds_recipe(
    refine={"method": "seedselect", "iterations": 2, "gradient": "truncated", "views": 2},
    generate={"method": "text_to_image", "steps": 3, "guidance": 1},
)
MEASURES = ["clip_score", "similarity", {"method": "likelihood", "steps": 1}]


def recipes():
    found = {name: {"generate": {"method": name, **settings}} for name, settings in METHODS.items()}
    found["seedselect"] = REFINED
    return {name: {**recipe, "unit": 2, "batch": 2} for name, recipe in found.items()}


def test_a_build_with_every_method_is_the_same_after_kills(drawings, tmp_path):
    """Killed when the first artifact is there, and again after every third part."""
    made = recipes()
    target = {"classes": ["circle"], "accepted": 2 * len(made), "recipe": dict.fromkeys(made, 2)}
    calm, killed = (
        make_config(tmp_path / name, drawings, recipes=made, targets=[target], filter=[], measure=MEASURES)
        for name in ("calm", "killed")
    )
    assert Driver(calm, tmp_path).end()[0] == 0
    output = tmp_path / "killed" / "out"

    def count(pattern):
        return len([path for path in output.glob(pattern) if ".tmp" not in path.name])

    moments = [("artifacts/*/*", 1), *(("parts/*/*", parts) for parts in range(1, len(made), 3))]
    for pattern, enough in moments:
        driver = Driver(killed, tmp_path)
        driver.when(lambda p=pattern, n=enough: count(p) >= n, f"{enough} of {pattern}")
        driver.kill()
        assert not list(output.glob("builds/*/manifest.json"))
    code, _, err = Driver(killed, tmp_path).end()
    assert code == 0, err
    assert packed(output) == packed(tmp_path / "calm" / "out")
