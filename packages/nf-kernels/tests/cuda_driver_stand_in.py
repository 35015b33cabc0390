"""What lanes call of the CUDA driver and of torch.cuda, with the rules of the real ones."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace


@dataclass(eq=False)
class Resource:
    sms: frozenset[int]
    split: int | None  # the call that made it

    @property
    def sm(self):
        return SimpleNamespace(smCount=len(self.sms))


@dataclass(eq=False)
class Context:
    sms: frozenset[int]
    streams: set[int] = field(default_factory=set)
    alive: bool = True


class Driver:
    """The functions of `cuda.bindings.driver` that lanes call."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    GRANULARITY = 8

    def __init__(self, layout: list[int]) -> None:
        numbers = itertools.count()
        self.clusters = [[next(numbers) for _ in range(size)] for size in layout]
        self.contexts: list[Context] = []
        self.of_stream: dict[int, Context] = {}
        self.splits = itertools.count()
        self.handles = itertools.count(1000)

    def cuGetErrorName(self, error):
        names = {1: b"CUDA_ERROR_INVALID_VALUE", 915: b"CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"}
        return 0, names[error]

    def cuDeviceGet(self, ordinal):
        return 0, f"device {ordinal}"

    def cuDeviceGetDevResource(self, device, kind):
        assert (device, kind) == ("device 0", 1)
        return 0, Resource(frozenset(itertools.chain(*self.clusters)), None)

    def cuDevSmResourceSplitByCount(self, count, resource, flags, min_count):
        if resource.split is not None or flags or not 0 <= min_count <= len(resource.sms):
            return 1, None, None, None
        size = -(-max(min_count, 1) // self.GRANULARITY) * self.GRANULARITY
        # A group does not cross a cluster's border in pieces smaller than the granularity.
        pieces = [
            cluster[start : start + self.GRANULARITY]
            for cluster in self.clusters
            for start in range(0, len(cluster) - self.GRANULARITY + 1, self.GRANULARITY)
        ]
        each = size // self.GRANULARITY
        made = min(count, len(pieces) // each)
        if not made:
            return 915, None, None, None
        split = next(self.splits)
        groups = [
            Resource(frozenset(itertools.chain(*pieces[i * each : (i + 1) * each])), split)
            for i in range(made)
        ]
        left = resource.sms.difference(*(group.sms for group in groups))
        unused = [Resource(frozenset(), None) for _ in range(count - made)]
        return 0, groups + unused, made, Resource(left, split)

    def cuDevResourceGenerateDesc(self, resources, count):
        if count != len(resources) or not all(resource.sms for resource in resources):
            return 1, None
        splits = {resource.split for resource in resources}
        if len(splits) > 1 or None in splits:
            return 915, None
        return 0, frozenset(itertools.chain(*(resource.sms for resource in resources)))

    def cuGreenCtxCreate(self, description, device, flags):
        if flags != 1:
            return 1, None
        self.contexts.append(Context(description))
        return 0, self.contexts[-1]

    def cuGreenCtxStreamCreate(self, context, flags, priority):
        if flags != 1 or not context.alive:
            return 1, None
        handle = next(self.handles)
        context.streams.add(handle)
        self.of_stream[handle] = context
        return 0, handle

    def cuStreamDestroy(self, handle):
        context = self.of_stream.pop(handle)
        assert context.alive, "the context was destroyed before its stream"
        context.streams.remove(handle)
        return (0,)

    def cuGreenCtxDestroy(self, context):
        assert not context.streams, "the context was destroyed before its streams"
        context.alive = False
        return (0,)


class Stream:
    """A torch stream that notes what is asked of it."""

    def __init__(self, handle=0, device=0, priority=0) -> None:
        self.cuda_stream, self.priority = handle, priority
        self.log: list[tuple[str, object]] = []
        self.is_capturing = False

    @staticmethod
    def priority_range():
        return 0, -5

    def wait_stream(self, other):
        self.log.append(("wait", other))

    def wait_event(self, event):
        self.log.append(("wait", event))

    def synchronize(self):
        self.log.append(("synchronize", None))


class TorchEvent:
    now = itertools.count()

    def __init__(self, enable_timing) -> None:
        assert enable_timing
        self.time = None
        self.over = False

    def record(self, stream):
        self.time = next(TorchEvent.now)
        stream.log.append(("record", self))

    def query(self):
        return self.over

    def synchronize(self):
        self.over = True

    def elapsed_time(self, later):
        return 1000.0 * (later.time - self.time)  # milliseconds
