"""The errors a user can cause or must act on; each carries the exit code of the `mpdsgr` command."""


class MpdsgrError(Exception):
    """Base of every error whose message is written for the user: one line that says what to do next."""

    exit_code = 2


class InputError(MpdsgrError):
    """A wrong option, recipe, file or environment (exit code 2)."""


class OutOfMemory(InputError):  # noqa: N818, it is what the user reads
    """A backend has too little memory for a batch of this size; a smaller one may fit."""


class EvaluationError(MpdsgrError):
    """The evaluation itself is not valid, so it proves nothing (exit code 3)."""

    exit_code = 3
