"""A process that has imported what the commands import, and forks a child for each command it is asked to run.

Importing torch and Lightning takes seconds of processor time; so each command costs its own work alone. A line of JSON
on stdin is a command, a line on stdout its exit code.
"""

import atexit
import gc
import json
import os
import sys
import threading
from importlib import import_module

PACKAGE = ("cli", "training", "exporting", "validation", "diagnostics.checkpoint", "runtime.torch_model")
MODULES = (*(f"mpdsgr_deploy.{name}" for name in PACKAGE), "sklearn.datasets")


def run(arguments: list[str], cwd: str, environment: dict[str, str], prelude: str, output: list[str]) -> None:
    """In a forked child: the command, as in a process of its own. prelude: code that is executed first."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, path in enumerate([os.devnull, *output]):
        opened = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    exec(prelude, {})
    from mpdsgr_deploy.cli import main

    main(arguments, prog_name="mpdsgr")


def leave(status: object) -> None:
    """End as an interpreter does, but leave it to the kernel to free what was imported, which else takes seconds."""
    code = status if isinstance(status, int) else int(status is not None)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    for name in MODULES:
        import_module(name)
    gc.freeze()  # a collection in a child would copy every page that holds an object
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                run(**json.loads(line))
            except SystemExit as end:
                leave(end.code)
            leave(None)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
