"""The server's ASGI application as a Ray Serve deployment, imported by the configs of `mpdsgr deploy ray`."""

from pathlib import Path

from ray import serve

from mpdsgr_deploy.allocator import limit_free_memory
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.serving.app import Server
from mpdsgr_deploy.serving.asgi import Asgi
from mpdsgr_deploy.serving.deploy.ray import DEPLOYMENT, Arguments
from mpdsgr_deploy.serving.logs import log_json


async def started(arguments: Arguments) -> Server:
    """Start a server and load its models. Raises MpdsgrError if a model cannot serve or is not that of the config."""
    keys = None if arguments.api_key_file is None else Path(arguments.api_key_file)
    models = [f"{network.name}={network.bundle}@{network.precision}" for network in arguments.networks]
    server = Server(models, arguments.settings, backend=arguments.backend, keys=keys)
    await server.start()
    for network in arguments.networks:
        if server.repository.model(network.name).digest != network.digest:
            await server.close()
            raise InputError(
                f"{network.bundle} is not the bundle that was deployed; copy that bundle to this node, or write a "
                "new configuration"
            )
    return server


@serve.deployment(name=DEPLOYMENT)
@serve.ingress()
class Replica:
    """A replica with one server. If its start fails, Ray shows the error as the reason of the failed deployment."""

    async def __init__(self, arguments: Arguments) -> None:  # type: ignore[misc]  # Ray awaits it
        limit_free_memory()
        log_json()
        self._server = await started(arguments)  # not in the application's lifespan, because Ray hides its errors

    def __serve_build_asgi_app__(self) -> Asgi:
        return Asgi(self._server, with_id=False)

    async def check_health(self) -> None:
        """Raise RuntimeError if the server is not ready. Ray calls this often, and replaces a replica that raises."""
        if not self._server.ready:
            raise RuntimeError("not ready: " + str(self._server.index(ready=False)))


def build(arguments: Arguments) -> serve.Application:
    """Build the application from a config's `args`."""
    return Replica.bind(arguments)  # type: ignore[attr-defined]
