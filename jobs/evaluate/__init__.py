"""`seedloom evaluate …`: what the methods do to images, judged on tangram.

Heavy libraries are imported when a command runs.
"""

import typer

from jobs.evaluate.directions import directions
from jobs.evaluate.geometry import geometry
from jobs.evaluate.inversion import inversion

evaluations = typer.Typer(help="Judge the methods on the embedded model.", no_args_is_help=True)
evaluations.command("geometry")(geometry)
evaluations.command("inversion")(inversion)
evaluations.command("directions")(directions)
