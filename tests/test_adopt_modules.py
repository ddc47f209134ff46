"""Torch modules of one's own: exported here, or by the user at a fixed batch."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from foreign_files import digits, quick

import mpdsgr_deploy as mpd
from mpdsgr_deploy.adoption import adopt
from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.cli import main
from mpdsgr_deploy.errors import EvaluationError, InputError
from mpdsgr_deploy.exporting import export_module, find_module
from mpdsgr_deploy.recipes import shipped
from mpdsgr_deploy.runtime import open_predictor


class Fixed(torch.nn.Module):
    """What exporters write down at a fixed batch: initial states, expanded values, time folded into the batch."""

    def __init__(self, *, mixes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.mixes = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(144, 10), mixes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, spikes = torch.full((len(x), 4, 6, 6), 0.1), []
        for _ in range(3):
            u = u * 0.5 + self.conv(x)
            spikes.append((u > 0.2).float())
            u = u - 0.2 * spikes[-1]
        outputs = self.head(torch.stack(spikes).flatten(0, 1).reshape(3 * len(x), -1)).reshape(3, len(x), 10).mean(0)
        return outputs - outputs.mean(0) if self.mixes else outputs


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_is_freed(batch: int, tmp_path: Path) -> None:
    network, x = Fixed().eval(), torch.from_numpy(digits(12).unit())
    exported(network, x[:batch], tmp_path / "fixed.onnx")
    bundle = adopt(tmp_path / "fixed.onnx", digits(12), tmp_path / "bundle", recipe=quick())
    assert bundle.manifest.provenance["adopted"]["batch fixed at export"] == batch
    with open_predictor(bundle) as predictor, torch.no_grad():
        np.testing.assert_allclose(predictor(x.numpy()), network(x), atol=1e-5)


def test_a_network_that_is_bound_to_its_batch_is_refused(tmp_path: Path) -> None:
    exported(Fixed(mixes=True).eval(), torch.from_numpy(digits(4).unit()), tmp_path / "mixed.onnx")
    with pytest.raises(InputError, match=r"in another batch|unknown sizes"):
        adopt(tmp_path / "mixed.onnx", digits(12), tmp_path / "no", recipe=quick())
    assert not (tmp_path / "no").exists()


def exported(network: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network, (x,), dynamo=True, input_names=["images"], verbose=False)
    program.save(path)


class Net(torch.nn.Module):
    """Three spiking layers over three steps, for `export_module`."""

    def __init__(self, *, leaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.between = torch.nn.Conv2d(1, 6, 3), torch.nn.Linear(216, 20)
        self.head, self.leaks, self.kept = torch.nn.Linear(20, 10), leaks, torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = self.kept if self.leaks else torch.zeros(())
        v, outputs = torch.zeros(()), []
        for _ in range(3):
            u = u * 0.5 + self.conv(x)
            spikes = (u > 0.2).float()
            u = u - 0.2 * spikes
            v = v * 0.5 + self.between(spikes.flatten(1))
            fired = (v > 0.1).float()
            v = v - 0.1 * fired
            outputs.append(self.head(fired))
        if self.leaks:
            self.kept = u.mean()
        return torch.stack(outputs).mean(0)


def test_a_module_is_exported_with_torch_as_its_reference(tmp_path: Path) -> None:
    module = Net()
    with torch.no_grad():
        logits = module(torch.from_numpy(digits(12).unit())).numpy()
    bundle = export_module(module, digits(12), tmp_path / "out", precisions=("int8",), recipe=quick())
    assert bundle.manifest.origin == "module"
    assert list(bundle.manifest.variants) == ["fp32", "int8"]
    np.testing.assert_allclose(bundle.reference().logits["fp32"], logits, atol=1e-5)
    operators = {node.op_type for node in onnx.load(bundle.variant("int8")).graph.node}
    assert "QuantizeLinear" in operators
    with open_predictor(bundle, precision="int8") as predictor:
        assert np.abs(predictor(digits(12).unit()) - logits).max() < 0.5


def test_a_state_that_is_left_over_is_found(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="a state is left from the last call"):
        export_module(Net(leaks=True), digits(200), tmp_path / "out")


def test_a_module_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_net.py").write_text("from test_adopt_modules import Net\ndef build(): return Net()\nword = str\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert isinstance(find_module("own_net:build"), torch.nn.Module)
    for name, message in (
        ("own_net:none", "AttributeError"),
        ("own_net:word", "returns a str"),
        ("no_net:x", "ModuleNot"),
    ):
        with pytest.raises(InputError, match=message):
            find_module(name)
    done = CliRunner().invoke(main, ["export", "own_net:build", "--out", "out"])
    assert done.exit_code == 2
    assert "is attacked with --data" in done.output
    words = ["export", "own_net:build", "--data", "digits", "--limit", "3", "--precision", "int8", "--out", "out"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert list(open_bundle(Path("out")).manifest.variants) == ["fp32", "int8"]


def test_images_in_memory_are_limited_and_have_no_directory(tmp_path: Path) -> None:
    network = shipped("export") / "bundles" / "digits" / "model.fp32.onnx"
    with pytest.raises(InputError, match="leave root out"):
        mpd.adopt(network, digits(12), tmp_path / "out", root="data")
    bundle = mpd.adopt(network, digits(12), tmp_path / "out", limit=6, recipe=quick())
    assert bundle.manifest.reference is not None
    assert bundle.manifest.reference.n == 6
