"""Write predictions as CSV, JSON lines, Parquet or NumPy arrays, chunk by chunk."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO
from zipfile import ZipFile, ZipInfo

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.prediction.partial import Chunk

Chunks = Callable[[], Iterator[Chunk]]  # called once per pass over the predictions
Writer = Callable[[BinaryIO, Chunks], None]
SEVERAL_PASSES = {".npz"}  # formats that take several passes over the predictions
ROW_GROUP = 65536  # rows of a row group, which a Parquet reader decodes together


def best(logits: NDArray[np.float32], top: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the `top` most probable classes of logits [B, K] and their probabilities, [B, top] each, best first."""
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    classes = np.argsort(-logits, axis=1, kind="stable")[:, :top]  # the first of equal logits, as argmax chooses
    return classes, np.take_along_axis(probabilities, classes, axis=1)


def headings(top: int) -> list[str]:
    """Return the column names: input, label, probability; for several labels input, label_1, probability_1, ..."""
    return ["input", *(f"{what}{rank}" for rank in _ranks(top) for what in ("label", "probability"))]


def write_csv(file: BinaryIO, chunks: Chunks, *, labels: tuple[str, ...], top: int) -> None:
    """Write one line per image below a line of `headings`."""
    file.write(_csv_lines([headings(top)]))
    for names, logits in chunks():
        rows = []
        for name, classes, probabilities in zip(names, *best(logits, top), strict=True):
            pairs = zip(classes, probabilities, strict=True)
            rows.append([name, *(cell for k, p in pairs for cell in (labels[k], f"{p:.6f}"))])
        file.write(_csv_lines(rows))


def write_jsonl(file: BinaryIO, chunks: Chunks, *, labels: tuple[str, ...], top: int) -> None:
    """Write one object per image: input, label, probability; for several labels input and the lists labels,
    probabilities.
    """
    for names, logits in chunks():
        for name, classes, probabilities in zip(names, *best(logits, top), strict=True):
            best_labels, shares = [labels[k] for k in classes], [round(float(p), 6) for p in probabilities]
            row: dict[str, object] = {"labels": best_labels, "probabilities": shares}
            if top == 1:
                row = {"label": best_labels[0], "probability": shares[0]}
            file.write(json.dumps({"input": name, **row}).encode() + b"\n")


def write_parquet(file: BinaryIO, chunks: Chunks, *, labels: tuple[str, ...], top: int) -> None:
    """Write the columns `headings`, strings and float32 probabilities; bytes that are not UTF-8 become U+FFFD."""
    arrow, parquet = need("pyarrow", "parquet"), need("pyarrow.parquet", "parquet")
    scores = [(f"label{rank}", arrow.string()) for rank in _ranks(top)]
    fields = dict([("input", arrow.string()), *scores])
    schema = arrow.schema([(name, fields.get(name, arrow.float32())) for name in headings(top)])
    waiting, rows = [], 0
    with parquet.ParquetWriter(file, schema) as writer:
        for names, logits in chunks():
            classes, probabilities = best(logits, top)
            columns: list[object] = [[os.fsencode(name).decode(errors="replace") for name in names]]
            for rank in range(top):
                columns += [[labels[k] for k in classes[:, rank]], probabilities[:, rank]]
            waiting.append(arrow.table(columns, schema))
            rows += len(names)
            if rows >= ROW_GROUP:
                writer.write_table(arrow.concat_tables(waiting))
                waiting, rows = [], 0
        if waiting:
            writer.write_table(arrow.concat_tables(waiting))


def write_npz(file: BinaryIO, chunks: Chunks) -> None:
    """Write the arrays inputs [N] (names), logits float32 [N, K] and classes int64 [N]."""
    count = width = kinds = 0
    for names, logits in chunks():
        count, width, kinds = count + len(names), max(width, *map(len, names)), logits.shape[1]
    with ZipFile(file, "w") as archive:
        _member(archive, "inputs", np.dtype(f"<U{width}"), (count,), (np.array(c.names) for c in chunks()))
        _member(archive, "logits", np.dtype("<f4"), (count, kinds), (c.logits for c in chunks()))
        _member(archive, "classes", np.dtype("<i8"), (count,), (c.logits.argmax(1) for c in chunks()))


FORMATS: dict[str, Callable[..., None]] = {
    ".csv": write_csv,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
    ".npz": write_npz,
}


def find_writer(suffix: str, labels: tuple[str, ...], top: int) -> Writer:
    """Return the writer for a file suffix, with the `top` best labels of each image.

    Raises InputError for an unknown suffix, for more labels than there are, and if pyarrow is missing.
    """
    if suffix not in FORMATS:
        raise InputError(f"the name of the output must end in one of {', '.join(FORMATS)}, not in {suffix!r}")
    if top > len(labels):
        raise InputError(f"--top {top} is too large: the network has only {len(labels)} classes")
    if suffix == ".npz":
        if top > 1:
            raise InputError("--top has no effect on .npz, which holds the logits of all classes; leave it out")
        return write_npz
    if suffix == ".parquet":
        need("pyarrow.parquet", "parquet")  # fails before the first image instead of after the last
    return partial(FORMATS[suffix], labels=labels, top=top)


def _ranks(top: int) -> list[str]:
    return [""] if top == 1 else [f"_{rank}" for rank in range(1, top + 1)]


def _csv_lines(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")  # file names need not be UTF-8


def _member(
    archive: ZipFile,
    name: str,
    dtype: np.dtype[np.generic],
    shape: tuple[int, ...],
    parts: Iterator[NDArray[np.generic]],
) -> None:
    with archive.open(ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.astype(dtype).tobytes())
