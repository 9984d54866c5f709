"""`seedloom evaluate inversion`: how well, how typically and how dearly each method inverts.

Ramachandran et al., AAAI 2024 ("Understanding the generalization of pretrained diffusion models on
out-of-distribution data"), Tables 1 and 2 in our setting: reconstruction of images in and out of the training
distribution, and how far each set is from it. The distance is Ben-David's proxy A-distance, 2(1 − 2ε), ε the
held-out error of a linear classifier that tells the set from training drawings; the paper calls more than 1.5
out of distribution.

Every inversion is measured at several step counts, by itself and per call of the model: reconstructing is not
being typical, and what is combined must be typical. Each image's measures are kept, so a second run measures
only what is new.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from jobs.evaluate.harness import Result
    from jobs.evaluate.metrics import Measure
    from jobs.evaluate.sets import ImageSet
    from pipeline.store import Store
    from stages.contract import Backbone

STEPS = (10, 20, 50, 100, 150)
LEFT_OUT = {"flow": "it inverts flow-matching models, and tangram predicts noise"}
VARIANTS: dict[str, dict[str, Any]] = {  # beside every method with its own settings
    "fixed_point, exact": {"method": "fixed_point", "start_noise": 0.0},
}
OUT_OF_DISTRIBUTION = 1.5  # proxy A-distance, in the paper
CALLS = 150  # of the model, at most, for the default
NAIVE = ("ddim", 50)
BATCH = 8
MEASURED = (
    "psnr",
    "latent_mse",
    "calls",
    "norm_ratio",
    "variance",
    "kurtosis",
    "autocorrelation",
    "atypical",
)
PICTURED = ("psnr", "latent_mse", "norm_ratio", "atypical")
# The table that decides the default is over the drawings of all kinds of classes, each kind counted alike.
DECIDING = ("drawings, head classes", "drawings, middle classes", "drawings, rare classes")


def inversion(
    out: Annotated[Path, typer.Option(help="Folder of measures and results.")] = Path(
        "out/evaluate/inversion"
    ),
    steps: Annotated[
        list[int] | None, typer.Option(min=1, help=f"Sampler steps. May be repeated; by default {STEPS}.")
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Images of each set.")] = 16,
    quick: Annotated[bool, typer.Option("--quick", help="Next to nothing of everything, for tests.")] = False,
) -> None:
    """Compare every inversion on images in and out of the training distribution."""
    import torch

    from jobs.evaluate.metrics import Observers
    from jobs.evaluate.report import write
    from jobs.evaluate.sets import image_sets, training_drawings
    from pipeline.store import Store
    from stages import registry
    from stages.backbones.diffusion.load import load_backbone
    from stages.backbones.diffusion.settings import BackboneSettings

    counts = tuple(dict.fromkeys(steps or ((2, 3) if quick else STEPS)))
    count, told_apart = (2, 10) if quick else (images, 200)
    torch.set_num_threads(1)
    begin = time.monotonic()
    store = Store(str(out / "measures"))
    store.probe()
    backbone = load_backbone(BackboneSettings(), torch.device("cpu"))
    for n in counts:
        backbone.schedule.path(n)  # raises for more than there are
    whole = {images.name: images for images in image_sets(told_apart)}
    methods = {name: {"method": name} for name in registry.names("invert") if name not in LEFT_OUT}
    methods |= VARIANTS
    measured: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    made = 0
    for method, settings in methods.items():
        for n in counts:
            for name, images_of in whole.items():
                rows, new = _measures(store, backbone, {**settings, "steps": n}, images_of.first(count))
                measured[name, method, n] = rows
                made += new
            print(f"{method}, {n} steps: measured", flush=True)
    distances = _distances(Observers(), training_drawings(told_apart), list(whole.values()))
    results = tables(measured, distances, told_apart)
    notes = [
        *(f"{name} is left out: {reason}" for name, reason in LEFT_OUT.items()),
        *decision(measured),
        f"{made} of {len(measured)} inversions measured now, {time.monotonic() - begin:.0f} s in all",
    ]
    files = write(out, "inversion", results, headings(), notes, curves(measured))
    print("\n".join(str(file) for file in files))


# --- measuring ----------------------------------------------------------------------------------------------


def _measures(
    store: Store, backbone: Backbone, settings: Mapping[str, Any], images: ImageSet
) -> tuple[list[dict[str, float]], bool]:
    """One mapping of measures an image, from the store or measured now; whether it was now."""
    from schemas.ids import fingerprint, sha256
    from schemas.sealed import seal, unseal
    from stages import registry

    name = settings["method"]
    cls: Any = registry.resolve("invert", name)
    method = cls(cls.Config.model_validate(settings))
    identity = {
        "backbone": backbone.fingerprint,
        "method": name,
        "version": method.version,
        "settings": method.config.model_dump(mode="json"),
        "prompts": list(images.prompts),
        "images": sha256(images.image_N3hw.numpy().tobytes()),
        "batch": BATCH,
    }
    place = f"{name}-{settings['steps']}/{fingerprint(identity)}.json"
    try:
        return unseal(store.get(place), f"{store.uri}/{place}")["rows"], False
    except FileNotFoundError:
        pass
    rows: list[dict[str, float]] = [{} for _ in images.prompts]
    for prompt in dict.fromkeys(images.prompts):
        wanted = [i for i, other in enumerate(images.prompts) if other == prompt]
        for start in range(0, len(wanted), BATCH):
            batch = wanted[start : start + BATCH]
            inverted = method(backbone, images.image_N3hw[batch], prompt)
            for i, measures in zip(batch, inverted.measures, strict=True):
                rows[i] = {**measures, "atypical": atypical(measures, inverted.z_BCHW[0].numel())}
    store.put_new(place, seal({**identity, "set": images.name, "rows": rows}))
    return rows, True


def atypical(measures: Mapping[str, float], d: int) -> float:
    """How many standard deviations a seed is from noise: about 1 for N(0, I).

    The root of the mean square over norm, autocorrelation and kurtosis, each in its standard deviation for d
    independent normal numbers.
    """
    scores = (
        (measures["norm_ratio"] - 1) * math.sqrt(2 * d),
        measures["autocorrelation"] * math.sqrt(2 * d),
        measures["kurtosis"] / math.sqrt(24 / d),
    )
    return math.sqrt(sum(score**2 for score in scores) / len(scores))


def proxy_a_distance(
    x_ND: np.ndarray, y_MD: np.ndarray, x_sources: Sequence[str], y_sources: Sequence[str]
) -> Any:
    """2(1 − 2ε) with the error ε of logistic regression on held-out fifths; and each image's own error.

    What comes from one source is held out together. 2: the sets are told apart without fail; 0: by chance.
    Below 0 by chance too, which is not cut off, so that its mean over repetitions is right.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = np.concatenate([x_ND, y_MD])
    labels = np.repeat([0, 1], [len(x_ND), len(y_MD)])
    sources = np.array([*x_sources, *y_sources])
    wrong = np.zeros(len(labels))
    folds = StratifiedGroupKFold(n_splits=min(5, len(set(y_sources))), shuffle=True, random_state=0)
    for fit, held in folds.split(features, labels, sources):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        wrong[held] = classifier.fit(features[fit], labels[fit]).predict(features[held]) != labels[held]
    # both sets weigh the same, whatever their sizes
    error = (wrong[labels == 0].mean() + wrong[labels == 1].mean()) / 2
    return 2 * (1 - 2 * error), wrong


def _distances(observers: Any, training: ImageSet, sets: Sequence[ImageSet]) -> dict[str, Measure]:
    """Proxy A-distance of each set to training drawings, in the CLIP's image features."""
    from jobs.evaluate.metrics import Measure
    from jobs.tangram.evaluate import wilson

    def seen(images: ImageSet) -> np.ndarray:
        pixels: Tensor = ((images.image_N3hw + 1) * 127.5).round().clamp(0, 255).byte()
        return observers.look(pixels).clip_ND

    found = {}
    x_ND = seen(training)
    for images in sets:
        value, wrong = proxy_a_distance(x_ND, seen(images), training.sources, images.sources)
        low, high = wilson(int(wrong.sum()), len(wrong))
        found[images.name] = Measure(value, 2 * (1 - 2 * high), 2 * (1 - 2 * low), len(wrong), x_ND.shape[1])
    return found


# --- tables -------------------------------------------------------------------------------------------------


def tables(
    measured: Mapping[tuple[str, str, int], list[dict[str, float]]],
    distances: Mapping[str, Measure],
    told_apart: int,
) -> list[Result]:
    """One table a set, and one of the distances."""
    from jobs.evaluate.harness import Result

    results = [
        Result(
            "proxy A-distance",
            f"linear classifier on the CLIP's image features, {told_apart} images a set against as many"
            f" training drawings; more than {OUT_OF_DISTRIBUTION}: out of distribution",
            {name: {"pad": measure} for name, measure in distances.items()},
        )
    ]
    for name in distances:
        rows = {
            f"{method}, {steps} steps": {metric: _mean(measures, metric) for metric in MEASURED}
            for (of, method, steps), measures in measured.items()
            if of == name
        }
        verdict = "out of" if distances[name].value > OUT_OF_DISTRIBUTION else "in"
        results.append(Result(name, f"guidance 1; by the proxy A-distance {verdict} distribution", rows))
    return results


def _mean(measures: Sequence[Mapping[str, float]], metric: str) -> Measure:
    from jobs.evaluate.metrics import measure

    return measure([m[metric] for m in measures])


def decision(measured: Mapping[tuple[str, str, int], list[dict[str, float]]]) -> list[str]:
    """Which inversions no other beats in error, typicality and calls at once, and whether targets are met."""
    pooled: dict[tuple[str, int], dict[str, float]] = {}
    for method, steps in dict.fromkeys((method, steps) for _, method, steps in measured):
        rows = [row for name in DECIDING for row in measured[name, method, steps]]
        pooled[method, steps] = {
            metric: float(sum(row[metric] for row in rows) / len(rows)) for metric in MEASURED
        }
    best = [arm for arm, own in pooled.items() if not any(_beats(other, own) for other in pooled.values())]
    lines = [
        f"  {method}, {steps} steps: {f['calls']:.0f} calls, latent MSE {f['latent_mse']:.2e},"
        f" norm/√d {f['norm_ratio']:.3f}, {f['atypical']:.1f} standard deviations from noise"
        for (method, steps), f in ((arm, pooled[arm]) for arm in best)
    ]
    if lines:
        lines.insert(
            0, "drawings of all kinds, not beaten by another in latent MSE, typicality and calls at once:"
        )
    affordable = {arm: f for arm, f in pooled.items() if f["calls"] <= CALLS}
    if affordable:
        arm = min(affordable, key=lambda a: affordable[a]["atypical"])
        lines.append(f"most typical seeds at no more than {CALLS} calls: {arm[0]}, {arm[1]} steps")
    if affordable and NAIVE in pooled:
        lines.append(_against_naive(pooled, min(affordable, key=lambda a: affordable[a]["latent_mse"])))
    return lines


def _beats(other: Mapping[str, float], own: Mapping[str, float]) -> bool:
    metrics = ("latent_mse", "atypical", "calls")
    return all(other[m] <= own[m] for m in metrics) and any(other[m] < own[m] for m in metrics)


def _against_naive(pooled: Mapping[tuple[str, int], Mapping[str, float]], arm: tuple[str, int]) -> str:
    own, naive = pooled[arm], pooled[NAIVE]
    equal = min(
        (a for a in pooled if a[0] == NAIVE[0]),
        key=lambda a: abs(math.log(pooled[a]["calls"] / own["calls"])),
    )
    gains = [other["latent_mse"] / own["latent_mse"] for other in (naive, pooled[equal])]
    reached = "reached" if gains[0] >= 16 else "MISSED"
    typical = "reached" if abs(own["norm_ratio"] - 1) <= 0.02 else "MISSED"
    return (
        f"least latent MSE at no more than {CALLS} calls: {arm[0]}, {arm[1]} steps; {gains[0]:.1f} × lower"
        f" than ddim's at {NAIVE[1]} steps (target 16 ×: {reached}), {gains[1]:.1f} × lower than ddim's at"
        f" {pooled[equal]['calls']:.0f} calls; norm/√d {own['norm_ratio']:.3f} (target 1 ± 0.02: {typical})"
    )


def curves(measured: Mapping[tuple[str, str, int], list[dict[str, float]]]) -> Any:
    """A row of panels for each set: what a method reaches with so many calls of the model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from jobs.evaluate.report import plain_ticks

    names, methods = (list(dict.fromkeys(key[place] for key in measured)) for place in (0, 1))
    page = Figure(figsize=(2.8 * len(PICTURED), 1.8 * len(names) + 0.6))
    page.subplots_adjust(left=0.07, right=0.99, bottom=0.04, top=0.98, wspace=0.32, hspace=0.3)
    FigureCanvasAgg(page)
    panels = page.subplots(len(names), len(PICTURED), squeeze=False, sharex=True, sharey="col")
    for name, line in zip(names, panels, strict=True):
        line[0].set_title(name, fontsize=8, loc="left")
        for metric, panel in zip(PICTURED, line, strict=True):
            heading = headings()[metric]
            panel.set_ylabel(heading.title, fontsize=7)
            panel.tick_params(labelsize=6)
            panel.grid(linewidth=0.4, alpha=0.5)
            panel.set_xscale("log")
            if heading.logarithmic:
                panel.set_yscale("log", nonpositive="clip")
            for method in methods:
                rows = [rows for (of, by, _), rows in measured.items() if (of, by) == (name, method)]
                x, y = ([_mean(r, m) for r in rows] for m in ("calls", metric))
                values = [m.value for m in x], [m.value for m in y]
                below = [m.value - (m.value if m.low is None else m.low) for m in y]
                above = [(m.value if m.high is None else m.high) - m.value for m in y]
                panel.errorbar(*values, [below, above], marker="o", markersize=3, linewidth=1, label=method)
    for metric, panel in zip(PICTURED, panels[-1], strict=True):
        panel.set_xlabel("calls an image", fontsize=7)
        plain_ticks(panel.xaxis)  # shared by all panels
        if headings()[metric].logarithmic:
            plain_ticks(panel.yaxis)
    panels[0][0].legend(fontsize=6)
    return page


def headings() -> dict[str, Any]:
    from jobs.evaluate.report import Heading

    return {
        "pad": Heading("proxy A-distance", ".2f"),
        "psnr": Heading("PSNR, dB", ".1f"),
        "latent_mse": Heading("latent MSE", ".1e", logarithmic=True),
        "calls": Heading("calls an image", ".0f", logarithmic=True),
        "norm_ratio": Heading("norm/√d", ".3f"),
        "variance": Heading("variance", ".3f"),
        "kurtosis": Heading("kurtosis", ".2f"),
        "autocorrelation": Heading("autocorrelation", ".3f"),
        "atypical": Heading("σ from noise", ".1f", logarithmic=True),
    }


if __name__ == "__main__":
    from jobs.entry import run

    run(inversion)
