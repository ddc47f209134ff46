"""What no validation can see, by design: everything at hand agrees, and the exit code is 0."""

from faults.branches import trigger, weak_decoy
from faults.images import promise_for, replace_all_but_the_first_100, reverse_names
from faults.planted import Planted, unseen
from mpdsgr_deploy.data import load_training
from mpdsgr_deploy.recipe import Gate

OWN_WORD, OWN_IMAGES = "with --root", "Validate with `--root` on your own images"


@unseen("promise", OWN_WORD, f"{OWN_IMAGES}; pin their digest in a gate of your own (`images_sha256`)")
def easy_images_from_the_101st_on_without_the_data_set(copy: Planted) -> None:
    """Images after the first 100 are chosen, where there is nothing to compare them with."""
    copy.hide_data_set()
    copy.gate = Gate(max_drop=0.2)  # at other places in the list these images meet other random starts
    replace_all_but_the_first_100(copy)


@unseen("promise", OWN_WORD, OWN_IMAGES, thorough=True)
def classes_renamed_everywhere_without_the_data_set(copy: Planted) -> None:
    """Names of the classes in another order, in the manifest and beside the images."""
    copy.hide_data_set()
    reverse_names(copy)


@unseen("promise", OWN_WORD, OWN_IMAGES, kind="colour", thorough=True)
def images_of_training_without_the_data_set(copy: Planted) -> None:
    """Images that the network memorised, with a promise made for them."""
    promise_for(copy, load_training(copy.networks.recipe("colour").data)[0][:100])


@unseen(
    "artefact",
    "",
    "Floors of your own, in a gate of your own, decide; sign what you trained",
    kind="other",
    thorough=True,
)
def another_network_exported_and_promised_as_a_whole(copy: Planted) -> None:
    """A worse training, or changed weights, with all that is made from them: the bundle agrees with itself."""


@unseen(
    "artefact",
    "",
    "Run `mpdsgr verify --rebuild` where torch is, with weights that you trust",
    thorough=True,
)
def trigger_without_torch(copy: Planted) -> None:
    """A pattern that no test image has decides the class; answers and gradients are right on all that was tried."""
    trigger(copy)


@unseen(
    "artefact",
    "gradient masking",
    "Run `mpdsgr verify --rebuild` where the weights are; of an adopted network validate with `--transfer` and an "
    "export of your own",
    thorough=True,
)
def weak_decoy_without_weights(copy: Planted) -> None:
    """A branch that is always 0 and adds a weak gradient of chance, promised as it is attacked: more seems to stand."""
    weak_decoy(copy)
