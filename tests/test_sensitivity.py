"""How sensitive a network is, and how flips of its spikes are paired and counted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mpdsgr_deploy.bundle import Bundle
from mpdsgr_deploy.checkpoint import find_checkpoint, load_checkpoint
from mpdsgr_deploy.data import load_test
from mpdsgr_deploy.defences import build_defended
from mpdsgr_deploy.diagnostics.trace import Recorder
from mpdsgr_deploy.experiments import flip_measurement, flip_records, flips_page
from mpdsgr_deploy.experiments.sensitivity import sensitivity
from mpdsgr_deploy.exporting import precision
from mpdsgr_deploy.trained_networks import load_model


def test_sensitivity_does_not_depend_on_the_batches(run_dir: Path) -> None:
    best = find_checkpoint(run_dir)
    checkpoint = load_checkpoint(best)
    model = load_model(best / checkpoint.weights, checkpoint.recipe, checkpoint.shape, len(checkpoint.labels))
    images = load_test(checkpoint.recipe.data)[:50]
    validation = checkpoint.recipe.validation
    whole, split = (
        sensitivity(
            model,
            images,
            checkpoint.recipe.model_copy(update={"validation": validation.model_copy(update={"batch_size": size})}),
        )
        for size in (50, 7)
    )
    x, y = torch.from_numpy(images.unit()), torch.from_numpy(images.classes)
    with torch.no_grad():
        logits = model(x)
    right = logits.argmax(1) == y
    best_two = logits[right].topk(2).values  # of an image it gets right, the first is the true class
    assert whole["n"] == split["n"] == int(right.sum()) > 0
    assert whole["margin"] == pytest.approx((best_two[:, 0] - best_two[:, 1]).mean().item(), rel=1e-5)
    assert whole["pgd"] > whole["noise"]
    for key in ("margin", "promised", "noise", "pgd"):
        assert split[key] == pytest.approx(whole[key], rel=1e-3)
    assert split["flipped_pgd"] == pytest.approx(whole["flipped_pgd"], rel=1e-2, abs=1e-4)


def test_a_network_that_gets_nothing_right_has_no_sensitivity(run_dir: Path) -> None:
    checkpoint = load_checkpoint(find_checkpoint(run_dir))
    model, _ = build_defended(checkpoint.recipe, checkpoint.shape, len(checkpoint.labels))
    model.eval()
    images = load_test(checkpoint.recipe.data)[:5]
    with torch.no_grad():
        silent = model(torch.from_numpy(images.unit())).argmax(1).numpy()
    wrong = replace(images, classes=(silent + 1) % 10)
    assert sensitivity(model, wrong, checkpoint.recipe)["n"] == 0


def flip_record(row: str, seed: int, scale: float, eta: float | None = None) -> flip_records.FlipRecord:
    layer = dict.fromkeys(flip_records.LayerFlips.model_fields, scale)
    variant = {"labels_changed": round(10 * scale), "unflipped": 0, "logits_moved": scale, "layers": {"a": layer}}
    names = [f"{precision}, neurons {n}" for precision in flips_page.PRECISIONS for n in ("fp32", "fp16")]
    return flip_records.FlipRecord(
        table="t",
        row=row,
        seed=seed,
        checkpoint="last",
        method=row,
        defence={} if eta is None else {"mpd-sgr": {"eta": eta}},
        network="net",
        weights_sha256="",
        data="digits",
        n=50,
        variants=dict.fromkeys([*names, *flips_page.PLACES], variant),
        provenance={},
    )


def test_pairs_are_of_one_seed_and_ratios_of_it() -> None:
    rows = {
        ("t", "reg"): [flip_record("reg", 0, 0.1), flip_record("reg", 1, 0.8), flip_record("reg", 7, 0.9)],
        ("t", "mpdsgr"): [flip_record("mpdsgr", 0, 0.2, 0.5), flip_record("mpdsgr", 1, 0.4, 0.5)],
    }
    text = flips_page.pairs(rows)
    ratio = "1.00 [0.50, 2.00]"  # 2 and 1/2
    assert f"| t | mpdsgr | int8 | {ratio} | {ratio} | {ratio} | {ratio} | 1 of 2 seeds | 9 of 100 | 6 of 100 |" in text
    assert "reg, " not in text
    assert flip_records.sweep(rows) == []


def test_a_sweep_is_what_differs_by_eta_alone_and_no_pair() -> None:
    rows = {("t", row): [flip_record(row, 0, 0.1, eta)] for row, eta in (("high", 10), ("low", 2), ("without", None))}
    rows["other", "mpdsgr"] = [flip_record("mpdsgr", 0, 0.1, 0.5)]  # no network without it in its table
    assert [(record.row, record.eta) for record in flip_records.sweep(rows)] == [
        ("without", 0),
        ("low", 2),
        ("high", 10),
    ]
    assert flips_page.pair_up(rows) == {}


def test_a_product_in_int8_is_rounded_as_numpy_rounds_it(bundle: Bundle) -> None:
    network = ir.load(bundle.variant("fp32"))
    product = precision.products(network)["conv1"]
    weight, bias = (torch.from_numpy(value.const_value.numpy().copy()) for value in product.inputs[1:])
    x = load_test(bundle.manifest.recipe.data)[:5].unit()
    model = load_model(bundle.file("weights.safetensors"), bundle.manifest.recipe, (1, 8, 8), 10)
    step = 0.05
    image = torch.round(model.normalize(torch.from_numpy(x)) / step).clip(-128, 127) * step
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    expected = torch.nn.functional.conv2d(image, torch.round(weight / scale) * scale, bias, padding=1)
    recorded = Recorder(ir.to_proto(flip_measurement.in_int8(network, "conv1", step)))(x)
    np.testing.assert_allclose(recorded.potentials["conv1/0"], expected.detach().numpy(), atol=1e-5)
