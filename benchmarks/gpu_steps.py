"""The steps of gpu.py, each a process of its own: gpu_steps.py STEP OUT ROOT cuda|cpu.

On a CPU they rehearse, at a size that only shows that the step works: Triton's interpreter stands for the kernels, and
onnxruntime's CPU provider for CUDA.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import gpu_inference
import harness
import machine
import numpy as np
import workers

from mpdsgr_deploy import api
from mpdsgr_deploy.attack_graph.attacker import GraphAttacker
from mpdsgr_deploy.attacks import pgd
from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.checkpoint import load_checkpoint
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.errors import MpdsgrError, one_line
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.reference import IMAGES, load_images
from mpdsgr_deploy.runtime import open_predictor, session
from mpdsgr_deploy.surrogates import trained_surrogate
from mpdsgr_deploy.validation.proportions import mcnemar

TOP = harness.FOLDER.parent
DIGITS = TOP / "export" / "bundles" / "digits"
GATE = "images = 20\nmax_drop = 0.5\n"  # of a rehearsal: as few images as can decide anything


class Place:
    """Where a step writes and computes; `note` keeps one result at once."""

    def __init__(self, name: str, out: Path, root: str, device: str) -> None:
        self.out, self.root, self.device = out, root, device
        self.gpu = device == "cuda"
        self.backend = f"onnxruntime-{device}"
        self._file = out / f"{name}.jsonl"

    def note(self, what: str, **figures: Any) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps({"what": what, **figures}) + "\n")


def kernels(place: Place) -> None:
    """The tests of the Triton kernels, on the GPU itself: forward, gradients, every surrogate, half precision."""
    report = place.out / "kernels.xml"
    chosen = [] if place.gpu else ["-k", "single_steps and triangle"]
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "0" if place.gpu else "1"}
    tests = TOP / "tests" / "triton_equality.py"
    subprocess.run([*command, tests, f"--junitxml={report}", *chosen], cwd=TOP, env=environment, check=False)
    outcomes: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        failed = case.find("failure") if case.find("error") is None else case.find("error")
        name = str(case.get("name")).partition("[")[0]
        outcomes.setdefault(name, Counter())["passed" if failed is None else "failed"] += 1
        if failed is not None:
            place.note(str(case.get("name")), failure=one_line(failed.get("message"))[:200])
    for name, counts in outcomes.items():
        place.note(name.replace("_", " "), **counts)


def providers(place: Place) -> None:
    """Golden batch, labels and attacked verdicts of every precision, CUDA against CPU, and TF32 as a planted fault."""
    limit, gate = (None, None) if place.gpu else (20, place.out / "gate.toml")
    if gate is not None:
        gate.write_text(GATE)
    digits = open_bundle(DIGITS)
    with cpu_reports(place, digits, limit, gate) as reports:
        for bundle in (digits, open_bundle(TOP / "export" / "doctor" / "bundle")):
            for precision in bundle.manifest.variants:
                label = f"{bundle.path.name} {precision}: labels, CUDA against CPU"
                refused(place, label, lambda b=bundle, p=precision, what=label: labels(place, b, p, what))
        if place.gpu:
            refused(place, "planted: TF32", lambda: planted_tf32(place, digits))
        for precision, wait in reports.items():
            what = f"digits {precision}: verdicts of tier commit, CUDA against CPU"
            refused(
                place, what, lambda p=precision, w=wait, what=what: verdicts(place, digits, p, w, limit, gate, what)
            )


@contextmanager
def cpu_reports(place: Place, bundle: Bundle, limit: int | None, gate: Path | None) -> Any:
    """The same validation on the CPU, begun at once beside the GPU's work; by precision, what waits for its report."""
    with ExitStack() as stack:
        waiting = {}
        for precision in bundle.manifest.variants if place.gpu else ["int8"]:
            report = place.out / f"cpu-{precision}"
            command = [
                sys.executable,
                "-m",
                "mpdsgr_deploy",
                "validate",
                f"{bundle.path}@{precision}",
                "--report",
                report,
            ]
            command += ["--tier", "commit"] if gate is None else ["--gate", gate, "--limit", limit]
            process = subprocess.Popen([*map(str, command)], cwd=TOP, stdout=subprocess.DEVNULL)
            stack.callback(process.kill)
            waiting[precision] = lambda process=process, report=report: (process.wait(), report)[1]
        yield waiting


def digits_images() -> Images:
    """The test images that the shipped bundle carries."""
    return load_images(DIGITS / IMAGES)


def labels(place: Place, bundle: Bundle, precision: str, what: str) -> None:
    x = digits_images().unit()[: None if place.gpu else 20]
    answers, seconds = {}, {}
    for backend in dict.fromkeys((place.backend, "onnxruntime-cpu")):
        with open_predictor(bundle, backend, precision) as predict:  # answers the golden batch, or raises
            predict(x)
            started = time.perf_counter()
            answers[backend] = predict(x)
            seconds[backend] = time.perf_counter() - started
    parity = compare(answers["onnxruntime-cpu"], answers[place.backend])
    rate = len(x) / seconds[place.backend]
    place.note(what, golden="equal", images_per_second=rate, **parity.model_dump())


def planted_tf32(place: Place, bundle: Bundle) -> None:
    """Rounding that the provider is told to leave alone: is it seen where it is switched on?"""
    exact = session.OPTIONS[session.CUDA]
    session.OPTIONS[session.CUDA] = {"use_tf32": "1"}
    try:
        labels(place, bundle, "fp32", "planted: TF32")
    finally:
        session.OPTIONS[session.CUDA] = exact


def verdicts(
    place: Place,
    bundle: Bundle,
    precision: str,
    wait: Callable[[], Path],
    limit: int | None,
    gate: Path | None,
    what: str,
) -> None:
    started = time.perf_counter()
    tier = None if gate else "commit"
    here = api.validate(
        bundle, place.out / f"{place.device}-{precision}", backend=place.backend, precision=precision, tier=tier,
        gate=gate, limit=limit, rebuild=False,
    )  # fmt: skip
    place.note(f"{what}: done", verdict=str(here.verdict), seconds=time.perf_counter() - started)
    there = json.loads((wait() / "report.json").read_text())
    rows = {row["name"]: row for row in there["rows"]}
    for row in here.rows:
        if row.name in rows:
            other = type(row).model_validate(rows[row.name])
            cuda, cpu = row.artefact.verdicts(row.n), other.artefact.verdicts(other.n)
            worse, better = int((cpu & ~cuda).sum()), int((cuda & ~cpu).sum())
            place.note(f"{what}, {row.name}", n=row.n, lost=worse, gained=better, p=mcnemar(worse, better))


def attack(place: Place) -> None:
    """PGD through the attack graph: the same images broken, how far the gradients differ, images a second."""
    bundle = open_bundle(DIGITS)
    provider = session.CUDA if place.gpu else session.CPU
    images, count = digits_images(), 256 if place.gpu else 20
    x, y = images.unit()[:count], images.classes[:count]
    surrogate = trained_surrogate(bundle.manifest.recipe)
    for precision in bundle.manifest.variants:
        found, gradients = {}, {}
        for name in dict.fromkeys((provider, session.CPU)):
            with GraphAttacker(bundle.variant(precision), surrogate, provider=name) as target:
                gradients[name] = target(x, y).gradient
                started = time.perf_counter()
                attacked = pgd(target, x, y, eps=0.1, step=0.025, steps=10)
                seconds = time.perf_counter() - started
                found[name] = target(attacked, y).logits.argmax(1) == y
                place.note(
                    f"digits {precision}: PGD-10 on {name}",
                    images_per_second=len(x) / seconds,
                    right=int(found[name].sum()),
                )
        here, there = gradients[provider], gradients[session.CPU]
        difference = np.abs(here - there).max((1, 2, 3)) / np.abs(there).max((1, 2, 3)).clip(1e-30)
        lost, gained = ((found[a] & ~found[b]).sum() for a, b in ((session.CPU, provider), (provider, session.CPU)))
        place.note(
            f"digits {precision}: against the CPU", lost=int(lost), gained=int(gained),
            median_gradient_difference=float(np.median(difference)), largest=float(difference.max()),
        )  # fmt: skip


def training(place: Place) -> None:
    """A step and PGD-7 of VGG11 beside SpikingJelly, and the share that they reach of the measured matrix product."""
    from training import flops_an_image

    width, T, batches, turns, size = (1.0, 8, (128, 256), 5, 8192) if place.gpu else (0.05, 2, (2,), 3, 256)
    passes = {"train": 3, "attack": 2 * 7}
    forward = flops_an_image(width, T)
    with ExitStack() as stack:
        names = ("ours", "spikingjelly")
        threads = len(os.sched_getaffinity(0))
        running = {n: stack.enter_context(workers.worker(n, width, T, threads, place.device)) for n in names}
        for precision in ("bf16", "fp32"):
            peak = machine.product_rate(precision, place.device, size)
            place.note(f"matrix product, {precision}", tflops=peak / 1e12)
            for batch in batches:
                for task in passes:
                    contenders = {
                        name: lambda work=work, b=batch, t=task, p=precision: work(t, b, p)["seconds"]
                        for name, work in running.items()
                    }
                    seconds = harness.take_turns(contenders, turns, warm_up=2)
                    for name, own in seconds.items():
                        share = passes[task] * forward * batch / median(own) / peak
                        ratio = harness.spread(seconds["spikingjelly"], own)
                        place.note(
                            f"{task}, {precision}, batch {batch}: {name}",
                            images_per_second=batch / median(own),
                            times_spikingjelly=ratio,
                            share_of_product=share,
                        )


def cifar10(place: Place) -> None:
    """Ninety seconds of training in two parts, the first one killed: epochs, images a second, accuracy."""
    run, settings = place.out / "cifar10", ["--set", "training.precision=bf16-mixed"]
    if place.gpu:
        recipe, parts = "cifar10-vgg11-mpdsgr", (45, 45)
        settings += [
            "--set",
            f"data.root={place.root}",
            "--set",
            "training.batch_size=256",
            "--set",
            "training.epochs=60",
        ]
    else:
        recipe, parts = "digits-mpdsgr", (20, 600)
        settings += ["--set", "training.epochs=2", "--set", "encoding.T=1", "--set", "training.accelerator=cpu"]
    command = [sys.executable, "-m", "mpdsgr_deploy", "train", recipe, *settings, "--out", run, "--resume"]
    for number, seconds in enumerate(parts):
        process = subprocess.Popen([*map(str, command)], cwd=TOP)
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = "killed"
        history = load_checkpoint(run / "last").history if (run / "last").exists() else []
        place.note(f"{recipe}, part {number + 1}: {seconds} s at most", ended=code, epochs=len(history))
    for entry in history:
        figures = {
            name: entry[name] for name in ("T", "seconds", "peak_mib", "loss", "train_accuracy", "validation_accuracy")
        }
        place.note(f"{recipe}, epoch {entry['epoch']}", **figures)


def inference(place: Place) -> None:
    width, T, batches, repetitions = (1.0, 8, (1, 32, 256, 1024), 10) if place.gpu else (0.05, 2, (1, 3), 2)
    recipe = Recipe.model_validate({"model": {"name": "vgg11", "width": width}, "encoding": {"T": T}})
    backends = gpu_inference.BACKENDS if place.gpu else gpu_inference.REHEARSED
    gpu_inference.measure(place.note, recipe, batches, repetitions, backends)


def refused(place: Place, what: str, measure: Callable[[], None]) -> None:
    """Measure, or note why that was refused: the other results are worth having all the same."""
    try:
        measure()
    except MpdsgrError as error:
        place.note(what, refused=one_line(error)[:300])


STEPS = {step.__name__: step for step in (kernels, providers, attack, training, cifar10, inference)}

if __name__ == "__main__":
    name, out, root, device = sys.argv[1:]
    STEPS[name](Place(name, Path(out).resolve(), root, device))
