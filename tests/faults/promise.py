"""What the bundle says of itself: figures, settings and files."""

import json

from faults.artefact import noisy
from faults.planted import Planted, fault
from mpdsgr_deploy.attacks.condition import CLEAN, GAUSSIAN, WORST
from mpdsgr_deploy.bundle import MANIFEST
from mpdsgr_deploy.recipe import Gate
from mpdsgr_deploy.reference import REFERENCE, VERDICT


@fault("promise", 2, "other figures")
def figures_of_the_manifest_edited(copy: Planted) -> None:
    """A hand that makes the table look better."""
    copy.manifest["reference"]["correct"][WORST] += 20


@fault("promise", 3, "check 13", thorough=True)
def figures_and_verdicts_edited(copy: Planted) -> None:
    """A promise that is easy to keep: the verdicts under attack edited along with their counts."""
    kept = {VERDICT + CLEAN, VERDICT + GAUSSIAN}
    found = copy.arrays(REFERENCE)
    for name in found.keys() - kept:
        if name.startswith(VERDICT):
            found[name] = found[name] & False
    copy.write(REFERENCE, found)


@fault("promise", 1, "answers differ from those of the exported network")
def figures_of_another_training(copy: Planted) -> None:
    """The reference left over from the export before."""
    copy.take(REFERENCE)
    copy.write(REFERENCE, copy.arrays(REFERENCE))


@fault("promise", 2, "nothing to decide")
def no_promise_at_all(copy: Planted) -> None:
    """A network that nobody measured, here with noisy weights: there is nothing to compare it with."""
    copy.change("body.2.synapse.weight", noisy)
    copy.manifest["reference"] = None


@fault("promise", 2, "has no precision")
def unknown_precision(copy: Planted) -> None:
    """A job that asks for what was not exported."""
    copy.precision = "int4"


@fault("promise", 2, "is missing")
def file_missing(copy: Planted) -> None:
    """A copy that was interrupted."""
    copy.seal()
    (copy.path / "model.fp32.onnx").unlink()


@fault("promise", 2, "does not match its hash")
def network_changed_after_its_hash(copy: Planted) -> None:
    """A byte lost on the way."""
    copy.seal()
    with (copy.path / "model.fp32.onnx").open("ab") as file:
        file.write(b"\0")


@fault("promise", 3, "check 13")
def surrogate_exchanged_in_the_manifest(copy: Planted) -> None:
    """Gradients are derived through the surrogate that the manifest names: one so narrow that hardly any passes."""
    copy.manifest["recipe"]["neuron"]["surrogate_parameter"] = 0.02


@fault("promise", 2, "its own digest")
def manifest_changed_after_its_digest(copy: Planted) -> None:
    """A manifest edited by hand: a recipe with a smaller eps."""
    copy.seal()
    manifest = json.loads((copy.path / MANIFEST).read_text())
    manifest["recipe"]["attack"]["eps"] = 0.01
    (copy.path / MANIFEST).write_text(json.dumps(manifest))


@fault("promise", 3, "check 13")
def verdicts_under_strong_attacks_deleted(copy: Planted) -> None:
    """A reference in which only weak attacks are left, so that nothing strong is compared."""
    weak = {VERDICT + name for name in (CLEAN, GAUSSIAN, "uniform", "fgsm", WORST)}
    found = copy.arrays(REFERENCE)
    copy.write(REFERENCE, {name: a for name, a in found.items() if name in weak or not name.startswith(VERDICT)})


@fault("promise", 3, "check 13")
def settings_of_the_promise_edited(copy: Planted) -> None:
    """A promise that claims to have met other attacks than the gate makes."""
    copy.manifest["reference"]["settings"] = dict.fromkeys(copy.manifest["reference"]["settings"], "a longer one")


@fault("promise", 3, "check 13", thorough=True)
def settings_of_the_promise_missing(copy: Planted) -> None:
    """A bundle of an earlier version: nobody knows how strong its attacks were."""
    copy.manifest["reference"]["settings"] = {}


@fault("promise", 3, "check 13")
def surrogate_of_the_recipe_edited(copy: Planted) -> None:
    """An attack through a surrogate that was not trained with, in a manifest that is whole."""
    copy.manifest["recipe"]["neuron"] |= {"surrogate": "triangle", "surrogate_parameter": 4.0}


@fault("promise", 3, "check 13")
def eps_of_the_recipe_lowered(copy: Planted) -> None:
    """A smaller eps than the promise was measured with, in a manifest that is whole: easy to keep."""
    copy.manifest["recipe"]["attack"] |= {"eps": 0.01, "step": 0.01}


@fault("promise", 2, "the gate is for attacks with eps 0.1")
def eps_lowered_against_a_gate_that_pins_it(copy: Planted) -> None:
    """The same, with a gate of one's own whose floors were chosen for another eps."""
    copy.manifest["recipe"]["attack"] |= {"eps": 0.01, "step": 0.01}
    copy.gate = Gate(eps=0.1, floors={"worst": 0.3})


@fault("promise", 3, "its own attacks broke")
def worst_case_of_the_promise_edited(copy: Planted) -> None:
    """The headline alone made better, in the verdicts and in the manifest: nothing else changes."""
    found = copy.arrays(REFERENCE)
    copy.write(REFERENCE, found | {VERDICT + WORST: found[VERDICT + CLEAN]})


@fault("promise", 3, "check 13", thorough=True)
def tier_of_the_promise_renamed(copy: Planted) -> None:
    """Weak attacks called those of a release, with figures that are easy to keep."""
    figures_and_verdicts_edited(copy)
    copy.manifest["reference"]["tier"] = "release"
