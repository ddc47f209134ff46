"""The output directory of a deploy command, which is written completely or not at all.

It replaces only earlier output of the same command, which it recognises by a file of checksums. That file has the
format of sha256sum, so that `sha256sum -c` checks a copy elsewhere.
"""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpdsgr_deploy.atomic_files import sha256
from mpdsgr_deploy.claimed_directories import claim_directory, recover_directory, replace_directory, scratch_directory
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.progress import log

NEW = ".new"
LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)\n")  # a checksum and a file name


@contextmanager
def output_directory(out: Path, sums: str, what: str, *, keep_edits: bool = False) -> Iterator[Path]:
    """Provide a scratch directory, which replaces `out` if the with block ends without an error.

    sums: the name of the file of checksums. what: a name for such a directory in messages. Raises InputError if `out`
    holds a file that no earlier call wrote or, unless `keep_edits`, one that was changed since. With `keep_edits` a
    changed file is kept, its new content is written beside it as NAME.new, and the log shows the difference.
    """
    out = out.resolve()  # a link is followed, not replaced
    recover_directory(out)
    claim_directory(out, sums, what)
    edited = _edited(out, sums) if (out / sums).exists() else []
    if edited and not keep_edits:
        raise InputError(f"{out / edited[0]} has been changed since this command wrote it; choose another --out")
    with scratch_directory(out, what) as scratch:
        yield scratch
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        lines = [f"{sha256(path)}  {path.relative_to(scratch).as_posix()}\n" for path in files]
        for name in edited:
            _keep(out / name, scratch / name)
        (scratch / sums).write_text("".join(lines), encoding="utf-8")
        replace_directory(scratch, out)


def _edited(out: Path, sums: str) -> list[str]:
    """Return the files of an earlier call that were changed since. Raises InputError for files that no call wrote."""
    text = (out / sums).read_text(encoding="utf-8", errors="replace")
    known = {name: digest for digest, name in LINE.findall(text)}
    changed = []
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_dir() or name == sums or (name.removesuffix(NEW) in known and name.endswith(NEW)):
            continue
        if name not in known:
            raise InputError(f"{out} holds {name}, which this command did not write; choose another --out")
        if sha256(path) != known[name]:
            changed.append(name)
    return changed


def _keep(edited: Path, written: Path) -> None:
    """Replace the file `written` by its edited version, and put the new content beside it if it differs."""
    theirs = edited.read_text(encoding="utf-8", errors="replace")
    ours = written.read_text(encoding="utf-8") if written.exists() else ""
    if theirs != ours:
        lines = difflib.unified_diff(
            theirs.splitlines(), ours.splitlines(), edited.name, edited.name + NEW, lineterm=""
        )
        log.warning("%s has been edited and is kept; the file that would replace it is %s:", edited, edited.name + NEW)
        for line in lines:
            log.warning("  %s", line)
        written.with_name(written.name + NEW).write_text(ours, encoding="utf-8")
    written.write_text(theirs, encoding="utf-8")
