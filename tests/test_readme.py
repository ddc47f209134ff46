"""What the README and the manuals of train/, export/ and serve/ show works as written."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from conftest import mpdsgr
from served import Served

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.cli import main

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "train/README.md", "export/README.md", "export/TRUST.md", "serve/README.md")
TEXTS = {name: (ROOT / name).read_text() for name in NAMES}
BLOCKS = [block for text in TEXTS.values() for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
CLIENTS = [block for block in BLOCKS if "tritonclient" in block]
CURL = re.findall(r"^curl .*?(?:\nEOF)?$(?=\n(?:curl|```))", TEXTS["serve/README.md"], re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^ *(mpdsgr [a-z].*?)(?: {2,}.*)?$", re.MULTILINE)


def test_the_readme_stays_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150


def shown_commands() -> list[tuple[str, str]]:
    return [(name, line.strip()) for name, text in TEXTS.items() for line in COMMAND.findall(text)]


def test_every_command_that_is_shown_can_be_parsed() -> None:
    lines = shown_commands()
    assert len(lines) > 20
    for name, line in lines:
        words = shlex.split(line, comments=True)[1:]
        command, context = main, click.Context(main)
        while isinstance(command, click.Group):
            found = command.get_command(context, words.pop(0))
            assert found is not None, f"{name}: {line}"
            command = found
            context = click.Context(command)
        try:
            command.make_parser(context).parse_args(args=words)
        except click.UsageError as error:
            pytest.fail(f"{name}: {line}: {error.message}")


def test_every_command_has_an_entry() -> None:
    shown = " ".join(TEXTS.values())
    commands = main.list_commands(click.Context(main))
    entries = {command for command in commands if f"mpdsgr {command}" in shown or f"make {command}" in shown}
    assert set(commands) == entries


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_to_fill_in(name: str) -> None:
    text = TEXTS[name]
    assert not re.findall(r"@[A-Z]+@", text)
    assert not re.findall(r"<!-- table: .* -->\n<!-- end of table -->", text)


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives to a page's headings, and those that the page itself gives."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    named = re.findall(r'<a id="([^"]+)">', text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings} | set(named)


@pytest.mark.parametrize("page", sorted(ROOT.glob("[!.]*/**/*.md")) + sorted(ROOT.glob("*.md")), ids=str)
def test_links_lead_to_a_file_and_to_a_heading_in_it(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", page.read_text().replace("\n", " "))
    targets = [(page.parent / path if path else page, anchor) for path, anchor in links]
    assert [str(target) for target, _ in targets if not target.exists()] == []
    assert [f"{target}#{anchor}" for target, anchor in targets if anchor and anchor not in anchors(target)] == []


@pytest.mark.parametrize("name", ["README.md", "train/README.md"])
def test_figures_in_the_text_stand_in_a_page_that_was_rendered_from_results(name: str) -> None:
    folders = ("train/results", "benchmarks", "export/results")
    pages = "".join(page.read_text() for folder in folders for page in sorted((ROOT / folder).rglob("*.md")))
    code = r"```.*?```|<!-- table:.*?<!-- end of table -->|`[^`]*`|^ {4}.*?$|arXiv [\d.]+|Python 3[\d.]+|3\.1[123]"
    text = re.sub(code, "", TEXTS[name], flags=re.DOTALL | re.MULTILINE)
    figures = re.findall(r"(?<![\w.])\d+\.\d+(?! GB)", text)
    assert [figure for figure in figures if figure not in pages] == []


@pytest.fixture(scope="module")
def served(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """What the manual serves, on ports of this test's own."""
    digits = tmp_path_factory.mktemp("bundles") / "digits"
    digits.symlink_to(bundle.path)
    with Served(digits) as server:
        yield server


def addressed(text: str, served: Served) -> str:
    return text.replace("localhost:8000", f"127.0.0.1:{served.port}").replace("localhost:8001", served.grpc)


@pytest.mark.parametrize("block", CLIENTS, ids=range(len(CLIENTS)))
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_clients_of_the_server(block: str, protocol: str, served: Served) -> None:
    """Each as it stands, and over the other protocol."""
    shown = "http" if "tritonclient.http" in block else "grpc"
    ports = {"http": "localhost:8000", "grpc": "localhost:8001"}
    code = block.replace(f"tritonclient.{shown}", f"tritonclient.{protocol}").replace(ports[shown], ports[protocol])
    done = subprocess.run([sys.executable, "-c", addressed(code, served)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\[\d \d\]", done.stdout)  # two labels


def test_curl_lines(served: Served) -> None:
    metadata, answer = (
        json.loads(subprocess.run(["bash", "-c", addressed(line, served)], capture_output=True, check=True).stdout)
        for line in CURL
    )
    assert metadata["name"] == answer["model_name"] == "digits"
    labels, margin = answer["outputs"]
    assert labels["shape"] == [1, 2]
    values = [float(text.split(":")[0]) for text in labels["data"]]
    assert margin["data"][0] == pytest.approx(values[0] - values[1], abs=1e-5)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block not in CLIENTS])
def test_python_blocks(block: str, bundle: Bundle, run_dir: Path, tmp_path: Path) -> None:
    for folder, target in (("bundles", bundle.path), ("runs", run_dir)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "digits").symlink_to(target)
    done = mpdsgr("--help", cwd=tmp_path, prelude=block)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["export", "validate", "predict", "build", "inspect", "bundles", "adopt"])
def test_the_manual_of_export_has_every_option(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
    words = set(re.findall(r"--[a-z][a-z-]*", TEXTS["export/README.md"]))
    assert [option for option in options if option not in words] == []
