"""What a user can demand of a bundle: a signature, and a signed verdict."""

from pathlib import Path
from typing import NamedTuple

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.signing.trust import Trust, required_trust
from mpdsgr_deploy.signing.verdict import Vouched, carried_verdict


class Demand(NamedTuple):
    """The demands on a bundle.

    trust: who must have signed it. tier: the tier at which, or at a harder one, the same signer's verdict must be
    "pass". None demands nothing.
    """

    trust: Trust | None = None
    tier: str | None = None

    def open(self, path: Path) -> Bundle:
        """Open a bundle, whose signature is verified before anything else is read. Raises as `open_bundle` does."""
        return open_bundle(path, self.trust)

    def verdict(self, bundle: Bundle, precision: str) -> Vouched | None:
        """Return the signed verdict on a precision of an opened bundle; None without one, and without a `trust`.

        Raises InputError if a tier is demanded and no trusted verdict says that the precision passed it or a harder
        one. Without that demand, a verdict that cannot be trusted causes a warning, and the result is None.
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
    """Return the demands of the options --require-signature and --require-verdict, None for options not given.

    Raises InputError for an invalid key, an unknown tier, and a required verdict without a required signature.
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
