"""A Ray Serve config that runs the server of this package in every replica, behind an HAProxy on every node.

It serves only HTTP. Whoever reaches Ray's own ports can run code on the cluster, so they must not be reachable from
outside.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose, need
from mpdsgr_deploy.runtime.open import BACKENDS
from mpdsgr_deploy.schema import Section
from mpdsgr_deploy.serving.deploy.output_directory import output_directory
from mpdsgr_deploy.serving.security import ApiKeys, check_exposure
from mpdsgr_deploy.serving.settings import ServerSettings
from mpdsgr_deploy.serving.source import Chosen

SUMS, CONFIG = "mpdsgr-ray.sha256", "serve.yaml"
APPLICATION, DEPLOYMENT = "mpdsgr", "server"
DEREGISTERED = 30 + 5  # seconds until all proxies have left a stopping replica, by Ray's own limit, and a margin
RETRIES = 2  # retries on other replicas; few, so that a request that crashes a process cannot crash all of them


class RayNetwork(Section):
    """A network that a replica serves. digest: that of the bundle for which the config was written."""

    name: str
    bundle: str
    precision: str
    digest: str


class Arguments(Section):
    """The arguments of each replica. api_key_file: its path on every node."""

    networks: Annotated[list[RayNetwork], Field(min_length=1)]
    backend: str
    api_key_file: str | None
    settings: ServerSettings


class Place(NamedTuple):
    """Where an application runs.

    replicas: the smallest and the largest number; gpu: GPUs per replica, below 1 a share of one; host, port: the
    address on every node.
    """

    replicas: tuple[int, int] = (1, 1)
    gpu: float = 0.0
    host: str = "127.0.0.1"
    port: int = 8000


def write_config(
    models: Sequence[Chosen],
    out: Path,
    place: Place,
    settings: ServerSettings,
    backend: str | None = None,
    keys: Path | None = None,
    *,
    insecure: bool = False,
) -> Path:
    """Write the config of one application with these models to the directory `out`, and return the config's path.

    out: does not exist, or was written by an earlier call. keys: the file of API keys on every node. Raises InputError
    for an unknown backend, impossible numbers, a host that others reach without `keys` unless `insecure`, and if `out`
    cannot be written.
    """
    least, most = place.replicas
    if not 1 <= least <= most:
        raise InputError(f"--replicas {least},{most}: write the smallest and the largest number, for example 1,4")
    if not (0 <= place.gpu < 1 or place.gpu == int(place.gpu)):
        raise InputError(
            f"--gpu {place.gpu:g}: Ray gives a replica a share of one GPU or whole GPUs; write for example 0.5 or 2"
        )
    if settings.machine.processes > 1:
        raise InputError("machine.processes has no effect with Ray; leave it out and use --replicas")
    backend = backend or ("onnxruntime-cuda" if place.gpu else "onnxruntime-cpu")
    choose("backend", BACKENDS, backend)
    check_exposure(place.host, authenticated=keys is not None, insecure=insecure)
    if keys is not None:
        ApiKeys(keys)
    networks = [
        RayNetwork(
            name=model.name,
            bundle=str(model.bundle.path.resolve()),
            precision=model.precision,
            digest=model.bundle.manifest.digest,
        )
        for model in models
    ]
    arguments = Arguments(
        networks=networks,
        backend=backend,
        api_key_file=None if keys is None else str(keys.resolve()),
        settings=settings,
    )
    yaml = need("yaml", "serve")
    with output_directory(out, SUMS, "directory with a Ray Serve config") as scratch:
        text = yaml.safe_dump(_config(arguments, place), sort_keys=False, width=120)
        (scratch / CONFIG).write_text(text, encoding="utf-8")
    return out / CONFIG


def _config(arguments: Arguments, place: Place) -> dict[str, Any]:
    limits = arguments.settings.limits
    haproxy = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # seconds of silence before a request's head or body has arrived; Ray's default is an hour
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(math.ceil(limits.body_seconds)),
        # inference changes no state, so requests that a stopping replica has not answered may be sent to another
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": str(RETRIES),
    }
    return {
        "proxy_location": "EveryNode",
        "controller_options": {"runtime_env": {"env_vars": haproxy}},
        "http_options": {
            "host": place.host,
            "port": place.port,
            # the server's own limits end a request first, with an answer that says why
            "request_timeout_s": limits.body_seconds + limits.request_seconds + 30,
        },
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "mpdsgr_deploy.serving.ray_app:build",
                "args": arguments.model_dump(mode="json"),
                "logging_config": {
                    "encoding": "JSON",
                    "enable_access_log": arguments.settings.log.requests,
                },
                "deployments": [_deployment(arguments.settings, place)],
            }
        ],
    }


def _deployment(settings: ServerSettings, place: Place) -> dict[str, Any]:
    limits = settings.limits
    least, most = place.replicas
    scaling: dict[str, Any] = {"num_replicas": least}
    if least < most:
        # a replica is fully used if the requests in progress fill a batch
        scaling = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": min(limits.batch, limits.connections),
            }
        }
    return {
        "name": DEPLOYMENT,
        **scaling,
        # the server bounds the queues of its models; Ray replaces only its listener, with the limit on connections
        "max_ongoing_requests": limits.connections,
        "max_queued_requests": limits.connections,
        "backpressure_config": {"status_code": 503, "retry_after_s": 1},
        "graceful_shutdown_timeout_s": limits.drain_seconds + DEREGISTERED,
        "health_check_period_s": 5,
        "health_check_timeout_s": 15,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": place.gpu},
    }
