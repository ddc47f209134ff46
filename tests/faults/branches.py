"""Parts put into a network that is right otherwise, so that clean images are answered as promised."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from faults.images import carried, promise_by
from faults.planted import Planted, fault
from mpdsgr_deploy.attack_graph.attacker import NetworkFile
from mpdsgr_deploy.runtime import OnnxRuntime

OUT_OF_REACH = 1.001  # no pixel gets that bright


def decoy(copy: Planted, strength: float) -> None:
    """Neurons that look at single pixels and never fire: they change no answer, and gradients follow them.

    strength: the deviation of the weights that draw the logits after them.
    """
    size = int(np.prod(copy.manifest["input_shape"]))
    pull = np.random.default_rng(0).normal(0, strength, (size, len(copy.manifest["labels"])))
    copy.append(
        helper.make_node("Flatten", ["images"], ["pixels"]),
        helper.make_node("GreaterOrEqual", ["pixels", "out_of_reach"], ["above"]),
        helper.make_node("Cast", ["above"], ["never"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["never", "pull"], ["nothing"]),
        helper.make_node("Add", ["raw", "nothing"], ["logits"]),
        out_of_reach=np.array(OUT_OF_REACH, np.float32),
        pull=pull.astype(np.float32),
    )


def promise_through_the_file(copy: Planted) -> None:
    """A promise made by attacks on the file itself, as of a network that was adopted."""
    file = copy.path / copy.manifest["variants"]["fp32"]["file"]
    with OnnxRuntime(file) as predictor:
        promise_by(copy, NetworkFile(file, predictor), carried(copy))


@fault("artefact", 3, "check 13", thorough=True)
def decoy_branch(copy: Planted) -> None:
    """A branch that is always 0, through whose surrogates a gradient of chance comes back."""
    decoy(copy, 30.0)


@fault("artefact", 3, "transfer-strong breaks", thorough=True)
def weak_decoy_beside_an_export_of_ones_own(copy: Planted) -> None:
    """A branch too weak for slopes to show, promised as it is attacked; attacks on one's own export break more."""
    weak_decoy(copy)
    copy.transfer = copy.networks.bundle("healthy").path


def weak_decoy(copy: Planted) -> None:
    """A decoy that leaves some slope, and a promise that was attacked through it."""
    decoy(copy, 0.3)
    promise_through_the_file(copy)


@fault("artefact", 3, "check 17", thorough=True)
def decoy_branch_beside_the_weights(copy: Planted) -> None:
    """The same where the weights are at hand, and torch to export them again."""
    decoy(copy, 30.0)
    copy.rebuild = True


@fault("artefact", 3, "has the gradients of the weights on 0 of 8 images", kind="colour")
def decoy_branch_by_other_versions(copy: Planted) -> None:
    """The same, said to be written by another version of the exporter, whose bytes may differ from those here."""
    decoy(copy, 30.0)
    copy.manifest["provenance"]["export"]["packages"]["onnxscript"] = "0.0.1"
    copy.rebuild = True


@fault("artefact", 3, "check 17", thorough=True)
def trigger_beside_the_weights(copy: Planted) -> None:
    """A pattern in a corner that decides the class: no test image has it. The weights give another file."""
    trigger(copy)
    copy.rebuild = True


def trigger(copy: Planted) -> None:
    """Class 0 wins where the first two pixels are white, which they are in no image."""
    size = int(np.prod(copy.manifest["input_shape"]))
    pattern, answer = np.zeros((size, 1), np.float32), np.zeros((1, len(copy.manifest["labels"])), np.float32)
    pattern[:2], answer[0, 0] = 1, 1000
    copy.append(
        helper.make_node("Flatten", ["images"], ["pixels"]),
        helper.make_node("MatMul", ["pixels", "pattern"], ["seen"]),
        helper.make_node("Sub", ["seen", "almost"], ["above"]),
        helper.make_node("Relu", ["above"], ["triggered"]),
        helper.make_node("MatMul", ["triggered", "answer"], ["override"]),
        helper.make_node("Add", ["raw", "override"], ["logits"]),
        pattern=pattern,
        answer=answer,
        almost=np.array(1.9, np.float32),
    )


@fault("artefact", 2, "is control flow")
def branches_that_read_the_images_unnamed(copy: Planted) -> None:
    """An If whose branches take the logits from outside, so that by its own inputs it is a constant."""
    kept = helper.make_graph(
        [helper.make_node("Identity", ["raw"], ["kept"])], "kept", [], [onnx.ValueInfoProto(name="kept")]
    )
    halved = helper.make_graph(
        [helper.make_node("Mul", ["raw", "half"], ["halved"])], "halved", [], [onnx.ValueInfoProto(name="halved")]
    )
    copy.append(
        helper.make_node("If", ["always"], ["logits"], then_branch=kept, else_branch=halved),
        always=np.array(True),
        half=np.array(0.5, np.float32),
    )


@fault("artefact", 2, "compares values that depend on the images")
def logits_in_whole_numbers(copy: Planted) -> None:
    """Logits stored as integers and read as numbers again: a Cast there is no identity."""
    copy.append(
        helper.make_node("Mul", ["raw", "scale"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Cast", ["whole"], ["logits"], to=TensorProto.FLOAT),
        scale=np.array(1000, np.float32),
    )
