"""The demo's error for wrong input from its user."""


class InputError(Exception):
    """Something the user passed cannot be used; the message names the argument, what was found and what is expected."""
