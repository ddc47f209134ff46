"""Writes what the scripts beside this file measured into export/ADOPT.md: python tests/foreign/page.py"""

from collections.abc import Callable
from typing import Any, NamedTuple

from recording import HERE, load, source

from mpdsgr_deploy.validation.proportions import mcnemar

PAGE = HERE.parent.parent / "export" / "ADOPT.md"
BEGIN, END = "<!-- measured: python tests/foreign/{}.py -->\n", "<!-- end of {} -->\n"
HEALTHY, SIGNIFICANT = "no fault", 0.01
Case = dict[str, Any]


class Flips(NamedTuple):
    """Images that count under one of two conditions alone: with a fault, and without one."""

    with_fault: int
    without: int

    @property
    def p(self) -> float:
        """Exact McNemar p-value: could the two be chance?"""
        return mcnemar(self.with_fault, self.without)

    @property
    def is_worse(self) -> bool:
        """Whether there are significantly more with the fault."""
        return self.with_fault > self.without and self.p < SIGNIFICANT

    def __str__(self) -> str:
        return f"+{self.with_fault} -{self.without} (p = {self.p:.2g})"


def flips(case: Case, healthy: Case, key: str) -> Flips:
    """What a fault changes in a list of images: "kept", or "square breaks"."""
    own, other = set(case[key]), set(healthy[key])
    return Flips(len(own - other), len(other - own))


def let_through(case: Case, healthy: Case) -> bool:
    """Whether the gate passes a fault and keeps too many images, or more that Square breaks, than without the fault."""
    return case["ended"] == 0 and any(flips(case, healthy, key).is_worse for key in ("kept", "square breaks"))


def held_out(result: Case) -> str:
    """Networks of the libraries against AutoAttack, in Markdown."""
    rows = [
        [name, case["clean"]["library"], case["clean"]["bundle"], case["worst"], case["autoattack"]]
        for name, case in result["records"].items()
    ]
    header = ["network", "correct, library", "correct, bundle", "`worst` of the bundle", "left by AutoAttack"]
    setting = result["setting"]
    how = f"n = {setting['n']}, tier {setting['tier']}, eps {setting['eps'] * 255:g}/255, seed {setting['seed']}"
    return table(header, rows, f"{how}. {source(result)}")


def faults(result: Case) -> str:
    """Planted faults and how they end, in Markdown."""
    healthy, rows = result["records"][HEALTHY], []
    for name, case in result["records"].items():
        figures = ["-"] * 4
        if "kept" in case:
            figures = [len(case["kept"]), "", len(case["square breaks"]), ""]
            if case is not healthy:
                figures[1::2] = [flips(case, healthy, key) for key in ("kept", "square breaks")]
        rows.append([name, case["adopt"], case["ended"], *figures, case["said"].partition("; ")[0][:160]])
    header = ["planted fault", "`adopt`", "ends with", "`worst`", "against no fault"]
    header += ["Square then breaks", "against no fault", "said"]
    setting = result["setting"]
    return table(
        header,
        rows,
        f"{setting['network']}, n = {setting['n']}, tier {setting['tier']}, eps {setting['eps'] * 255:g}/255, seed "
        f"{setting['seed']}; Square with {setting['queries']:,} queries on what `worst` counts as kept; +a -b: images "
        f"with the fault alone and without it alone, exact McNemar test. {source(result)}",
    )


def sweep(result: Case) -> str:
    """Torchvision's classifiers, in Markdown."""
    rows = []
    for name, case in result["records"].items():
        cells = [name, case["size"], case["refused"] or "yes", sum(case["nodes"].values())]
        for key in ("gradient errors", "gradient errors of torch in float32"):
            cells += [f"{choose(case[key]):.1g}" if key in case else "-" for choose in (min, max)]
        rows.append(cells)
    header = ["network", "pixels a side", "adopted", "nodes", "error, best image", "worst image"]
    header += ["torch's own, best image", "worst image"]
    setting = result["setting"]
    return table(
        header,
        rows,
        f"Random weights, n = {setting['n']} images, seed {setting['seed']}; error: the largest difference to torch's "
        f"gradient in float64, relative to that image's largest entry. {source(result)}",
    )


def resnet18(result: Case) -> str:
    """ResNet-18 and its int8 variant, in Markdown."""
    (case,), setting = result["records"].values(), result["setting"]
    rows: list[list[Any]] = []
    for precision in ("fp32", "int8"):
        clean, worst = (case[precision][name] for name in ("clean", "worst"))
        lost = ", ".join(map(str, worst["lost"])) or "none"
        rows.append([precision, case[precision]["ended"], clean["correct"], worst["correct"], lost])
    header = [
        "precision",
        "`validate` ends with",
        "correct",
        "`worst`",
        "images lost under attack, of those float32 keeps",
    ]
    how = f"n = {setting['n']}, tier {setting['tier']}, eps {setting['eps']}, seed {setting['seed']}"
    note = "lost under attack: images, by their number, that the float32 reference keeps"
    return table(header, rows, f"{how}; {note}. {source(result)}")


def table(header: list[str], rows: list[list[Any]], note: str) -> str:
    """A Markdown table with a note below."""
    head, *body = (f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows))
    return "\n".join([head, "|---" * len(header) + "|", *body, "", note, ""])


TABLES: dict[str, Callable[[Case], str]] = {
    "held_out": held_out,
    "faults": faults,
    "sweep": sweep,
    "resnet18": resnet18,
}


def shown(name: str) -> str:
    """The table of a results file as it stands in the page."""
    return PAGE.read_text().partition(BEGIN.format(name))[2].partition(END.format(name))[0]


def published() -> list[str]:
    """The tables whose results are there."""
    return [name for name in TABLES if (HERE / f"{name}.json").exists()]


def main() -> None:
    for name in published():
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = PAGE.read_text().partition(begin)
        PAGE.write_text(f"{before.rstrip()}\n\n{begin}{TABLES[name](load(name))}{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    main()
