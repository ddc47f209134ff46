"""Health checks of the evaluation itself, registered by number; importing this package registers all."""

from mpdsgr_deploy.validation.health import artefact, attacks  # noqa: F401  (register their checks)
