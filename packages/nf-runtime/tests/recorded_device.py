"""A device with graphs, on a CPU: what torch does is recorded and done again, as CUDA graphs are.

A graph knows addresses, not Python: what is read from a tensor by the host while it is recorded
cannot be, and tensors that were made meanwhile are written again where they were.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nf_runtime.device_api import InlineDevice
from nf_runtime.device_graph import DeviceGraph
from nf_runtime.device_stream import DeviceStream, InlineStream
from nf_runtime.pipeline.plan import Plan


def _needs_host(func: Any, args: Any) -> bool:
    """Whether the host has to know what is in a tensor."""
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return bool({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & {*func.tags})


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _needs_host(func, args):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class RecordedWork:
    """A graph; `launch` writes to the very tensors that were written when it was recorded."""

    def __init__(self, calls: Sequence[tuple[Any, Any, Any, Any]]) -> None:
        self.calls = calls

    def launch(self) -> None:
        """Do it again."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class GraphDevice(InlineDevice):
    """Plain torch on a CPU, with graphs, and a stream for each lane."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: list[RecordedWork] = []
        self._lanes: dict[str, DeviceStream] = {}

    def streams(self, plan: Plan) -> Sequence[DeviceStream]:
        """One for each lane."""
        lanes = [self._lanes.setdefault(name, InlineStream()) for name in plan.lane_names[1:]]
        return [self.stream, *lanes]

    def capture(self, work: Callable[[], object]) -> DeviceGraph:
        """As `DeviceApi`."""
        work()
        with _Recorder() as recorder:
            work()
        self.graphs.append(RecordedWork(recorder.calls))
        return self.graphs[-1]
