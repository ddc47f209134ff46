"""Write a report: report.json, summary.md for a pull request, junit.xml for a CI system, badge.json, report.html."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from mpdsgr_deploy.atomic_files import write_atomic
from mpdsgr_deploy.attacks.condition import CLEAN, WORST
from mpdsgr_deploy.claimed_directories import claim_directory
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.locks import LOCK, exclusive
from mpdsgr_deploy.lookup import need
from mpdsgr_deploy.progress import log
from mpdsgr_deploy.validation.report import (
    GATE_ADVICE,
    NOT_COMPARED,
    PAGE,
    PROGRESS,
    REPORT,
    SUMMARY,
    Report,
    accuracy_text,
    findings,
    gate_reasons,
    headline_first,
    not_compared,
    percent,
    sensitivity,
)
from mpdsgr_deploy.validation.rows import Reason, Row

NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
MARKUP = re.compile(r"([\\`*_\[\]|~#])")
LONGEST = 500  # largest number of characters of a name or a reason in Markdown, because hosts refuse long comments
COLOURS = {"pass": "brightgreen", "fail": "red", "invalid": "orange"}
IN_PART = "yellow"  # colour of the badge for a pass in which something was not compared
STATES = {"passed": "ok", "failed": "FAILED", "not compared": "NOT COMPARED"}


@contextmanager
def report_directory(directory: Path) -> Iterator[None]:
    """Reserve a directory for one report during the block, in which the measurement may take hours.

    Raises InputError before the block if the directory holds other files or another process writes a report there.
    """
    claim_directory(directory, REPORT, "report", partial=PROGRESS)
    with exclusive(directory / LOCK, "report"):
        yield


def write_report(report: Report, directory: Path) -> Path:
    """Write all files into `directory`; return the one to read, report.html, or summary.md if that is not `drawable`.

    report.json is written last, because it marks the directory as complete. Raises InputError for a full disk.
    """
    write_atomic(directory / SUMMARY, summary(report).encode())
    write_atomic(directory / "junit.xml", junit(report))
    write_atomic(directory / "badge.json", badge(report))
    best = directory / SUMMARY
    if drawable():
        from mpdsgr_deploy.validation.report_page import page

        best = directory / PAGE
        write_atomic(best, page(report).encode())
    else:
        (directory / PAGE).unlink(missing_ok=True)  # a page of an earlier run would contradict the new files
    write_atomic(directory / REPORT, report.model_dump_json(indent=1).encode())
    shutil.rmtree(directory / PROGRESS, ignore_errors=True)
    return best


def drawable() -> bool:
    """Whether jinja2 and matplotlib, which only report.html needs, are installed; logs a warning if not."""
    try:
        need("jinja2", "report")
        need("matplotlib", "report")
    except InputError:
        log.warning(
            "report.html was not written, because it needs jinja2 and matplotlib; install them with: pip install "
            "'mpdsgr-deploy[report]'"
        )
        return False
    return True


def escaped(text: str) -> str:
    """Return untrusted text as one line of Markdown without markup, HTML and line breaks, cut to LONGEST characters."""
    line = " ".join(text.split())
    line = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
    return MARKUP.sub(r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def summary(report: Report) -> str:
    """Return the Markdown page for a pull request comment and for GitHub's step summary."""
    how = f"{escaped(report.precision)}, {escaped(report.backend)}"
    about = f"{report.network}; {report.images}; tier {report.tier}; seed {report.seed}."
    lines = [f"## {report.verdict.upper()}: {escaped(report.bundle)} ({how})", ""]
    for finding in findings(report):
        lines += [f"- {escaped(what)}" for what in finding.what]
        lines.append(f"  - **do:** {finding.advice}")
    if report.stopped:
        lines.append(f"- {escaped(report.stopped.moment)}: {escaped(report.stopped.why)}")
    if alone := not_compared(report):
        lines.append(
            f"- {NOT_COMPARED} with the reference, which was not attacked in this way: {escaped(', '.join(alone))}"
        )
    lines += [f"- {escaped(remark)}" for remark in report.remarks]
    lines += [
        "",
        f"{escaped(about)} Accuracy in % with its 95 % interval.",
        "",
        "| condition | artefact | reference | newly wrong | newly right | McNemar p |",
        "|---|---|---|---|---|---|",
        *(line(row, report) for row in headline_first(report)),
        "",
    ]
    if report.parity is not None:
        lines += [f"Clean logits, reference against artefact: {report.parity}.", ""]
    lines += [f"- rule: {escaped(f'{rule.name} {rule.value} ({rule.origin})')}" for rule in report.rules]
    if seen := sensitivity(report):
        lines.append(f"- {seen}")
    for check in report.health:
        lines.append(f"- check {check.number}, {check.name}: {STATES[check.state]}, {escaped(check.saw)}")
    return "\n".join(lines) + "\n"


def line(row: Row, report: Report) -> str:
    name = f"**{row.name}**" if row.name == WORST else escaped(row.name)
    accuracy = accuracy_text(row, report.stopped)
    reference = percent(row.reference) if row.reference else NOT_COMPARED
    flips = f"{row.flips.newly_wrong} | {row.flips.newly_right} | {row.flips.p_text}" if row.flips else "- | - | -"
    return f"| {name} | {escaped(accuracy) if row.at_most else accuracy} | {reference} | {flips} |"


class Case(NamedTuple):
    """A JUnit test case. failure: what is wrong and what to do; skipped: why there is no verdict."""

    name: str
    failure: str | None = None
    skipped: str | None = None


def junit(report: Report) -> bytes:
    suite = ElementTree.Element("testsuite", name=f"mpdsgr validate {readable(report.bundle)}")
    tests = cases(report)
    for case in tests:
        element = ElementTree.SubElement(suite, "testcase", classname="mpdsgr", name=readable(case.name))
        if case.failure is not None:
            message = readable(case.failure)
            ElementTree.SubElement(element, "failure", message=message).text = message
        elif case.skipped is not None:
            ElementTree.SubElement(element, "skipped", message=readable(case.skipped))
    suite.set("tests", str(len(tests)))
    suite.set("failures", str(sum(case.failure is not None for case in tests)))
    suite.set("skipped", str(sum(case.failure is None and case.skipped is not None for case in tests)))
    suite.set("time", f"{report.seconds:.1f}")
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


def cases(report: Report) -> list[Case]:
    """Return a test case for each health check, one for each condition, and one for the gate's other reasons."""
    checks = [
        Case(
            f"check {check.number}: {check.name}",
            f"{check.saw}; {check.advice}" if check.failed else None,
            check.saw if check.state == NOT_COMPARED else None,
        )
        for check in report.health
    ]
    reasons = gate_reasons(report)
    names = {row.name for row in report.rows}
    conditions = [
        Case(f"gate: {row.name}", _complaint(r for r in reasons if r.condition == row.name), _undecided(row, report))
        for row in report.rows
    ]
    others = _complaint(reason for reason in reasons if reason.condition not in names)
    return [*checks, *conditions, Case("gate: everything else", others)]


def _complaint(reasons: Iterable[Reason]) -> str | None:
    lines = [reason.line for reason in reasons]
    return f"{'; '.join(lines)}; {GATE_ADVICE}" if lines else None


def _undecided(row: Row, report: Report) -> str | None:
    if row.at_most:
        return accuracy_text(row, report.stopped)
    if row.reference is None and row.name not in report.gate.floors:
        return f"{NOT_COMPARED}: {row.not_compared or 'there is no reference'}"
    return None


def readable(text: str) -> str:
    """Return the text with a replacement character for each one that XML cannot hold."""
    return NOT_IN_XML.sub("\ufffd", text)


def badge(report: Report) -> bytes:
    """Return the JSON that https://shields.io/badges/endpoint-badge reads. An invalid evaluation shows no accuracy."""
    clean, worst = report.row(CLEAN), report.row(WORST)
    parts = []
    if worst is not None and report.eps is not None:
        bound = "at most " if worst.at_most else ""
        parts.append(f"robust {bound}{100 * worst.artefact.accuracy:.1f} % @ eps {report.eps:.3g}")
    if clean is not None:
        parts.append(f"clean {100 * clean.artefact.accuracy:.1f} %")
    if report.stopped is not None:
        parts.append(report.stopped.moment)
    in_part = bool(not_compared(report)) or any(check.state == NOT_COMPARED for check in report.health)
    if in_part:
        parts.append("not all compared")
    message = ", ".join(parts) if parts and report.verdict != "invalid" else "evaluation not valid"
    colour = IN_PART if in_part and report.verdict == "pass" else COLOURS[report.verdict]
    return json.dumps({"schemaVersion": 1, "label": "mpdsgr", "message": message, "color": colour}).encode()
