"""`train --init` from a bundle, and from a torch module of another library, whose layers map one to one."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import small_recipe
from safetensors.torch import load_file
from torch import Tensor, nn

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.checkpoint import load_checkpoint
from mpdsgr_deploy.cli import main
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.models import build_model
from mpdsgr_deploy.recipe import Recipe
from mpdsgr_deploy.training import train
from mpdsgr_deploy.training.module_init import mapped_weights
from mpdsgr_deploy.training.training_state import find_weights

SHAPE, T = (1, 8, 8), 2
RECIPE = {
    "model": {"name": "vgg-small", "width": 0.125},
    "encoding": {"T": T},
    "neuron": {"v_threshold": 2.0, "tau": 0.5, "reset": "soft"},
    "data": {"name": "digits"},
    "training": {"epochs": 1},
}


class Decaying(nn.Module):
    """SpikingJelly's default: u <- u + (x - u) / tau with tau = 2 and threshold 1; resets by subtraction."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 4), (4, 8), (8, 8))]
        self.body = nn.ModuleList(nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)) for conv in convs)
        self.head = nn.Linear(128, 10)
        for _, norm in self.body:
            nn.init.normal_(norm.bias, 1.5, 0.6)
            nn.init.normal_(norm.running_mean, 0, 0.2)
            nn.init.uniform_(norm.running_var, 0.02, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        potentials = [torch.zeros(())] * len(self.body)
        outputs = []
        for _ in range(T):
            spikes = x
            for number, layer in enumerate(self.body):
                u = potentials[number]
                u = u + (layer(spikes) - u) / 2
                spikes = (u >= 1).float()
                potentials[number] = u - spikes
                if number == 0:
                    spikes = nn.functional.avg_pool2d(spikes, 2)
            outputs.append(self.head(spikes.flatten(1)))
        return torch.stack(outputs).mean(0)


def test_a_network_that_starts_from_a_module_answers_as_it_does() -> None:
    """The threshold is that of the module times tau, since it decays its input."""
    module, network = Decaying().eval(), build_model(Recipe.model_validate(RECIPE), SHAPE, 10).eval()
    network.load_state_dict(mapped_weights(module, network), strict=False)
    x = torch.rand(20, *SHAPE)
    with torch.no_grad():
        expected, found = module(x), network(x)
    assert expected.std(0).min() > 0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.body.append(nn.Conv2d(1, 1, 3)),
            r"has 5 layers .*body.0.0 \[4, 1, 3, 3\], .*network 4",
        ),
        (lambda m: m.body[0].__delitem__(1), "is normalised and its counterpart body.0.0 is not"),
        (lambda m: m.body[1].__setitem__(0, nn.Conv2d(4, 9, 3, padding=1)), r"body.1.0 is a Conv2d \[9, 4, 3, 3\]"),
        (lambda m: m.body[0].__setitem__(0, nn.Conv2d(1, 4, 3, padding=1, stride=2)), r"has stride \(2, 2\)"),
        (lambda m: m.body[0].__setitem__(1, nn.BatchNorm2d(4, track_running_stats=False)), "has no running statistics"),
    ],
)
def test_layers_that_do_not_map_are_named(change, message: str) -> None:
    module = Decaying()
    change(module)
    with pytest.raises(InputError, match=message):
        mapped_weights(module, build_model(Recipe.model_validate(RECIPE), SHAPE, 10))


def test_training_starts_from_a_module_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_decaying.py").write_text("from test_init import Decaying\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    words = ["train", "digits-reg", "--init", "own_decaying:Decaying", "--out", "run"]
    settings = ["model.name=vgg-small", "model.width=0.125", "encoding.T=2", "neuron.v_threshold=2", "neuron.tau=0.5"]
    settings += [
        "neuron.reset=soft",
        "training.epochs=1",
        "training.pictures=0",
        "training.lr=0.0001",
        "training.batch_size=400",
    ]
    done = CliRunner().invoke(main, [*words, *(word for setting in settings for word in ("--set", setting))])
    assert done.exit_code == 0, done.output
    init = load_checkpoint(tmp_path / "run" / "last").init
    assert init is not None
    assert init["module"] == "own_decaying:Decaying"
    assert init["alike"] == 1
    again = ["train", "digits-reg", "--init", "own_decaying:Nothing", "--out", "other"]
    done = CliRunner().invoke(main, again)
    assert done.exit_code == 2
    assert "cannot be imported and called" in done.output


def test_a_bundle_is_a_start_as_good_as_its_checkpoint(run_dir: Path, bundle: Bundle, tmp_path: Path) -> None:
    of_bundle, of_run = find_weights(bundle.path), find_weights(run_dir)
    assert of_bundle.sha256 == of_run.sha256
    assert of_bundle._replace(file=of_run.file, recipe=of_run.recipe) == of_run
    still = {"epochs": 1, "lr": 1e-12, "momentum": 0.0, "weight_decay": 0.0, "pictures": 0}
    train(small_recipe(training=still, data={"train_images": 260}), tmp_path / "run", init=bundle.path)
    checkpoint = load_checkpoint(tmp_path / "run" / "last")
    assert checkpoint.init is not None
    assert (checkpoint.init["weights_sha256"], checkpoint.init["epoch"]) == (of_run.sha256, of_run.epoch)
    before, after = load_file(of_run.file), load_file(tmp_path / "run" / "last" / checkpoint.weights)
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before if "running" not in name)
