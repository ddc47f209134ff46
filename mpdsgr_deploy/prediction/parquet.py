"""Images in Parquet shards: a column of encoded image files, as in data sets of the Hugging Face Hub."""

from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import closing
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdsgr_deploy.data.image_files import Shape
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.prediction.sources import ShardFile, decoded, reading, takes_images
from mpdsgr_deploy.stores import Place, opened

NAMES = ("image", "img")  # names of the column of images; if there is neither, the types of columns decide
BYTES = ("binary", "large_binary", "binary_view")  # Arrow's types of bytes
PAGES = 2**20  # bytes that are read at a time, because a row group may be larger than the memory


class ParquetImages(ShardFile):
    """The rows of a Parquet file, each with an encoded image as bytes or as Hugging Face's struct {bytes, path}.

    The name of a row is FILE[row]. Rows are read one after another, a few pages at a time.

    Raises InputError for a damaged or empty file, for one without a column of images, and for a network that takes
    event frames.
    """

    _batches: Iterator[list[bytes | None]]
    _rows: list[bytes | None]  # the rows in memory, from row `_first` on

    def __init__(self, path: Place, shape: Shape) -> None:
        if not takes_images(shape):
            raise InputError(f"{path} holds images, but the network takes event frames {list(shape)}")
        super().__init__(path, shape)
        with reading(f"Parquet file {path}"), closing(self):
            table = self._open()
            self._column = image_column(table.schema_arrow, str(path))
            groups = range(table.metadata.num_row_groups)
            # the first row of each row group, and the number of all rows
            self._starts = [0, *accumulate(table.metadata.row_group(i).num_rows for i in groups)]
            self.count = self._starts[-1]
        if not self.count:
            raise InputError(f"{path} has no rows")

    def read(self, start: int, stop: int, pool: Executor) -> NDArray[np.uint8]:
        names = self.names(start, stop)
        contents = []
        for name, content in zip(names, self._rows_from(start, stop), strict=True):
            if not content:
                raise InputError(f"{name} holds no bytes; a row must contain the image file itself, not only its name")
            contents.append(content)
        return decoded(names, contents, self.shape, pool)

    def _rows_from(self, start: int, stop: int) -> list[bytes | None]:
        """Return rows from `start` up to, but not including, `stop`; they stay in memory until later ones are read."""
        with reading(f"Parquet file {self._path}"):
            if not self._first <= start <= self._first + len(self._rows):
                self._seek(start, stop - start)
            while self._first + len(self._rows) < stop:
                batch = next(self._batches, None)
                if batch is None:
                    raise EOFError("it has fewer rows than its header states")
                self._rows += batch
                self._drop_before(start)
            self._drop_before(start)
        rows = self._rows[: stop - start]
        if stop == len(self):
            self.close()
        return rows

    def _seek(self, start: int, size: int) -> None:
        """Restart the stream at the row group that contains row `start`, with about `size` rows at a time."""
        self.close()
        group = bisect_right(self._starts, start) - 1
        self._first, self._rows = self._starts[group], []
        self._batches = self._stream(self._open(), group, size)

    def _stream(self, table: Any, group: int, size: int) -> Iterator[list[bytes | None]]:
        groups = range(group, table.metadata.num_row_groups)
        for batch in table.iter_batches(size, row_groups=groups, columns=[self._column]):
            (column,) = batch.columns
            yield (column.flatten()[0] if column.type.num_fields else column).to_pylist()

    def _drop_before(self, start: int) -> None:
        count = min(start - self._first, len(self._rows))
        self._rows, self._first = self._rows[count:], self._first + count

    def _open(self) -> Any:
        self._file = opened(self._path)
        return need("pyarrow.parquet", "parquet").ParquetFile(self._file, buffer_size=PAGES)

    def _forget(self) -> None:
        super()._forget()
        self._batches = iter(())
        self._rows, self._first = [], -1


def image_column(schema: Any, path: str) -> str:
    """Return the path of encoded images in a pyarrow schema: in the column `image` or `img`, or the only one of bytes.

    Raises InputError, which lists all columns, if there is none or if several are possible.
    """
    columns = {field.name: leaf for field in schema if (leaf := _leaf(field))}
    for name in NAMES:
        if name in columns:
            return columns[name]
    if len(columns) == 1:
        return next(iter(columns.values()))
    what = f"{len(columns)} columns of bytes, {', '.join(columns)}" if columns else "no column of encoded images"
    raise InputError(
        f"{path} has {what}; name the column of images, which holds bytes or structs with the field bytes, "
        f"{' or '.join(NAMES)} (its columns: {', '.join(schema.names)})"
    )


def _leaf(field: Any) -> str | None:
    """Return the path of the bytes in a column; None if it has none."""
    if str(field.type) in BYTES:
        return str(field.name)
    inner = {child.name: str(child.type) for child in field.type} if str(field.type).startswith("struct") else {}
    return f"{field.name}.bytes" if inner.get("bytes") in BYTES else None
