"""Health checks of the evaluation itself, registered by number; importing this package registers all."""

from mpdsgr_deploy.validation.health import artefact, attacks
from mpdsgr_deploy.validation.health.registry import (
    CHECKS,
    Check,
    Compared,
    Convergence,
    Evidence,
    Reach,
    Rebuilt,
    Search,
    Slopes,
    run_checks,
)

__all__ = [
    "CHECKS",
    "Check",
    "Compared",
    "Convergence",
    "Evidence",
    "Reach",
    "Rebuilt",
    "Search",
    "Slopes",
    "artefact",
    "attacks",
    "run_checks",
]
