"""What the image promises, tried without a container engine: the kernel's own walls around the Dockerfile's commands.

The server is process 1 of its own mount, network and process namespaces, has the image's user and environment, no
capability and a read-only root, and gets the command of compose.yaml.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serve_files import HTTP, docker
from served import BUNDLE

ROOT = Path(__file__).parent.parent
SERVE = ROOT / "serve"
WALLS = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
NEW_ROOT = "/mnt"
SECONDS = 60.0  # for the server to come up on a busy machine


def _walls_stand() -> bool:
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "setpriv", "ip"))):
        return False
    if Path(sys.prefix).is_relative_to("/tmp"):  # the container has a /tmp of its own
        return False
    other = ["setpriv", "--reuid=10001", "--regid=10001", "--clear-groups"]
    stranger = [*other, "--", sys.executable, "-c", "import numpy"]
    commands = [*WALLS, "ip", "link", "set", "lo", "up"], stranger  # who must be able to read this environment
    return all(subprocess.run(command, capture_output=True, check=False).returncode == 0 for command in commands)


pytestmark = pytest.mark.skipif(
    not _walls_stand(), reason="takes root, namespaces, and an environment outside /tmp that others read"
)


class Container:
    """A running server: `inside` runs a command beside it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (child := children.read_text().split()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        self.pid = int(child[0])

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        user, group = docker.final_stage(SERVE)["USER"].split(":")
        words = ["nsenter", "--target", str(self.pid), "--root", "--mount", "--net", "--pid", "--"]
        words += ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--", *command]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=SECONDS)

    def alive(self) -> None:
        """Raise AssertionError with the log if it has ended."""
        assert self._process.poll() is None, self._process.communicate()

    def healthy(self) -> subprocess.CompletedProcess[str]:
        """The image's HEALTHCHECK."""
        program, *arguments = docker.health_check(SERVE)
        assert program == "python"
        return self.inside(sys.executable, *arguments)

    def get(self, path: str, key: str) -> str:
        script = (
            "import sys, urllib.request as r; told = {'Authorization': 'Bearer ' + sys.argv[2]}; "
            "print(r.urlopen(r.Request(sys.argv[1], headers=told)).read().decode())"
        )
        done = self.inside(sys.executable, "-c", script, f"http://127.0.0.1:{HTTP}{path}", key)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stop(self) -> tuple[int, str]:
        """The image's STOPSIGNAL; the exit code and the log."""
        os.kill(self.pid, getattr(signal, docker.final_stage(SERVE)["STOPSIGNAL"]))
        _, log = self._process.communicate(timeout=SECONDS)
        return self._process.returncode, log


def _mounts(places: dict[str, Path]) -> list[str]:
    """The lines that show the sources, read-only, below ROOT."""
    lines = []
    for place, source in places.items():
        to = shlex.quote(f"{NEW_ROOT}{place}")
        lines += [f"mkdir -p {to}"] if source.is_dir() else [f"mkdir -p $(dirname {to})", f"touch {to}"]
        lines += [f"mount --bind {shlex.quote(str(source))} {to}", f"mount -o remount,bind,ro {to}"]
    return lines


@contextmanager
def container(bundle: Path, key_file: Path) -> Iterator[Container]:
    """Start compose's service `server`, with nothing but Python, the package and what compose mounts to be seen."""
    service = docker.compose(SERVE)["services"]["server"]
    command = [*json.loads(docker.final_stage(SERVE)["ENTRYPOINT"]), *service["command"]]
    command = [word.replace("${MPDSGR_BUNDLE:-digits}", "digits") for word in command]
    (settings,) = (v["target"] for v in service["volumes"] if v["source"] == "../settings.toml")
    (folder,) = (v["target"] for v in service["volumes"] if "MPDSGR_BUNDLES" in v["source"])
    (secret,) = service["secrets"]
    machine = {path: Path(path) for path in ("/usr", sys.base_prefix, sys.prefix, str(ROOT))}
    given = {f"{folder}/digits": bundle, settings: SERVE / "settings.toml", f"/run/secrets/{secret}": key_file}
    (tmpfs,) = service["tmpfs"]
    target, _, options = tmpfs.partition(":")
    user, group = service["user"].split(":")
    variables = {
        **docker.environment(SERVE),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
    }
    privileges = [f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs"]
    privileges += ["--bounding-set=-all", "--inh-caps=-all"]
    words = [*privileges, "env", "-i", *(f"{name}={value}" for name, value in variables.items()), *command]
    script = [
        "set -e",
        "ip link set lo up",
        f"mount -t tmpfs tmpfs {NEW_ROOT}",
        *_mounts(machine | given),
        f"cd {NEW_ROOT}",
        "ln -s usr/bin usr/lib usr/lib64 .",
        f"mkdir -p dev proc sys .{target}",
        "mount --rbind /dev dev; mount --rbind /sys sys; mount -t proc proc proc",
        f"mount -t tmpfs -o {options} tmpfs .{target}",
        "mount -o remount,ro .",
        shlex.join(["exec", "chroot", ".", "setpriv", *words]),
    ]
    walls = [*WALLS, "sh", "-c", "\n".join(script)]
    with subprocess.Popen(walls, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            yield Container(process)
        finally:
            process.kill()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "api-keys"
    path.write_text(f"# two clients\n{secrets.token_urlsafe(32)}\n{secrets.token_urlsafe(32)}\n")
    return path


def until_healthy(running: Container) -> None:
    deadline = time.monotonic() + SECONDS
    while (done := running.healthy()).returncode != 0:
        running.alive()
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.2)


def test_the_image_commands_work_behind_the_walls(key_file: Path) -> None:
    with container(BUNDLE, key_file) as running:
        until_healthy(running)
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{running.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert set(status["Uid"].split()) == {"10001"}
        assert (status["NoNewPrivs"], int(status["CapEff"], 16), int(status["CapBnd"], 16)) == ("1", 0, 0)
        assert status["NSpid"].split()[-1] == "1"
        for place in ("/x", "/bundles/digits/x", "/run/secrets/api-keys"):
            assert re.search("Read-only|Permission denied", running.inside("touch", place).stderr), place
        for key in key_file.read_text().splitlines()[1:]:
            assert json.loads(running.get("/status", key))["models"][0]["state"] == "READY"
        os.kill(running.pid, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS
        while running.healthy().returncode == 0:  # not ready any more, and not gone yet
            assert time.monotonic() < deadline
        code, log = running.stop()
        assert code == 0, log
        assert "Traceback" not in log
