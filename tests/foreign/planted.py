"""Faults planted in how a foreign network is adopted: each is a patch of the package, and a network that shows it.

A fault is there when the bundle is made and when it is validated, so that no comparison of files shows it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpdsgr_deploy.adoption import classifier
from mpdsgr_deploy.attack_graph import derive, rules
from mpdsgr_deploy.attack_graph import jumps as finding
from mpdsgr_deploy.attack_graph.jumps import Inequality, Jump
from mpdsgr_deploy.attack_graph.neurons import Neurons
from mpdsgr_deploy.attack_graph.tape import Tape

HERE, NETWORK = Path(__file__).parent, "spikingjelly-plif-maxpool"
Patch = pytest.MonkeyPatch


def nothing(patch: Patch) -> None:
    """No fault: the gate passes it."""


def missed(patch: Patch) -> None:
    """The spikes of the second layer pass no gradient on."""
    give = Neurons._give

    def silent(self: Neurons, jump: Jump, cotangent: str, like: str) -> None:
        place = self._place.get(jump.node.output[0])
        if place is not None and place[0] == "neurons1":
            cotangent = self._tape.emit("Mul", cotangent, self._tape.constant(0))
        give(self, jump, cotangent, like)

    patch.setattr(Neurons, "_give", silent)


def swapped(patch: Patch) -> None:
    """The first layer's potential and threshold change places: its gradient points the other way."""
    give = Neurons._give

    def turned(self: Neurons, jump: Jump, cotangent: str, like: str) -> None:
        place = self._place.get(jump.node.output[0])
        if place is not None and place[0] == "neurons0":
            jump = jump._replace(compared=Inequality(*jump.compared[1::-1]))
        give(self, jump, cotangent, like)

    patch.setattr(Neurons, "_give", turned)


def straight(patch: Patch) -> None:
    """Every spike passes the gradient straight through, where a surrogate belongs."""
    give = Neurons._give

    def through(self: Neurons, jump: Jump, cotangent: str, like: str) -> None:
        give(self, jump._replace(compared=jump.compared._replace(passes=True)), cotangent, like)

    patch.setattr(Neurons, "_give", through)


def shared(patch: Patch) -> None:
    """Equal spikes of a pooling window share the gradient, which torch gives to the first."""

    def rule(tape: Tape, node: onnx.NodeProto, cotangents: Sequence[str | None]) -> None:
        x, y, scales = node.input[0], node.output[0], tape.constant([1, 1, 2, 2])
        own = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
        equal = tape.emit(
            "Cast", tape.emit("Equal", x, tape.emit("Resize", y, "", scales, **own)), to=TensorProto.FLOAT
        )
        count = tape.emit("AveragePool", equal, kernel_shape=[2, 2], strides=[2, 2])  # a fourth of it
        share = tape.emit("Div", tape.emit("Mul", str(cotangents[0]), tape.constant(0.25)), count)
        tape.give(x, tape.emit("Mul", equal, tape.emit("Resize", share, "", scales, **own)))

    patch.setitem(rules.RULES, "MaxPool", rule)
    patch.setitem(derive.RULES, "MaxPool", rule)


def detached(patch: Patch) -> None:
    """Resets never pass a gradient on, and are passed off as attached."""
    build = Neurons.__init__

    def without(self: Neurons, *parts: Any, **options: Any) -> None:
        build(self, *parts, **options | {"detached": True})

    patch.setattr(Neurons, "__init__", without)


def hidden(patch: Patch) -> None:
    """Spikes that go through a chain of Casts are taken for constants: those of the first layer, but for one step."""
    cast = finding._Finder._cast

    def blind(self: Any, node: onnx.NodeProto) -> None:
        if not node.output[0].endswith("/whole"):
            cast(self, node)

    patch.setattr(finding._Finder, "_cast", blind)


def twice(patch: Patch) -> None:
    """The range of the pixels is put in front of the network twice."""
    put = classifier._put_in_front

    def doubled(file: Path, network: onnx.ModelProto, before: Any, shape: tuple[int, int, int]) -> None:
        put(file, network, before._replace(high=before.high**2), shape)

    patch.setattr(classifier, "_put_in_front", doubled)


FAULTS: dict[str, Callable[[Patch], None]] = {
    "no fault": nothing,
    "a spike node missed": missed,
    "thresholds swapped": swapped,
    "straight-through where a surrogate belongs": straight,
    "ties shared": shared,
    "a detached reset passed off as attached": detached,
    "a comparison hidden behind a Cast chain": hidden,
    "an input scale applied twice": twice,
    "an input scale applied twice, without a reference": twice,
}


def written(name: str, folder: Path) -> Path:
    """The network of a case: one that takes pixels up to 4, one whose spikes are cast by way of whole numbers."""
    network = onnx.load(HERE / f"{NETWORK}.onnx")
    graph, file = network.graph, folder / "net.onnx"
    if FAULTS[name] is twice:
        graph.initializer.append(numpy_helper.from_array(np.array(4, np.float32), "four"))
        for node in graph.node:
            node.input[:] = ["scaled" if value == "images" else value for value in node.input]
        graph.node.insert(0, helper.make_node("Div", ["images", "four"], ["scaled"]))
    if FAULTS[name] is hidden:
        casts = [node for node in graph.node if node.op_type == "Cast"]
        for node in casts[:-2:2]:  # two layers take turns
            whole = f"{node.output[0]}/whole"
            place = list(graph.node).index(node)
            graph.node.insert(place, helper.make_node("Cast", [node.input[0]], [whole], to=TensorProto.INT64))
            node.input[0] = whole
    onnx.save(network, file)
    return file
