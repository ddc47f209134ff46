"""The settings of a server, from a TOML file; the defaults suit a single machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpdsgr_deploy.demand import Demand, demand_of
from mpdsgr_deploy.schema import Count, NonNegative, Positive, Section, override, parse, read_toml
from mpdsgr_deploy.signing.trust import beside

MiB = 1 << 20


class Limits(Section):
    """The limits of a server.

    batch: images in a request, and in an inference. queue: images that wait for a model. in_flight_bytes: bytes of all
    requests in memory, decompressed. connections: open connections.
    header_seconds, body_seconds: the time in which a client must send the head and the body of a request.
    keep_alive_seconds: the time for its next request on an open connection; it must be longer than that of a load
    balancer in front, or requests get lost between the two.
    connection_age_seconds: the time after which a connection is ended between two requests, so that clients find new
    servers. request_seconds: the time from a request's arrival to its inference.
    grace_seconds: how long a server that is told to end answers "not ready" and goes on serving, so that load balancers
    turn away. drain_seconds: the time for accepted requests to end after that.
    """

    batch: Count = 64
    queue: Count = 1024
    in_flight_bytes: Count = 256 * MiB
    connections: Count = 1000
    header_seconds: Positive = 10.0
    body_seconds: Positive = 30.0
    keep_alive_seconds: Positive = 75.0
    connection_age_seconds: Positive = 600.0
    request_seconds: Positive = 20.0
    grace_seconds: NonNegative = 3.0
    drain_seconds: Positive = 30.0

    def share(self, processes: int) -> "Limits":
        """Return the limits of each of `processes` processes, which together keep these limits, but for rounding up."""
        parts = {key: -(-getattr(self, key) // processes) for key in ("queue", "in_flight_bytes", "connections")}
        return self.model_copy(update=parts)


class Machine(Section):
    """The processes of a server.

    processes: their number; all share the ports, so that reading and writing requests uses several cores. hang_seconds:
    one of several processes whose event loop stands still for longer is killed and replaced.
    """

    processes: Count = 1
    hang_seconds: Positive = 30.0


class Log(Section):
    """The log of a server. requests: log a line for every request, not only for refused ones."""

    requests: bool = False


class TrustSettings(Section):
    """The signatures that bundles need.

    require_signature: who must have signed every bundle, as a key file or IDENTITY,ISSUER; "": nobody. require_verdict:
    the least tier at which the same signer must have passed it; "": none.
    """

    require_signature: str = ""
    require_verdict: str = ""

    def demand(self) -> Demand:
        """Return these settings as a Demand. Raises InputError as `demand_of` does."""
        return demand_of(self.require_signature, self.require_verdict)


class ServerSettings(Section):
    """The whole settings file."""

    limits: Limits = Limits()
    machine: Machine = Machine()
    log: Log = Log()
    trust: TrustSettings = TrustSettings()

    def demanding(self, signature: str | None, least_tier: str | None) -> "ServerSettings":
        """Return the settings with the options --require-signature and --require-verdict; None keeps the setting."""
        options = {"require_signature": signature, "require_verdict": least_tier}
        trust = self.trust.model_copy(update={key: value for key, value in options.items() if value})
        return self.model_copy(update={"trust": trust})

    def everywhere(self) -> "ServerSettings":
        """Return the settings for servers that start in another directory: with the full path of a key file."""
        key = self.trust.require_signature
        return self.demanding(str(Path(key).resolve()) if Path(key).is_file() else None, None)


def load_settings(path: Path | None, overrides: Sequence[str] = ()) -> ServerSettings:
    """Load the settings of a file, or the defaults, with `section.key=value` overrides.

    Raises InputError for a file that cannot be read, an unknown key or a value out of range.
    """
    values: dict[str, Any] = {} if path is None else read_toml(path)
    trust = values.get("trust")
    if path is not None and isinstance(trust, dict) and isinstance(key := trust.get("require_signature"), str):
        trust["require_signature"] = beside(path, key)
    override(values, overrides, example="limits.batch=128")
    return parse(ServerSettings, values, str(path or "--set"))
