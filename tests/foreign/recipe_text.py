"""The code blocks of export/ADOPT.md."""

import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "export" / "ADOPT.md"


def recipes() -> dict[str, str]:
    """The code of each recipe by the heading above it."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    blocks = {section.partition("\n")[0]: re.search(r"```python\n(.*?)```", section, re.DOTALL) for section in sections}
    return {name: block[1] for name, block in blocks.items() if block}


def export_call() -> str:
    """How the page exports a network."""
    block = re.search(r"```python\n(.*?)```", PAGE.read_text().partition("\n## ")[0], re.DOTALL)
    assert block is not None
    return block[1]


def digest(code: str) -> str:
    return hashlib.sha256((export_call() + code).encode()).hexdigest()
