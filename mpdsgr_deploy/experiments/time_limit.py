"""Run a command with a time limit."""

import subprocess
from collections.abc import Sequence

from mpdsgr_deploy.progress import log

GRACE = 20.0  # seconds between the request to stop and the end


def run_limited(command: Sequence[str], seconds: float) -> int | None:
    """Run a command and return its exit status, or None if it was ended because the time was up."""
    with subprocess.Popen(command) as child:
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            log.info("the time is up; the same command continues")
            child.terminate()  # not SIGINT, which a command in the background of a shell ignores
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
    return None
