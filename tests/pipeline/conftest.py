"""A small build needs references; how a test makes one is said in tests/small_build.py."""

from tests.small_build import drawings, references, seedloom  # noqa: F401  fixtures
