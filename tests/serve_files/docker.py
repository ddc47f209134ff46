"""ServerSettings, Dockerfile and compose files."""

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

from mpdsgr_deploy.cli.serve import command
from mpdsgr_deploy.serving.settings import ServerSettings, load_settings
from serve_files import BIN, GRPC, HTTP, READY, accepts, ending, load

HARDENED = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}


def settings_are_the_defaults(serve: Path) -> None:
    """Every key with its default, in the model's order, each with a word on it."""
    text = (serve / "settings.toml").read_text()
    told, real = tomllib.loads(text), ServerSettings().model_dump()
    assert told == real
    assert [*told] == [*real]
    assert all([*told[section]] == [*real[section]] for section in real)
    assert all("# " in line for line in text.splitlines() if "=" in line)
    load_settings(serve / "settings.toml")


def instructions(serve: Path) -> list[tuple[str, str]]:
    """The Dockerfile's, joined over lines."""
    lines = [line for line in (serve / "docker/Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def final_stage(serve: Path) -> dict[str, str]:
    """The last stage's instructions, of each kind the last."""
    found = instructions(serve)
    start = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    return dict(found[start:])


def environment(serve: Path) -> dict[str, str]:
    """What the image sets, but for PATH, which is the image's own."""
    pairs = (word.split("=", 1) for word in shlex.split(final_stage(serve)["ENV"]))
    return {name: value for name, value in pairs if name != "PATH"}


def health_check(serve: Path) -> list[str]:
    """The command of HEALTHCHECK."""
    command: list[str] = json.loads(final_stage(serve)["HEALTHCHECK"].partition("CMD")[2])
    return command


def dockerfile_lints(serve: Path) -> None:
    accepts(BIN / "hadolint", "docker/Dockerfile", cwd=serve)


def image_is_small_and_unprivileged(serve: Path) -> None:
    found, last = instructions(serve), final_stage(serve)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert last["EXPOSE"].split() == [str(HTTP), str(GRPC)]
    assert json.loads(last["ENTRYPOINT"])[:2] == ["mpdsgr", "serve"]
    assert f"http://127.0.0.1:{HTTP}{READY}'" in health_check(serve)[-1]
    assert {"HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}.items() <= environment(serve).items()
    stages = [value for name, value in found if name == "FROM"]
    assert len(stages) == 2  # what builds stays behind
    assert len({stage.split()[0] for stage in stages}) == 1  # or the environment's python is another
    assert not any(re.search(r"apt-get|curl|gcc", value) for name, value in found if name == "RUN")


def compose(serve: Path) -> dict[str, Any]:
    """compose.yaml."""
    found: dict[str, Any] = load(serve / "docker/compose.yaml")
    return found


def compose_follows_its_schema(serve: Path) -> None:
    files = (serve / "docker").glob("compose*.yaml")
    accepts(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *files, cwd=serve)


def compose_is_locked_down(serve: Path) -> None:
    found = compose(serve)
    for name, service in found["services"].items():
        assert service.items() >= HARDENED.items(), name
        assert {"mem_limit", "pids_limit"} <= service.keys()
        assert all(str(port).startswith("127.0.0.1:") for port in service["ports"]), name
        assert ":latest" not in service["image"]
        assert ":" in service["image"]
        for volume in service["volumes"]:
            assert volume["type"] == "volume" or volume["read_only"], name
            if volume["source"].startswith(".."):
                assert (serve / "docker" / volume["source"]).exists(), volume["source"]
        for secret in service["secrets"]:
            assert (secret if isinstance(secret, str) else secret["source"]) in found["secrets"]
    assert all(not secret["file"].startswith(".") for secret in found["secrets"].values())  # nothing beside the code
    server = found["services"]["server"]
    assert server["user"] == final_stage(serve)["USER"]
    assert [port.rsplit(":", 1)[1] for port in server["ports"]] == final_stage(serve)["EXPOSE"].split()
    assert int(server["stop_grace_period"].removesuffix("s")) > ending(serve / "settings.toml")
    assert not [name for name, service in found["services"].items() if "profiles" not in service and name != "server"]


def gpu_changes_only_what_it_must(serve: Path) -> None:
    """The options of both are the same but for the backend."""
    gpu = load(serve / "docker/compose.gpu.yaml")["services"]["server"]
    options = [word for word in gpu["command"] if word != "--backend=onnxruntime-cuda"]
    assert options == compose(serve)["services"]["server"]["command"] != gpu["command"]
    assert "gpu" in gpu["build"]["args"]["EXTRAS"].split(",")
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def command_lines(serve: Path) -> dict[str, list[str]]:
    """What each file gives `mpdsgr serve`."""
    entry = json.loads(final_stage(serve)["ENTRYPOINT"])[2:]
    docker, kubernetes = serve / "docker", serve / "kubernetes"
    found = {file.name: load(file)["services"]["server"]["command"] for file in docker.glob("compose*.yaml")}
    for variant in ("cpu", "gpu"):
        pod = load(kubernetes / variant / "deployment.yaml")["spec"]["template"]["spec"]
        found[variant] = pod["containers"][0]["args"]
    return {name: [*entry, *words] for name, words in found.items()}


def options_exist(serve: Path) -> None:
    """Of the command that is installed here, with a readable value for each."""
    known = {option for parameter in command.params for option in parameter.opts}
    for name, words in command_lines(serve).items():
        used = {word.split("=", 1)[0] for word in words if word.startswith("--")}
        assert used <= known, name
        assert "--api-key-file" in used, name
