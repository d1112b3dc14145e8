"""The exception for what a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake, told in one line: the value, what is allowed, and where there is one the command that mends it.

    The command line prints it without a traceback and exits with status 2.
    """


class DivergedError(UserError):
    """Weights or activations that are not finite: the training's learning rate was too high."""
