"""Profile a training step by layer with torch's profiler.

    OUT/profile/trace.json.gz    for chrome://tracing or Perfetto
    OUT/profile/profile.txt      time and memory by layer, as a table
    OUT/profile/profile.json     the same for programs

A backward operation belongs to the layer whose forward operation it differentiates, which has the same autograd
sequence number. What a layer recomputes in the backward pass counts as backward.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function, schedule

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.snn import SpikingLayer

WARM_UP, STEPS = 2, 3  # number of training steps before those that are profiled, and of those
WHOLE = ("data", "attack", "regulariser", "optimiser")  # parts whose time includes that of the layers that run in them
BACKWARD, NODE, STEP = "backward", "autograd::engine::evaluate_function", "ProfilerStep"
Place = tuple[str, bool]  # name of a part, and whether it is the part's backward pass


def span(name: str) -> AbstractContextManager[Any]:
    """Return a context manager whose block has that name in the profile, if a profiler is running."""
    return record_function(name) if torch.autograd.profiler._is_profiler_enabled else nullcontext()


def parts_of(model: SpikingNet) -> dict[str, nn.Module]:
    """Return the modules that have a row in the profile, by the row's name, in the order of the forward pass."""
    parts: dict[str, nn.Module] = {"encoding": model.encode}
    for number, module in enumerate(model.body, 1):
        if not isinstance(module, SpikingLayer):
            parts[f"{number} {type(module).__name__}"] = module
        for layer in module.modules():
            if isinstance(layer, SpikingLayer):
                modules = {"synapse": layer.synapse, "norm": layer.norm, "neuron": layer.neuron, "rest": layer}
                parts |= {f"{layer.name} {name}": part for name, part in modules.items() if part is not None}
    return {**parts, "readout": model.readout}


class Profile:
    """Profiles STEPS training steps after a warm-up, and writes the files into `out`. Call `step` after each step."""

    def __init__(self, model: SpikingNet, out: Path) -> None:
        self._out, self._done, self._ranges = out, False, []  # type: ignore[var-annotated]
        modules = parts_of(model)
        self._names = [*modules, *WHOLE, "loss", BACKWARD]
        self._hooks = [hook for name, module in modules.items() for hook in self._named(name, module)]
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=schedule(wait=WARM_UP - 1, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )
        self._profiler.start()

    def _named(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Name each forward pass of the module in the profile, also one that raises; yield the hooks that do it."""

        def before(*_: Any) -> None:
            self._ranges.append(record_function(name).__enter__())

        def after(*_: Any) -> None:
            self._ranges.pop().__exit__(None, None, None)

        yield module.register_forward_pre_hook(before)
        yield module.register_forward_hook(after, always_call=True)

    def step(self) -> None:
        """Mark the end of a training step."""
        if not self._done:
            self._profiler.step()

    def close(self) -> None:
        """Remove the hooks, and log a warning if the run had too few steps for a profile."""
        if not self._done:
            self._finish()
            log.warning("no profile was written, because it needs %d training steps", WARM_UP + STEPS)

    def _finish(self) -> None:
        self._done = True
        for hook in self._hooks:
            hook.remove()

    def _write(self, profiler: torch.profiler.profile) -> None:
        if not any(event.name.startswith(STEP) for event in profiler.events() or ()):
            return
        self._finish()
        self._out.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._out / "trace.json.gz"))
        profile = summary(list(profiler.events()), self._names)
        write_atomic(self._out / "profile.json", (json.dumps(profile, indent=1) + "\n").encode())
        write_atomic(self._out / "profile.txt", table(profile).encode())
        log.info("profile of %d training steps in %s", profile["steps"], self._out)


def summary(events: list[FunctionEvent], names: list[str]) -> dict[str, Any]:
    """Return the content of profile.json: the average of the steps in `events`, by part.

    names: the parts, in order. step_ms is wall time; forward_ms and backward_ms of a part are GPU time if there is a
    GPU, else CPU time. share: of step_ms. grown_mib: the memory that the part's forward pass allocated and kept.
    explained: the sum of all shares.
    """
    step_events = [event for event in events if event.name.startswith(STEP) and event.device_type.name == "CPU"]
    count, on_gpu = len(step_events), any(event.device_type.name == "CUDA" for event in events)
    milliseconds = sum(event.time_range.elapsed_us() for event in step_events) / 1000 / count
    spent: dict[Place, float] = defaultdict(float)
    grown: dict[str, float] = defaultdict(float)
    for event, place in placed(events, names):
        name, back = place
        spent[place] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000 / count
        if not back:
            memory = event.self_device_memory_usage if on_gpu else event.self_cpu_memory_usage
            grown[name] += memory / 2**20 / count
    rows = [
        {
            "part": name,
            "forward_ms": spent[name, False],
            "backward_ms": spent[name, True],
            "share": (spent[name, False] + spent[name, True]) / milliseconds,
            "grown_mib": grown[name],
        }
        for name in names
        if (name, False) in spent or (name, True) in spent
    ]
    return {
        "steps": count,
        "step_ms": milliseconds,
        "time_of": "GPU" if on_gpu else "CPU",
        "explained": sum(row["share"] for row in rows),
        "peak_mib": peak_memory() / 2**20,
        "parts": rows,
    }


def placed(events: list[FunctionEvent], names: list[str]) -> Iterator[tuple[FunctionEvent, Place]]:
    """Yield the CPU events that belong to one of the parts `names`, each with its place."""
    known = set(names)
    created: dict[tuple[int, int], FunctionEvent] = {}  # forward operations by thread and autograd sequence number
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not within(event, lambda e: e.name.startswith(NODE)):
            created[event.thread, event.sequence_nr] = event
    places: dict[int, Place | None] = {}

    def place(event: FunctionEvent) -> Place | None:
        if id(event) not in places:
            places[id(event)] = located(event)
        return places[id(event)]

    def located(event: FunctionEvent) -> Place | None:
        parent = place(event.cpu_parent) if event.cpu_parent is not None else None
        if parent is not None and parent[0] in WHOLE:
            return parent
        if event.name in known:
            return event.name, event.name == BACKWARD or (parent is not None and parent[1])
        if event.name.startswith(NODE):
            differentiated = created.get((event.fwd_thread or event.thread, event.sequence_nr))
            forward = None if differentiated is None else place(differentiated)
            return (BACKWARD if forward is None else forward[0]), True
        return parent

    for event in events:
        if event.device_type.name == "CPU" and not event.name.startswith(STEP):
            event_place = place(event)
            if event_place is not None:
                yield event, event_place


def within(event: FunctionEvent | None, kind: Callable[[FunctionEvent], bool]) -> bool:
    """Whether `kind` holds for the event or for one that encloses it."""
    while event is not None and not kind(event):
        event = event.cpu_parent
    return event is not None


def peak_memory() -> int:
    """Return peak memory in bytes: what torch allocated on the GPU, or without a GPU the memory of this process.

    On Windows, where the latter is unknown, it is 0.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(profile: dict[str, Any]) -> str:
    width = max(len(row["part"]) for row in profile["parts"])
    lines = [
        (
            f"one training step: {profile['step_ms']:.1f} ms, mean of {profile['steps']}; {profile['time_of']} time; "
            f"peak memory {profile['peak_mib']:.0f} MiB"
        ),
        "",
        f"{'part':{width}}  {'forward ms':>10}  {'backward ms':>11}  {'% of step':>9}  {'memory grown, MiB':>17}",
    ]
    for row in profile["parts"]:
        lines.append(
            f"{row['part']:{width}}  {row['forward_ms']:10.2f}  {row['backward_ms']:11.2f}  "
            f"{100 * row['share']:9.1f}  {row['grown_mib']:17.1f}"
        )
    lines.append(f"{'not in any of them':{width}}  {'':10}  {'':11}  {100 * (1 - profile['explained']):9.1f}")
    return "\n".join([*lines, ""])
