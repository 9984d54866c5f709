"""What is measured of a set of images, with 95 % intervals, and when a difference counts as shown.

Intervals come from one bootstrap over groups of images: what was made from the same reference seeds stands or
falls together, and is drawn together (Efron & Tibshirani 1993, ch. 8). Two arms whose images were made from
the same seeds in the same places have the same groups and get the same resamples, so that their difference is
a paired one; for other arms the resamples are independent.

Intervals are value ± 1.96 standard deviations of the resamples and not their percentiles, because a Fréchet
distance grows with every repeated image and its resamples lie above it. Shares have Wilson's interval. Images
of real drawings that a distance refers to are taken as given: the interval is over what was generated.

Fréchet distance: Heusel et al., arXiv:1706.08500, Eq. 6. Its bias falls with n and rises with the number of
features, so both stand beside it, and arms are compared at equal n. Diversity: the mean cosine distance of
two images of a class in the features of a CLIP model.

Shape letters: N images, R resamples, D features, h w image.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from jobs.tangram.data import to_model
from jobs.tangram.evaluate import wilson
from jobs.tangram.parts import load_classifier
from schemas.ids import random_stream
from stages.backbones.classifier import load_classifier as load_filter_classifier
from stages.backbones.clip import load_clip
from stages.backbones.weights import TANGRAM

RESAMPLES = 100
# So few groups say nothing of their own variation.
LEAST_GROUPS = 10
SIDES = 1.959964  # standard deviations on each side of a 95 % interval

Array = np.ndarray
Statistic = Callable[[Float[Array, "R N"]], Float[Array, " R"]]


@dataclass(frozen=True)
class Measure:
    """A figure with its 95 % interval."""

    value: float
    low: float | None  # None: there is no telling
    high: float | None
    n: int
    dimensions: int | None = None  # of the feature space, where there is one
    resampled_R: Float[Array, " R"] | None = None  # the same figure of each resample


@dataclass(frozen=True)
class Difference:
    """One arm's figure less another's."""

    value: float
    low: float | None
    high: float | None
    verdict: Literal["higher", "lower", "not shown"]


def resamples(groups: Sequence[Hashable]) -> Float[Array, "R N"]:
    """How often each image is drawn: once in row 0, and by whole groups, with replacement, in the others.

    The draws depend on the grouping alone, so equal groupings get equal draws.
    """
    number = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    place_N = np.array([number[group] for group in groups])
    rng = random_stream("bootstrap", *place_N.tolist(), *map(repr, number))
    drawn_RG = rng.multinomial(len(number), [1 / len(number)] * len(number), size=RESAMPLES)
    return np.concatenate([np.ones((1, len(groups))), drawn_RG[:, place_N].astype(np.float64)])


def estimate(
    statistic: Statistic, times_RN: Float[Array, "R N"], groups: int, dimensions: int | None = None
) -> Measure:
    """A statistic of the whole set, and its interval from the resamples; none with too few groups."""
    n = times_RN.shape[1]
    if groups < LEAST_GROUPS:
        return Measure(float(statistic(times_RN[:1])[0]), None, None, n, dimensions)
    value, *rest = statistic(times_RN)
    resampled_R = np.array(rest)
    half = SIDES * float(np.nanstd(resampled_R, ddof=1))
    return Measure(float(value), float(value) - half, float(value) + half, n, dimensions, resampled_R)


def share(hit_N: Float[Array, " N"], distinct_N: Float[Array, " N"], groups: Sequence[Hashable]) -> Measure:
    """A share with Wilson's interval, in which an image that was made twice counts once."""
    times_RN = resamples(groups)
    count = int(distinct_N.sum())
    low, high = wilson(int((hit_N * distinct_N).sum()), count)
    counted = estimate(mean_of(hit_N, distinct_N), times_RN, len(set(groups)))
    return replace(counted, low=low, high=high, n=count)


def compare(one: Measure, other: Measure) -> Difference:
    """Which of two arms has the higher figure, if the interval of their difference leaves 0 outside."""
    value = one.value - other.value
    if one.resampled_R is None or other.resampled_R is None:
        return Difference(value, None, None, "not shown")
    half = SIDES * float(np.nanstd(one.resampled_R - other.resampled_R, ddof=1))
    return _told(value, value - half, value + half)


def _told(value: float, low: float | None, high: float | None) -> Difference:
    """A difference is shown if its interval leaves 0 outside."""
    verdict: Literal["higher", "lower", "not shown"] = "not shown"
    if low is not None and high is not None and (low > 0 or high < 0):
        verdict = "higher" if value > 0 else "lower"
    return Difference(value, low, high, verdict)


def student(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of independent values with Student's 95 % interval; no interval for a single one."""
    from scipy import stats

    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, None, None
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return mean, mean - half, mean + half


def measure(values: Sequence[float]) -> Measure:
    """Mean of independent values, such as those of several training seeds, with Student's interval."""
    return Measure(*student(values), n=len(values))


def difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """Mean difference of values that belong together in pairs, with Student's interval."""
    return _told(*student(np.subtract(one, other).tolist()))


# --- statistics: of a set in which each image stands `times` ----------------------------------------------


def mean_of(x_N: Float[Array, " N"], counted_N: Float[Array, " N"] | float = 1.0) -> Statistic:
    """The mean of a value over the images that are counted."""

    def statistic(times_RN: Float[Array, "R N"]) -> Float[Array, " R"]:
        weight_RN = times_RN * counted_N
        return weight_RN @ x_N / weight_RN.sum(axis=1)

    return statistic


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features."""

    mean_D: Float[Array, " D"]
    covariance_DD: Float[Array, "D D"]

    @classmethod
    def of(cls, x_ND: Float[Array, "N D"], times_N: Float[Array, " N"] | None = None) -> Moments:
        """With row n counted `times_N[n]` times; the covariance is the unbiased one."""
        times_N = np.ones(len(x_ND)) if times_N is None else times_N
        total = times_N.sum()
        mean_D = times_N @ x_ND / total
        off_ND = x_ND - mean_D
        return cls(mean_D, (off_ND * times_N[:, None]).T @ off_ND / (total - 1))

    @cached_property
    def root_DD(self) -> Float[Array, "D D"]:
        """The symmetric square root of the covariance."""
        values_D, vectors_DD = np.linalg.eigh(self.covariance_DD)
        return (vectors_DD * np.sqrt(values_D.clip(min=0))) @ vectors_DD.T


def frechet(a: Moments, b: Moments) -> float:
    """‖μ_a − μ_b‖² + Tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^½); the last trace is that of (√Σ_b Σ_a √Σ_b)^½."""
    values_D = np.linalg.eigvalsh(b.root_DD @ a.covariance_DD @ b.root_DD)
    spread = np.trace(a.covariance_DD) + np.trace(b.covariance_DD)
    return float(np.sum((a.mean_D - b.mean_D) ** 2) + spread - 2 * np.sqrt(values_D.clip(min=0)).sum())


def frechet_to(real: Moments, x_ND: Float[Array, "N D"]) -> Statistic:
    """The Fréchet distance of features to those of real images, `frechet(Moments.of(x_ND, times_N), real)`.

    The trace of (√Σ_b Σ_a √Σ_b)^½ is the sum of the singular values of the centred features times √Σ_b, which
    N or D eigenvalues give, whichever are fewer.
    """
    turned_ND = x_ND @ real.root_DD

    def distance(times_N: Float[Array, " N"]) -> float:
        total = times_N.sum()
        mean_D = times_N @ x_ND / total
        spread = times_N @ np.square(x_ND - mean_D).sum(axis=1) / (total - 1)
        a_ND = (turned_ND - mean_D @ real.root_DD) * np.sqrt(times_N / (total - 1))[:, None]
        values = np.linalg.eigvalsh(a_ND @ a_ND.T if len(a_ND) < a_ND.shape[1] else a_ND.T @ a_ND)
        shared = np.sqrt(values.clip(min=0)).sum()
        return float(
            np.square(mean_D - real.mean_D).sum() + spread + np.trace(real.covariance_DD) - 2 * shared
        )

    def statistic(times_RN: Float[Array, "R N"]) -> Float[Array, " R"]:
        return np.array([distance(times_N) for times_N in times_RN])

    return statistic


def diversity(x_ND: Float[Array, "N D"], labels: Sequence[str]) -> Statistic:
    """Mean cosine distance of two different images of a class, averaged over the classes.

    An image that a resample holds twice is not compared with itself.
    """
    unit_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    of_class = {
        label: [i for i, other in enumerate(labels) if other == label] for label in dict.fromkeys(labels)
    }

    def statistic(times_RN: Float[Array, "R N"]) -> Float[Array, " R"]:
        classes = []
        for rows in of_class.values():
            distance_nn = 1 - unit_ND[rows] @ unit_ND[rows].T
            np.fill_diagonal(distance_nn, 0)
            times_Rn = times_RN[:, rows]
            pairs_R = times_Rn.sum(axis=1) ** 2 - (times_Rn**2).sum(axis=1)
            total_R = np.einsum("rn,nm,rm->r", times_Rn, distance_nn, times_Rn, optimize=True)
            # a resample may hold no two images of a class, and then says nothing of it
            classes.append(np.divide(total_R, pairs_R, out=np.full(len(pairs_R), np.nan), where=pairs_R > 0))
        told = np.array(classes)
        known_R = (~np.isnan(told)).sum(axis=0)
        return np.divide(
            np.nansum(told, axis=0), known_R, out=np.full(len(known_R), np.nan), where=known_R > 0
        )

    return statistic


# --- who looks at the images --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """What judge, CLIP and classifier see in images."""

    verdict_N: Int[Array, " N"]  # the judge's class, as a position in its `classes`
    judge_ND: Float[Array, "N D"]  # before its last layer
    clip_ND: Float[Array, "N D"]
    probability_NK: Float[Array, "N K"]  # that the classifier gives to each class

    def of(self, rows: Sequence[int]) -> Features:
        return Features(
            self.verdict_N[rows], self.judge_ND[rows], self.clip_ND[rows], self.probability_NK[rows]
        )


class Observers:
    """tangram's judge, which is used for nothing but judging, its CLIP model and its classifier."""

    def __init__(self) -> None:
        self.judge: Any = load_classifier(TANGRAM / "judge")
        self.clip = load_clip("tangram", torch.device("cpu"))
        self.classifier = load_filter_classifier("tangram", torch.device("cpu"))

    @torch.no_grad()
    def look(self, pixels_N3hw: UInt8[Tensor, "N 3 h w"]) -> Features:
        verdicts, judged, clipped, classified = [], [], [], []
        for chunk_B3hw in pixels_N3hw.split(64):
            image_B3hw = to_model(chunk_B3hw)
            seen = self.judge.forward_features(image_B3hw)
            verdicts.append(self.judge.forward_head(seen).argmax(dim=1))
            judged.append(self.judge.forward_head(seen, pre_logits=True))
            clipped.append(self.clip.encode_image(image_B3hw))
            classified.append(self.classifier.logits(image_B3hw).double().softmax(dim=1))
        return Features(
            torch.cat(verdicts).numpy(),
            torch.cat(judged).double().numpy(),
            torch.cat(clipped).double().numpy(),
            torch.cat(classified).numpy(),
        )
