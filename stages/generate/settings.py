"""What the settings of every method that draws images share: its sampler."""

from __future__ import annotations

from pydantic import Field

from schemas.settings import Settings
from stages.schedule import SchedulerName


class SamplerSettings(Settings):
    """Base of the settings of a method of generating."""

    steps: int = Field(20, ge=1)
    """Sampler steps; SeedSelect's and NAO's code draw with 20."""
    guidance: float = Field(4.0, ge=0)
    """Scale of classifier-free guidance. 1 is none, at half the work; Stable Diffusion is used at 7.5."""
    scheduler: SchedulerName | None = None
    """Rule of the steps, by its usual name. Not set: ddim, and flow for a flow-matching backbone."""
