"""Sees what on a GPU would make the host wait for the device, though on a CPU nobody feels it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}
"""Operators that hand a value, or a shape that depends on values, to the host."""

COPIES = {"tolist", "numpy", "cpu", "__array__"}
"""Methods of tensors that copy to the host, which dispatch does not see on a CPU."""

COLLECTIVES = (
    "all_gather all_gather_into_tensor all_gather_object all_reduce barrier broadcast broadcast_object_list gather "
    "gather_object monitored_barrier reduce reduce_scatter reduce_scatter_tensor scatter send recv"
).split()


class Watch:
    """Inside, notes everything that waits, with the place in our code that asked for it.

    What is asked for inside DeepSpeed is exempt where `exempt` names the function; its collectives always are.

    Args:
        exempt: Names of functions, as `deepspeed/runtime/utils.py:function`.

    Attributes:
        found: `what at file:line (function)` of everything that is not exempt.
        met: Names of exempt functions that asked for something.
    """

    def __init__(self, exempt: set[str] = frozenset()):
        self.found: list[str] = []
        self.met: set[str] = set()
        self._exempt = exempt
        self._modes: list = []
        self._originals: dict = {}

    def __enter__(self) -> Watch:
        self._modes = [_Functions(self), _Operators(self)]
        for mode in self._modes:
            mode.__enter__()
        self._originals = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, function in self._originals.items():
            setattr(dist, name, self._noted(name, function))
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        for name, function in self._originals.items():
            setattr(dist, name, function)

    def _noted(self, name: str, function):
        def call(*args, **kwargs):
            self.note(name, collective=True)
            return function(*args, **kwargs)

        return call

    def note(self, what: str, collective: bool = False) -> None:
        """Something waits; find out who asked."""
        frame = sys._getframe(1)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if not _is_plumbing(file) and frame.f_code.co_name != "__torch_function__":
                place = _short(file)
                name = f"{place}:{frame.f_code.co_name}"
                if name in self._exempt:
                    self.met.add(name)
                elif not (collective and "deepspeed" in file.parts):
                    self.found.append(f"{what} at {place}:{frame.f_lineno} ({frame.f_code.co_name})")
                return
            frame = frame.f_back
        self.found.append(f"{what} at an unknown place")


def _short(file: Path) -> str:
    """Its path below the repository or the installed packages."""
    root = next((root for root in file.parents if root.name == "site-packages" or (root / ".git").exists()), None)
    return (file.relative_to(root) if root else file).as_posix()


def _is_plumbing(file: Path) -> bool:
    return "torch" in file.parts or file == Path(__file__) or file.name in ("contextlib.py", "_decorators.py")


class _Functions(TorchFunctionMode):
    def __init__(self, watch: Watch):
        super().__init__()
        self._watch = watch

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if getattr(function, "__name__", "") in COPIES:
            self._watch.note(function.__name__)
        return function(*arguments, **(keywords or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, watch: Watch):
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name in READS or _is_masked(name, arguments):
            self._watch.note(name)
        if name == "lift_fresh":
            self._watch.note("a tensor of host values")
        if name == "repeat_interleave" and (keywords or {}).get("output_size") is None:
            self._watch.note(name)
        return function(*arguments, **(keywords or {}))


def _is_masked(name: str, arguments: tuple) -> bool:
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])
