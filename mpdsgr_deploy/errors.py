"""Errors that a user can cause or act on; each has an exit code of the `mpdsgr` command."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class MpdsgrError(Exception):
    """The base of all errors whose message is written for the user: one line that says what to do next."""

    exit_code = 2


class InputError(MpdsgrError):
    """A wrong option, recipe, file or environment (exit code 2)."""


class MissingData(InputError):  # noqa: N818 - the name describes the problem
    """A data set that is not on this machine (exit code 2). A damaged data set is another InputError."""


class StoreError(MpdsgrError):
    """An object store that cannot be used: no credentials, no access, no connection (exit code 2).

    It is no InputError, because no input is at fault: a run that skips faulty inputs ends with this error.
    """


class OutOfMemory(InputError):  # noqa: N818 - the name describes the event
    """A batch that does not fit into the device's memory (exit code 2). A smaller one may fit."""


class EvaluationError(MpdsgrError):
    """An evaluation that is not valid, so that its result proves nothing (exit code 3)."""

    exit_code = 3


@contextmanager
def explained(explain: Callable[[Exception], MpdsgrError]) -> Iterator[None]:
    """Raise errors of other libraries, which may be of any type, in a with block as the error that `explain` returns.

    Errors of this package are raised unchanged.
    """
    try:
        yield
    except MpdsgrError:
        raise
    except Exception as error:
        raise explain(error) from error


def one_line(error: object) -> str:
    """Return the message of any error on one line, or the name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
