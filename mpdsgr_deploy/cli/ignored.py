"""Refuse options that a command would ignore in the mode in which the user runs it."""

import click

from mpdsgr_deploy.errors import InputError


def refuse_ignored(mode: str, *parameters: str) -> None:
    """Raise InputError if the command line has one of `parameters`, by the names that the command's function uses.

    mode: what ignores them, the subject of the message. Values from the environment are for all commands and accepted.
    """
    ignored = [given for name, given in _given().items() if name in parameters]
    if ignored:
        raise InputError(f"{mode} ignores {', '.join(ignored)}; leave {'them' if len(ignored) > 1 else 'it'} out")


def refuse_all_but(mode: str, *parameters: str) -> None:
    """Raise InputError, as `refuse_ignored` does, if the command line has anything but `parameters`."""
    refuse_ignored(mode, *(name for name in _given() if name not in parameters))


def _given() -> dict[str, str]:
    """Return the parameters on the command line, in the order of the help: how a user writes them, by name."""
    context = click.get_current_context()
    given = {}
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is click.core.ParameterSource.COMMANDLINE and context.params[name] != ():
            is_option = isinstance(parameter, click.Option)
            given[name] = parameter.opts[0] if is_option else parameter.human_readable_name
    return given
