"""The one error class for mistakes a person can repair."""


class RuadaptError(Exception):
    """A mistake in the input or the environment; the message names the thing and the way out."""
