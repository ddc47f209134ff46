"""Attack graphs in a bundle: stored by export, and derived again to check the stored one."""

from mpdsgr_deploy.attack_graph.derive import derived
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.surrogates import trained_surrogate


def derived_attack_graph(bundle: Bundle, precision: str) -> bytes:
    """What `bundle.attack(precision)` must hold, byte by byte, derived from the network of that precision.

    Raises InputError for a precision that the bundle does not have.
    """
    return derived(bundle.variant(precision), trained_surrogate(bundle.manifest.recipe))
