"""The one error class for mistakes a person can repair."""


class RuadaptError(Exception):
    """A mistake in the input or the environment; the message names the thing and the way out.

    `exit_code` is what a command ends with that stops at it.
    """

    exit_code = 2
