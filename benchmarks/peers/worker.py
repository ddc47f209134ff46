"""One implementation of VGG11 in a process of its own: reads a task a line, answers seconds and peak memory as JSON.

    python worker.py NAME[-compiled|-onnx] WIDTH T THREADS DEVICE

A task is `train|attack|infer BATCH fp32|bf16`. A training step is forward, cross-entropy (ours: and the
MPD-SGR regulariser), backward and SGD with momentum; an attack is PGD-7 in eval mode, theirs by torchattacks; both are
as the library's users would write them. Peak memory is of that task alone: the process's resident set on a CPU, what
torch allocated on a GPU.
"""

import contextlib
import importlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import ALPHA, CLASSES, EPS, SHAPE, STEPS


class Peer:
    """Another library's network, with the plain training loop around it; compiled, it is also channels last."""

    def __init__(self, name: str, width: float, T: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        library, _, compiled = name.partition("-")
        self.layout = torch.channels_last if compiled else torch.contiguous_format
        network = importlib.import_module(f"{library}_vgg11").Network(width, T).to(device, memory_format=self.layout)
        # compile again for each shape, because kernels for any batch size would be slower
        self.network = torch.compile(network, dynamic=False) if compiled else network
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9)

    def autocast(self, precision: str) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def train(self, x: torch.Tensor, y: torch.Tensor, precision: str) -> None:
        self.network.train()
        with self.autocast(precision):
            logits = self.network(x.contiguous(memory_format=self.layout))
            loss = torch.nn.functional.cross_entropy(logits.float(), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def attack(self, x: torch.Tensor, y: torch.Tensor, precision: str) -> None:
        import torchattacks

        self.network.eval()
        pgd = torchattacks.PGD(self.network, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=True)
        with self.autocast(precision):
            pgd(x.contiguous(memory_format=self.layout), y)

    @torch.inference_mode()
    def infer(self, x: torch.Tensor, y: torch.Tensor, precision: str) -> None:
        self.network.eval()
        with self.autocast(precision):
            self.network(x.contiguous(memory_format=self.layout))


class Exported(Peer):
    """Its ONNX file, as torch writes it, in onnxruntime: inference on a CPU."""

    def __init__(self, name: str, width: float, T: int, device: torch.device) -> None:
        super().__init__(name.removesuffix("-onnx"), width, T, device)
        self.sessions: dict[int, object] = {}

    def infer(self, x: torch.Tensor, y: torch.Tensor, precision: str) -> None:
        if len(x) not in self.sessions:
            self.sessions[len(x)] = self.session(x)
        self.sessions[len(x)].run(None, {"x": x.numpy()})

    def session(self, x: torch.Tensor) -> object:
        import onnxruntime

        exported = io.BytesIO()
        torch.onnx.export(self.network.eval(), (x,), input_names=["x"], dynamo=True, verbose=False).save(exported)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(exported.getvalue(), options, providers=["CPUExecutionProvider"])


class Ours:
    """This package's network, in its own training loop, with the regulariser, its neurons compiled."""

    def __init__(self, width: float, T: int, device: torch.device) -> None:
        from mpdsgr_deploy.recipe import Recipe
        from mpdsgr_deploy.snn import compiled

        compiled.PAYS = 0.0  # neurons are compiled in the first step, which is not counted, as later in a long training
        self.device, self.learners = device, {}
        model, defence = {"name": "vgg11", "width": width}, {"mpd-sgr": {}}
        self.recipe = Recipe.model_validate({"model": model, "encoding": {"T": T}, "defence": defence})

    def learner(self, precision: str) -> object:
        """One for all precisions: they share weights and optimiser."""
        from lightning_fabric import Fabric

        from mpdsgr_deploy.defences import build_defended
        from mpdsgr_deploy.training.epoch import Learner

        if precision not in self.learners:
            plugin = {"fp32": "32-true", "bf16": "bf16-mixed"}[precision]
            fabric = Fabric(accelerator=self.device.type, devices=1, precision=plugin)
            torch.manual_seed(0)
            net, defences = build_defended(self.recipe, SHAPE, CLASSES)
            net = net.to(memory_format=torch.channels_last)
            wrapped, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9))
            self.learners = {precision: Learner(fabric, self.recipe, wrapped, net, defences, optimizer)}
        return self.learners[precision]

    def train(self, x: torch.Tensor, y: torch.Tensor, precision: str) -> None:
        from mpdsgr_deploy.data.batches import generator
        from mpdsgr_deploy.training.epoch import batch_loss

        learner = self.learner(precision)
        learner.wrapped.train()
        pixels = (x * 255).to(torch.uint8)
        learner.fabric.backward(batch_loss(learner, pixels, y, 0, generator(0, "draw"))["loss"])
        learner.optimizer.step()
        learner.optimizer.zero_grad()

    def attack(self, x: torch.Tensor, y: torch.Tensor, precision: str) -> None:
        from mpdsgr_deploy.defences.adversarial import AdversarialSettings, AdversarialTraining

        learner = self.learner(precision)
        attack = AdversarialTraining(AdversarialSettings(eps=EPS, step=ALPHA, steps=STEPS))
        with learner.fabric.autocast():
            attack.examples(learner.model, x, y, torch.Generator())

    @torch.no_grad()
    def infer(self, x: torch.Tensor, y: torch.Tensor, precision: str) -> None:
        learner = self.learner(precision)
        learner.model.eval()
        with learner.fabric.autocast():
            learner.model(x)


def measured(task: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds, and bytes above what there was before."""
    before = started_watching(device)
    started = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": peak(device), "before": before}


def started_watching(device: torch.device) -> int:
    """Forget the peak so far; returns what is in use."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: torch.device) -> int:
    """The most that was in use since."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM")


def status(key: str) -> int:
    """A line of the kernel's report on this process, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def main(name: str, width: float, T: int, threads: int, accelerator: str) -> None:
    """Answer until the input ends."""
    torch.set_num_threads(threads)
    device = torch.device(accelerator)
    if name == "ours":
        network = Ours(width, T, device)
    else:
        network = (Exported if name.endswith("-onnx") else Peer)(name, width, T, device)
    print("ready", flush=True)
    for line in sys.stdin:
        what, batch, precision = line.split()
        draw = torch.Generator().manual_seed(0)
        x = torch.rand(int(batch), *SHAPE, generator=draw).to(device)
        y = torch.randint(CLASSES, (int(batch),), generator=draw).to(device)
        task = getattr(network, what)
        print(json.dumps(measured(lambda task=task, x=x, y=y, p=precision: task(x, y, p), device)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
