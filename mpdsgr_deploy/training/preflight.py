"""Check before the first epoch that a network can be trained, exported and validated.

Checks run on the meta device, which computes shapes but no values. Networks with a model or defence of another package
are also exported once, untrained, because only the ONNX graph shows operators without a gradient rule.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn import functional as F

from mpdsgr_deploy.data import Images
from mpdsgr_deploy.defences import DEFENCES, build_defended
from mpdsgr_deploy.errors import InputError, explained, one_line
from mpdsgr_deploy.models import MODELS, SpikingNet
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.surrogates import ATTACK_ONLY, parse_surrogate, surrogate_nodes, trained_surrogate
from mpdsgr_deploy.training.stages import check_stages

# Largest size of the weights in bytes. An ONNX file is a protobuf message of at most 2 GiB; also an attack graph holds
# the weights once, and nodes besides.
LARGEST = 2**31 - 2**26
OURS = __name__.partition(".")[0]


def preflight(recipe: Recipe, training: Images) -> None:
    """Raise InputError for a recipe whose network cannot be trained on these images, exported, or attacked."""
    check_stages(recipe)
    batch_size, classes = recipe.training.batch_size, len(training.labels)
    if batch_size > len(training):
        raise InputError(f"training.batch_size is {batch_size}, but there are only {len(training)} training images")
    _check_surrogates(recipe)
    with torch.device("meta"):
        model, _ = build_defended(recipe, training.shape, classes)
    if recipe.neuron.detach_reset and not model.plain:
        raise InputError(
            f"neuron.detach_reset works only for plain LIF neurons, which {', '.join(recipe.defence)} replaces; "
            "leave it out"
        )
    size = sum(value.nbytes for value in model.state_dict().values())
    if size > LARGEST:
        raise InputError(
            f"the network has {size / 2**30:.1f} GiB of weights; an ONNX file holds 2 GiB at most: reduce model.width"
        )
    _check_step(recipe, model, training)
    if _is_foreign(recipe):
        _check_export(recipe, training.shape, classes)


def _check_surrogates(recipe: Recipe) -> None:
    """Raise InputError if the attack graph cannot contain a surrogate that training or an attack uses."""
    for name in (trained_surrogate(recipe), *recipe.attack.surrogates):
        kind = parse_surrogate(name).kind
        if kind not in ATTACK_ONLY:
            surrogate_nodes(kind)


def _check_step(recipe: Recipe, model: SpikingNet, training: Images) -> None:
    """Raise InputError if the shapes of a training step on one device's share of a batch do not fit together."""
    config = recipe.training
    share = config.batch_size // (config.processes * config.accumulate)
    try:
        x = torch.zeros(share, *training.shape, device="meta")
        logits = model.train()(x, None, torch.Generator().manual_seed(0))
        F.cross_entropy(logits, torch.zeros(share, dtype=torch.long, device="meta")).backward()
    except (RuntimeError, ValueError, IndexError) as error:
        advice = "raise training.batch_size" if share == 1 else "change the model or the size of the images"
        raise InputError(f"a training step on {share} images would fail: {one_line(error)}; {advice}") from error


def _is_foreign(recipe: Recipe) -> bool:
    """Whether the recipe uses another package's model or defence."""
    parts = [MODELS[recipe.model.name], *(DEFENCES[name] for name in recipe.defence)]
    # the __module__ of a partial is functools
    functions = [part.func if isinstance(part, partial) else part for part in parts]
    return any(str(function.__module__).partition(".")[0] != OURS for function in functions)


def _check_export(recipe: Recipe, shape: tuple[int, int, int], classes: int) -> None:
    """Raise InputError if the untrained network cannot be exported, or if no attack graph can be derived from it."""
    from mpdsgr_deploy.attack_graph import derived
    from mpdsgr_deploy.exporting.onnx_writer import save, to_graph
    from mpdsgr_deploy.models.simplify import simplify

    model, _ = build_defended(recipe, shape, classes)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        cannot = f"model {recipe.model.name!r} cannot be exported"
        with explained(lambda error: InputError(f"{cannot}: {one_line(error)[:500]}")):
            save(to_graph(simplify(model.eval()), shape), file)
        derived(file, trained_surrogate(recipe))
