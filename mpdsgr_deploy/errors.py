"""The errors a user can cause or must act on; each carries the exit code of the `mpdsgr` command."""


class MpdsgrError(Exception):
    """Base of every error whose message is written for the user: one line that says what to do next."""

    exit_code = 2


class InputError(MpdsgrError):
    """A wrong option, recipe, file or environment (exit code 2)."""


class MissingData(InputError):  # noqa: N818 - the name describes the problem
    """A data set that is not on this machine; a damaged one is an InputError (exit code 2)."""


class StoreError(MpdsgrError):
    """An object store that cannot be asked: no credentials, no access, no connection (exit code 2).

    It is not an InputError, because no input is at fault: a run that skips bad inputs ends with it.
    """


class OutOfMemory(InputError):  # noqa: N818 - the name describes the event
    """The device's memory does not hold a batch; a smaller one may fit (exit code 2)."""


class EvaluationError(MpdsgrError):
    """The evaluation itself is not valid, so it proves nothing (exit code 3)."""

    exit_code = 3


def one_line(error: object) -> str:
    """Return the message of any error on one line, or the name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
