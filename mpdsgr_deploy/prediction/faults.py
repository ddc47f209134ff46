"""Record which inputs were skipped, and for what reason."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np

from mpdsgr_deploy.atomic_files import followed, write_atomic
from mpdsgr_deploy.prediction.inputs import InputBatch
from mpdsgr_deploy.prediction.partial import Chunk

NOT_FINITE = "the network's logits are not finite"


def place_of_faults(out: Path) -> Path:
    """Return the file that names the skipped inputs of output `out`, with the columns input and reason."""
    out = followed(out)
    return out.with_name(f"{out.name}.skipped.csv")


class Faults:
    """Removes skipped images from answers.

    unusable: reasons by input that are known before; reasons: all of them; rows: the number of removed images.
    """

    def __init__(self, unusable: Mapping[str, str]) -> None:
        self.reasons, self.rows = dict(unusable), 0

    def without(self, answers: Iterable[tuple[InputBatch, Chunk]]) -> Iterator[Chunk]:
        """Yield the answers without the images whose logits are not finite; their files are read again for the reason.

        A second pass over the same answers counts nothing twice.
        """
        self.rows = 0
        for batch, chunk in answers:
            usable = np.isfinite(chunk.logits).all(1)
            if usable.all():
                yield chunk
                continue
            own_batch = batch.alone()  # another thread may be reading the batch's source
            with ThreadPoolExecutor(1) as pool, closing(own_batch.source):
                reasons = own_batch.read_usable(pool).faults
            for i in np.flatnonzero(~usable).tolist():
                self.reasons[chunk.names[i]] = reasons.get(i, NOT_FINITE)
                self.rows += 1
            yield Chunk([chunk.names[i] for i in np.flatnonzero(usable)], chunk.logits[usable])

    def content(self) -> bytes | None:
        """Return the content of the file that names the skipped inputs; None if there are none."""
        if not self.reasons:
            return None
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("input", "reason"), *self.reasons.items()])
        return text.getvalue().encode(errors="surrogateescape")

    def save(self, path: Path) -> None:
        """Write `content` to `path` or, if nothing was skipped, remove the file of an earlier run."""
        content = self.content()
        if content is None:
            path.unlink(missing_ok=True)
        else:
            write_atomic(path, content)
