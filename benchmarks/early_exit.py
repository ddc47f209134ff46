"""Does a network that answers as soon as it is sure beat one that always takes its first N steps? Under attack, too.

    python benchmarks/early_exit.py export/bundles/digits export/bundles/cifar10-clean --root data

After step t the logits are the mean of the outputs so far, and their margin the best logit minus the second. An early
exit answers at the first t whose margin reaches a threshold. Thresholds are chosen on validation images, such that
these take a given number of steps on average. The attacker knows the threshold and attacks the exit as well:

- wrong: APGD climbs the cross-entropy after each of the steps, their mean, and that of the step at which an image exits
  now, so that it is pushed to exit wrongly, early or late. An image is broken once any iterate is answered wrongly.
- cost: APGD climbs minus the margins before the last step, so that images exit late. What counts is the most steps that
  any iterate took, of this attack or of the others.

Every iterate is tried on every exit and on every number of steps, so all meet the same images; an image that has broken
all of them meets the cost attack only. Rows of bundles that are not named stay in the results file.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import harness
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mpdsgr_deploy.attacks import apgd
from mpdsgr_deploy.attacks.attacker_surrogate import with_surrogate
from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.data import Images, load_training
from mpdsgr_deploy.data.images import name_sample
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.models.simplify import encode_once, fold_norm, simplify
from mpdsgr_deploy.progress import log, show_progress
from mpdsgr_deploy.protocols import Gradient
from mpdsgr_deploy.provenance import provenance
from mpdsgr_deploy.reference import IMAGES as CARRIED
from mpdsgr_deploy.snn import fold_time
from mpdsgr_deploy.snn.recompute import one_by_one
from mpdsgr_deploy.trained_networks import load_bundled
from mpdsgr_deploy.validation.image_checks import evaluation_images
from mpdsgr_deploy.validation.proportions import wilson

IMAGES, CLEAN, BATCH, STEPS = 200, 2000, 100, 100
TARGETS = (1.5, 2.0, 3.0)  # steps that validation images take on average
SURROGATES, COST = ("superspike:20", "superspike:10"), "cost"
Objective = Callable[[Tensor, Tensor], Tensor]  # logits after each step [T, B, K], classes [B] to losses [B]


ALL = slice(None)


class Policy(NamedTuple):
    """When a network answers: at the first step whose margin reaches `threshold`, and after `most` steps anyway."""

    name: str
    threshold: float
    most: int

    def exits(self, logits: Tensor) -> Tensor:
        """The step, counted from 0, at which each image leaves [B]; logits [T, B, K]."""
        sure = margins(logits) >= self.threshold
        sure[self.most - 1] = True
        return sure[: self.most].float().argmax(0)  # the first


def prefix_logits(model: SpikingNet, x: Tensor) -> Tensor:
    """The mean of the outputs until each step [T, B, K], for images x [B, C, H, W]."""
    spikes = one_by_one(model.body, model.encode(x, model.normalize), None, None, recompute=False)
    outputs = fold_time(lambda s: F.linear(s, model.readout.weight, model.readout.bias), spikes)
    count = torch.arange(1, len(outputs) + 1, device=x.device, dtype=x.dtype)
    return outputs.cumsum(0) / count[:, None, None]


def margins(logits: Tensor) -> Tensor:
    """The best logit minus the second, over the last axis."""
    first, second = logits.topk(2).values.unbind(-1)
    return first - second


def at(logits: Tensor, steps: Tensor) -> Tensor:
    """Logits [B, K] after each image's own number of steps [B], counted from 0."""
    return logits[steps, torch.arange(logits.shape[1])]


def cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """[T, B] of logits [T, B, K]."""
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none").view(len(logits), -1)


def objectives(policies: Sequence[Policy], T: int) -> dict[str, Objective]:
    """What attackers climb, by name."""

    def after(t: int) -> Objective:
        return lambda logits, y: F.cross_entropy(logits[t], y, reduction="none")

    def at_exit(policy: Policy) -> Objective:
        return lambda logits, y: F.cross_entropy(at(logits, policy.exits(logits)), y, reduction="none")

    return {
        **{f"after step {t + 1}": after(t) for t in range(T)},
        "mean of all": lambda logits, y: cross_entropies(logits, y).mean(0),
        **{f"at the exit of {policy.name}": at_exit(policy) for policy in policies if policy.threshold < torch.inf},
        COST: lambda logits, y: -margins(logits[:-1]).mean(0),
    }


class Tally:
    """What every policy did with the iterates of some images [P, B]: whether all were right, the most steps taken."""

    def __init__(self, policies: Sequence[Policy], count: int) -> None:
        self.policies = policies
        self.standing = np.ones((len(policies), count), bool)
        self.steps = np.zeros((len(policies), count), np.int64)

    def see(self, logits: Tensor, y: Tensor, rows: NDArray[Any] | slice = ALL) -> None:
        """Logits [T, R, K] of an iterate of the images `rows` [R], whose classes are y [R]."""
        for number, policy in enumerate(self.policies):
            exits = policy.exits(logits)
            self.standing[number, rows] &= (at(logits, exits).argmax(1) == y).numpy()
            self.steps[number, rows] = np.maximum(self.steps[number, rows], exits.numpy() + 1)


class Climbed(NamedTuple):
    """A network as an attacker climbs an objective on it; what each policy answers to images `rows` is tallied."""

    model: SpikingNet
    objective: Objective
    tally: Tally
    rows: NDArray[Any]

    def __call__(self, images: NDArray[Any], classes: NDArray[Any]) -> Gradient:
        pixels, labels = torch.from_numpy(images).requires_grad_(), torch.from_numpy(classes)
        logits = prefix_logits(self.model, pixels)
        loss = self.objective(logits, labels)
        (gradient,) = torch.autograd.grad(loss.sum(), pixels)
        self.tally.see(logits.detach(), labels, self.rows)
        return Gradient(logits[-1].detach().numpy(), loss.detach().numpy(), gradient.numpy())


def attack(model: SpikingNet, policies: Sequence[Policy], x: NDArray[Any], y: NDArray[Any], eps: float) -> Tally:
    """Attack images with every objective through every surrogate, and try each iterate on each policy."""
    tally = unattacked(model, policies, x, y)
    draw = np.random.default_rng(0)
    for surrogate in SURROGATES:
        attacked = with_surrogate(model, surrogate)
        for name, objective in objectives(policies, model.T).items():
            rows = np.arange(len(y)) if name == COST else np.flatnonzero(tally.standing.any(0))
            if not len(rows):
                continue
            apgd(
                Climbed(attacked, objective, tally, rows),
                x[rows],
                y[rows],
                eps=eps,
                steps=STEPS,
                step=eps / 2,
                draw=lambda shape: draw.uniform(-1, 1, shape).astype(np.float32),
                keep="worst",
            )
            log.info("%s through %s: %s right", name, surrogate, tally.standing.sum(1).tolist())
    return tally


@torch.no_grad()
def unattacked(model: SpikingNet, policies: Sequence[Policy], x: NDArray[Any], y: NDArray[Any]) -> Tally:
    """What every policy answers to the images as they are."""
    tally = Tally(policies, len(y))
    for start in range(0, len(y), BATCH):
        rows = np.arange(start, min(start + BATCH, len(y)))
        tally.see(prefix_logits(model, torch.from_numpy(x[rows])), torch.from_numpy(y[rows]), rows)
    return tally


@torch.no_grad()
def thresholds(model: SpikingNet, images: Images) -> list[Policy]:
    """For each target the margin at which these images take so many steps on average, as nearly as they can."""
    parts = torch.from_numpy(images.unit()).split(BATCH)
    logits = torch.cat([prefix_logits(model, part) for part in parts], dim=1)
    tried = [Policy("", value, model.T) for value in margins(logits[:-1]).flatten().quantile(torch.linspace(0, 1, 401))]
    means = [(policy.exits(logits) + 1).float().mean().item() for policy in tried]
    nearest = [min(range(len(tried)), key=lambda i: abs(means[i] - target)) for target in TARGETS]
    return [
        Policy(f"exit, {target:g} steps", float(tried[i].threshold), model.T)
        for target, i in zip(TARGETS, nearest, strict=True)
    ]


@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@click.option("--root", help="Where CIFAR-10 lies.  [default: the recipe's]")
@click.option("--limit", default=IMAGES, show_default=True, help="Test images.")
def run(bundles: tuple[Path, ...], root: str | None, limit: int) -> dict[str, Any]:
    """Attack each bundle's network with early exits and with fewer steps."""
    show_progress()
    measured = {path.resolve().name: measure(path, root, limit) for path in bundles}
    networks = {**harness.load("early_exit")["networks"], **measured}
    return {"attack_steps": STEPS, "surrogates": SURROGATES, "networks": networks}


def measure(path: Path, root: str | None, limit: int) -> dict[str, Any]:
    """One network: each policy's clean and worst accuracy, and its steps."""
    bundle = open_bundle(path)
    manifest, recipe = bundle.manifest, bundle.manifest.recipe
    model = load_bundled(bundle, otherwise="give a network that this package trained")
    model = simplify(model, (fold_norm, encode_once)).requires_grad_(False)
    _, validation = load_training(recipe.data.at(root))
    fixed = [Policy(f"first {n} steps" if n > 1 else "first step", torch.inf, n) for n in range(1, model.T + 1)]
    policies = [*fixed, *thresholds(model, validation)]
    images = evaluation_images(bundle, None, None if CARRIED in manifest.files else root)
    many, few = images[: min(CLEAN, len(images))], images[: min(limit, len(images))]
    clean = unattacked(model, policies, many.unit(), many.classes)
    attacked = attack(model, policies, few.unit(), few.classes, recipe.attack.eps)
    return {
        "digest": manifest.digest,
        "images": name_sample(len(few), recipe.data.name),
        "validation": len(validation),
        "eps": recipe.attack.eps,
        "n": len(few),
        "n_clean": len(many),
        "provenance": provenance(),
        "policies": [
            {
                **policy._asdict(),
                "threshold": None if policy.threshold == torch.inf else policy.threshold,
                "clean": int(clean.standing[i].sum()),
                "worst": int(attacked.standing[i].sum()),
                "steps": float(clean.steps[i].mean()),
                "steps_attacked": float(attacked.steps[i].mean()),
            }
            for i, policy in enumerate(policies)
        ],
    }


def render(result: dict[str, Any]) -> str:
    """A table with a row for each policy, and what the networks and images are."""
    header = ("network", "answers after", "mean steps", "mean steps, attacked", "clean %", "worst % [95 % interval]")
    lines = []
    for name, network in result["networks"].items():
        for policy in network["policies"]:
            n, threshold = network["n"], policy["threshold"]
            low, high = wilson(policy["worst"], n)
            lines.append(
                (
                    name,
                    policy["name"] if threshold is None else f"margin {threshold:.3g}",
                    *(f"{policy[steps]:.2f}" for steps in ("steps", "steps_attacked")),
                    f"{100 * policy['clean'] / network['n_clean']:.1f}",
                    f"{100 * policy['worst'] / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                )
            )
    notes = [
        f"- {name}: {network['images']}, eps {network['eps'] * 255:.3g}/255; clean accuracy and mean "
        f"steps on {network['n_clean']:,}; thresholds chosen on {network['validation']:,} validation images. "
        + harness.source(network)
        for name, network in result["networks"].items()
    ]
    legend = (
        f"`worst`: right at every iterate of {result['attack_steps']} steps of APGD through each of "
        f"{' and '.join(result['surrogates'])}, on every objective. mean steps, attacked: the most that any iterate "
        "took."
    )
    return harness.table(header, lines, legend, "", *notes)


main = harness.command("early_exit", run, render)

if __name__ == "__main__":
    main()
