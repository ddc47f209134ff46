"""The README's path works as it is written, and no command reaches another machine unless it is told to.

Watched where programs in C++ ask the system too.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from missing_packages import HAS_TORCH
from PIL import Image
from served import BUNDLE, INFER, Served, images, request
from signatures import new_keys

from mpdsgr_deploy.cli import COMMANDS
from mpdsgr_deploy.runtime.session import preload_libraries

VARIABLES = ("ORT_DISABLE_TELEMETRY", "RAY_USAGE_STATS_ENABLED")
COMPILER = shutil.which("cc")
WATCH = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
static void note(const char *call, const char *where) {
  FILE *file = fopen(getenv("SOCKET_WATCH"), "a");
  if (file) { fprintf(file, "%s %s\n", call, where ? where : "0.0.0.0"); fclose(file); }
}
static void address(const char *call, const struct sockaddr *to) {
  char text[64] = "";
  if (to && to->sa_family == AF_INET) inet_ntop(AF_INET, &((struct sockaddr_in *)to)->sin_addr, text, sizeof text);
  if (to && to->sa_family == AF_INET6) inet_ntop(AF_INET6, &((struct sockaddr_in6 *)to)->sin6_addr, text, sizeof text);
  if (*text) note(call, text);
}
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
  note("getaddrinfo", node);
  return ((__typeof__(&getaddrinfo))dlsym(RTLD_NEXT, "getaddrinfo"))(node, service, hints, found);
}
int connect(int file, const struct sockaddr *to, socklen_t length) {
  address("connect", to);
  return ((__typeof__(&connect))dlsym(RTLD_NEXT, "connect"))(file, to, length);
}
ssize_t sendto(int file, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t length) {
  address("sendto", to);
  return ((__typeof__(&sendto))dlsym(RTLD_NEXT, "sendto"))(file, data, size, flags, to, length);
}
"""
ONE_AFTER_THE_OTHER = """
import json, sys
from mpdsgr_deploy.cli import main
from mpdsgr_deploy.runtime import BACKENDS
del BACKENDS.loaded["torch-compile"]  # for which `doctor` has a C++ compiler work for half a minute
for command in json.loads(sys.argv[1]):
    try:
        main(command)
    except SystemExit as end:
        if end.code:
            sys.exit(f"{command}: {end.code}")
"""
README = (Path(__file__).parent.parent / "README.md").read_text()
PATH = [shlex.split(line)[1:] for line in re.findall(r"^ {4}(mpdsgr .*?)(?: {2,}#.*)?$", README, re.MULTILINE)]
# added to the path's `train`, so that every line after it is a matter of seconds; `make demo` trains at full length
SMALL = (
    *("model.width=0.25", "encoding.T=1", "training.epochs=3", "training.batch_size=65", "validation.limit=20"),
    *("attack.eps=0.1", "attack.step=0.03", "attack.strong_steps=5", "gate.images=20", "gate.max_drop=0.5"),
)
TABLE = """
title = "Of the tests"
seeds = [0]
limit = 20
set = [
    "model.width=0.125", "encoding.T=1", "training.epochs=1", "training.pictures=0",
    "attack.strong_steps=2", "data.train_images=200",
]
"""
ROWS = """
[[rows]]
recipe = "digits-reg"
"""
METHODS = """
tier = "commit"
[[methods]]
name = "reg"
recipe = "digits-reg"
[[settings]]
factor = "base"
name = "base"
"""
LOOPBACK = re.compile(r"\w+ (127\.\S+|::1|localhost|0\.0\.0\.0|::|::ffff:127\.\S+)")


class Home:
    """A user's directory, and what the processes started with it asked of the network."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._log = directory, directory / "watch.log"
        library = directory / "watch.so"
        (directory / "watch.c").write_text(WATCH)
        command = [str(COMPILER), "-shared", "-fPIC", "-o", str(library), str(directory / "watch.c"), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        self.variables = {"HOME": str(directory), "LD_PRELOAD": str(library), "SOCKET_WATCH": str(self._log)}

    def run_all(self, commands: list[list[str]]) -> str:
        """What commands print, one after the other in one process, which imports everything once."""
        environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
        command = [sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(commands)]
        done = subprocess.run(
            command, env=environment | self.variables, cwd=self.directory, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def asked(self) -> list[str]:
        """Where anything but this machine was asked for, and what telemetry keeps in the user's cache."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        kept = [str(path) for path in self.directory.rglob("*") if "onnxruntime" in path.name.lower()]
        return [line for line in lines if not LOOPBACK.fullmatch(line)] + kept


@pytest.fixture
def home(tmp_path: Path) -> Home:
    if COMPILER is None:
        pytest.skip("no C compiler to build the watch with")
    return Home(tmp_path)


def beside_the_path(home: Path) -> dict[str, list[object]]:
    """The arguments of every command that the path has not, but for `demo`, which calls those of the path."""
    (home / "t.toml").write_text(TABLE + ROWS)
    (home / "s.toml").write_text(TABLE + METHODS)
    keys, signed = new_keys(home, "ci"), shutil.copytree(BUNDLE, home / "signed")
    results = ["--seeds", "0", "--runs", home / "runs", "--out", home / "results"]
    adopted = ["--surrogate", "triangle:1", "--limit", 20, "--out", home / "adopted"]
    return {
        "adopt": [BUNDLE / "model.fp32.onnx", "--images", "digits", *adopted],
        "sign": [signed, "--key", keys.private],
        "verify": [signed, "--key", keys.public],
        "bench": [BUNDLE, "--seconds", 0.1, "--batch", 1, "--backend", "onnxruntime-cpu"],
        "deploy": ["triton", BUNDLE, "--out", home / "triton"],
        "bundles": [],
        "table": [home / "t.toml", *results],
        "study": [home / "s.toml", *results],
    }


@pytest.mark.skipif(not HAS_TORCH, reason="needs the extra `train`")
def test_the_readmes_path_works_and_no_command_asks_anybody(home: Home) -> None:
    """`serve` does not end: the next test has one, and what the server's manual shows has tests of its own."""
    folder = home.directory
    (folder / "photos").mkdir()
    Image.new("L", (20, 30), 128).save(folder / "photos" / "grey.png")
    names = ["recipes", "train", "inspect", "export", "inspect", "validate", "predict", "build", "doctor", "serve"]
    others = beside_the_path(folder)
    assert [words[0] for words in PATH] == names
    assert {*names, *others, "demo"} == set(COMMANDS)
    small = [word for setting in SMALL for word in ("--set", setting)]
    path = [[*words, *(small if words[0] == "train" else [])] for words in PATH[:-1]]
    shown = home.run_all([*path, *([name, *map(str, arguments)] for name, arguments in others.items())])
    assert "[train]" in shown  # of `doctor`: the extras
    assert (folder / "reports" / "digits" / "report.html").exists()
    assert "grey.png" in (folder / "labels.csv").read_text()
    assert home.asked == []


def test_a_server_asks_nobody(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in home.variables.items():
        monkeypatch.setenv(key, value)
    with Served() as served:
        for _ in range(20):
            assert served.post(INFER, request(images())).status == 200
        assert served.get("/metrics").status == 200
    assert home.asked == []


@pytest.mark.parametrize("call", ["socket.getaddrinfo('host.invalid', 80)", "s.sendto(b'', ('192.0.2.1', 53))"])
def test_the_watch_sees_who_asks(call: str, home: Home) -> None:
    """Not telemetry itself: whether onnxruntime sends any in a short run depends on the machine."""
    code = f"import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); {call}"
    subprocess.run([sys.executable, "-c", code], env=os.environ | home.variables, capture_output=True, check=False)
    assert home.asked in (["getaddrinfo host.invalid"], ["sendto 192.0.2.1"])


def test_what_telemetry_leaves_in_the_users_home_is_seen(home: Home) -> None:
    (home.directory / ".cache" / "Microsoft" / "onnxruntime").mkdir(parents=True)
    assert home.asked != []


def test_cudas_libraries_are_loaded_from_their_wheels(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """onnxruntime-gpu's provider has no path to them; on the CPU package the call does nothing."""
    calls = []

    def preload_dlls() -> None:
        print("Failed to load libcublas")
        calls.append(1)
        raise RuntimeError

    preload_libraries(SimpleNamespace(preload_dlls=preload_dlls))
    preload_libraries(SimpleNamespace())  # an older one
    assert (calls, capsys.readouterr().out) == ([1], "")
