"""The report for machines and for a glance: Markdown for a pull request, JUnit for a CI system, a badge."""

import json
import re
from xml.etree import ElementTree

from mpdsgr_deploy.validation.report import GATE_ADVICE, Report, findings, gate_reasons, percent
from mpdsgr_deploy.validation.rows import Row

NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
MARKUP = re.compile(r"([\\`*_\[\]|~#])")
LONGEST = 500  # characters of a name or a reason in Markdown: hosts refuse long comments
COLOURS = {"pass": "brightgreen", "fail": "red", "invalid": "orange"}


def markdown(text: str) -> str:
    """Untrusted text as itself within a line of Markdown: no markup, no HTML, no line break."""
    line = " ".join(text.split())
    line = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
    return MARKUP.sub(r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def summary(report: Report) -> str:
    """A Markdown page, fit for a pull request comment and for GitHub's step summary."""
    how = f"{markdown(report.precision)}, {markdown(report.backend)}"
    about = f"{report.network}; {report.images}; tier {report.tier}; seed {report.seed}."
    lines = [
        f"## {report.verdict.upper()}: {markdown(report.bundle)} ({how})",
        "",
        *(
            line
            for found in findings(report)
            for line in (*(f"- {markdown(what)}" for what in found.what), f"  - **do:** {found.advice}")
        ),
        *([f"- ended early: {markdown(report.stopped)}"] if report.stopped else []),
        "",
        f"{markdown(about)} Accuracy in % with its 95 % interval.",
        "",
        "| condition | artefact | reference | newly wrong | newly right | McNemar p |",
        "|---|---|---|---|---|---|",
        *(line(row) for row in report.rows),
        "",
    ]
    if report.parity is not None:
        lines += [f"Clean logits, reference against artefact: {report.parity}.", ""]
    for check in report.health:
        lines.append(
            f"- check {check.number}, {check.name}: {'ok' if check.passed else 'FAILED'}, {markdown(check.saw)}"
        )
    return "\n".join(lines) + "\n"


def line(row: Row) -> str:
    """One condition as a line of the table."""
    name = f"**{row.name}**" if row.name == "worst" else markdown(row.name)
    reference = percent(row.reference) if row.reference else "-"
    flips = f"{row.flips.newly_wrong} | {row.flips.newly_right} | {row.flips.p_value:.2g}" if row.flips else "- | - | -"
    return f"| {name} | {percent(row.artefact)} | {reference} | {flips} |"


def junit(report: Report) -> bytes:
    """One test case a health check, one a condition under the gate, one for the gate's other rules."""
    suite = ElementTree.Element("testsuite", name=f"mpdsgr validate {readable(report.bundle)}")
    tests = cases(report)
    for name, failure in tests:
        case = ElementTree.SubElement(suite, "testcase", classname="mpdsgr", name=readable(name))
        if failure is not None:
            message = readable(failure)
            ElementTree.SubElement(case, "failure", message=message).text = message
    suite.set("tests", str(len(tests)))
    suite.set("failures", str(sum(failure is not None for _, failure in tests)))
    suite.set("time", f"{report.seconds:.1f}")
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


def cases(report: Report) -> list[tuple[str, str | None]]:
    """Name of every test case, with what is wrong and what to do if it failed."""
    found = [(f"check {c.number}: {c.name}", None if c.passed else f"{c.saw}; {c.advice}") for c in report.health]
    left = gate_reasons(report)
    for row in report.rows:
        own = [reason for reason in left if reason.startswith(f"{row.name}: ")]
        left = [reason for reason in left if reason not in own]
        found.append((f"gate: {row.name}", f"{'; '.join(own)}; {GATE_ADVICE}" if own else None))
    return [*found, ("gate: everything else", f"{'; '.join(left)}; {GATE_ADVICE}" if left else None)]


def readable(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return NOT_IN_XML.sub("�", text)


def badge(report: Report) -> bytes:
    """What https://shields.io/badges/endpoint-badge reads. An invalid evaluation shows no accuracy: it has none."""
    clean, worst = report.row("clean"), report.row("worst")
    parts = []
    if worst is not None and report.eps is not None:
        parts.append(f"robust {100 * worst.artefact.accuracy:.1f} % @ eps {report.eps:.3g}")
    if clean is not None:
        parts.append(f"clean {100 * clean.artefact.accuracy:.1f} %")
    message = ", ".join(parts) if parts and report.verdict != "invalid" else "evaluation not valid"
    colour = COLOURS[report.verdict]
    shown = {"schemaVersion": 1, "label": "mpdsgr", "message": message, "color": colour}
    return json.dumps(shown).encode()
