"""The errors that are a user's to mend: one line, exit code 2, no traceback."""


class UserError(ValueError):
    """A mistake of the user's: the message is one line that says what is wrong, where, and what to
    do (exit code 2)."""


class ServerGone(UserError):
    """A server that does not answer any more, or answers nothing of use: lost, or failing."""


class ServerUnreachable(ServerGone):
    """A server that has not answered this process at all: not there, or not yet."""


class ServerRefused(UserError):
    """A server that refuses a request (HTTP 4xx). status: its code."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
