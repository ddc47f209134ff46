"""The folder to which a prediction job on a cluster writes its parts, on this machine or in an object store.

    _job.json             the job: a rerun of the same job continues, another job is refused
    part-00000.parquet    the rows of some batches; each file is written once and completely
    _skipped-00000.csv    the inputs that part 0 left out, with the reasons
    _SUCCESS              the number of rows, written when all parts exist

Readers of Parquet folders ignore names that begin with an underscore.
"""

import json
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any, BinaryIO

from mpdsgr_deploy.atomic_files import complete_file, write_atomic
from mpdsgr_deploy.claimed_directories import claim_directory, not_ours
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.locks import LOCK, exclusive
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.prediction.faults import Faults
from mpdsgr_deploy.stores import Place, Stored, asking, opened

JOB, SUCCESS, SKIPPED = "_job.json", "_SUCCESS", "_skipped.csv"
WHAT = "set of predictions"


def part_name(number: int) -> str:
    return f"part-{number:05}.parquet"


def skipped_name(number: int) -> str:
    return f"_skipped-{number:05}.csv"


class PartsHere:
    """Parts in a local or shared directory. Methods raise InputError if it cannot be read or written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Lock the folder for a with block, after which files that killed processes left unfinished are removed.

        Raises InputError if the folder holds other files, or if it is locked already.
        """
        claim_directory(self._path, JOB, WHAT)
        with exclusive(self._path / LOCK, "mpdsgr predict"):
            try:
                yield
            finally:
                for unfinished in self._path.glob(".*.tmp"):
                    with suppress(OSError):
                        unfinished.unlink()

    def describe(self, job: dict[str, Any]) -> None:
        """Write the description of the job to _job.json. Raises InputError if the folder has parts of another job."""
        with suppress(OSError, ValueError):
            if json.loads((self._path / JOB).read_bytes()) != job:
                raise _other_job(self._path)
        write_atomic(self._path / JOB, json.dumps(job).encode())

    def names(self) -> set[str]:
        return {path.name for path in self._path.iterdir()}

    def part(self, number: int) -> AbstractContextManager[BinaryIO]:
        """Open a file for writing, which becomes the part if the with block ends without an error."""
        return self._complete(part_name(number))

    def open(self, name: str) -> IO[bytes]:
        return (self._path / name).open("rb")

    def write(self, name: str, content: bytes) -> None:
        with self._complete(name) as file:
            file.write(content)

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def _complete(self, name: str) -> AbstractContextManager[BinaryIO]:
        """The temporary file has a name of its own, because two processes may write the same part at once."""
        temporary = self._path / f".{name}.{uuid.uuid4().hex}.tmp"
        return complete_file(self._path / name, temporary, "finished parts are kept")


class PartsInStore:
    """The same in an object store, which has no locks and shows a file only once it is complete.

    Of two different jobs only one can create _job.json, so that their parts do not mix. Two processes with the same job
    write the same files twice. Methods also raise StoreError.
    """

    def __init__(self, place: Stored) -> None:
        self._place = place

    @contextmanager
    def claimed(self) -> Iterator[None]:
        names = self.names()
        if names and JOB not in names:
            raise not_ours(self._place, JOB, WHAT)
        yield

    def describe(self, job: dict[str, Any]) -> None:
        content = json.dumps(job).encode()
        with asking(self._place):
            try:
                self._put(JOB, content, mode="create")
            except FileExistsError:
                if self._place.store.cat_file((self._place / JOB).path) != content:
                    raise _other_job(self._place) from None
            except (NotImplementedError, TypeError, ValueError):  # the store cannot create a file only if it is new
                self._put(JOB, content)

    def names(self) -> set[str]:
        with asking(self._place), suppress(FileNotFoundError):
            return {path.rpartition("/")[2] for path in self._place.store.ls(self._place.path, detail=False)} - {""}
        return set()

    @contextmanager
    def part(self, number: int) -> Iterator[BinaryIO]:
        with BytesIO() as file:
            yield file
            self.write(part_name(number), file.getvalue())

    def open(self, name: str) -> IO[bytes]:
        return opened(self._place / name)

    def write(self, name: str, content: bytes) -> None:
        with asking(self._place):
            self._put(name, content)

    def remove(self, name: str) -> None:
        with asking(self._place), suppress(FileNotFoundError):
            self._place.store.rm_file((self._place / name).path)

    def _put(self, name: str, content: bytes, **options: str) -> None:
        self._place.store.pipe_file((self._place / name).path, content, **options)


Parts = PartsHere | PartsInStore


def parts_at(place: Place) -> Parts:
    return PartsInStore(place) if isinstance(place, Stored) else PartsHere(place)


def count_rows(parts: Parts, numbers: Iterable[int]) -> int:
    parquet = need("pyarrow.parquet", "parquet")

    def rows(number: int) -> int:
        with parts.open(part_name(number)) as file:
            return int(parquet.read_metadata(file).num_rows)

    with ThreadPoolExecutor(16) as pool:  # because a store answers slowly
        return sum(pool.map(rows, numbers))


def save_faults(parts: Parts, name: str, faults: Faults) -> None:
    """Write the skipped inputs to the file `name` or, if there are none, remove the file of an earlier run."""
    if content := faults.content():
        parts.write(name, content)
    else:
        parts.remove(name)


def _other_job(place: Place) -> InputError:
    return InputError(
        f"{place} holds predictions of another bundle, of other inputs or with other settings; choose another --out"
    )
