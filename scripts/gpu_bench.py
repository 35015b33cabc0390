"""What the sections of `make gpu-check` measure with, on a CUDA device or, to rehearse, on the CPU.

Times on a device are those of CUDA events around a captured graph, so that launching does not
count; what cannot be captured is timed as it is launched, and says so. Each call of a measurement
has tensors of its own, as many as make a working set that no cache holds.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nf_kernels import lanes, ops
from nf_kernels.ops import OperationSet

_log = logging.getLogger("gpu-check")
Call = Callable[[], object]
ELEMENT = 2  # bytes of bfloat16


@dataclass(frozen=True)
class Sizes:
    """How large things are.

    Attributes:
        model: (K, N) of a layer's products, by name.
        hidden: Elements of a row.
        inner: Of a feed-forward row.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: Of each.
        vocabulary: Of the logits.
        experts: Of a mixture; experts_per_token of them for each token.
        experts_per_token: See above.
        expert_inner: Of an expert's feed-forward row.
        page_size: Tokens of a page.
        few_rows: Of a batch of decodes.
        many_rows: Of a batch with prompts.
        decodes: (requests, tokens of each) of decode attention.
        prompt: Tokens of prefill attention.
        square: Side of the product that is the roof.
        copy_bytes: Of the copy that is the other.
        cycled_bytes: Least working set.
        sm_counts: Of the share curves.
        pair_sms: First lane's SMs, of the pairs.
        lane_seconds: What two lanes are kept busy for.
    """

    model: dict[str, tuple[int, int]]
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int
    experts_per_token: int
    expert_inner: int
    page_size: int
    few_rows: tuple[int, ...]
    many_rows: int
    decodes: tuple[tuple[int, int], ...]
    prompt: int
    square: int
    copy_bytes: int
    cycled_bytes: int
    sm_counts: tuple[int, ...]
    pair_sms: tuple[int, ...]
    lane_seconds: float


LLAMA_3_8B = {
    "qkv": (4096, 6144),
    "o": (4096, 4096),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
}
_TINY = {"qkv": (64, 96), "o": (64, 64), "gate_up": (64, 128), "down": (64, 64)}


def device_sizes(sms: int, l2_bytes: int) -> Sizes:
    """Those of a device: Llama 3 8B's, and of Mixtral 8x7B for the mixture."""
    counts = (*range(8, sms, 8), sms)
    return Sizes(
        model=LLAMA_3_8B,
        hidden=4096,
        inner=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocabulary=128256,
        experts=8,
        experts_per_token=2,
        expert_inner=14336,
        page_size=16,
        few_rows=(1, 16, 64, 256),
        many_rows=2048,
        decodes=((1, 32768), (16, 4096), (64, 2048), (256, 1024)),
        prompt=4096,
        square=8192,
        copy_bytes=4 << 30,
        cycled_bytes=max(4 * l2_bytes, 256 << 20),
        sm_counts=counts,
        pair_sms=tuple(n for n in (16, 32, 48, 64, 96, 112) if n < sms),
        lane_seconds=0.02,
    )


def rehearsal_sizes(cores: int) -> Sizes:
    """Small ones that a CPU is through with at once."""
    return Sizes(
        model=_TINY,
        hidden=64,
        inner=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocabulary=256,
        experts=4,
        experts_per_token=2,
        expert_inner=32,
        page_size=16,
        few_rows=(1, 4),
        many_rows=16,
        decodes=((1, 64), (4, 32)),
        prompt=32,
        square=128,
        copy_bytes=1 << 20,
        cycled_bytes=1 << 16,
        sm_counts=tuple(range(1, cores + 1)),
        pair_sms=(1,),
        lane_seconds=0.0005,
    )


class TorchLibrary:
    """The interface of `nf_kernels.cuda.library.CudaLibrary` in torch, to rehearse with."""

    tiles = ("rehearsal_64x64", "rehearsal_128x128")

    def best_tile(self, m: int, n: int, k: int, sm_count: int = 0) -> str:
        return self.tiles[m > 8]

    def takes(
        self,
        tile: str,
        *,
        m: int,
        n: int,
        k: int,
        sm_count: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> bool:
        return True

    def workspace_bytes(
        self,
        *,
        m: int,
        n: int,
        k: int,
        tile: str | None = None,
        sm_count: int = 0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> int:
        return 16

    def gemm(
        self,
        *,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        tile: str | None = None,
        sm_count: int = 0,
        workspace: Tensor | None = None,
    ) -> None:
        ops.REFERENCE["linear"](x=x, weight=weight, out=out, bias=bias, residual=residual)

    def copy(self, src: Tensor, dst: Tensor, sm_count: int = 0) -> None:
        dst.copy_(src)


def _call_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def first_line(error: Exception) -> str:
    """What an error says first, or its type where it says nothing."""
    lines = str(error).splitlines() or [""]
    return lines[0][:300] or type(error).__name__


class Missing(Exception):
    """What a section needs is not there."""


class OutOfTime(Exception):
    """The section's time is up."""


class Bench:
    """A device, its operations and its library, and a clock that runs out.

    Attributes:
        device: Where tensors are.
        rehearsal: Whether it is the CPU in a device's place.
        sizes: See `Sizes`.
        operations: The fastest set there is.
        units: SMs, or cores.
        mechanisms: Of lanes.
    """

    def __init__(self, *, rehearse: bool, limit_s: float) -> None:
        self._deadline = time.monotonic() + limit_s
        self.rehearsal = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.operations: OperationSet = ops.load(self.device)
        torch.manual_seed(0)
        if rehearse:
            whole = lanes.partition("cpu", [1])
            self.units = len(whole[0].units)
            for lane in whole:
                lane.close()
            self.sizes = rehearsal_sizes(self.units)
            self.mechanisms: tuple[str, ...] = ("cores", "shared")
        else:
            properties = torch.cuda.get_device_properties(self.device)
            self.units = properties.multi_processor_count
            self.sizes = device_sizes(self.units, properties.L2_cache_size)
            self.mechanisms = ("green_contexts", "capped", "shared")

    def library(self) -> Any:
        """The CUTLASS library, or `Missing` with the reason."""
        if self.rehearsal:
            return TorchLibrary()
        try:
            from nf_kernels.cuda import library
        except ImportError as error:
            raise Missing(f"the CUDA library's module is not there: {error}") from None
        loaded = library.load()
        if loaded is None:
            raise Missing(f"the CUDA library is not built: {library.status().reason}")
        return loaded

    def check_time(self) -> None:
        """Raise OutOfTime when the section's time is up."""
        if time.monotonic() > self._deadline:
            raise OutOfTime

    def rows(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers in bfloat16: zeros would let a device run faster than it can."""
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16).mul_(scale)

    def copies(self, nbytes: int) -> int:
        """How many tensors of so many bytes no cache holds, at least two."""
        return max(2, min(64, math.ceil(self.sizes.cycled_bytes / max(nbytes, 1))))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(
        self, calls: Sequence[Call], *, repeats: int = 7, graph: bool = True
    ) -> tuple[float, str]:
        """Median time of a call, and how it was taken: `graph`, `eager` or `host`.

        Args:
            calls: The same work on tensors of their own.
            repeats: Rounds through all of them, after one that does not count.
            graph: False for calls that wait for the device, which cannot be captured.
        """
        self.check_time()
        if self.device.type != "cuda":
            return self._host_seconds(calls, repeats), "host"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _call_all(calls)
            stream.synchronize()
            run, how = (self._captured(calls, stream), "graph") if graph else (None, "eager")
            if run is None:
                run, how = partial(_call_all, calls), "eager"
            times = []
            for _ in range(repeats + 1):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) * 1e-3 / len(calls))
        return statistics.median(times[1:]), how

    def _captured(self, calls: Sequence[Call], stream: torch.cuda.Stream) -> Call | None:
        """The calls as a graph; None where they cannot be captured."""
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, stream=stream):
                _call_all(calls)
        except RuntimeError as error:
            _log.info("timed as launched: %s", first_line(error))
            torch.cuda.synchronize()
            return None
        return captured.replay

    def _host_seconds(self, calls: Sequence[Call], repeats: int) -> float:
        times = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            _call_all(calls)
            times.append((time.perf_counter() - started) / len(calls))
        return statistics.median(times[1:])

    @contextlib.contextmanager
    def partition(self, sizes: Sequence[int], mechanism: str) -> Iterator[list[lanes.Lane]]:
        """Lanes of so many units, of which the last takes what is left; Missing if there are none.

        Args:
            sizes: Units that each lane is to have.
            mechanism: See `lanes.partition`.
        """
        self.check_time()
        rest = self.units - sum(sizes)
        try:
            made = lanes.partition(
                self.device, [*sizes, *([rest] if rest else [])], mechanism=mechanism
            )
        except RuntimeError as error:
            raise Missing(f"no lanes by {mechanism}: {error}") from None
        try:
            yield made
        finally:
            for lane in made:
                lane.close()

    def lane_seconds(self, lane: lanes.Lane, calls: Sequence[Call]) -> float:
        """Median time of a call in a lane, alone."""
        self.check_time()
        times = []
        for _ in range(4):
            self.synchronize()
            begin = lane.record()
            with lane:
                _call_all(calls)
            end = lane.record()
            end.wait()
            times.append(end.seconds_since(begin) / len(calls))
        return max(statistics.median(times[1:]), 1e-9)

    def together(
        self, made: Sequence[lanes.Lane], calls: Sequence[Sequence[Call]]
    ) -> tuple[float, list[float]]:
        """Seconds until all lanes are through, and of each; the median of three rounds.

        Args:
            made: Lanes.
            calls: For each, what it runs from the common beginning on.
        """
        self.check_time()
        rounds = []
        for _ in range(4):
            self.synchronize()
            begin = made[0].record()
            for lane in made[1:]:
                lane.wait(begin)
            ends = []
            # In turns, so that no lane is a long launch ahead of the other.
            for turn in range(max(map(len, calls))):
                for lane, its in zip(made, calls, strict=True):
                    if turn < len(its):
                        with lane:
                            its[turn]()
            for lane in made:
                ends.append(lane.record())
            for end in ends:
                end.wait()
            each = [end.seconds_since(begin) for end in ends]
            rounds.append((max(each), each))
        rounds = sorted(rounds[1:], key=lambda measured: measured[0])
        return rounds[len(rounds) // 2]
