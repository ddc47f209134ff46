"""mpdsgr serve"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from mpdsgr_deploy.allocator import limit_free_memory
from mpdsgr_deploy.cli.output import overrides_option, signature_option, verdict_option
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.runtime.open import DEFAULT_BACKEND

LOST = 4  # the exit code of a server that stopped before it had answered all accepted requests
FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("serve")
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]BUNDLE[@PRECISION]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port for HTTP; 0 takes any free port.",
)
@click.option(
    "--grpc-port",
    type=click.IntRange(0, 65535),
    default=8001,
    show_default=True,
    help="Port for gRPC; 0 takes any free port.",
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="Number of server processes, which share the ports.  [default: the setting machine.processes, 1]",
)
@click.option(
    "--backend", default=DEFAULT_BACKEND, show_default=True, help="Runtime of the networks; `mpdsgr doctor` lists all."
)
@click.option("--settings", type=FILE, help="TOML file with settings; serve/settings.toml lists all with comments.")
@overrides_option
@click.option(
    "--api-key-file",
    type=FILE,
    help="File of keys, one per line, of which clients must send one; it is read again when it changes.",
)
@click.option("--tls-certificate", type=FILE, help="PEM file with the server's certificate; needs --tls-key.")
@click.option("--tls-key", type=FILE, help="PEM file with the private key of --tls-certificate.")
@click.option(
    "--tls-client-ca", type=FILE, help="PEM file with the authorities that must have signed the clients' certificates."
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Allow a --host that other machines reach, without API keys or client certificates.",
)
@signature_option
@verdict_option
@click.option(
    "--repository-control", is_flag=True, help="Allow requests that load and unload the models of this command."
)
def command(
    models: tuple[str, ...],
    host: str,
    port: int,
    grpc_port: int,
    processes: int | None,
    backend: str,
    settings: Path | None,
    overrides: tuple[str, ...],
    api_key_file: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    insecure: bool,
    signature: str | None,
    least_tier: str | None,
    repository_control: bool,
) -> None:
    """Serve networks over HTTP and gRPC.

    The server speaks the Open Inference Protocol (v2), over HTTP with JSON or binary tensors, and over gRPC. A model is
    called NAME, or without a NAME like its bundle's directory, followed by -PRECISION for a precision other than fp32.
    Before the server is ready, each network must give the stored answers to its bundle's golden batch, a few images
    whose logits are known.

    SIGTERM stops the server after all accepted requests are answered; the exit code is 4 if some could not be answered
    in time. SIGHUP reads TLS certificates again and loads bundles that have changed; a changed bundle replaces the old
    one once its golden batch is answered correctly.

    On a machine with several GPUs start one server per GPU and set CUDA_VISIBLE_DEVICES.

    \b
    Example:
      mpdsgr serve bundles/digits
      mpdsgr serve bundles/digits bundles/digits@int8 --host 0.0.0.0 --api-key-file keys.txt
    """
    if find_spec("fcntl") is None:
        raise InputError("mpdsgr serve needs Linux or macOS; on Windows run it in WSL or in a container")
    limit_free_memory()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC reads this when it is imported; its log does not help users
    need("httptools", "serve")
    need("orjson", "serve")
    need("tritonclient.grpc", "serve")
    from mpdsgr_deploy.serving.app import Server
    from mpdsgr_deploy.serving.group import group_of
    from mpdsgr_deploy.serving.listener import Tls
    from mpdsgr_deploy.serving.logs import log_json
    from mpdsgr_deploy.serving.server import Address, run
    from mpdsgr_deploy.serving.settings import load_settings

    if (tls_certificate is None) != (tls_key is None) or (tls_client_ca and not tls_certificate):
        raise InputError("--tls-certificate and --tls-key belong together, and --tls-client-ca needs both")
    tls = None
    if tls_certificate is not None and tls_key is not None:
        tls = Tls(tls_certificate, tls_key, tls_client_ca)
    log_json()
    demanded = load_settings(settings, overrides).demanding(signature, least_tier)
    with group_of(processes or demanded.machine.processes) as group:
        server = Server(
            models,
            demanded,
            backend=backend,
            keys=api_key_file,
            repository_control=repository_control,
            group=group,
        )
        lost = run(server, Address(host, port, grpc_port), tls, insecure=insecure)
    if lost:
        sys.exit(LOST)
