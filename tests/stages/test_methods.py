"""The methods that ship, by the names that configs use, and what their settings refuse."""

import pytest
from pydantic import ValidationError

from stages import registry

SHIPPED = {
    "invert": {"ddim", "fixed_point", "belm", "flow", "regularized"},
    "combine": {
        "lerp",
        "slerp",
        "slerp_rescaled",
        "cog",
        "subspace",
        "geodesic",
        "direction",
        "euclidean",
        "normalized",
        "mode_norm",
        "standardized",
        "karcher",
        "geometric_median",
        "nao",
        "nao_adam",
    },
    "refine": {"none", "seedselect"},
    "generate": {
        "text_to_image",
        "image_to_image",
        "genie",
        "genie_ada",
        "null_prompt",
        "cads",
        "minority_prompt",
        "sgms",
        "textual_inversion",
        "da_fusion",
        "cap2aug",
    },
    "filter": {"clip", "classifier", "safety_checker"},
    "measure": {"clip_score", "likelihood", "similarity"},
}
REQUIRED = {"safety_checker": {"model": "owner/name"}}  # what has no default


@pytest.mark.parametrize(("kind", "names"), SHIPPED.items())
def test_every_method_is_found_by_its_name_and_its_defaults_work(kind, names):
    assert names <= set(registry.names(kind))
    for name in names:
        cls = registry.resolve(kind, name)
        assert (cls.kind, cls.name) == (kind, name)
        config = cls(cls.Config(**REQUIRED.get(name, {}))).config
        assert config.model_dump()["method"] == name
        assert cls.Config.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in SHIPPED.items() for name in sorted(names)]
)
def test_every_setting_is_explained_and_closed_to_what_it_does_not_know(kind, name):
    config = registry.resolve(kind, name).Config
    for field, info in config.model_fields.items():
        assert field == "method" or info.description, f"{kind} {name}.{field} says nothing of itself"
    with pytest.raises(ValidationError, match="unknown key"):
        config(no_such_setting=1)


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        ("invert", "ddim", {"steps": 0}),
        ("invert", "ddim", {"guidance": -1}),
        ("generate", "text_to_image", {"steps": 0}),
        ("generate", "text_to_image", {"guidance": "strong"}),
        ("refine", "seedselect", {"iterations": 0}),
        ("refine", "seedselect", {"lr": 0}),
        ("refine", "seedselect", {"norm": "sphere"}),
        ("filter", "clip", {"margin": 3}),
        ("filter", "classifier", {"probability": 50}),
        ("combine", "slerp", {"t": -0.1}),
        ("measure", "likelihood", {"steps": 0}),
        ("measure", "likelihood", {"probes": 0}),
        ("measure", "likelihood", {"prompt": "image"}),
    ],
)
def test_settings_outside_their_range_name_the_key(kind, name, settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        registry.resolve(kind, name).Config(**settings)
