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
        raise InputError(
            "--require-verdict needs --require-signature, because a verdict is only as trustworthy as its signer"
        )
    if tier:
        # imported here, because it loads every attack, which a server does not need
        from mpdsgr_deploy.attacks.tiers import TIERS

        choose("tier", TIERS, tier)
    return Demand(required_trust(signature), tier or None)


def _require(vouched: Vouched | None, tier: str, what: str) -> None:
    from mpdsgr_deploy.attacks.tiers import TIERS

    advice = f"validate it with --tier {tier}, then sign the bundle and the report with one call of `mpdsgr sign`"
    if vouched is None:
        raise InputError(f"{what} carries no signed verdict, and one of tier {tier} is required; {advice}")
    verdict, order = vouched.verdict, list(TIERS)
    if verdict.verdict != "pass":
        raise InputError(f"{what} did not pass validation: its signed verdict is {verdict.line}; do not deploy it")
    if verdict.tier not in order or order.index(verdict.tier) < order.index(tier):
        raise InputError(f"{what} passed only tier {verdict.tier}, and tier {tier} is required; {advice}")
