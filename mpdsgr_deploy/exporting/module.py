"""Export any torch module that maps images to logits: adopt its ONNX file, with torch's logits as the reference."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common
from torch import Tensor, nn

from mpdsgr_deploy.adoption import Preprocessing, adopt
from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.data import Images
from mpdsgr_deploy.errors import EvaluationError, InputError, one_line
from mpdsgr_deploy.exporting.onnx_writer import DYNAMIC, save, traced
from mpdsgr_deploy.exporting.precision import PRECISIONS, convert, plan
from mpdsgr_deploy.lookup import choose
from mpdsgr_deploy.parity import compare
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.recipe import Recipe

BATCH = 64  # images per call of the torch module


def export_module(
    module: nn.Module,
    images: Images,
    out: Path,
    *,
    surrogate: str = "triangle",
    labels: Sequence[str] = (),
    precisions: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    recipe: Recipe | None = None,
    tier: str | None = None,
    carry_images: bool = True,
) -> Bundle:
    """Write the bundle of a torch module to directory `out`.

    module: maps preprocessed images float32 [B, C, H, W] to logits [B, K], loops over its own time steps, and keeps no
        state from one call to the next. It is set to eval mode and moved to the CPU in place.
    images: the labelled test images on which the reference is measured.
    precisions: those to write in addition to fp32; int8 and fp8 quantise the products of spikes, whose scales are
        exact.

    The other arguments are those of `adopt`.

    Raises InputError for a module that cannot be exported or attacked, and for a precision that would change nothing;
    EvaluationError if its ONNX file gives other logits, or if a second call with the same images does.
    """
    for name in precisions:
        choose("precision", dict.fromkeys(PRECISIONS), name)
    before = Preprocessing() if preprocessing is None else preprocessing
    module = module.eval().cpu()
    x = torch.from_numpy(before.applied(images.unit()))
    logits = _answers(module, x)
    graph = _exported(module, x[:2])
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"{type(module).__name__}.onnx"
        save(graph, file)
        variants = {name: _variant(graph, name, file) for name in precisions if name != "fp32"}
        return adopt(
            file,
            images,
            out,
            surrogate=surrogate,
            preprocessing=before,
            labels=labels,
            variants=variants,
            reference=logits,
            recipe=recipe,
            tier=tier,
            carry_images=carry_images,
            origin="module",
        )


def _answers(module: nn.Module, x: Tensor) -> NDArray[np.float32]:
    """Return the module's logits [N, K]. Raises EvaluationError if a second call gives other logits."""
    try:
        with torch.no_grad():
            logits = torch.cat([module(part) for part in x.split(BATCH)]).float().numpy()
            of_second_call = torch.cat([module(part) for part in x.split(BATCH - 1)]).float().numpy()
    except Exception as error:  # the module may raise any type
        raise InputError(f"the module does not take images {list(x.shape[1:])}: {one_line(error)}") from error
    parity = compare(logits, of_second_call)
    if not parity.holds:
        raise EvaluationError(
            f"the module gives other logits when it is called again with the same images ({parity}), because a "
            "state is left from the last call, or it draws noise; reset the state at the beginning of `forward`"
        )
    return np.asarray(logits)


def _exported(module: nn.Module, example: Tensor) -> ir.Model:
    """Export the module's graph with a dynamic batch, in which every node has a name."""
    try:
        graph = traced(module, example, {}, shapes=(DYNAMIC,))
    except Exception as error:  # the exporter's errors share no public base class
        raise InputError(f"torch cannot export the module: {one_line(error)[:300]}") from error
    common.ClearMetadataAndDocStringPass()(graph)
    for number, node in enumerate(graph.graph):
        node.name = node.name or f"{node.op_type}_{number}"
    return graph


def _variant(graph: ir.Model, precision: str, fp32: Path) -> Path:
    """Write another precision beside the float32 file. Raises InputError if it would change no product."""
    layers = plan(graph, precision)
    quantised = list(layers.values()).count(precision)
    if not quantised:
        raise InputError(
            f"{precision} would change nothing: only products of spikes between the first and the last layer are "
            f"quantised, and there are none; leave {precision} out, or quantise the ONNX file yourself and adopt "
            "it with --variant"
        )
    log.info("%s: %d of %d products are quantised", precision, quantised, len(layers))
    file = fp32.with_name(f"{precision}.onnx")
    save(convert(graph, layers), file)
    return file
