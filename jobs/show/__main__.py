"""`python -m jobs.show`."""

from jobs.entry import run
from jobs.show import show

run(show)
