"""Elementwise functions of a CPU, compiled by torch (inductor, which needs a C++ compiler) once that pays.

A function runs eagerly until it has taken as long as compiling it may take. So a short training never waits for a
compiler, and a long one takes at most that much longer than if it had been compiled from the start. The moment leaves
no trace in the results: the compiled function is used only if it gave the same bits as the eager one on the arguments
that it was compiled for, as a C++ compiler does that may not fuse multiplication and addition. What cannot be compiled
stays eager. One compilation serves all layers, networks and batch sizes: the number of elements is no part of it.
"""

import logging
from collections.abc import Callable, Hashable
from functools import cache, lru_cache, partial
from time import perf_counter

import torch
from torch import Tensor

PAYS = 10.0  # seconds; loading torch's compiler takes about four, and so does a function that is not cached
FEWEST = 1024  # elements of a step; below, calls take most of the time, and torch specialises on 0 and 1
# What IEEE 754 rounds in one way, and copies: exp and pow differ in their last bit between torch and its compiler
EXACT = {
    *("add", "sub", "rsub", "mul", "div", "addcmul", "reciprocal", "neg", "abs", "maximum", "minimum", "clamp_min"),
    *("lt", "le", "ge", "gt", "where", "_to_copy", "lift_fresh_copy", "empty_like", "zeros_like", "ones_like"),
    *("select", "slice", "stack"),
}
Tensors = tuple[Tensor | None, ...]
Function = Callable[..., Tensors]


def run(function: Function, constants: tuple[Hashable, ...], tensors: Tensors, *, compiles: bool = True) -> Tensors:
    """Return function(*constants, *tensors, in_place=...) of tensors [N] or [T, N]; the first one is not None.

    in_place=False asks for the same results by functions that change no tensor, which are those that compile well.
    compiles=False: it is never compiled.
    """
    first = tensors[0]
    assert first is not None
    if not compiles or first.device.type != "cpu" or first.shape[-1] < FEWEST or type(first) is not Tensor:
        return function(*constants, *tensors, in_place=True)
    form = tuple(None if x is None else (x.shape[:-1], x.dtype) for x in tensors)
    return _kernel(function, constants, form)(tensors)


class _Kernel:
    """A function of tensors of one form, and how it runs: eagerly at first."""

    def __init__(self, function: Function) -> None:
        self._function, self._seconds = function, 0.0
        self._run: Callable[[Tensors], Tensors] = self._timed

    def __call__(self, tensors: Tensors) -> Tensors:
        return self._run(tensors)

    def _timed(self, tensors: Tensors) -> Tensors:
        started = perf_counter()
        results = self._eager(tensors)
        self._seconds += perf_counter() - started
        if self._seconds >= PAYS:
            self._run = self._compiled(tensors, results) or self._eager
        return results

    def _eager(self, tensors: Tensors) -> Tensors:
        return self._function(*tensors, in_place=True)

    def _compiled(self, tensors: Tensors, expected: Tensors) -> Callable[[Tensors], Tensors] | None:
        """The compiled function, if it can be had and computes what is expected of these tensors."""
        try:
            function = compile_function(self._function, tensors, expected)
            if function is None or all(map(_same, function(tensors), expected)):
                return function
            reason = "compiled neurons compute other values"
        except Exception as error:  # a missing or broken compiler or cache may raise any type
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        _say_once(f"neurons are not compiled, so training is slower than it could be ({reason})")
        return None


@lru_cache(maxsize=256)
def _kernel(function: Function, constants: tuple[Hashable, ...], form: tuple[Hashable, ...]) -> _Kernel:
    return _Kernel(partial(function, *constants))


def compile_function(function: Function, tensors: Tensors, results: Tensors) -> Callable[[Tensors], Tensors] | None:
    """Compile the function for tensors of this form and any N; it returns None where these results are None.

    Return None if it computes anything that torch and its compiler may round differently.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # imported here, as it loads a part of the compiler

    def on_present(*present: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(present)
        outputs = function(*(x if x is None else next(remaining) for x in tensors), in_place=False)
        return tuple(y for y in outputs if y is not None)

    def without_none(tensors: Tensors) -> list[Tensor]:
        return [x.data for x in tensors if x is not None]  # data: of a view torch would also guard the tensor behind it

    quiet_compiler()
    # traced here, since torch.compile would take floats for variables and cannot follow a surrogate's array API
    graph = make_fx(on_present)(*(x[..., :FEWEST].clone() for x in without_none(tensors)))
    if not all(
        node.target.overloadpacket.__name__ in EXACT for node in graph.graph.nodes if node.op == "call_function"
    ):
        return None
    # without processes that compile in parallel: there is one thing to compile
    fast = torch.compile(graph, dynamic=True, fullgraph=True, options={"compile_threads": 1})
    absent = [y is None for y in results]

    def run(tensors: Tensors) -> Tensors:
        with torch.autocast("cpu", enabled=False):  # else torch compiles with and without
            outputs = iter(fast(*without_none(tensors)))
        return tuple(None if none else next(outputs) for none in absent)

    return run


def quiet_compiler() -> None:
    """Suppress a warning about CUDA on machines without a GPU, which is meant for developers of torch."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@cache
def _say_once(message: str) -> None:
    logging.getLogger("mpdsgr_deploy").warning(message)
