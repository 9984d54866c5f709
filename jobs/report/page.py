"""What was gathered, as HTML: a template, a style and a script that are put into one file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jobs.report.gather import Gathered, run_facts, seeds, trace_axis

if TYPE_CHECKING:
    from pipeline.plan import Plan
    from pipeline.store import Store
    from schemas.manifest import Manifest

PHASES = ("start", "invert", "assess", "prepare", "generate", "pack")

# Nothing is loaded, from wherever the page is opened; what the page brings with it may run.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(
    store: Store,
    manifest: Manifest,
    plan: Plan,
    gathered: Gathered,
    found: dict[str, Any],
    number: int,
    names: Sequence[str],
) -> str:
    """One page of a report. `found` is what `gather.cards` says of its candidates."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = files("jobs.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((here / "page.html.j2").read_text("utf-8"))
    run = run_facts(store, manifest.build_id)
    return template.render(
        policy=POLICY,
        style=Markup((here / "page.css").read_text("utf-8")),
        script=Markup((here / "page.js").read_text("utf-8")),
        charts=Markup((here / "vendor" / "chart.umd.min.js").read_text("utf-8")),
        manifest=manifest,
        config=store.get(f"builds/{manifest.build_id}/config.yaml").decode(),
        readable=plan.config.readable,
        run=run,
        total=gathered.total,
        number=number,
        names=names,
        data={
            **found,
            "targets": targets(manifest),
            "scores": {name: histogram.binned() for name, histogram in gathered.scores.items()},
            "seeds": seeds(store, plan),
            "seconds": {name: run["seconds"][name] for name in PHASES if name in run.get("seconds", {})},
            "axes": trace_axis(plan),
        },
    )


def targets(manifest: Manifest) -> list[dict[str, Any]]:
    """The sums of every target and recipe: candidates = accepted + rejected + surplus + failed."""
    return [
        {
            "target": name,
            "recipe": recipe,
            "class": target.label,
            "quota": account.quota,
            "candidates": account.candidates,
            "accepted": account.accepted,
            "rejected": account.rejected,
            "surplus": account.surplus,
            "failed": account.failed,
            "missing": account.missing,
            "exhausted": account.exhausted,
        }
        for name, target in manifest.targets.items()
        for recipe, account in target.recipes.items()
    ]
