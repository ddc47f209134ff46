"""Studies: how settings and methods become runs, what an effect is, what the variants do, and the factors of --why."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import small_recipe
from scipy.stats import norm as normal
from scipy.stats import t as student
from torch import nn

from mpdsgr_deploy.cli.study import command
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.defences.base import Step, Term
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.experiments import effect, explain, variants, why_page
from mpdsgr_deploy.experiments.records import AttackedNetwork, PackedVerdicts, records_of
from mpdsgr_deploy.experiments.study import PREFIX, built_in_studies, load_study
from mpdsgr_deploy.experiments.table import TableSpec, checked
from mpdsgr_deploy.snn import LIF, SpikingLayer, TdBN, Trace
from mpdsgr_deploy.snn.surrogate import make_surrogate

RESULTS = Path(__file__).parent.parent / "train" / "results"
STUDIES = list(built_in_studies())
EXPLAINED = [name for name in STUDIES if (RESULTS / f"{PREFIX}{name}" / explain.RECORDS).exists()]
DIFFERENCES = {"0.8"}  # in what they show: -3.7 to -4.5

SMALL = """
title = "A study of the tests"
seeds = [0, 1]
limit = 10
tier = "commit"
set = [
    "model.name=plain-3", "model.width=0.25", "encoding.T=2", "training.epochs=1", "training.pictures=0",
    "attack.strong_steps=2",
]

[[methods]]
name = "reg"
recipe = "digits-reg"

[[methods]]
name = "overlap"
recipe = "digits-reg"
set = ["defence.mpd-sgr.estimator=empirical"]

[[settings]]
factor = "base"
name = "base"

[[settings]]
factor = "eta"
name = "eta-2"
set = ["defence.mpd-sgr.eta=2"]
methods = ["overlap"]

[[settings]]
factor = "adversarial training"
name = "at"
set = ["defence.at.eps=0.05"]
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "small.toml"
    file.write_text(SMALL)
    return file


def study(file: Path, *options: object) -> Result:
    """The command in this process, on a study file; everything it writes lies beside that file."""
    places = ("--runs", file.parent / "runs", "--out", file.parent / "results")
    return CliRunner().invoke(command, [str(a) for a in (file, *options, *places)])


def test_settings_and_methods_become_rows(small: Path) -> None:
    name, spec = load_study(str(small))
    table = spec.table()
    assert name == "study-small"
    assert [row.title for row in table.rows] == ["base.reg", "base.overlap", "eta-2.overlap", "at.reg", "at.overlap"]
    # a baseline's images of the next seed; where a setting has no baseline, the base's
    assert [row.transfer for row in table.rows] == ["base.reg", "base.reg", "base.reg", "at.reg", "at.reg"]
    defences = {row.title: table.recipe(row, 0).defence for row in table.rows}
    assert defences["base.reg"] == {}
    assert {title: found["mpd-sgr"]["eta"] for title, found in defences.items() if "mpd-sgr" in found} == {
        "base.overlap": 0.5,
        "eta-2.overlap": 2.0,
        "at.overlap": 0.5,
    }
    # what no method has of its own is given to all
    assert {title for title, found in defences.items() if "at" in found} == {"at.reg", "at.overlap"}
    source, recipe = table.source(table.row("at.overlap"), 1)
    assert (source.title, recipe.training.seed) == ("at.reg", 0)
    assert table.source(table.row("at.overlap"), 0)[1].training.seed == 1


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_recipes_that_can_be_trained(name: str) -> None:
    table = load_study(name)[1].table()
    recipes = [table.recipe(row, seed) for row in table.rows for seed in table.seeds]
    assert len({recipe.model_dump_json() for recipe in recipes}) > len(table.seeds)
    assert len(table.seeds) >= 3
    images = {"digits": 1300, "cifar10": 50_000}  # before the validation split
    for recipe in recipes:
        assert (recipe.data.train_images or 0) <= (1 - recipe.data.validation_share) * images[recipe.data.name]


def test_what_cannot_be_compared_is_refused(small: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.toml"
    twice.write_text(SMALL + '[[settings]]\nfactor = "x"\nname = "at"\n')
    with pytest.raises(InputError, match=r"at\.overlap, at\.reg appear twice"):
        load_study(str(twice))[1].table()
    unknown = tmp_path / "unknown.toml"
    unknown.write_text(SMALL + '[[settings]]\nfactor = "x"\nname = "y"\nmethods = ["regg"]\n')
    with pytest.raises(InputError, match="unknown method 'regg'"):
        load_study(str(unknown))[1].table()
    row = load_study(str(small))[1].table().rows[0]
    with pytest.raises(InputError, match="two seeds, and the table has one"):
        tables_of(row, seeds=(0,))
    with pytest.raises(InputError, match="leave out transfer or \\[artefact\\]"):
        tables_of(row, seeds=(0, 1), artefact={"tier": "commit"})


def tables_of(row: object, **fields: object) -> object:
    return checked(TableSpec.model_validate({"title": "t", "rows": (row,), **fields}), "t")


def a_result(seed: int, **right: list[int]) -> SimpleNamespace:
    """As much of a record as a comparison reads."""
    conditions = {name: PackedVerdicts.of("", np.array(verdicts, bool)) for name, verdicts in right.items()}
    n = len(next(iter(right.values())))
    return SimpleNamespace(
        seed=seed, attacked=AttackedNetwork(images="", seed=0, n=n, conditions=conditions, provenance={})
    )


def test_an_effect_counts_seeds_and_images_by_hand() -> None:
    ours = [a_result(0, pgd=[1, 1, 1, 0]), a_result(1, pgd=[1, 1, 0, 0]), a_result(2, pgd=[1, 0, 0, 0])]
    theirs = [a_result(2, pgd=[0, 0, 0, 0]), a_result(1, pgd=[1, 0, 0, 0]), a_result(0, pgd=[0, 0, 1, 0])]
    found = effect.effect(ours, theirs, "pgd")
    by_seed, by_image = [50, 25, 25], [200 / 3, 200 / 3, 0, 0]
    errors = [np.std(values, ddof=1) / math.sqrt(len(values)) for values in (by_seed, by_image)]
    half = math.hypot(student.ppf(0.975, 2) * errors[0], normal.ppf(0.975) * errors[1])
    assert found == pytest.approx((100 / 3, 100 / 3 - half, 100 / 3 + half), rel=1e-3)
    assert effect.effect(ours, theirs, "worst") is None
    assert effect.effect(ours[:1], theirs[:1], "pgd") is None  # seeds 0 and 2


@pytest.mark.parametrize(
    ("union", "paper", "expected"),
    [
        (30, 0, "helps"),
        (-30, 30, "hurts"),
        (0, 30, "masks"),
        (1, 30, "undecided"),  # more under every attack too, as far as can be told
        (0, 3, "undecided"),  # more under PGD by chance
        (0, 0, "undecided"),
        (0, -30, "undecided"),
    ],
)
def test_verdicts(union: int, paper: int, expected: str) -> None:
    def network(seed: int, extra_union: int, extra_paper: int) -> SimpleNamespace:
        return a_result(
            seed, **{n: [1] * (50 + e) + [0] * (50 - e) for n, e in (("worst", extra_union), ("pgd", extra_paper))}
        )

    ours, theirs = ([network(seed, *extra) for seed in range(3)] for extra in ((union, paper), (0, 0)))
    assert effect.verdict(ours, theirs) == expected
    assert effect.verdict(ours[:1], theirs[:1]) == "undecided"  # one seed says nothing of how seeds differ


def test_where_nothing_is_left_nothing_is_decided() -> None:
    ours, theirs = ([a_result(s, worst=[0] * 4, pgd=[right] * 4) for s in range(3)] for right in (1, 0))
    assert effect.effect(ours, theirs, "worst") is None
    assert effect.verdict(ours, theirs) == "undecided"


def test_settings_that_share_images_are_pooled_by_image() -> None:
    """Twice the same images in a second setting: no narrower an interval."""
    ours = [a_result(0, pgd=[1, 1, 1, 0]), a_result(1, pgd=[1, 1, 0, 0]), a_result(5, pgd=[1, 1, 1, 1])]
    theirs = [a_result(0, pgd=[0, 0, 1, 0]), a_result(1, pgd=[1, 0, 0, 0])]
    one = effect.effect(ours[:2], theirs, "pgd")
    assert effect.pooled([(ours, theirs), (ours[:2], theirs)], "pgd") == pytest.approx(one)
    nothing = (theirs, theirs)
    assert effect.pooled([(ours, theirs), nothing], "pgd") == pytest.approx([value / 2 for value in one])
    assert effect.pooled([(ours[:1], theirs), (ours[1:], theirs)], "pgd") is None


def test_by_how_much_the_window_is_emptied_over_common_seeds() -> None:
    def network(seed: int, *omegas: float) -> SimpleNamespace:
        return SimpleNamespace(seed=seed, layers=[{"omega_empirical": omega} for omega in omegas])

    ours = [network(0, 0.2, 0.4), network(1, 0.1, 0.1)]
    theirs = [network(0, 0.5, 0.5), network(2, 0.9, 0.9)]
    assert effect.emptied(ours, theirs) == pytest.approx(0.2)


def step_of(model: nn.Module, defence: object, x: torch.Tensor, clean: torch.Tensor) -> Step:
    """A training step of a network in eval mode, as `batch_loss` makes it."""
    readings: list[object] = []
    y = torch.arange(len(x)) % 10
    logits = model(x, lambda trace: readings.append(defence.read(trace)))
    return Step(lambda x, observe: model(x, observe), x, y, clean, logits, readings, 0, torch.Generator())


def built(**settings: object) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    model, (defence,) = build_defended(small_recipe(defence={"mpd-sgr-variant": settings}), (1, 8, 8), 10)
    return model, defence


X = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_plain_variant_is_the_regulariser_of_the_package() -> None:
    for estimator in ("theorem", "empirical"):
        torch.manual_seed(0)
        recipe = small_recipe(defence={"mpd-sgr": {"estimator": estimator, "eta": 0.5}})
        model, (original,) = build_defended(recipe, (1, 8, 8), 10)
        expected = original.term(step_of(model, original, X, X))
        again, variant = built(estimator=estimator)
        found = variant.term(step_of(again, variant, X, X))
        assert found.value.item() == pytest.approx(expected.value.item(), rel=1e-6)
        assert found.weight == expected.weight


def test_only_what_is_asked_for_receives_the_gradient() -> None:
    """By the theorem the mean is a matter of beta, and the deviation of lambda."""
    for reaches, silent, reached in (("mean", "weight", "bias"), ("deviation", "bias", "weight")):
        model, variant = built(estimator="theorem", reaches=reaches)
        variant.term(step_of(model, variant, X, X)).value.backward()
        norms = [layer.norm for layer in model.layers()]
        assert all(getattr(norm, reached).grad.abs().max() > 0 for norm in norms)
        assert all(getattr(norm, silent).grad is None or not getattr(norm, silent).grad.any() for norm in norms)


def test_a_window_around_zero_and_a_bound_on_the_deviation() -> None:
    torch.manual_seed(0)
    current = 0.3 + 2.0 * torch.randn(1, 4000, 1)
    neuron = LIF(tau=0.5, surrogate=make_surrogate("triangle"))
    trace = Trace("layer", TdBN(1, v_threshold=1.0), neuron, neuron(current)[1], current)
    mu, sigma = current.mean().item() - 1, current.std(unbiased=False).item()

    def value(**settings: object) -> float:
        _, variant = built(**settings)
        step = SimpleNamespace(readings=[variant.read(trace)], epoch=0)
        return variant.term(step).value.item()

    def mass(mu: float, sigma: float) -> float:
        return normal.cdf((mu + 1) / sigma) - normal.cdf((mu - 1) / sigma)

    assert value() == pytest.approx(mass(mu, sigma), rel=1e-4)
    assert value(centre="zero") == pytest.approx(mass(mu + 1, sigma), rel=1e-4)
    assert value(widest=1.5) == pytest.approx(mass(mu, 1.5), rel=1e-4)
    rate = normal.cdf(mu / sigma)
    assert value(floor=0.9) == pytest.approx(mass(mu, sigma) + 1 - rate / 0.9, rel=1e-4)
    assert value(floor=0.1) == pytest.approx(mass(mu, sigma), rel=1e-4)


def test_eta_moves_over_the_epochs() -> None:
    for anneal, expected in (("none", [2, 2, 2]), ("in", [0, 2 / 3, 4 / 3]), ("out", [2, 4 / 3, 2 / 3])):
        model, variant = built(eta=2.0, anneal=anneal)
        step = step_of(model, variant, X, X)
        assert [variant.term(step._replace(epoch=e)).weight for e in range(3)] == pytest.approx(expected)


def test_a_membrane_margin_pushes_each_neuron_to_its_own_side() -> None:
    recipe = small_recipe(defence={"membrane-margin": {"width": 0.5}})
    _, (margin,) = build_defended(recipe, (1, 8, 8), 10)
    current = torch.tensor([0.0, 0.9, 1.1, 2.0]).view(1, 4, 1).requires_grad_()
    neuron = LIF(tau=0.5, surrogate=make_surrogate("triangle"))
    trace = Trace("layer", None, neuron, neuron(current)[1], current)
    step = SimpleNamespace(readings=[margin.read(trace)], logits=None, y=None)
    value = margin.term(step).value
    sigma = current.std(unbiased=False).item()
    assert value.item() == pytest.approx(2 * (1 - 0.1 / (0.5 * sigma)) / 4, rel=1e-4)
    value.backward()
    assert current.grad.sign().flatten()[1:3].tolist() == [1, -1]  # descent: 0.9 falls and 1.1 rises
    # a scale of all potentials around the threshold changes nothing
    assert ((current - 1) * current.grad).sum().item() == pytest.approx(0, abs=1e-5)


def salient_step(name: str, clean: torch.Tensor, **settings: object) -> tuple[Step, Term, list[torch.Tensor]]:
    """A step on X, attacked from `clean`, the term of a defence, and how much each current moves the margin."""
    torch.manual_seed(0)
    model, defences = build_defended(small_recipe(defence={"at": {}, name: settings}), (1, 8, 8), 10)
    step = step_of(model, defences[-1], X, clean)
    term = defences[-1].term(step)
    index, top = torch.arange(len(X)), step.logits.detach().clone()
    top[index, step.y] = -torch.inf
    currents = [reading[0] for reading in step.readings]
    margin = (step.logits[index, step.y] - step.logits[index, top.argmax(1)]).sum()
    margin.backward(inputs=currents, retain_graph=True)
    return step, term, [current.grad.abs() for current in currents]


def test_a_salient_neuron_weighs_by_the_margins_gradient() -> None:
    step, term, weights = salient_step("membrane-margin", X, salient=True)
    means = [(w * x).sum() / w.sum() for w, (_, x) in zip(weights, step.readings, strict=True)]
    assert term.value.item() == pytest.approx(torch.stack(means).mean().item(), rel=1e-4)


def test_a_salient_channel_weighs_by_the_margins_gradient_in_what_is_reached() -> None:
    clean = (X + 0.1).clamp(0, 1)
    step, term, weights = salient_step("salient-reach", clean)
    met = [own for _, own in step.readings]
    other: list[Trace] = []
    step.forward(clean, other.append)
    means = []
    for own, trace, weight in zip(met, other, weights, strict=True):
        moved = torch.stack([a - b.u for a, b in zip(own.potentials, trace.states, strict=True)]).detach()
        width = moved.square().mean((1, 3, 4)).sqrt().numpy()
        mu, sigma = (moment.detach().numpy() for moment in own.moments)
        mass = normal.cdf((mu + width) / sigma) - normal.cdf((mu - width) / sigma)
        means.append(np.average(mass, weights=weight.mean((1, 3, 4)).numpy()))
    assert term.value.item() == pytest.approx(np.mean(means), rel=1e-3)
    with pytest.raises(InputError, match=r"add \[defence.at\]"):
        build_defended(small_recipe(defence={"salient-reach": {}}), (1, 8, 8), 10)


def test_the_largest_gain_is_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    norm = TdBN(3, v_threshold=1.0).eval()
    norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.0]))
    norm.running_mean.fill_(0.7)
    nn.init.constant_(norm.bias, 0.4)
    layer = SpikingLayer(
        "conv1", nn.Conv2d(2, 3, 3, padding=1), norm, LIF(tau=0.5, surrogate=make_surrogate("triangle"))
    )
    with torch.no_grad():
        zero = norm(layer.synapse(torch.zeros(1, 2, 5, 5)))
        columns = [(norm(layer.synapse(e.view(1, 2, 5, 5))) - zero).flatten() for e in torch.eye(50)]
    expected = torch.linalg.matrix_norm(torch.stack(columns), 2).item()
    assert explain.largest_gain(layer, (2, 5, 5)) == pytest.approx(expected, rel=1e-3)


def test_factors_of_a_layer_by_hand() -> None:
    torch.manual_seed(0)
    recipe = small_recipe(neuron={"tau": 0.5})
    model, _ = build_defended(recipe, (1, 8, 8), 10)
    model.eval()
    images = load_test(recipe.data)[:5]
    first, *_ = explain.factors(model, images)
    traces: list[Trace] = []
    model(torch.from_numpy(images.unit()), traces.append)
    v = torch.stack([u for u, _ in traces[0].states]) - 1
    assert first.surrogate == pytest.approx((1 - v.abs()).clamp(min=0).square().mean().sqrt().item(), rel=1e-5)
    assert first.leak == pytest.approx(1 + 0.5 + 0.25)
    assert first.firing_rate == pytest.approx((v >= 0).float().mean().item())
    # its input is the image
    assert first.density == pytest.approx(1 / images.unit().std(), rel=1e-5)
    assert first.scale == pytest.approx(model.layers()[0].norm.weight.square().mean().sqrt().item())
    assert first.scale * first.density * first.filter == pytest.approx(first.weights)


def test_a_study_is_run_explained_and_shown(small: Path) -> None:
    done = study(small, "base.reg", "eta-2")
    assert done.exit_code == 0, done.output
    folder = small.parent / "results" / "study-small"
    records = records_of(folder)
    assert set(records) == {(row, seed) for row in ("base.reg", "eta-2.overlap") for seed in (0, 1)}
    tried = records["eta-2.overlap", 1].attacked.conditions
    assert {"transfer", "square", "strong adaptive", "worst"} <= tried.keys()
    page = (folder / "README.md").read_text()
    assert "| eta | eta-2 | overlap |" in page
    assert "Not measured: base.overlap, at.reg, at.overlap." in page
    why = study(small, "base.reg", "eta-2", "--why", "--images", "20")
    assert why.exit_code == 0, why.output
    networks = why_page.load_networks(load_study(str(small))[1], folder)
    assert {row: [n.seed for n in own] for row, own in networks.items()} == {
        "base.reg": [0, 1],
        "eta-2.overlap": [0, 1],
    }
    assert [round(size["eps"] / 0.1, 3) for size in networks["base.reg"][0].sizes] == list(explain.SIZES)
    assert "| eta-2.overlap | promised |" in (folder / "WHY.md").read_text()
    assert (folder / "why.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", EXPLAINED)
def test_a_committed_explanation_is_what_its_records_give(name: str) -> None:
    assert variants.DEPTHS  # registered, so that their recipes can be read
    stem, spec = load_study(name)
    folder = RESULTS / stem
    assert (folder / why_page.PAGE).read_text() == why_page.render(spec, why_page.load_networks(spec, folder))
    assert (folder / why_page.PLOT).read_bytes()[:4] == b"\x89PNG"


def test_what_the_studies_show_quotes_their_pages() -> None:
    text, pages = ("".join(page.read_text() for page in RESULTS.glob(g)) for g in ("STUDY.md", "study-*/*.md"))
    number = r"(?<![\w:.])[-+]?\d+\.\d+(?!\w|\.\d)"
    quoted, known = set(re.findall(number, text)), set(re.findall(number, pages))
    assert len(quoted) > 30
    assert quoted - known - {figure.lstrip("-+") for figure in known} - DIFFERENCES == set()
