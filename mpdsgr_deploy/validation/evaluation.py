"""One evaluation under way: every condition on every image, what the artefact made of it, and what that shows."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy import __version__
from mpdsgr_deploy.attack_graph.artefact import Artefact
from mpdsgr_deploy.attacks.condition import Attacked, Condition
from mpdsgr_deploy.attacks.run import Journal, gather, run
from mpdsgr_deploy.attacks.suite import CLEAN, STRONG, WORST, Suite
from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.parity import Parity
from mpdsgr_deploy.progress import log, track
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.reference import Reference
from mpdsgr_deploy.runtime import open_predictor, predict
from mpdsgr_deploy.validation import fidelity, health
from mpdsgr_deploy.validation.gate import failures, limit, lost
from mpdsgr_deploy.validation.health import Check
from mpdsgr_deploy.validation.images import image_faults
from mpdsgr_deploy.validation.pictures import examples
from mpdsgr_deploy.validation.probes import Probe
from mpdsgr_deploy.validation.report import Curve, Example, Point, VariantFlips
from mpdsgr_deploy.validation.rounding import rounding_faults
from mpdsgr_deploy.validation.rows import Flips, Row
from mpdsgr_deploy.validation.target import Target, fingerprint

TRIED = 100  # images that a precision's rounding is tried on

Bools = NDArray[np.bool_]


class Evaluation:
    """`attack`, then `probe`, then read `rows`, `health` and the rest. `stopped` says why `attack` ended early, if so.

    images: the first test images of data set `data`; reference: what the bundle promises for them, None for others.
    """

    stopped: str | None = None
    _hopeless: str | None = None  # the rule of the gate that cannot be met any more
    parity: Parity | None = None
    journal: Journal | None = None

    def __init__(
        self,
        target: Target,
        artefact: Artefact,
        suite: Suite,
        gate: Gate,
        images: Images,
        data: str,
        reference: Reference | None,
    ) -> None:
        self.target, self.artefact, self.suite, self.gate, self.images = target, artefact, suite, gate, images
        self.x, self.y, self.n = images.unit(), images.classes, len(images)
        self.data, self.reference = data, reference
        self.rule = f"the first {self.n} test images of {data}"
        self.conditions = list(suite.conditions)
        self._promised = self._comparable()
        self.size = target.bundle.manifest.recipe.validation.batch_size
        self.rows: list[Row] = []
        self.curves: list[Curve] = []
        self.examples: list[Example] = []
        self._verdicts: dict[str, Bools] = {}  # of finished conditions
        self._faults: list[str] = []  # of attacked images
        self._probes: list[Check] = []
        self._gradients = Attacked(self.x[:0])  # counts over all conditions through the trained surrogate
        self._strong = self.x  # attacked by the strong PGD

    @property
    def names(self) -> list[str]:
        """What a gate can have rules for."""
        return [CLEAN, *(condition.name for condition in self.conditions), WORST]

    @property
    def referenced(self) -> list[str]:
        """Of these, what the reference has verdicts of."""
        return list(self._promised)

    def identity(self, images: str, transfer: Path | None) -> str:
        """Everything that the result of a batch depends on. images: their digest."""
        target, bundle = self.target, self.target.bundle
        networks = [bundle.model_sha256(precision) for precision in (target.precision, "fp32")]
        what = [__version__, *networks, bundle.manifest.recipe.model_dump(mode="json"), target.backend, target.url]
        other = None if transfer is None else fingerprint(transfer)
        return json.dumps([*what, self.gate.tier, self.size, self.n, images, other])

    def attack(self) -> None:
        """All conditions, weak ones first; ends early, or does not begin, once it is clear that it cannot be passed."""
        self.logits = predict(self.artefact, self.x, self.size, "clean")
        self.clean = self.logits.argmax(1)
        self.parity = fidelity.check_answers(self.reference, self.target.precision, self.logits)
        self.standing = self.clean == self.y
        self._finish(CLEAN, "test images as they are", 0.0, self.standing)
        self._first = self._checks_without_attack()
        self._wrong = self._not_the_network()
        invalid = (f"check {check.number} ({check.name}) failed" for check in self._first if not check.passed)
        self._hopeless = self._lost(CLEAN, self.standing)
        self.stopped = self._hopeless or next(iter([*self._wrong, *invalid]), None)
        started, total = time.monotonic(), sum(condition.cost + 1 for condition in self.conditions)
        spent = 0
        for condition in self.conditions:
            if self.stopped:
                log.warning("stopped early: %s", self.stopped)
                break
            self._carry_out(condition)
            spent += condition.cost + 1
            left = (time.monotonic() - started) / spent * (total - spent)
            shown = 100 * self._verdicts[condition.name].mean()
            log.info("%-24s %5.1f %%   about %.0f s left", condition.name, shown, left)
        bound = "; stopped early, so an upper bound" if self.stopped else ""
        settings = f"right under every condition within eps{bound}"
        self._finish(WORST, settings, self.target.bundle.manifest.recipe.attack.eps, self.standing)

    def _carry_out(self, condition: Condition) -> None:
        """One condition on all images, or as many as it takes to know that the gate will fail."""
        parts = []
        batches = run(self.suite, condition, self.x, self.y, self.clean, batch_size=self.size, journal=self.journal)
        for part in track(batches, condition.name, -(-self.n // self.size)):
            parts.append(part)
            rows = part.rows
            self._faults += health.budget_faults(condition.name, self.x[rows], part.attacked.images, condition.eps)
            if condition.eps is not None:
                self.standing[rows] &= part.predicted == self.y[rows]
            correct = np.concatenate([p.predicted == self.y[p.rows] for p in parts])
            self.stopped = self._hopeless = self._lost(condition.name, correct) or self._lost(WORST, self.standing)
            if self.stopped:
                break
        attacked, predicted = gather(parts)
        self._finish(condition.name, condition.settings, condition.eps, correct, evaluations=attacked.evaluations)
        self._note(condition, attacked, predicted)

    def _note(self, condition: Condition, attacked: Attacked, predicted: NDArray[np.int64]) -> None:
        """What later checks and the report's pictures need of one condition."""
        if condition.kind == "gradient" and condition.surrogate == self.target.trained:
            counts = (a + b for a, b in zip(self._gradients[1:], attacked[1:], strict=True))
            self._gradients = Attacked(self.x[:0], *counts)
        if condition.name != STRONG:
            return
        done = len(predicted)
        self._strong = attacked.images
        broken = (self.clean[:done] == self.y[:done]) & (predicted != self.y[:done])
        if broken.any() and health.rounded_to_bytes(self._strong[broken]):
            self._faults.append(f"{condition.name} left every pixel on the 8-bit grid, from random starts")
        self.examples = examples(
            self.x[:done],
            self._strong,
            self.y[:done],
            before=self.clean[:done],
            after=predicted,
            labels=self.images.labels,
            attack=condition.name,
            eps=condition.eps,
        )

    def _finish(self, name: str, settings: str, eps: float | None, correct: Bools, *, evaluations: int = 0) -> None:
        promised = self._promised.get(name)
        reference = None if promised is None else promised[: len(correct)]
        self._verdicts[name] = correct.copy()
        self.rows.append(Row.of(name, settings, correct, eps=eps, reference=reference, evaluations=evaluations))

    def _comparable(self) -> dict[str, Bools]:
        """The reference's verdicts [n] under what it met with the same settings; the tier of its export may be another.

        Its worst case is that of the attacks made here, if it met all of them.
        """
        promise, recipe = self.target.bundle.manifest.reference, self.target.bundle.manifest.recipe
        if self.reference is None or promise is None:
            return {}
        entries = choose("tier", TIERS, promise.tier).entries
        then = Suite.of(self.suite.source, entries, recipe.attack, seed=recipe.validation.seed)
        met = {condition.name: condition.settings for condition in then.conditions}
        names = [CLEAN, *(c.name for c in self.conditions if met.get(c.name) == c.settings)]
        found = {name: self.reference.verdicts[name][: self.n] for name in names if name in self.reference.verdicts}
        within = [c.name for c in self.conditions if c.eps is not None and c.kind != "transfer"]
        if found.keys() >= {CLEAN, *within}:
            found[WORST] = np.logical_and.reduce([found[name] for name in (CLEAN, *within)])
        return found

    def _lost(self, name: str, correct: Bools) -> str | None:
        return lost(self.gate, name, correct, None if name == WORST else self._promised.get(name), self.n)

    def probe(self, count: int) -> None:
        """What growing eps and twice the steps do to the first `count` images."""
        if self.stopped:
            return
        part = slice(0, count)
        x, y, clean = self.x[part], self.y[part], self.clean[part]
        probe = Probe(self.suite, x, y, clean, batch_size=self.size, journal=self.journal)
        grown = probe.growth()
        self.curves = [Curve(attack=name, points=_points(verdicts)) for name, verdicts in grown.items()]
        strong = [c for c in self.conditions if c.method == "strong-pgd"]
        strongest = min(strong, key=lambda c: self._verdicts[c.name].mean())
        steps = strongest.steps
        broken = probe.convergence(strongest, self.standing[part])
        self._probes = [
            health.check_growth(grown[STRONG]),
            health.check_convergence(broken, len(x), steps, limit(self.gate, WORST)),
        ]

    def _checks_without_attack(self) -> list[Check]:
        standard = "the reference" if self.reference is not None else "floors" if self.gate.floors else ""
        return [
            health.check_compared(self.n, standard),
            health.check_attack_graph(self.target.attack_graph_faults()),
            health.check_images(image_faults(self.data, self.images, self.reference), self.rule),
            health.check_logits(self.logits),
        ]

    def _not_the_network(self) -> list[str]:
        """How the artefact differs from the network that was exported."""
        bundle, precision = self.target.bundle, self.target.precision
        rounding = rounding_faults(bundle, precision, self.x[:TRIED]) if precision != "fp32" else []
        return [*fidelity.answer_faults(self.parity), *rounding]

    def health(self) -> list[Check]:
        """All checks; of an evaluation that stopped early those that do not need all of it."""
        gradients = self._gradients
        checks = [
            *self._first,
            health.check_budget(self._faults, self.rule),
            health.check_function(self.artefact, self.target.fresh(), self.x),
        ]
        if not self.stopped:
            white = [c.name for c in self.conditions if c.kind == "gradient" and c.eps is not None]
            black = [c.name for c in self.conditions if c.kind in ("query", "transfer")]
            checks += [
                health.check_order(self._verdicts),
                health.check_black_box(self._verdicts, black, white),
                health.check_gradients(gradients.evaluations, gradients.zero, gradients.not_finite),
                health.check_sweep((c.surrogate for c in self.conditions), self.target.trained),
                health.check_reach(self.rows[-1].flips, self.n, limit(self.gate, WORST)),
                *self._probes,
            ]
        return sorted(checks, key=lambda check: check.number)

    def failures(self) -> list[str]:
        """What the artefact does worse than allowed, in a line each."""
        broken = [*failures(self.gate, self.rows), *self._wrong]
        told = {reason.partition(":")[0] for reason in broken}
        if self._hopeless and self._hopeless.partition(":")[0] not in told:
            broken.append(self._hopeless)
        return broken

    def variants(self) -> list[VariantFlips]:
        """Every other precision of the bundle against float32: the same images, clean and attacked."""
        bundle = self.target.bundle
        if self.stopped or len(bundle.manifest.variants) == 1:
            return []
        verdicts: dict[str, tuple[Bools, ...]] = {}
        for precision in bundle.manifest.variants:
            with open_predictor(bundle, precision=precision) as network:
                verdicts[precision] = tuple(
                    predict(network, x, self.size, precision).argmax(1) == self.y for x in (self.x, self._strong)
                )
        exact = verdicts.pop("fp32")
        return [
            VariantFlips(
                precision=precision,
                n=self.n,
                clean=Flips.of(exact[0], found[0]),
                attacked=Flips.of(exact[1], found[1]),
            )
            for precision, found in verdicts.items()
        ]


def _points(verdicts: Mapping[float, Bools]) -> list[Point]:
    return [Point(eps=eps, correct=int(found.sum()), n=len(found)) for eps, found in sorted(verdicts.items())]
