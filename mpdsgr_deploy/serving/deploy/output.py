"""A directory that a deploy command writes: whole or not at all, over what it wrote there before and nothing else.

Its checksums lie in it in the format of sha256sum, so that `sha256sum -c` checks what was copied somewhere else.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.files import claim_directory, recover_directory, replace_directory, scratch_directory, sha256

LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)\n")


@contextmanager
def output_directory(out: Path, sums: str, what: str) -> Iterator[Path]:
    """A scratch directory, which takes the place of `out` when the block ends well.

    sums: the file of checksums, by which a later call knows `out` for `what` it may replace. Raises InputError where
    `out` holds a file that no earlier call wrote or that was changed since.
    """
    out = out.resolve()  # a link is followed, not replaced
    recover_directory(out)
    claim_directory(out, sums, what)
    if (out / sums).exists():
        _refuse_foreign(out, sums)
    with scratch_directory(out, what) as scratch:
        yield scratch
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        lines = [f"{sha256(path)}  {path.relative_to(scratch).as_posix()}\n" for path in files]
        (scratch / sums).write_text("".join(lines), encoding="utf-8")
        replace_directory(scratch, out)


def _refuse_foreign(out: Path, sums: str) -> None:
    text = (out / sums).read_text(encoding="utf-8", errors="replace")
    known = {name: digest for digest, name in LINE.findall(text)}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_dir() or name == sums:
            continue
        if name not in known:
            raise InputError(f"{out} holds {name}, which this command did not write; choose another --out")
        if sha256(path) != known[name]:
            raise InputError(f"{out / name} was changed since this command wrote it; choose another --out")
