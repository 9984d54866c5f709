"""References for the few tests of stages that ask a plan."""

from tests.small_build import drawings  # noqa: F401  fixture
