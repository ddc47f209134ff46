"""Neurons that torch compiled once that paid: the same bits, forward and backward, whatever compiling came to."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mpdsgr_deploy.snn import compiled
from mpdsgr_deploy.snn.lif_state import LIFConstants
from mpdsgr_deploy.snn.multistep import multistep_lif
from mpdsgr_deploy.snn.surrogate import make_surrogate

HARD = LIFConstants(4, 0.5, 1.0, True, make_surrogate("triangle"))
SOFT = LIFConstants(3, 0.3, 0.75, False, make_surrogate("superspike"))
SHAPE = (3, 8, 9, 11)  # no multiple of what a CPU computes at once


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Compile at once; what was compiled is noted, and each use of it."""
    noted: list[str] = []
    compile_function = compiled.compile_function

    def noting(*arguments: Any) -> Any:
        fast = compile_function(*arguments)
        noted.append("compiled" if fast else "left")
        return fast and (lambda tensors: noted.append("used") or fast(tensors))

    monkeypatch.setattr(compiled, "PAYS", 0.0)
    monkeypatch.setattr(compiled, "compile_function", noting)
    compiled._kernel.cache_clear()
    yield noted
    compiled._kernel.cache_clear()


def step(how: LIFConstants, shape: tuple[int, ...], dtype: torch.dtype, *, held: bool = False) -> list[torch.Tensor]:
    """Outputs and the gradient; held: with one current for all steps and a loss of both outputs."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    images = drawn((1 if held else how.steps) * shape[0], *shape[1:]).contiguous(memory_format=torch.channels_last)
    current = (images.unflatten(0, (-1, shape[0])) + 0.5).requires_grad_()
    u, spikes = multistep_lif(current, None, how)
    torch.autograd.backward([u, spikes][1 - held :], [drawn(*spikes.shape) for _ in range(1 + held)])
    return [u.detach(), spikes.detach(), current.grad]


@pytest.fixture(scope="module")
def compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize(
    ("how", "dtype", "held", "compilations"),
    [(HARD, torch.float32, False, 2), (SOFT, torch.bfloat16, True, 1)],  # in 16 bits the backward pass alone
)
def test_compiled_neurons_give_the_same_bits_for_any_number_of_elements(
    how: LIFConstants, dtype: torch.dtype, held: bool, compilations: int, uses: list[str], compiler: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for shape in (SHAPE, SHAPE, (5, 7, 13, 17)):  # the first compiles
        found = step(how, shape, dtype, held=held)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "FEWEST", 1 << 40)
            expected = step(how, shape, dtype, held=held)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()
    assert uses.count("compiled") == compilations
    assert uses.count("used") == 3 * compilations  # the first to compare


def test_few_elements_and_short_trainings_are_not_compiled(uses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    step(HARD, (2, 3, 4, 5), torch.float32)
    monkeypatch.setattr(compiled, "PAYS", 1e9)
    step(HARD, SHAPE, torch.float32)
    assert uses == []


def test_a_surrogate_that_a_compiler_may_round_otherwise_is_not_compiled(uses: list[str]) -> None:
    step(HARD._replace(surrogate=make_surrogate("sigmoid")), SHAPE, torch.bfloat16)
    assert uses == ["left"]


@pytest.mark.parametrize("wrong", [False, True])
def test_training_goes_on_without_a_compiler_that_works(
    wrong: bool, uses: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(function: Any, tensors: Any) -> Any:
        if wrong:
            return lambda tensors: tuple(y + 1 for y in function(*tensors, in_place=False))
        raise RuntimeError("no g++\nand more")

    monkeypatch.setattr(compiled, "compile_function", failing)
    compiled._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        first, second = (step(HARD, SHAPE, torch.float32) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    (message,) = caplog.messages
    assert ("other values" if wrong else "(RuntimeError: no g++)") in message
