"""Noise levels of a diffusion by their ᾱ."""

from stages.schedule import Level


def at(alpha: float) -> Level:
    return Level(alpha**0.5, (1 - alpha) ** 0.5)
