"""Compile elementwise functions for a CPU by torch's inductor, which needs a C++ compiler, once this pays.

A function runs eagerly until its total run time reaches PAYS, about the cost of compiling it. So a short training never
waits for a compiler, and a long one takes at most that much longer than if it had been compiled from the start.

Compiling does not change results: the compiled function is used only if it gives the same bits as the eager one on the
arguments that it was compiled for, as it does if the C++ compiler may not fuse multiplication and addition. Functions
that cannot be compiled stay eager. One compilation serves all layers, networks and batch sizes, because it does not
depend on the number of elements.
"""

import logging
from collections.abc import Callable, Hashable
from functools import cache, lru_cache, partial
from time import perf_counter

import torch
from torch import Tensor

PAYS = 10.0  # seconds; loading torch's compiler takes about four, and compiling an uncached function four more
FEWEST = 1024  # elements of a step; with fewer, calls take most of the time, and torch specialises on 0 and 1
# Copies, and operations whose rounding IEEE 754 defines; the last bit of exp and pow differs when they are compiled
EXACT = {
    *("add", "sub", "rsub", "mul", "div", "addcmul", "reciprocal", "neg", "abs", "maximum", "minimum", "clamp_min"),
    *("lt", "le", "ge", "gt", "where", "_to_copy", "lift_fresh_copy", "empty_like", "zeros_like", "ones_like"),
    *("select", "slice", "stack"),
}
Tensors = tuple[Tensor | None, ...]
Results = tuple[Tensor, ...]
Function = Callable[..., Results]


def run(function: Function, constants: tuple[Hashable, ...], tensors: Tensors, *, compiles: bool = True) -> Results:
    """Return function(*constants, *tensors, in_place=...) for tensors [N] or [T, N]; the first tensor is not None.

    The function must give the same results with in_place=False, without changing any tensor; that form is compiled.
    compiles: False to run it eagerly in any case.
    """
    first = tensors[0]
    assert first is not None
    if not compiles or first.device.type != "cpu" or first.shape[-1] < FEWEST or type(first) is not Tensor:
        return function(*constants, *tensors, in_place=True)
    form = tuple(None if x is None else (x.shape[:-1], x.dtype) for x in tensors)
    return _kernel(function, constants, form)(tensors)


class _Kernel:
    """A function for tensors of one form (step shapes and types), which runs eagerly until it is compiled."""

    def __init__(self, function: Function) -> None:
        self._function, self._seconds = function, 0.0
        self._run: Callable[[Tensors], Results] = self._timed

    def __call__(self, tensors: Tensors) -> Results:
        return self._run(tensors)

    def _timed(self, tensors: Tensors) -> Results:
        started = perf_counter()
        results = self._eager(tensors)
        self._seconds += perf_counter() - started
        if self._seconds >= PAYS:
            self._run = self._compiled(tensors, results) or self._eager
        return results

    def _eager(self, tensors: Tensors) -> Results:
        return self._function(*tensors, in_place=True)

    def _compiled(self, tensors: Tensors, expected: Results) -> Callable[[Tensors], Results] | None:
        """Return the compiled function; None if this fails or its results for `tensors` are not `expected`."""
        try:
            function = compile_function(self._function, tensors)
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


def compile_function(function: Function, tensors: Tensors) -> Callable[[Tensors], Results] | None:
    """Compile a function for tensors of the form of `tensors` and any N.

    Returns None if it has an operation that torch and its compiler may round differently.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # only here, because it loads a part of the compiler

    def on_present(*present: Tensor) -> Results:
        remaining = iter(present)
        return function(*(x if x is None else next(remaining) for x in tensors), in_place=False)

    def without_none(tensors: Tensors) -> list[Tensor]:
        return [x.data for x in tensors if x is not None]  # data: for a view, torch would also guard its base tensor

    quiet_compiler()
    # traced by make_fx, because torch.compile treats floats as variables and cannot trace a surrogate's array API
    graph = make_fx(on_present)(*(x[..., :FEWEST].clone() for x in without_none(tensors)))
    if not all(
        node.target.overloadpacket.__name__ in EXACT for node in graph.graph.nodes if node.op == "call_function"
    ):
        return None
    # one thread, because there is only one function to compile
    fast = torch.compile(graph, dynamic=True, fullgraph=True, options={"compile_threads": 1})

    def run(tensors: Tensors) -> Results:
        with torch.autocast("cpu", enabled=False):  # otherwise torch compiles once with and once without autocast
            return tuple(fast(*without_none(tensors)))

    return run


def quiet_compiler() -> None:
    """Suppress a warning about CUDA on machines without a GPU, which is meant for developers of torch."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@cache
def _say_once(message: str) -> None:
    logging.getLogger("mpdsgr_deploy").warning(message)
