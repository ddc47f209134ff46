"""Event recordings: their file format, their frames, and a network trained, exported and used on them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_input_error, mpdsgr, small_recipe

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.data import load_test, load_training
from mpdsgr_deploy.data.batches import augment, generator
from mpdsgr_deploy.data.events import COUNT_CAP, Events, parse_events, read_frames, to_frames
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.exporting import export
from mpdsgr_deploy.models import build_model
from mpdsgr_deploy.recipe import Data, load_recipe
from mpdsgr_deploy.training import train

Event = tuple[int, int, int, int]  # x, y, polarity, microseconds
T = 2


def record(x: int, y: int, polarity: int, t: int) -> bytes:
    """One event as the 40-bit number that the format's description spells out."""
    return (x << 32 | y << 24 | polarity << 23 | t).to_bytes(5, "big")


def write(path: Path, events: list[Event]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(record(*event) for event in events))
    return path


def recording(seed: int, count: int = 1000) -> list[Event]:
    """Random events of about 300 ms in the order of time, a third of them at pixels that fire more often."""
    draw = np.random.default_rng(seed)
    places = draw.integers(0, 34, (count, 2))
    places[::3] = places[::3] % 2
    times = np.sort(draw.integers(1_000, 300_000, count))
    return [(int(x), int(y), int(draw.integers(2)), int(t)) for (x, y), t in zip(places, times, strict=True)]


def frames_by_loop(events: list[Event], T: int) -> np.ndarray:
    """The frames, event by event."""
    first, last = min(t for *_, t in events), max(t for *_, t in events)
    counts = np.zeros((T, 2, 34, 34), int)
    for x, y, polarity, t in events:
        frame = 0
        while (t - first) * T >= (frame + 1) * (last - first + 1):
            frame += 1
        counts[frame, polarity, y, x] += 1
    return (np.minimum(counts, 5) * 51).reshape(2 * T, 34, 34)


def test_events_are_read_back(tmp_path: Path) -> None:
    events = [(0, 33, 1, 0), (33, 0, 0, 2**23 - 1), (17, 5, 1, 0x123456), *recording(0)]
    found = parse_events(write(tmp_path / "a.bin", events).read_bytes(), "a.bin")
    assert list(zip(found.x, found.y, found.polarity, found.t, strict=True)) == events
    assert {values.dtype for values in found} == {np.dtype(np.int64)}


def test_a_record_at_y_240_moves_what_follows_by_one_turn_of_the_clock(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [(1, 2, 0, 8000), (0, 240, 0, 0), (3, 4, 1, 5), (0, 240, 1, 9), (5, 6, 0, 7)])
    x, y, polarity, t = (values.tolist() for values in parse_events(path.read_bytes(), "a.bin"))
    assert (x, y, polarity) == ([1, 3, 5], [2, 4, 6], [0, 1, 0])
    assert t == [8000, 2**13 + 5, 2 * 2**13 + 7]


@pytest.mark.parametrize("T", [1, 2, 7, 10])
def test_frames_are_those_of_a_loop_over_the_events(T: int, tmp_path: Path) -> None:
    for seed in range(5):
        events = recording(seed)
        expected = frames_by_loop(events, T)
        found = read_frames(write(tmp_path / "a.bin", events), (2 * T, 34, 34))
        assert found.dtype == np.uint8
        assert np.array_equal(found, expected)
        assert found.max() == 255  # the cap was met, and nothing wrapped around


def test_frames_by_hand() -> None:
    x, y, polarity, t = np.array([(5, 9, 1, 100), (5, 9, 1, 149), (5, 9, 0, 150), (6, 9, 1, 199)]).T
    frames = to_frames(Events(x, y, polarity, t), 2)
    lit = {(0 * 2 + 1, 9, 5): 2 * 51, (1 * 2 + 0, 9, 5): 51, (1 * 2 + 1, 9, 6): 51}
    assert {tuple(map(int, index)): frames[tuple(index)] for index in np.argwhere(frames)} == lit
    once = to_frames(Events(*(np.full(300, v) for v in (1, 2, 1, 77))), 4)  # all at one instant
    assert once[1, 2, 1] == once.sum() == COUNT_CAP * 51


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (record(1, 2, 0, 3) + b"\0\0", "cut off: its 7 bytes"),
        (b"", "holds no events"),
        (record(0, 240, 0, 0), "holds no events"),
        (record(34, 2, 0, 3), "x = 34 or y = 2, outside 34x34"),
        (record(1, 2, 0, 3) + record(1, 239, 0, 3), "x = 1 or y = 239, outside 34x34"),
        (None, "cannot read"),
    ],
)
def test_a_damaged_recording_is_one_line_that_names_it(content: bytes | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "00042.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=expected) as error:
        read_frames(path, (2, 34, 34))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def n_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("n-mnist")
    for digit in range(10):
        for i in range(3):
            write(root / "Train" / str(digit) / f"{i:05}.bin", recording(100 * digit + i))
        write(root / "Test" / str(digit) / "00009.bin", recording(100 * digit + 9))
    return root


def test_the_data_set_is_read_in_its_layout(n_mnist: Path, tmp_path: Path) -> None:
    config = Data(name="n-mnist", root=str(n_mnist), frames=T)
    test = load_test(config)
    assert (test.shape, test.labels, test.classes.tolist()) == ((2 * T, 34, 34), tuple("0123456789"), list(range(10)))
    for digit, frames in enumerate(test.pixels):
        assert np.array_equal(frames, frames_by_loop(recording(100 * digit + 9), T))
    training, validation = load_training(config)
    assert (len(training), len(validation)) == (27, 3)
    assert np.bincount([*training.classes, *validation.classes]).tolist() == [3] * 10
    with pytest.raises(InputError, match=r"needs data\.frames"):
        load_test(Data(name="n-mnist", root=str(n_mnist)))
    with pytest.raises(InputError, match=r"no recordings in .*Test/0; point data\.root"):
        load_test(Data(name="n-mnist", root=str(tmp_path), frames=T))


def test_one_frame_a_step(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[data]\nname = 'n-mnist'\nframes = 3\n[encoding]\nname = 'frames'\nT = 4\n")
    with pytest.raises(InputError, match=r"encoding\.T is 4 and data\.frames is 3"):
        load_recipe(tmp_path / "r.toml")
    recipe = load_recipe(tmp_path / "r.toml", ["encoding.T=3", "model.name=vgg-small"])
    model = build_model(recipe, (6, 34, 34), 10)
    x = torch.rand(2, 6, 34, 34)
    steps = model.encode(x, model.normalize)
    assert steps.shape == (3, 2, 2, 34, 34)
    assert all(torch.equal(steps[t], x[:, 2 * t : 2 * t + 2]) for t in range(3))
    with pytest.raises(InputError, match=r"set encoding\.T to a divisor of 8"):
        build_model(recipe, (8, 34, 34), 10)


def test_augmentation_moves_all_frames_of_a_recording_alike() -> None:
    frame = torch.randint(256, (50, 1, 34, 34), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = augment(frame.expand(-1, 2 * T, -1, -1), padding=2, flip=True, draw=generator(0, "test"))
    assert all(torch.equal(out[:, c], out[:, 0]) for c in range(2 * T))
    assert torch.equal(out[:, :1], augment(frame, padding=2, flip=True, draw=generator(0, "test")))
    assert not torch.equal(out[:, :1], frame)


def test_a_network_is_trained_exported_and_used_on_recordings(n_mnist: Path, tmp_path: Path) -> None:
    recipe = small_recipe(
        data={"name": "n-mnist", "root": str(n_mnist), "frames": T, "augment": "crop"},
        model={"width": 0.1},
        encoding={"name": "frames", "T": T},
        training={"epochs": 1, "batch_size": 9},
        defence={"mpd-sgr": {"estimator": "empirical"}},
    )
    train(recipe, tmp_path / "run")
    bundle = export(tmp_path / "run", tmp_path / "bundle", root=str(n_mnist))  # compares ONNX with torch
    assert bundle.manifest.input_shape == (2 * T, 34, 34)
    assert bundle.manifest.variants["fp32"].accuracy.n == 10
    assert open_bundle(bundle.path).golden()[0].any()

    np.save(tmp_path / "frames.npy", load_test(recipe.data).pixels)
    inputs = n_mnist / "Test", tmp_path / "frames.npy"
    done = mpdsgr("predict", bundle.path, *inputs, "--out", tmp_path / "found.jsonl")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [row["input"] for row in found[:10]] == [str(n_mnist / "Test" / str(k) / "00009.bin") for k in range(10)]
    assert [row["label"] for row in found[:10]] == [row["label"] for row in found[10:]]
    assert_input_error(mpdsgr("predict", bundle.path, __file__), "takes arrays, and .bin recordings")
