"""Display a training run: a log line per epoch, and curves, warnings and pictures in TensorBoard."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from mpdsgr_deploy.checkpoint import VALIDATION_PGD
from mpdsgr_deploy.data.batches import generator, take, to_unit
from mpdsgr_deploy.diagnostics.distribution import measure
from mpdsgr_deploy.diagnostics.layer_statistics import LayerStatistics, warnings_of
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.training.epoch import Data, Learner


@contextmanager
def open_board(folder: Path, first_epoch: int) -> Iterator[SummaryWriter]:
    """Yield a writer of TensorBoard files. Entries of `first_epoch` (counted from 1) and later epochs are discarded.

    TensorBoard writes in a thread, and the next call raises the thread's error again. The traceback that Python prints
    for the thread is therefore suppressed. Raises InputError if the folder cannot be written.
    """
    python_hook = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.exc_value, OSError):
            python_hook(failure)

    threading.excepthook = hook
    try:
        with _writable(folder):
            board = SummaryWriter(str(folder), purge_step=first_epoch)
        yield board
        with _writable(folder):
            board.close()
    finally:
        threading.excepthook = python_hook


def display(board: SummaryWriter, learner: Learner, history: list[dict[str, Any]], validation: Data) -> None:
    """Show the last epoch of `history` in the log and in TensorBoard.

    Raises InputError if TensorBoard's folder cannot be written.
    """
    with _writable(Path(board.get_logdir())):
        log_epoch(board, history)
        log_pictures(board, learner, validation, history[-1]["epoch"])


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror}; finished epochs are kept, so continue with --resume"
        ) from None


def log_epoch(board: SummaryWriter, history: list[dict[str, Any]]) -> None:
    """Log the values of the last epoch in `history`, and the warnings about layers that are new in this epoch."""
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
        "epoch %d  T %d  %.0f s  loss %.3f  train %.1f %%  validation %.1f %%%s%s  omega %.3f  firing rate %.3f",
        epoch,
        entry["T"],
        entry["seconds"],
        entry["loss"],
        100 * entry["train_accuracy"],
        100 * entry["validation_accuracy"],
        f" ({100 * entry['score']:.1f} % attacked)" if entry["score"] != entry["validation_accuracy"] else "",
        f"  PGD {100 * entry[VALIDATION_PGD]:.1f} %" if VALIDATION_PGD in entry else "",
        sum(layer["omega_empirical"] for layer in entry["layers"]) / len(entry["layers"]),
        sum(layer["firing_rate"] for layer in entry["layers"]) / len(entry["layers"]),
    )
    before, now = ([LayerStatistics(**layer) for layer in e["layers"]] for e in ([{"layers": []}, *history])[-2:])
    for line in warnings_of(now, before):
        log.warning("epoch %d  %s", epoch, line)
        board.add_text("warnings", line, epoch)
    board.flush()


def log_pictures(board: SummaryWriter, learner: Learner, data: Data, epoch: int) -> None:
    """Draw the membrane potentials of the first validation batch, if pictures are due after `epoch`, counted from 1.

    They are due every `training.pictures` epochs and after the last epoch. Drawing a layer takes up to half a second.
    """
    config = learner.recipe.training
    if not config.pictures or (epoch != config.epochs and epoch % config.pictures):
        return
    from mpdsgr_deploy.diagnostics.distribution_plots import layer_steps, overview
    from mpdsgr_deploy.diagnostics.picture import pixels

    batch_size, seed = learner.recipe.validation.batch_size, config.seed
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
