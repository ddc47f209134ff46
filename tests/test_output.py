"""What commands share: bundles' addresses, paths below ~, tables for terminals and logs, stdout that goes away."""

import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_input_error, mpdsgr, mpdsgr_here

from mpdsgr_deploy.address import BundleAddress, parse_address
from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.cli import at_home
from mpdsgr_deploy.cli.doctor import grouped
from mpdsgr_deploy.cli.number_list import number_list
from mpdsgr_deploy.cli.output import opened_bundle, opened_precisions, print_json, print_table
from mpdsgr_deploy.errors import InputError

ROWS = [("digits-mpdsgr", "a network for scikit-learn's digits with the regulariser of the paper " * 2, "1.0")]
COLUMNS = ("recipe", "what it is", "clean")


def on_terminal(width: int, text: str) -> str:
    """What a program prints on a terminal of that width."""
    parent, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", text], stdout=child, stderr=child, env=environment)
    os.close(child)
    output = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # how a pseudo-terminal ends on Linux
            break
        if not part:
            break
        output += part
    os.close(parent)
    assert process.wait(60) == 0
    return re.sub(r"\x1b\[[0-9;]*m|\r", "", output.decode())


def test_a_log_gets_one_plain_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(COLUMNS, ROWS, "title")
    title, head, row = capsys.readouterr().out.splitlines()
    assert title == "title"
    assert head.split() == ["recipe", "what", "it", "is", "clean"]
    assert row.startswith("digits-mpdsgr  a network")
    assert row.endswith("1.0")


@pytest.mark.parametrize("width", [60, 100])
def test_a_terminal_gets_a_table_that_fits(width: int) -> None:
    program = f"from mpdsgr_deploy.cli.output import print_table\nprint_table({COLUMNS!r}, {ROWS!r})"
    lines = on_terminal(width, program).splitlines()
    assert max(map(len, lines)) <= width
    assert "━" in lines[0]
    assert "digits-mpdsgr" in "".join(lines)


def test_a_table_that_cannot_fit_becomes_a_block_for_each_row() -> None:
    columns, row = ["name", *"abcdefgh"], ["first", *(f"{letter * 20}" for letter in "abcdefgh")]
    program = f"from mpdsgr_deploy.cli.output import print_table\nprint_table({columns!r}, [{row!r}])"
    lines = on_terminal(80, program).splitlines()
    assert lines[0] == "first"
    assert lines[1] == f"  a: {'a' * 20}"


def test_recipes_and_bundles_take_a_line_each_in_a_pipe() -> None:
    lines = mpdsgr_here("recipes").stdout.splitlines()
    recipes = json.loads(mpdsgr_here("recipes", "--json").stdout)
    assert len(lines) == len(recipes) + 2


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf, "d": "NaN"}})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None, [None]], "b": {"c": None, "d": "NaN"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("digits", BundleAddress("digits")),
        ("digits@int8", BundleAddress("digits", "int8")),
        (f"digits@sha256:{'a' * 64}", BundleAddress("digits", None, "a" * 64)),
        (f"s3://b/n@int8@sha256:{'b' * 64}", BundleAddress("s3://b/n", "int8", "b" * 64)),
        ("s3://user@host/n", BundleAddress("s3://user@host/n")),
    ],
)
def test_addresses(text: str, expected: BundleAddress) -> None:
    assert parse_address(text) == expected


def test_a_bundle_is_opened_by_path_string_home_and_precision(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(bundle.path, tmp_path / "a@b")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (str(copy), copy, "~/a@b", Path("~/a@b")):
        assert open_bundle(path).manifest == bundle.manifest
    found, precision = opened_bundle(f"{copy}@fp32", None)
    assert (found.path, precision) == (copy, "fp32")
    assert opened_bundle(str(copy), "int8")[1] == "int8"
    with pytest.raises(InputError, match="two precisions"):
        opened_bundle(f"{copy}@int8", "fp32")
    with pytest.raises(InputError, match="with all its precisions"):
        open_bundle(f"{copy}@fp32")
    with pytest.raises(InputError, match="another bundle than the address names"):
        open_bundle(f"{copy}@sha256:{'0' * 64}")
    assert open_bundle(f"{copy}@sha256:{bundle.manifest.digest}").path == copy
    assert [at_home(text) for text in ("~/x", "--out=~/y", "a~b", "--set=a.b=~")] == [
        f"{tmp_path}/x",
        f"--out={tmp_path}/y",
        "a~b",
        "--set=a.b=~",
    ]


def test_a_remote_bundle_is_verified_cached_and_found_offline(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("MPDSGR_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(bundle.path), "/models/digits", recursive=True)
    address = f"memory://models/digits@sha256:{bundle.manifest.digest}"
    with pytest.raises(InputError, match="has no digest"):
        open_bundle("memory://models/digits")
    with pytest.raises(InputError, match="another bundle than the address names"):
        open_bundle(f"memory://models/digits@sha256:{'0' * 64}")
    assert open_bundle(address).manifest == bundle.manifest
    memory.rm("/models", recursive=True)
    assert open_bundle(address).path == tmp_path / "cache" / bundle.manifest.digest
    with pytest.raises(InputError, match="cannot use nowhere://x"):
        open_bundle(f"nowhere://x@sha256:{'1' * 64}")
    with (tmp_path / "cache" / bundle.manifest.digest / "golden.npz").open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="does not match its hash"):
        open_bundle(address)


def test_commands_take_precisions_behind_the_bundle(precise: Bundle, bundle: Bundle, tmp_path: Path) -> None:
    images = precise.path / "images.npz"
    shutil.copy(images, tmp_path / "images.npz")
    import numpy as np

    with np.load(images) as arrays:
        np.save(tmp_path / "a.npy", arrays["pixels"][:4])
    done = mpdsgr_here("predict", f"{precise.path}@int8", tmp_path / "a.npy", "--out", tmp_path / "int8.npz")
    assert done.returncode == 0, done.stderr
    mpdsgr_here("predict", precise.path, tmp_path / "a.npy", "--precision", "int8", "--out", tmp_path / "same.npz")
    with np.load(tmp_path / "int8.npz") as first, np.load(tmp_path / "same.npz") as second:
        assert np.array_equal(first["logits"], second["logits"])
    assert_input_error(mpdsgr_here("predict", f"{precise.path}@int9", tmp_path / "a.npy"), "no precision 'int9'")


def test_a_report_does_not_go_into_the_bundle(bundle: Bundle) -> None:
    done = mpdsgr_here("validate", bundle.path, "--report", bundle.path / "report")
    assert_input_error(done, "--report", "is inside the bundle")


def shell(line: str) -> "subprocess.CompletedProcess[str]":
    command = f'set -o pipefail; mpdsgr() {{ {sys.executable} -m mpdsgr_deploy "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("line", "code"),
    [("mpdsgr recipes | true", 0), ("mpdsgr recipes --json | head -c 3", 0), ("mpdsgr recipes >&-", 0)],
)
def test_a_stdout_that_goes_away_is_no_traceback(line: str, code: int) -> None:
    done = shell(line)
    assert done.stderr == ""
    assert done.returncode == code


def test_a_full_stdout_is_one_line() -> None:
    done = shell("mpdsgr recipes > /dev/full")
    assert_input_error(done, "No space left on device")
    assert len(done.stderr.splitlines()) == 1


def test_a_finished_run_says_that_nothing_is_left(run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run")
    recipe = json.loads((copy / "recipe.json").read_text())
    overrides = [
        f"--set={section}.{key}={json.dumps(value)}"
        for section in ("data", "model", "encoding", "training")
        for key, value in recipe[section].items()
        if isinstance(value, int | float | str) and not isinstance(value, bool)
    ]
    done = mpdsgr("train", "digits-reg", *overrides, "--out", copy, "--resume")
    assert done.returncode == 0, done.stderr
    assert "already has all of its 3 epochs" in done.stderr
    assert "epochs 4 to 3" not in done.stderr


def test_the_doctor_says_a_reason_that_precisions_share_once() -> None:
    states = {("a", "fp32"): "works", ("a", "int8"): "no: old", ("a", "fp8"): "no: old", ("b", "fp32"): "no: old"}
    assert grouped(states) == [("a", "fp32", "works"), ("a", "int8, fp8", "no: old"), ("b", "fp32", "no: old")]


def test_precisions_are_those_that_are_named_or_all(precise: Bundle) -> None:
    """A digest names no precision, although it follows an "@" too."""
    everything = list(precise.manifest.variants)
    assert len(everything) > 1
    place, digest = str(precise.path), f"@sha256:{precise.manifest.digest}"
    for text, options, expected in (
        (place, (), everything),
        (place + digest, (), everything),
        (f"{place}@int8{digest}", (), ["int8"]),
        (place + digest, ("int8", "fp32"), ["int8", "fp32"]),
    ):
        assert opened_precisions(text, options)[1] == expected
    with pytest.raises(InputError, match="leave one of them out"):
        opened_precisions(f"{place}@int8", ["fp32"])


@pytest.mark.parametrize(
    ("text", "bounds", "advice"),
    [
        ("1,x", {}, "write numbers with commas between them, such as 7"),
        ("", {}, "write numbers with"),
        ("nan", {}, "write numbers with"),
        ("1,0", {"low": 1}, "write numbers from 1 with"),
        ("1,9", {"low": 1, "high": 8}, "write numbers from 1 to 8 with"),
        ("1,2", {"counts": (3, 3)}, "write 3 numbers with"),
        ("1,2,3", {"counts": (1, 2)}, "write 1 to 2 numbers with"),
    ],
)
def test_a_list_of_numbers_says_what_to_write(text: str, bounds: dict[str, Any], advice: str) -> None:
    assert number_list("--some", "1, 2.5", float, "7") == [1, 2.5]
    with pytest.raises(InputError, match=re.escape(f"--some {text!r}: {advice}")):
        number_list("--some", text, float, "7", **bounds)
    with pytest.raises(InputError, match="write whole numbers"):
        number_list("--some", "2.5", int, "7")
