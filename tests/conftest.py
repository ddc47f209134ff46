"""One small trained network, its bundle, and the command, shared by all tests."""

import gc
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked_worker
import numpy as np
import pytest
import quick_tiers
from click.testing import CliRunner
from missing_packages import HAS_TORCH, pytest_make_collect_report, pytest_runtest_makereport
from once import make_once
from zygote import ADDRESS, ASKING, BASE, SERVERS, WORKERS, ask, start

from mpdsgr_deploy.attacks.tiers import TIERS
from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.cli import main
from mpdsgr_deploy.damage import cover_up, damage
from mpdsgr_deploy.damage import seal_again as resealed
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.recipe import Recipe

quick_tiers.use()
gc.disable()  # until everything is collected and imported
__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport", "resealed"]
T = 2  # time steps of the small recipe: the exporter takes as long as there are layers times steps
SMALL = {
    "data": {"name": "digits", "augment": "none"},
    "model": {"name": "vgg-small", "width": 0.25},
    "encoding": {"T": T},
    "training": {"epochs": 3, "batch_size": 65, "pictures": 0},  # drawing takes longer than three epochs
    "attack": {"eps": 0.1, "step": 0.03, "strong_steps": 8, "surrogates": ["triangle:0.5", "rate"]},
    "validation": {"limit": 100},
}
FIRST = (  # the slowest tests, by worker
    # these share the networks of test_export.exported; predict_ray starts when the other cluster stops
    ("export", "attack_graph", "graph_attacker", "precision", "firing", "predict_ray"),
    # loading torch's compiler takes seconds, once for both files that use it
    ("deploy_ray", "compiled_neurons", "torch_compile", "study"),
    ("calls_home", "readme", "deployed_table", "cli", "processes"),
)
QUICK_GATE = "images = 20\nmax_drop = 0.5\n"  # as few images as can decide anything, in seconds


def small_recipe(**sections: dict[str, object]) -> Recipe:
    """The small recipe with some fields of some sections replaced."""
    values = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}}
    return Recipe.model_validate(values)


def pytest_configure(config: pytest.Config) -> None:
    """Workers inherit the variables that say where the zygotes listen."""
    if config.getoption("numprocesses", None):
        start(SERVERS)
        filters = [f"-W{rule}" for rule in config.getoption("pythonwarnings") or []]
        start(*([ADDRESS] if HAS_TORCH else []), WORKERS, tests=[*filters, *config.args])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """Have workers forked from a process that has imported what they import."""
    for spec in specs:
        spec.python = shlex.join([sys.executable, "-IS", forked_worker.__file__, os.environ[WORKERS]])


def mpdsgr(
    *arguments: object, cwd: Path | None = None, prelude: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a user would. prelude: code that this process executes first."""
    words, variables = [*map(str, arguments)], {**os.environ, **environment}
    if not HAS_TORCH or "PYTHONPATH" in environment:  # a path decides what is imported
        program = f"{prelude}\nfrom mpdsgr_deploy.cli import main\nmain({words!r}, prog_name='mpdsgr')"
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300, check=False)
    return ask(words, cwd or Path.cwd(), variables, prelude)


def mpdsgr_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in this process: seconds faster, where only its last line and exit code are of interest."""
    try:
        runner = CliRunner(mix_stderr=False)  # type: ignore[call-arg]  # click before 8.2
    except TypeError:
        runner = CliRunner()
    done = runner.invoke(main, [*map(str, arguments)])
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def assert_input_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2, no traceback, one last line that says what is wrong."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    for part in parts:
        assert part in line, line


def perturbed(bundle: Bundle, out: Path) -> Path:
    """A copy in which the network's weights are off, and golden batch and hashes go along with that."""
    return cover_up(damage(bundle, out), bundle)


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills once in a test run, by whichever worker needs it first.

    Every worker gets a copy of its own, so that a test that writes into it disturbs no other worker.
    """
    mine = tmp_path_factory.mktemp("copies") / name
    shutil.copytree(made_once(tmp_path_factory, name, make), mine)
    return mine


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A file or folder that `make` writes once in a test run, shared by all workers: not to be written to."""
    return make_once(base_of_all(tmp_path_factory), name, make)


def base_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder that all workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One more than there are cores: some tests wait for servers and clusters most of their time."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin each worker's share, an equal stretch of all tests at first, with long ones; others take from its end."""
    workers, total = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)), len(items)
    long: dict[str, list[pytest.Item]] = {f"test_{name}.py": [] for names in FIRST for name in names}
    short: list[pytest.Item] = []
    for item in items:
        long.get(item.path.name, short).append(item)
    items.clear()
    for worker in range(workers):
        share = (total - len(items)) // (workers - worker)
        begin = [item for names in FIRST[worker::workers] for name in names for item in long[f"test_{name}.py"]]
        room = max(0, share - len(begin))
        items += begin + short[:room]
        del short[:room]


def pytest_collection_finish() -> None:
    """Have garbage collections, a seventh of all processor time else, skip what is imported, and be rarer."""
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)
    gc.enable()


def trained(recipe: Recipe, out: Path) -> None:
    if not HAS_TORCH:
        pytest.skip("needs the extra `train`")
    from mpdsgr_deploy.training import train

    train(recipe, out)


def exported(run: Path, out: Path, **options: Any) -> None:
    from mpdsgr_deploy.exporting import export

    export(run, out, **options)


@pytest.fixture(scope="session", autouse=True)
def _neurons_are_not_compiled() -> Iterator[None]:
    """On a busy machine the neurons of many tests would together take long enough to be compiled, which costs more."""
    if "torch" not in sys.modules:
        yield
        return
    from mpdsgr_deploy.snn import compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "PAYS", float("inf"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _every_network_is_exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where bundles are written and checked, in tests that import `exporting_once`, and in forked commands."""
    if "torch" not in sys.modules:
        yield  # nobody exports here
        return
    import exporting_once

    with pytest.MonkeyPatch.context() as patch:
        base = base_of_all(tmp_path_factory)
        exporting_once.use(patch, base)
        patch.setenv(BASE, str(base))
        patch.setattr("mpdsgr_deploy.exporting.bundle_writer.promise", exporting_once.promise)
        yield


@pytest.fixture(scope="session", autouse=True)
def _every_fresh_process_of_a_validation_is_forked() -> Iterator[None]:
    """Elsewhere than in tests of an installed package, where it starts as a user's does."""
    if not HAS_TORCH:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpdsgr_deploy.validation.target.subprocess", ASKING)
        yield


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of the small recipe, with pictures of the second and the last epoch."""
    return once(tmp_path_factory, "run", lambda out: trained(small_recipe(training={"pictures": 2}), out))


@pytest.fixture(scope="session")
def bundle(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle, in float32."""
    return open_bundle(once(tmp_path_factory, "bundle", lambda out: exported(run_dir, out)))


@pytest.fixture(scope="session")
def images(bundle: Bundle) -> np.ndarray:
    """The first 40 test images of the bundle's data, float32 [40, 1, 8, 8] in [0, 1]."""
    return load_test(bundle.manifest.recipe.data)[:40].unit()


@pytest.fixture(scope="session")
def precise(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same network in every precision."""
    from mpdsgr_deploy.exporting.precision import PRECISIONS

    return open_bundle(once(tmp_path_factory, "precise", lambda out: exported(run_dir, out, precisions=PRECISIONS)))


@pytest.fixture(scope="session")
def stochastic(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of a trained network of Poisson spikes and gates, in float32 and float16."""

    def make(out: Path) -> None:
        trained(stochastic_recipe(), out / "run")
        exported(out / "run", out / "noisy", precisions=["fp16"])

    return open_bundle(once(tmp_path_factory, "stochastic", make) / "noisy")


def stochastic_recipe() -> Recipe:
    return small_recipe(
        encoding={"name": "poisson", "T": 3},
        defence={"stog": {"prior": 0.01}},
        attack={"eps": 0.1, "step": 0.05, "strong_steps": 3, "surrogates": [], "draws": 2},
        validation={"limit": 40, "seed": 7},
    )


@pytest.fixture
def real_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attacks of the tier `commit` as users have them, in this process: see `quick_tiers`."""
    monkeypatch.setitem(TIERS, "commit", replace(quick_tiers.REAL, probe=TIERS["commit"].probe))


@pytest.fixture
def loggers() -> Iterator[None]:
    """The logging of this process as it was before a command in it set up its own."""
    found = [logging.getLogger(name) for name in (None, "mpdsgr_deploy")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in found]
    yield
    logging.captureWarnings(False)
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def run_without_data(run_dir: Path, tmp_path: Path) -> Path:
    """The same checkpoint, of a data set that is not at hand."""
    copy = tmp_path / "run-without-data"
    copy.mkdir()
    for file in (run_dir / "best").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    text = (copy / "checkpoint.json").read_text()
    (copy / "checkpoint.json").write_text(text.replace('"name": "digits"', '"name": "mnist"'))
    return copy
