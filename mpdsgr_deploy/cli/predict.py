"""mpdsgr predict"""

import csv
import io
import json
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.data.files import read_inputs
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.files import write_atomic
from mpdsgr_deploy.runtime import open_predictor, predict
from mpdsgr_deploy.runtime.open import DEFAULT_BACKEND

SUFFIXES = (".csv", ".jsonl", ".npz")


@click.command("predict")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--backend", default=DEFAULT_BACKEND, show_default=True, help="What runs the network.")
@click.option("--precision", default="fp32", show_default=True, help="Which of the bundle's networks.")
@click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Images per inference.")
@click.option(
    "--out", type=click.Path(path_type=Path), help=f"{', '.join(SUFFIXES)} file to write.  [default: CSV on stdout]"
)
def command(bundle: Path, inputs: tuple[Path, ...], backend: str, precision: str, batch: int, out: Path | None) -> None:
    """Classify INPUTS with BUNDLE: images, folders of images, .npy or .npz arrays.

    Arrays are uint8, or float32 in [0, 1], of shape [N, C, H, W]; images are resized and centre cropped. A network of
    event frames takes .bin recordings in place of images. CSV and JSON lines hold the label and its probability, .npz
    the names, logits and class numbers.

    \b
    Example:
      mpdsgr predict bundles/digits photos/ --out labels.csv
    """
    if out is not None and out.suffix not in SUFFIXES:
        raise InputError(f"--out {out}: the file name must end in one of {', '.join(SUFFIXES)}")
    opened = open_bundle(bundle)
    names: list[str] = []
    logits = []
    with open_predictor(opened, backend, precision) as predictor:
        for found, images in read_inputs(inputs, opened.manifest.input_shape):
            names += found
            logits.append(predict(predictor, images, batch))
    data = render(names, np.concatenate(logits), opened.manifest.labels, out.suffix if out else ".csv")
    if out is None:
        click.echo(data, nl=False)
    else:
        write_atomic(out, data)
        click.echo(f"{len(names)} predictions in {out}")


def render(names: list[str], logits: NDArray[np.float32], labels: tuple[str, ...], suffix: str) -> bytes:
    """The predictions in the format a suffix stands for."""
    classes = logits.argmax(1)
    if suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, inputs=np.array(names), logits=logits, classes=classes)
        return buffer.getvalue()
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    rows = [(name, labels[k], f"{p[k]:.6f}") for name, k, p in zip(names, classes, probabilities, strict=True)]
    if suffix == ".jsonl":
        lines = [json.dumps({"input": n, "label": label, "probability": float(p)}) for n, label, p in rows]
        return "".join(f"{line}\n" for line in lines).encode()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("input", "label", "probability"))
    writer.writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")  # file names need not be UTF-8
