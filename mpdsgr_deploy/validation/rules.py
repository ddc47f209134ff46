"""The rules that a verdict rests on, and who set each of them."""

import math
from collections.abc import Iterator

from pydantic import BaseModel

from mpdsgr_deploy.attacks.tiers import TIERS, smaller_tiers
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Gate, Recipe
from mpdsgr_deploy.validation.gate import least_decidable

WIDEST_USUAL_LIMIT = 0.10  # largest limit of a gate that states none; it takes 100 images


class Rule(BaseModel):
    """One rule as text, and its origin: who set it."""

    name: str
    value: str
    origin: str


def chosen_tier(tier: str | None, gate: Gate | None, recipe: Recipe, promised: str | None) -> tuple[str, str]:
    """Return the tier to evaluate, and who chose it.

    The caller's `tier` comes first, then that of the gate, then that of the reference (`promised`), then the recipe's.
    Raises InputError if the caller's tier is weaker than the one that the gate states.
    """
    pinned = gate.tier if gate is not None and "tier" in gate.model_fields_set else None
    if pinned and tier in smaller_tiers(pinned):
        raise InputError(
            f"the gate requires tier {pinned}, and tier {tier} has weaker attacks; leave out --tier, or change the gate"
        )
    if tier is not None:
        return tier, "the caller"
    if pinned:
        return pinned, "the gate"
    if promised is not None:
        return promised, "the bundle's reference"
    return recipe.gate.tier, "the recipe"


def settled(gate: Gate, tier: str, n: int) -> Gate:
    """Return the gate with tier, number of images n and max_drop filled in.

    A gate without max_drop gets its tier's, or, if n images cannot decide that one, the smallest that they can decide,
    but WIDEST_USUAL_LIMIT at most.
    """
    usual = max(TIERS[tier].max_drop, min(least_decidable(n), WIDEST_USUAL_LIMIT))
    return gate.model_copy(
        update={"tier": tier, "images": n, "max_drop": usual if gate.max_drop is None else gate.max_drop}
    )


def check_pins(gate: Gate, recipe: Recipe, images_sha256: str, n: int) -> None:
    """Raise InputError if the evaluation is not the one that the gate's figures were chosen for."""
    if gate.eps is not None and not math.isclose(gate.eps, recipe.attack.eps, rel_tol=1e-6):
        raise InputError(
            f"the gate is for attacks with eps {gate.eps:.6g}, the bundle's recipe has {recipe.attack.eps:.6g}; export "
            "with the gate's eps, or change the gate"
        )
    if gate.images_sha256 is not None and gate.images_sha256 != images_sha256:
        raise InputError(
            f"the gate is for images with sha256 {gate.images_sha256}, and these have {images_sha256}; validate "
            "on the images of the gate, or change the gate"
        )
    if gate.least_images is not None and n < gate.least_images:
        raise InputError(f"the gate requires at least {gate.least_images} images, not {n}; use more with --limit")


def stated_rules(
    replacement: Gate | None, rules: Gate, recipe: Recipe, *, tier_from: str, data: str, n: int
) -> Iterator[Rule]:
    """Yield every rule of the settled gate `rules`, with its origin.

    replacement: the gate that replaces the recipe's, if any. tier_from: who chose the tier. data: the name of the data
    set under evaluation, of which there are n images.
    """
    source = "the gate" if replacement is not None else "the recipe"
    if replacement is None and data != recipe.data.name:
        source = f"the recipe, which is for {recipe.data.name}"
    stated = replacement if replacement is not None else recipe.gate
    yield Rule(name="tier", value=rules.tier, origin=tier_from)
    if stated.max_drop is not None:
        origin = source
    elif rules.max_drop is not None and rules.max_drop > TIERS[rules.tier].max_drop:
        origin = (
            f"the smallest drop that {n} images can decide; tier {rules.tier} allows {TIERS[rules.tier].max_drop:.2%}"
        )
    else:
        origin = f"tier {rules.tier}"
    yield Rule(name="max drop", value=f"{rules.max_drop:.2%}", origin=origin)
    for kind, values in (("max drop", rules.drops), ("floor", rules.floors)):
        for name, value in values.items():
            yield Rule(name=f"{kind} of {name}", value=f"{value:.2%}", origin=source)
    for name in ("eps", "images_sha256", "least_images"):
        if (value := getattr(rules, name)) is not None:
            yield Rule(name=name, value=str(value), origin=source)
    if replacement is not None:
        for name, value in recipe.gate.floors.items():
            if name not in replacement.floors:
                not_applied = "the recipe; not applied, since the gate replaces the recipe's"
                yield Rule(name=f"floor of {name}", value=f"{value:.2%}", origin=not_applied)
