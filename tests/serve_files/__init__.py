"""What must hold of a copy of `serve/`, checked by linters of others and by what they cannot know.

Every check takes the copy's path and raises AssertionError.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from mpdsgr_deploy.serving.settings import load_settings

BIN = Path(sys.executable).parent
PROMTOOL, KUBECTL = shutil.which("promtool"), shutil.which("kubectl")
HTTP, GRPC = 8000, 8001
LIVE, READY = "/v2/health/live", "/v2/health/ready"


def load(path: Path) -> Any:
    """YAML, its anchors resolved."""
    return YAML(typ="safe").load(path.read_text())


def accepts(*command: object, cwd: Path) -> None:
    """A linter that has nothing to say."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def ending(settings: Path) -> float:
    """Seconds from SIGTERM to the end, at most."""
    limits = load_settings(settings).limits
    return limits.grace_seconds + limits.drain_seconds
