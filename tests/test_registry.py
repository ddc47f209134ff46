"""Named choices: built-ins, and entries that other packages add through entry points."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from mpdsgr_deploy import registry
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.registry import Expected, Registry

GROUP = "mpdsgr_deploy.tests"


def make(monkeypatch: pytest.MonkeyPatch, **plugins: str) -> Registry[object]:
    """A registry with one built-in, and plug-ins by name: MODULE:ATTRIBUTE."""
    points = tuple(EntryPoint(name, value, GROUP) for name, value in plugins.items())
    monkeypatch.setattr(registry, "_installed", lambda group: points)
    return Registry("shape", GROUP, {"square": 4})


def test_a_built_in_is_registered_by_a_decorator_and_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = make(monkeypatch)

    @shapes.register("circle")
    def circle() -> float:
        return 3.14

    assert shapes.choose("circle") is circle
    assert list(shapes) == ["square", "circle"]
    assert "circle" in shapes
    assert len(shapes) == 2
    with pytest.raises(InputError, match=r"^unknown shape 'sqare'; allowed: circle, square; did you mean 'square'\?$"):
        shapes.choose("sqare")
    with pytest.raises(InputError, match="shape 'square' is registered twice"):
        shapes.add("square", 5)


def test_a_plug_in_is_imported_only_when_it_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = make(monkeypatch, spiral="colorsys:rgb_to_hsv", zigzag="no.such.module:f")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert list(shapes) == ["square", "spiral", "zigzag"]
    assert "spiral" in shapes
    assert shapes.choose("square") == 4
    assert "colorsys" not in sys.modules
    assert shapes.choose("spiral").__name__ == "rgb_to_hsv"  # type: ignore[attr-defined]
    assert "colorsys" in sys.modules


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no.such.module:f", "shape 'bad' of the installed package .* cannot be loaded .ModuleNotFoundError: .*repair"),
        ("colorsys:no_such_function", "cannot be loaded .AttributeError"),
        ("colorsys:ONE_THIRD", "shape 'bad' of the installed package .* is not a callable"),
    ],
)
def test_a_broken_plug_in_is_an_error_that_names_its_package(
    value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = make(monkeypatch, bad=value)
    assert shapes.choose("square") == 4  # other names still work
    with pytest.raises(InputError, match=message):
        shapes.choose("bad")


def test_a_name_taken_twice_is_an_error_for_every_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = make(monkeypatch, square="colorsys:rgb_to_hsv")
    with pytest.raises(InputError, match="shape 'square' is provided by mpdsgr-deploy and by colorsys"):
        shapes.choose("square")
    twice = tuple(EntryPoint("star", value, GROUP) for value in ("colorsys:rgb_to_hsv", "bisect:insort"))
    monkeypatch.setattr(registry, "_installed", lambda group: twice)
    with pytest.raises(InputError, match=r"shape 'star' is provided by colorsys.* and by bisect"):
        Registry("shape", GROUP, {"square": 4}).choose("square")


def test_what_an_entry_must_be_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    make(monkeypatch, odd="colorsys:ONE_THIRD")
    numbers = Registry("number", GROUP, expected=Expected("a float", lambda entry: isinstance(entry, float)))
    assert numbers.choose("odd") == pytest.approx(1 / 3)


def test_backends_and_data_sets_are_listed_without_torch() -> None:
    program = (
        "import sys; from mpdsgr_deploy.runtime import BACKENDS; from mpdsgr_deploy.data import DATASETS; "
        "print(len(BACKENDS), len(DATASETS)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
