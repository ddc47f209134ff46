"""The backend torch-compile, with a compiler and without one."""

import numpy as np
import pytest
import torch

from mpdsgr_deploy.bundle import open_bundle
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipes import shipped
from mpdsgr_deploy.runtime import open_predictor
from mpdsgr_deploy.runtime.torch_model import TorchModel


def test_torch_compile_answers_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # without vector instructions, which the compiler tries out and then builds for, most of half a minute
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", False)
    bundle = open_bundle(shipped("export") / "doctor" / "bundle")
    inputs, logits = bundle.golden()
    with open_predictor(bundle, "torch-compile") as predictor:
        first = predictor(inputs)
        kept = first.copy()
        np.testing.assert_allclose(predictor(inputs[::-1].copy()), logits[::-1], atol=1e-5)
        assert np.array_equal(first, kept)


def test_torch_compile_without_a_compiler_is_one_line() -> None:
    class Small(torch.nn.Module):  # compiled as far as the C++ in a second, which a spiking network takes ten for
        stochastic = False

        def forward(self, x: torch.Tensor, observe: object, noise: object) -> torch.Tensor:
            return x.exp().flatten(1)

    torch._dynamo.reset()
    model = TorchModel(Small(), (1, 8, 8)).compiled()
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/compiler")})  # a monkeypatch would remove it
    with missing, pytest.raises(InputError, match=r"install a C\+\+ compiler") as error:
        model(np.zeros((2, 1, 8, 8), np.float32))
    assert "\n" not in str(error.value)
