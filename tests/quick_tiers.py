"""The tier `commit` as the tests export and validate by it: the same attacks, with fewer steps and images.

The promise of a bundle names the steps of its attacks, so that all processes of a test run must agree:
pytest's workers and the zygote call `use`. A test that meets a promise of the real tier, as of a bundle that comes with
the package, takes the fixture `real_tiers`.
"""

from dataclasses import replace

from mpdsgr_deploy.attacks.tiers import TIERS, Tier
from mpdsgr_deploy.validation import probes

FEWER = {"mpd-apgd": {"steps": 30}, "square": {"queries": 40}}
REAL = TIERS["commit"]


def quick(tier: Tier, probe: int = 12) -> Tier:
    """The tier with the steps of FEWER, probed on so many images."""
    entries = (replace(entry, values={**entry.values, **FEWER.get(entry.method, {})}) for entry in tier.entries)
    return replace(tier, probe=probe, entries=tuple(entries))


def use() -> None:
    """Have every evaluation of this process by tier `commit` be a quick one."""
    TIERS["commit"] = quick(REAL)
    probes.ENOUGH = 80
