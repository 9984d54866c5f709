"""The outlines of the 24 classes: closed polygons in the unit circle, before angle, size and place.

The order of CLASSES is the order of frequency in training, the commonest first. Families are confusable on
purpose: pentagon, hexagon, octagon and circle; four-, five- and six-pointed star; square, rectangle,
diamond and trapezoid. Small free proportions (an ellipse's axes, an arrow's head) come from the generator.
"""

from __future__ import annotations

import numpy as np

CLASSES: tuple[str, ...] = (
    "circle",
    "square",
    "triangle",
    "heart",
    "ring",
    "cross",
    "arrow",
    "crescent",
    "five_pointed_star",
    "hexagon",
    "rectangle",
    "semicircle",
    "ellipse",
    "droplet",
    "diamond",
    "bolt",
    "pentagon",
    "four_pointed_star",
    "chevron",
    "flower",
    "gear",
    "six_pointed_star",
    "octagon",
    "trapezoid",
)

_ROUND = np.linspace(0, 2 * np.pi, 96, endpoint=False)


def outline(shape: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Rings of corners, each (N, 2) with x to the right and y down; a second ring is a hole."""
    if shape == "ring":
        hole = rng.uniform(0.5, 0.6)
        return [_polar(_ROUND, 1.0), _polar(_ROUND, hole)]
    return [_outline(shape, rng)]


def _outline(shape: str, rng: np.random.Generator) -> np.ndarray:
    match shape:
        case "triangle" | "square" | "pentagon" | "hexagon" | "octagon":
            sides = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "octagon": 8}[shape]
            return _polar(np.arange(sides) * 2 * np.pi / sides, 1.0)
        case "four_pointed_star":
            return _star(4, rng.uniform(0.36, 0.42))
        case "five_pointed_star":
            return _star(5, rng.uniform(0.40, 0.46))
        case "six_pointed_star":
            return _star(6, rng.uniform(0.52, 0.58))
        case "circle":
            return _polar(_ROUND, 0.94)
        case "ellipse":
            return _polar(_ROUND, 1.0) * (1.0, rng.uniform(0.52, 0.64))
        case "semicircle":
            return _centred(_polar(np.linspace(0, np.pi, 48), 1.0))
        case "rectangle":
            return _fit(_box(1.0, rng.uniform(0.44, 0.58)))
        case "diamond":
            return np.array([(1, 0), (0, 1), (-1, 0), (0, -1)]) * (1.0, rng.uniform(0.54, 0.66))
        case "trapezoid":
            top = rng.uniform(0.42, 0.54)
            return _fit(np.array([(-1.0, 0.55), (1.0, 0.55), (top, -0.55), (-top, -0.55)]))
        case "cross":
            arm = rng.uniform(0.26, 0.34)
            quarter = np.array([(arm, arm), (arm, 1.0), (-arm, 1.0)])
            turns = [np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]]) for t in _quarters()]
            return _fit(np.concatenate([quarter @ turn for turn in turns]))
        case "arrow":
            neck, shaft = rng.uniform(-0.05, 0.15), rng.uniform(0.20, 0.27)
            half = np.array([(1.0, 0.0), (neck, 0.72), (neck, shaft), (-1.0, shaft)])
            return np.concatenate([half, half[:0:-1] * (1, -1)])
        case "chevron":
            thick = rng.uniform(0.62, 0.74)
            front = np.array([(-0.35, -0.85), (0.5, 0.0), (-0.35, 0.85)])
            return _fit(_centred(np.concatenate([front, front[::-1] - (thick, 0.0)])))
        case "bolt":
            half = np.array([(0.12, -1.0), (-0.5, 0.14), (-0.06, 0.14)])
            return _fit(np.concatenate([half, -half]))
        case "heart":
            x = 16 * np.sin(_ROUND) ** 3
            y = 13 * np.cos(_ROUND) - 5 * np.cos(2 * _ROUND) - 2 * np.cos(3 * _ROUND) - np.cos(4 * _ROUND)
            return _fit(_centred(np.stack([x, -y], 1)))
        case "crescent":
            return _crescent(rng.uniform(0.40, 0.50))
        case "droplet":
            x, y = np.cos(_ROUND), np.sin(_ROUND) * np.sin(_ROUND / 2) ** 1.6
            return _fit(_centred(np.stack([x, y * 0.82], 1)))
        case "flower":
            return _polar(_ROUND, 0.76 + 0.24 * np.cos(5 * _ROUND))
        case "gear":
            return _polar(_ROUND, 0.85 + 0.15 * np.clip(3 * np.cos(8 * _ROUND), -1, 1))
    raise ValueError(f"tangram has no class {shape!r}: choose one of {', '.join(CLASSES)}")


def _polar(angle_N: np.ndarray, radius_N: np.ndarray | float) -> np.ndarray:
    return np.stack([np.cos(angle_N) * radius_N, np.sin(angle_N) * radius_N], 1)


def _star(points: int, inner: float) -> np.ndarray:
    angle_N = np.arange(2 * points) * np.pi / points
    return _polar(angle_N, np.where(np.arange(2 * points) % 2, inner, 1.0))


def _box(half_width: float, half_height: float) -> np.ndarray:
    return np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * (half_width, half_height)


def _crescent(shift: float) -> np.ndarray:
    """The unit disc less a disc of radius 0.85 that is moved by `shift` to the right."""
    bite = 0.85
    x = (1 - bite**2 + shift**2) / (2 * shift)  # where the two circles meet
    tip_outer = np.arccos(x)
    tip_inner = np.arctan2(np.sqrt(1 - x**2), x - shift)
    outer = _polar(np.linspace(tip_outer, 2 * np.pi - tip_outer, 64), 1.0)
    inner = _polar(np.linspace(2 * np.pi - tip_inner, tip_inner, 64), bite) + np.array([shift, 0.0])
    return np.concatenate([outer, inner])


def _quarters() -> np.ndarray:
    return np.arange(4) * np.pi / 2


def _centred(corner_N2: np.ndarray) -> np.ndarray:
    """Moved so that the bounding box has its middle at the origin."""
    return corner_N2 - (corner_N2.min(0) + corner_N2.max(0)) / 2


def _fit(corner_N2: np.ndarray) -> np.ndarray:
    """Scaled so that the farthest corner lies on the unit circle."""
    return corner_N2 / np.linalg.norm(corner_N2, axis=1).max()
