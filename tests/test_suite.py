"""Conditions carried out: what is drawn depends on the image alone, finished batches are kept, broken images left."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from mpdsgr_deploy.attacks.condition import CONDITIONS, Attacked, Batch, Condition, Generators, Kind, Network, register
from mpdsgr_deploy.attacks.resumable_run import Journal, Part, gather, run
from mpdsgr_deploy.attacks.suite import Source, Suite
from mpdsgr_deploy.attacks.tiers import (
    BY_STRENGTH,
    TIERS,
    TierEntry,
    entry,
    recipe_entries,
    required_surrogates,
    resolved,
)
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.manifest import Prepared
from mpdsgr_deploy.recipe import Attack, Gate
from mpdsgr_deploy.runtime.torch_model import TorchModel, TorchNetwork
from mpdsgr_deploy.validation import Target
from mpdsgr_deploy.validation.comparison import Comparison
from mpdsgr_deploy.validation.subject import Subject, identity


@pytest.fixture(scope="module")
def network(bundle: Bundle) -> TorchNetwork:
    return TorchNetwork(TorchModel.from_bundle(bundle))


def digits(bundle: Bundle, count: int) -> tuple[np.ndarray, np.ndarray]:
    images = load_test(bundle.manifest.recipe.data)[:count]
    return images.unit(), images.classes


def test_conditions_do_not_depend_on_the_batch_size(bundle: Bundle, network: TorchNetwork) -> None:
    x, y = digits(bundle, 30)
    attack = bundle.manifest.recipe.attack.model_copy(update={"strong_steps": 4})
    clean = network(x).argmax(1)
    suite = Suite.of(Source(network, "triangle:1"), TIERS["commit"].entries, attack, seed=1)
    for condition in suite.conditions:
        if condition.kind == "query":
            condition = replace(condition, queries=20)
        if condition.method == "mpd-apgd":
            condition = replace(condition, steps=20)  # rounding grows with the number of steps
        one, other = (gather(list(run(suite, condition, x, y, clean, batch_size=size))) for size in (30, 7))
        same = np.abs(one[0].images - other[0].images).max((1, 2, 3)) < 1e-6
        assert same.mean() > 0.9, condition.name  # all but sign flips of tiny gradients
        assert (one[1] == other[1]).mean() > 0.9


def test_seeds_and_conditions_draw_differently(bundle: Bundle, network: TorchNetwork) -> None:
    x, y = digits(bundle, 4)
    batch = Batch(x, y, np.arange(4))

    def noise(seed: int) -> dict[str, np.ndarray]:
        suite = Suite.of(
            Source(network, "triangle:1"), TIERS["commit"].entries, bundle.manifest.recipe.attack, seed=seed
        )
        added = {}
        for condition in suite.conditions:
            if condition.kind == "noise":
                with suite.open(condition) as attack:
                    added[condition.name] = attack(batch).images - x
        return added

    first, again, other = noise(0), noise(0), noise(1)
    assert set(first) == {"gaussian", "uniform"}
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["uniform"], other["uniform"])
    assert not np.allclose(np.sign(first["uniform"]), np.sign(first["gaussian"]))


def test_a_condition_draws_the_same_under_another_name_of_the_same_stream() -> None:
    batch = Batch(np.zeros((2, 1, 2, 2), np.float32), np.zeros(2, np.int64), np.arange(2))
    (one,) = resolved([entry("uniform", "uniform")], Attack(), "triangle:1", seed=3)
    renamed = replace(one, name="uniform at 1", stream="uniform")
    draws = [condition.attack(None, batch, condition.generators(batch)).images for condition in (one, renamed)]
    assert np.array_equal(*draws)


def names(entries: Iterable[TierEntry], attack: Attack, trained: str, **options: Any) -> list[str]:
    return [condition.name for condition in resolved(entries, attack, trained, **options)]


def test_entries_become_conditions_in_the_order_of_strength(bundle: Bundle) -> None:
    attack = bundle.manifest.recipe.attack
    common = ["gaussian", "uniform", "fgsm", "bim", "pgd"]
    sweep = ["strong triangle:0.25", "strong triangle:2.5", "strong rectangular:1"]
    commit, release, paper = (TIERS[tier].entries for tier in ("commit", "release", "paper"))
    strong = ["pgd-strong", *sweep, "strong adaptive"]
    assert names(commit, attack, "triangle:1") == [*common, *strong, "mpd-apgd", "square"]
    assert names(release, attack, "triangle:1") == names(commit, attack, "triangle:1")
    assert {"apgd-ce", "apgd-dlr"} <= set(names(paper, attack, "triangle:1"))
    assert {"strong triangle:0.5", "strong rate"} <= set(names(paper, attack, "triangle:1"))
    assert "strong triangle:0.5" not in names(paper, attack, "triangle:0.5")  # pgd-strong already is that
    assert names(recipe_entries(attack), attack, "triangle:1") == [
        *common,
        "pgd-strong",
        "strong triangle:0.5",
        "strong rate",
    ]
    moved = names(commit, attack, "triangle:1", transfer={"transfer fp32": "triangle:1", "transfer": "sigmoid:4"})
    assert moved[5:8] == ["transfer fp32", "transfer", "pgd-strong"]
    assert moved[-3:] == ["mpd-apgd", "transfer-strong", "square"]  # from a network that was asked for alone
    assert BY_STRENGTH == ("uniform", "fgsm", "pgd", "pgd-strong", "worst")


def test_the_required_surrogates_scale_with_the_trained_one() -> None:
    assert required_surrogates("triangle:1") == ("adaptive", "triangle:0.25", "triangle:2.5", "rectangular:1")
    assert required_surrogates("sigmoid:4")[1:3] == ("sigmoid:16", "sigmoid:1.6")  # there a larger one is narrower
    assert required_surrogates("rectangular:1") == ("adaptive", "rectangular:0.25", "rectangular:2.5")


def test_settings_say_everything_that_makes_an_attack_stronger() -> None:
    """Equal text means equal strength: what is compared with a reference is decided by it."""
    attack = Attack()
    seen = {}
    for tier in TIERS.values():
        for condition in resolved(tier.entries, attack, "triangle:1"):
            unlike = {
                name: value for name, value in asdict(condition).items() if name not in ("name", "rank", "stream")
            }
            assert seen.setdefault((condition.method, condition.settings), unlike) == unlike
    weaker = attack.model_copy(update={"eps": 0.01})
    for one, other in zip(
        resolved(TIERS["paper"].entries, attack, "triangle:1"),
        resolved(TIERS["paper"].entries, weaker, "triangle:1"),
        strict=True,
    ):
        assert one.settings != other.settings or one.eps is None


@pytest.mark.usefixtures("real_tiers")
def test_a_tier_whose_attacks_change_gets_another_version() -> None:
    """Records of a version are compared with one another; the digest is that of all fields of its conditions."""
    made = {}
    for tier, known in TIERS.items():
        conditions = resolved(known.entries, Attack(), "triangle:1", transfer={"transfer": "triangle:1"})
        fields = repr(list(conditions))
        made[tier, known.suite] = sha256(fields.encode()).hexdigest()[:8]
    assert made == {("commit", 3): "4e060e7e", ("release", 4): "009f8dd5", ("paper", 4): "73e6c2e9"}


def test_batches_that_another_attack_of_the_same_name_finished_are_not_used(
    bundle: Bundle, network: TorchNetwork
) -> None:
    """A plug-in, or a later version of an attack, may be registered under a name that an evaluation knows."""
    images = load_test(bundle.manifest.recipe.data)[:4]
    conditions = list(
        resolved([entry("apgd", "apgd", steps=4), entry("apgd", "apgd", steps=5)], Attack(), "triangle:1")
    )
    suites = [Suite(Source(network, "triangle:1"), (condition,)) for condition in conditions]
    parts = Gate(), images, "digits", None, None, Comparison({}), None
    known = [identity(Subject(Target(bundle), suite, *parts), None) for suite in suites]
    assert known[0] != known[1]
    assert known[0] == identity(Subject(Target(bundle), suites[0], *parts), None)


def test_batches_that_another_engine_finished_are_not_used(bundle: Bundle, network: TorchNetwork) -> None:
    images = load_test(bundle.manifest.recipe.data)[:4]
    made = Prepared(backend="onnxruntime-cpu", precision="fp32", model_sha256="", machine={}, file="engines/a.plan")

    def known(digest: str) -> str:
        files = {**bundle.manifest.files, "engines/a.plan": digest}
        manifest = bundle.manifest.model_copy(update={"prepared": [made], "files": files})
        target = Target(Bundle(bundle.path, manifest))
        parts = Gate(), images, "digits", None, None, Comparison({}), None
        return identity(Subject(target, Suite(Source(network, "triangle:1"), ()), *parts), None)

    assert known("aa") == known("aa") != known("bb")


def test_what_another_model_of_a_server_finished_is_dropped(tmp_path: Path) -> None:
    """Nothing that names the evaluation tells the two apart, only their answers."""
    x, y = np.ones((3, 1, 2, 2), np.float32), np.ones(3, np.int64)
    suite = Suite(Source(Brightness(), "triangle:1"), ())
    logits = np.eye(3, 2, dtype=np.float32)

    def attacked_by_a_resumed_run(answers: np.ndarray) -> list[int]:
        condition, journal = Darkening(name="dark"), Journal(tmp_path, "one")
        journal.begin(answers)
        list(run(suite, condition, x, y, y, batch_size=3, journal=journal))
        return condition.seen

    assert attacked_by_a_resumed_run(logits) == [0, 1, 2]
    assert attacked_by_a_resumed_run(logits) == []
    assert attacked_by_a_resumed_run(logits[::-1]) == [0, 1, 2]


def test_an_unknown_method_is_named_beside_those_there_are() -> None:
    with pytest.raises(InputError, match="did you mean 'apgd'"):
        list(resolved([entry("apdg", "mine")], Attack(), "triangle:1"))


@dataclass(frozen=True, kw_only=True)
class Darkening(Condition):
    """An attack that darkens images, and remembers which."""

    method: ClassVar[str] = "darkening"
    kind: ClassVar[Kind] = "query"
    eps: float | None = None
    seen: list[int] = field(default_factory=list)
    opened: list[int] = field(default_factory=list)

    @property
    def settings(self) -> str:
        return "to black"

    def target(self, network: Network) -> AbstractContextManager[Network]:
        self.opened.append(1)
        return nullcontext(network)

    def attack(self, target: Network, batch: Batch, generators: Generators) -> Attacked:
        self.seen.extend(batch.places.tolist())
        return Attacked(batch.x * 0, evaluations=2 * len(batch.x), zero=1)


def test_an_attack_of_ones_own_is_registered_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONDITIONS, "loaded", dict(CONDITIONS.loaded))
    register(Darkening)
    (mine,) = resolved([], Attack(also=("darkening",)), "triangle:1")
    assert (mine.name, mine.settings, mine.eps) == ("darkening", "to black", Attack().eps)


class Brightness:
    """Class 1 for what is not black."""

    stochastic = False

    def __call__(self, x: np.ndarray) -> np.ndarray:
        light = (x.max((1, 2, 3)) > 0).astype(np.float32)
        return np.stack([1 - light, light], 1)


def test_wrong_images_are_left_alone_and_finished_batches_kept(tmp_path: Path) -> None:
    x, y = np.ones((7, 1, 2, 2), np.float32), np.ones(7, np.int64)
    clean = np.array([1, 0, 1, 1, 0, 0, 1])
    suite = Suite(Source(Brightness(), "triangle:1"), ())

    def attacked(journal: Journal) -> tuple[Darkening, Iterator[Part]]:
        condition = Darkening(name="dark")
        return condition, run(suite, condition, x, y, clean, batch_size=3, journal=journal)

    first, parts = attacked(Journal(tmp_path, "one"))
    next(parts)
    next(parts)
    del parts  # killed after two of three batches
    second, parts = attacked(Journal(tmp_path, "one"))
    images, predicted = gather(list(parts))
    assert (first.seen, second.seen) == ([0, 2, 3], [6])
    assert predicted.tolist() == [0, 0, 0, 0, 0, 0, 0]
    assert [image.max() for image in images.images] == [0, 1, 0, 0, 1, 1, 0]
    assert (images.evaluations, images.zero) == (8, 3)
    third, parts = attacked(Journal(tmp_path, "another"))
    list(parts)
    assert third.seen == [0, 2, 3, 6]
    for file in tmp_path.rglob("*.npz"):
        file.write_bytes(b"damaged")
    fourth, parts = attacked(Journal(tmp_path, "one"))
    list(parts)
    assert fourth.seen == [0, 2, 3, 6]
    assert len(fourth.opened) == 1
    idle = Darkening(name="idle")
    assert gather(list(run(suite, idle, x, y, 1 - y, batch_size=3)))[1].tolist() == [0] * 7
    assert idle.opened == []  # gradients take memory, and there is nothing to attack


@pytest.mark.parametrize("array", ["images", "predicted", "counts"])
def test_a_kept_batch_of_another_shape_is_made_again(array: str, tmp_path: Path) -> None:
    x, y = np.ones((3, 1, 2, 2), np.float32), np.ones(3, np.int64)
    suite = Suite(Source(Brightness(), "triangle:1"), ())

    def attacked() -> list[int]:
        condition = Darkening(name="dark")
        list(run(suite, condition, x, y, y, batch_size=3, journal=Journal(tmp_path, "one")))
        return condition.seen

    assert (attacked(), attacked()) == ([0, 1, 2], [])
    (file,) = tmp_path.rglob("*.npz")
    with np.load(file) as archive:
        content = dict(archive)
    np.savez(file, **{**content, array: content[array][:2]})
    assert attacked() == [0, 1, 2]
