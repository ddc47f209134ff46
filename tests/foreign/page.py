"""Writes what held_out.py and faults.py measured into export/ADOPT.md: python tests/foreign/page.py"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "export" / "ADOPT.md"
BEGIN, END = "<!-- measured: python tests/foreign/page.py -->\n", "<!-- end of measured -->\n"
OTHER = {"versions", "provenance"}  # entries of a results file that are no case


def results(name: str) -> dict[str, Any]:
    return json.loads((HERE / f"{name}.json").read_bytes())


def cases(result: dict[str, Any]) -> dict[str, Any]:
    return {name: case for name, case in result.items() if name not in OTHER}


def source(result: dict[str, Any]) -> str:
    """Where a result comes from, in one line."""
    origin, machine = result["provenance"], result["provenance"]["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
    return (
        f"{machine['cores']} cores of {machine['cpu']}; {versions + '; ' if versions else ''}{origin['created'][:10]}."
    )


def render(held_out: dict[str, Any], faults: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    lines = ["| network | images | correct, library | correct, bundle | `worst` of the bundle | left by AutoAttack |"]
    lines.append("|---" * 6 + "|")
    for name, case in cases(held_out).items():
        clean = case["clean"]
        row = [name, case["n"], clean["library"], clean["bundle"], case["worst"], case["autoattack"]]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += ["", f"Tier release, eps 8/255, seed 0. {source(held_out)}", ""]
    lines += ["| planted fault | `adopt` | ends with | `worst` | Square then breaks | said |", "|---" * 6 + "|"]
    for name, case in cases(faults).items():
        row = [name, case["adopt"], case["ended"], case.get("worst", "-"), case.get("square breaks of these", "-")]
        lines.append("| " + " | ".join(map(str, row)) + f" | {case['said'].partition('; ')[0][:160]} |")
    n = next(iter(cases(faults).values()))["n"]
    lines += [
        "",
        f"{n} images, tier release; Square with 5,000 queries on what `worst` counts as kept. {source(faults)}",
    ]
    return "\n".join(lines) + "\n"


def page() -> tuple[str, str, str]:
    """The page before the tables, the tables, and what follows."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    shown, _, after = rest.partition(END)
    return before, shown, after


def main() -> None:
    before, _, after = page()
    PAGE.write_text(f"{before}{BEGIN}{render(results('held_out'), results('faults'))}{END}{after}")


if __name__ == "__main__":
    main()
