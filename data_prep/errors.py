"""The errors that are a user's to mend: one line, exit code 2, no traceback."""


class UserError(ValueError):
    """A mistake of the user's: the message is one line that says what is wrong, where, and what to
    do (exit code 2)."""


class ServerUnreachable(UserError):
    """A server that has not answered this process at all: not there, or not yet."""
