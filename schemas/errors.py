"""The two ways in which a run ends badly for a reason that a person can mend."""


class UserError(Exception):
    """What the user gave cannot be used: one line that says what was given, what is allowed, what to do.

    The command line prints the line and exits with `exit_code`; any other exception is an internal fault,
    keeps its traceback and exits with 1.
    """

    exit_code = 2


class Damaged(UserError):
    """A stored object is not what was written: names the object and what differs."""

    exit_code = 4


class Busy(UserError):
    """Another run is at work there: says which."""

    exit_code = 5


class Interrupted(UserError):
    """The run was stopped from outside (Ctrl-C, SIGTERM); the message says how to go on."""

    exit_code = 130
