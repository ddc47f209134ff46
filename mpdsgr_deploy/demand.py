"""What a user of a bundle demands before anything else in it is read: a signature, and a verdict."""

from pathlib import Path
from typing import NamedTuple

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.signing.trust import Trust, required_trust
from mpdsgr_deploy.signing.verdict import Vouched, carried_verdict


class Demand(NamedTuple):
    """trust: who must have signed the bundle. tier: the least at which the same signer must have passed it."""

    trust: Trust | None = None
    tier: str | None = None

    def open(self, path: Path) -> Bundle:
        """Open a bundle and verify its signature before anything else in it is read. Raises as `open_bundle` does."""
        return open_bundle(path, self.trust)

    def verdict(self, bundle: Bundle, precision: str) -> Vouched | None:
        """Return the signed verdict on a precision of an opened bundle, if it carries one and signatures are demanded.

        Raises InputError if a tier is demanded and no verdict says that the precision passed it or a harder one.
        Without such a demand, a verdict that cannot be trusted is left out with a warning.
        """
        if self.trust is None:
            return None
        try:
            vouched = carried_verdict(bundle.path, precision, bundle.manifest.digest, self.trust)
        except InputError as error:
            if self.tier is not None:
                raise
            log.warning("%s", error)
            return None
        if self.tier is not None:
            _require(vouched, self.tier, f"{bundle.path}@{precision}")
        return vouched


def demand_of(signature: str | None, tier: str | None = None) -> Demand:
    """Return what the options --require-signature and --require-verdict demand.

    Raises InputError for an invalid key, an unknown tier, and a required verdict without a signer.
    """
    if tier and not signature:
        raise InputError("--require-verdict needs --require-signature: a verdict counts for what its signer does")
    if tier:
        from mpdsgr_deploy.attacks.tiers import TIERS  # with every attack, which a server otherwise does without

        choose("tier", TIERS, tier)
    return Demand(required_trust(signature), tier or None)


def _require(vouched: Vouched | None, tier: str, what: str) -> None:
    from mpdsgr_deploy.attacks.tiers import TIERS

    advice = f"validate it with --tier {tier}, then `mpdsgr sign` bundle and report together"
    if vouched is None:
        raise InputError(f"{what} carries no signed verdict, and one of tier {tier} is required; {advice}")
    verdict, order = vouched.verdict, list(TIERS)
    if verdict.verdict != "pass":
        raise InputError(f"{what} did not pass: its signed verdict is {verdict.line}; do not deploy it")
    if verdict.tier not in order or order.index(verdict.tier) < order.index(tier):
        raise InputError(f"{what} passed tier {verdict.tier} only, and tier {tier} is required; {advice}")
