"""Bytes of tensors that are alive, counted by torch's dispatcher: the same everywhere, and on tensors without data."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOMENTS = torch.ops.aten.batch_norm_update_stats.default


class Live(TorchDispatchMode):
    """While it is entered: `now` bytes of the storages made since, and their `peak`.

    What a kernel needs for itself meanwhile is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((arguments, named)) if isinstance(t, Tensor)}
        if function is MOMENTS and arguments[0].is_meta:  # the one that torch does not know without data
            result: Any = tuple(torch.empty_like(arguments[1]) for _ in range(2))
        else:
            result = function(*arguments, **(named or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._meet(made.untyped_storage(), given)
        return result

    def _meet(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = id(storage)
        if key in self._known or key in given:  # a view of what is known, or of what was there before
            return
        size = self._known[key] = storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)
