"""The `mpdsgr` command, with one module per subcommand, which is loaded when it is called so that --help stays fast."""

import gc
import importlib
import os
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from mpdsgr_deploy import __version__
from mpdsgr_deploy.errors import EvaluationError, InputError, MpdsgrError
from mpdsgr_deploy.progress import show_progress

COMMANDS = (
    "demo",
    "train",
    "export",
    "adopt",
    "build",
    "validate",
    "verify",
    "sign",
    "predict",
    "serve",
    "bench",
    "deploy",
    "inspect",
    "doctor",
    "recipes",
    "bundles",
    "table",
    "study",
)


class OneLineErrors(click.Command):
    """A command whose errors become one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # an error of this at exit would be printed as a traceback
            return result
        except BrokenPipeError:  # the reader closed the pipe, as `| head` does
            drop_output()
            sys.exit(0)
        except MpdsgrError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; results that were finished before are on disk", err=True)
            sys.exit(130)
        except OSError as error:
            click.echo(f"error: {error}", err=True)
            drop_output()
            sys.exit(InputError.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:  # a bug of this package: Python's exit code 1 would mean that the gate failed
            traceback.print_exc()
            click.echo(
                "error: this is a bug in mpdsgr-deploy, so the command gave no result; please report it", err=True
            )
            sys.exit(EvaluationError.exit_code)


def drop_output() -> None:
    """Discard unwritten output to stdout, which Python would otherwise try to write again at exit, with an error."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def at_home(argument: str) -> str:
    """Return an argument with a leading ~ replaced by the user's home directory, even after OPTION= (unlike shells)."""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("--") and value.startswith("~"):
        return f"{option}={os.path.expanduser(value)}"
    return os.path.expanduser(argument) if argument.startswith("~") else argument


class LazyGroup(OneLineErrors, click.Group):
    """A group of commands that imports the module of a command only when it is needed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [at_home(text) for text in args])

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"mpdsgr_deploy.cli.{name}").command
        return command


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mpdsgr")
def main() -> None:
    """Train robust spiking neural networks, export them to ONNX, and test that the exported network is still robust.

    A bundle is the directory that `mpdsgr export` writes: ONNX files, test images, and the accuracies that were
    measured with and without attacks. The commands `validate`, `predict`, `serve` and others take a bundle.

    \b
    Exit codes of all commands:
      0  success
      1  the gate failed: the network is less accurate or less robust than allowed
      2  the usage or an input is wrong
      3  an evaluation is not valid, so that it proves nothing

    Nothing has run on a GPU yet: `mpdsgr doctor` lists the parts that are untested for that reason.

    \b
    Start here:  mpdsgr demo
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, with >&- for example
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - it lasts as long as the process
    if not sys.warnoptions:  # warnings of libraries are meant for developers, not for users of this command
        warnings.simplefilter("ignore")
    # torch and Lightning are 600,000 objects: Python's own intervals spend a tenth of a command on looking at them
    gc.set_threshold(20_000, 50, 50)
    show_progress()
