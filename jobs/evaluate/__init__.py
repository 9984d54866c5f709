"""`seedloom evaluate …`: what the methods do to images, judged on tangram.

Heavy libraries are imported when a command runs.
"""

import typer

from jobs.evaluate.confusion import confusion
from jobs.evaluate.directions import directions
from jobs.evaluate.geometry import geometry
from jobs.evaluate.hard_negatives import hard_negatives
from jobs.evaluate.inversion import inversion
from jobs.evaluate.long_tail import long_tail
from jobs.evaluate.minority import minority
from jobs.evaluate.rare import rare

evaluations = typer.Typer(help="Judge the methods on the embedded model.", no_args_is_help=True)
evaluations.command("geometry")(geometry)
evaluations.command("inversion")(inversion)
evaluations.command("directions")(directions)
evaluations.command("confusion")(confusion)
evaluations.command("rare")(rare)
evaluations.command("hard-negatives")(hard_negatives)
evaluations.command("minority")(minority)
evaluations.command("long-tail")(long_tail)
