"""An option that a command would ignore in the mode in which it runs is refused by name."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import mpdsgr_here

from mpdsgr_deploy.cli.ignored import refuse_ignored
from mpdsgr_deploy.recipes import shipped

BUNDLE = str(shipped("export") / "bundles" / "digits")
URL = "http://127.0.0.1:9/v2/models/n"
COMBINATIONS = [
    ("adopt net.onnx --check --images digits", "--images"),
    ("adopt net.onnx --check --out b --tier commit --limit 5 --root d", "--root, --limit, --tier, --out"),
    ("adopt net.onnx --check --set attack.eps=0.1 --labels a,b", "--labels, --set"),
    ("adopt net.onnx --check --variant int8=n.onnx --reference l.npz", "--variant, --reference"),
    (f"bench {BUNDLE} --rate 5 --requests 9", "--rate, --requests"),
    (f"bench {BUNDLE} --concurrency 1 --seed 1", "--concurrency, --seed"),
    (f"bench {BUNDLE} --images x.npy --api-key-file keys", "--images, --api-key-file"),
    (f"bench {BUNDLE} --hours 8", "--hours"),
    (f"bench --url {URL} --hours 8", "--hours"),
    (f"bench --url {URL} --backend openvino --precision int8 --total 9", "--backend, --precision, --total"),
    (f"bench --url {URL} --images x.npy --seed 1", "--seed"),
    (f"build {BUNDLE} --backend openvino --target l4", "--target"),
    (f"build {BUNDLE} --backend onnxruntime-cpu --batch 1,2,3", "--batch"),
    ("export runs/none --out b --data digits", "--data"),
    ("export runs/none --out b --surrogate arctan:2", "--surrogate"),
    ("export pack.mod:net --out b --data d.npz --steps 2 --max-drop 0.1", "--steps, --max-drop"),
    ("export pack.mod:net --out b --data d.npz --checkpoint best", "--checkpoint"),
    (f"inspect {BUNDLE} --attack-graph a.onnx --flips --json", "--flips, --json"),
    (f"inspect {BUNDLE} --attack-graph a.onnx --images 128", "--limit"),
    (f"inspect {BUNDLE} {BUNDLE} --attack-graph a.onnx", "OTHER"),
    (f"inspect {BUNDLE} {BUNDLE} --flips --card", "--flips, --card"),
    (f"inspect {BUNDLE} {BUNDLE} --steps --report r --layer l --channel 0", "--steps, --report, --layer, --channel"),
    (f"inspect {BUNDLE} --card --plots p --root d --json", "--plots, --root, --json"),
    (f"inspect {BUNDLE} --card --flips --layer l", "--flips, --layer"),
    (f"inspect {BUNDLE} --flips --steps", "--flips"),
    (f"inspect {BUNDLE} --flips --report r --channel 1", "--report, --channel"),
    (f"inspect {BUNDLE} --steps --layer l", "--layer"),
    (f"inspect {BUNDLE} --plots p", "--plots"),
    (f"inspect {BUNDLE} --report r --root d --images 5", "--root, --limit, --report"),
    ("inspect runs/none --images 5 --layer l", "--limit, --layer"),
    ("inspect runs/none --plots p --report r", "--report"),
    (f"predict {BUNDLE} x.npy --ray-cpus 2 --ray-gpus 1", "--ray-cpus, --ray-gpus"),
    ("study --why", "--why"),
    ("study --seeds 0 --jobs 2", "--seeds, --jobs"),
    ("study --render-only --runs r --images 5", "--runs, --images"),
    ("study digits --images 5", "--images"),
    ("study digits --why --jobs 2", "--jobs"),
    ("study digits base --render-only --why --seeds 0", "ROWS, --seeds, --why"),
    ("table --pack p --minutes 5", "--minutes, --pack"),
    ("table --render-only --flips --seeds 0 --root d", "--seeds, --root, --flips"),
    ("table digits --images 5", "--images"),
    ("table digits --flips --jobs 2 --minutes 5", "--jobs, --minutes"),
    ("table digits reg --render-only --seeds 0 --minutes 5", "ROWS, --seeds, --minutes"),
    ("table digits --render-only --jobs 2 --runs r", "--jobs, --runs"),
    ("table digits --render-only --flips --images 5", "--images"),
    ("table --from r --seeds 0 --pack p", "--seeds, --pack"),
    (f"validate {BUNDLE} --rate 5", "--rate"),
    (f"validate {BUNDLE} --url {URL} --backend openvino", "--backend"),
]


@pytest.mark.parametrize(("words", "ignored"), COMBINATIONS)
def test_it_is_refused_before_anything_is_read_or_written(
    words: str, ignored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mpdsgr_here(*words.split())
    assert done.returncode == 2, done.stderr
    them = "them" if "," in ignored else "it"
    assert f" ignores {ignored}; leave {them} out\n" in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_rebuild_of_a_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    done = mpdsgr_here("verify", tmp_path, "--rebuild", "--key", "key.pub")
    assert "a REPORT ignores --rebuild; leave it out" in done.stderr


@pytest.mark.parametrize("source", ["images.npz", "."])
@pytest.mark.parametrize("command", ["adopt", "export"])
def test_a_root_for_images_that_have_their_own_place_is_refused(source: str, command: str) -> None:
    network = str(Path(BUNDLE) / "model.fp32.onnx")
    words = {
        "adopt": ["adopt", network, "--images", source, "--out", "out"],
        "export": ["export", "pack.mod:net", "--data", source, "--out", "out"],
    }
    if command == "export":
        pytest.importorskip("onnxscript")
    done = mpdsgr_here(*words[command], "--root", "data")
    assert done.returncode == 2
    assert "is not the name of a data set" in done.stderr


def test_a_variable_of_the_environment_is_for_all_commands() -> None:
    """MPDSGR_REQUIRE_SIGNATURE may be set for a whole machine; only what stands on the command line is refused."""
    command = click.Command("some", params=[click.Option(["--option"], envvar="OPTION")])
    command.callback = lambda option: refuse_ignored("this mode", "option")
    assert CliRunner().invoke(command, [], env={"OPTION": "x"}).exit_code == 0
    assert "--option" in str(CliRunner().invoke(command, ["--option", "x"]).exception)
