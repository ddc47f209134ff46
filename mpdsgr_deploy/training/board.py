"""How a run is displayed: one log line per epoch; curves, warnings and pictures in TensorBoard."""

from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from mpdsgr_deploy.data.batches import generator, take, to_unit
from mpdsgr_deploy.diagnostics.distribution import measure
from mpdsgr_deploy.diagnostics.layer_statistics import LayerStatistics, warnings_of
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.training.epoch import Data, Learner

PICTURES_EVERY = 10  # epochs between pictures: drawing a layer takes half a second


def log_epoch(board: SummaryWriter, history: list[dict[str, Any]]) -> None:
    """Log the curves and the line of the last epoch in `history`, with warnings about layers that are new."""
    entry = history[-1]
    epoch = entry["epoch"]
    for name, value in entry.items():
        if isinstance(value, float):
            board.add_scalar(name, value, epoch)
    for layer in entry["layers"]:
        for name, value in layer.items():
            if isinstance(value, float):
                board.add_scalar(f"{name}/{layer['layer']}", value, epoch)
    log.info(
        "epoch %d  T %d  %.0f s  loss %.3f  train %.1f %%  validation %.1f %%%s  omega %.3f  firing rate %.3f",
        epoch,
        entry["T"],
        entry["seconds"],
        entry["loss"],
        100 * entry["train_accuracy"],
        100 * entry["validation_accuracy"],
        f" ({100 * entry['score']:.1f} % attacked)" if entry["score"] != entry["validation_accuracy"] else "",
        sum(layer["omega_empirical"] for layer in entry["layers"]) / len(entry["layers"]),
        sum(layer["firing_rate"] for layer in entry["layers"]) / len(entry["layers"]),
    )
    before, now = ([LayerStatistics(**layer) for layer in e["layers"]] for e in ([{"layers": []}, *history])[-2:])
    for line in warnings_of(now, before):
        log.warning("epoch %d  %s", epoch, line)
        board.add_text("warnings", line, epoch)
    board.flush()


def log_pictures(board: SummaryWriter, learner: Learner, data: Data, epoch: int) -> None:
    """Draw the membrane on the first validation batch, in every tenth epoch (counted from 1) and in the last."""
    if epoch != learner.recipe.training.epochs and epoch % PICTURES_EVERY:
        return
    from mpdsgr_deploy.diagnostics.picture import pixels
    from mpdsgr_deploy.diagnostics.plots import layer_steps, overview

    batch_size, seed = learner.recipe.validation.batch_size, learner.recipe.training.seed
    first, _ = take(data, torch.arange(min(batch_size, len(data[1]))), learner.fabric.device)
    model = learner.judged.eval()
    with learner.fabric.autocast():
        noise = generator(seed, "pictures", epoch)
        layers = measure(model, to_unit(first), batch_size=batch_size, noise=noise)
    statistics = [layer.statistics() for layer in layers]
    board.add_image("membrane/overview", pixels(overview(statistics)), epoch, dataformats="HWC")
    for layer in layers:
        board.add_image(f"membrane/{layer.layer}", pixels(layer_steps(layer)), epoch, dataformats="HWC")
    board.flush()
