"""A small build needs references; how a test makes one is said in tests/small_build.py."""

from tests.local_build import one_backbone  # noqa: F401  fixture
from tests.small_build import drawings, references, seedloom  # noqa: F401  fixtures
