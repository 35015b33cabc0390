"""An engine without a model that writes a replay log: real scheduler, KV cache, disk and loop."""

import random
import time
import zlib
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nf_kvcache import KVCache, KVLayout
from nf_kvcache.copier import CpuCopier
from nf_kvcache.disk import DiskTier
from nf_kvcache.fingerprint import Fingerprint
from nf_runtime import EngineConfig
from nf_runtime.iteration_output import IterationOutput
from nf_runtime.replay.recorded_loop import RecordedLoop
from nf_runtime.replay.recorder import Recorder
from nf_runtime.scheduling import make_scheduler
from nf_scheduler import Batch, IterationResult, Progress, QueueFull, Request

PAGE_SIZE = 4
LAYOUT = KVLayout(2, 1, 8, torch.float32, PAGE_SIZE)
MAX_MODEL_LEN = 96


class UnreliableCopier(CpuCopier):
    """Takes its time, and fails now and then."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(inline_bytes=0)
        self._rng = rng

    def download(self, layers: Any, pages: Any, targets: Any) -> Any:
        if self._rng.random() < 0.05:
            pages = [10**9] * len(pages)  # there is none: the copy raises
        self._delay()
        return super().download(layers, pages, targets)

    def upload(self, layers: Any, pages: Any, sources: Any) -> Any:
        if self._rng.random() < 0.1:
            pages = [10**9] * len(pages)
        self._delay()
        return super().upload(layers, pages, sources)

    def _delay(self) -> None:
        if self._rng.random() < 0.2:
            self._thread.submit(lambda: time.sleep(self._rng.random() * 0.002))


class IterationError(Exception):
    """An iteration that fails."""


class ToyRunner:
    """Samples what follows from a request and how far it is; fails when told to.

    Attributes:
        fails_next: Iterations, from the next one on, that fail when their result is asked for.
        is_broken: Whether the next iteration cannot be launched.
    """

    def __init__(self, num_layers: int) -> None:
        self.fails_next = 0
        self.is_broken = False
        self._num_layers = num_layers
        self._launched: deque[tuple[Batch, bool]] = deque()

    def launch(self, batch: Batch, page_tables: np.ndarray, offload: Any = None) -> None:
        if self.is_broken:
            self.is_broken = False
            raise IterationError
        for layer in range(self._num_layers if offload is not None else 0):
            offload.before_append(layer)
            offload.after_append(layer)
        self._launched.append((batch, self.fails_next > 0))
        self.fails_next -= self.fails_next > 0

    def poll(self) -> IterationOutput:
        batch, fails = self._launched.popleft()
        if fails:
            raise IterationError
        ends = batch.context_lens + np.diff(batch.query_start)
        tokens = [
            zlib.crc32(f"{name[:2]} {end}".encode()) % 7
            for name, end in zip(batch.request_ids, ends, strict=True)
        ]
        result = IterationResult(batch.iteration, np.array(tokens, dtype=np.int32))
        return IterationOutput(result, {}, {})

    def drain(self) -> None:
        self._launched.clear()


class RecordedToy:
    """An engine that goes through something, and the log of it.

    Args:
        directory: For logs, and for the disk tier.
        seed: Of what its copier does.
        num_pages: Of the device.
        tiers: `none`, `host` or `disk`.
        options: Fields of `EngineConfig`.
    """

    def __init__(
        self, directory: Path, seed: int, *, num_pages: int, tiers: str, **options: Any
    ) -> None:
        self.config = EngineConfig(
            model="toy",
            page_size=PAGE_SIZE,
            replay_log_dir=str(directory / "logs"),
            kv_host_bytes=None if tiers == "none" else 10 * 4096,
            kv_ssd_dir=str(directory / "disk") if tiers == "disk" else None,
            **options,
        ).on_device("cpu")
        self.recorder = Recorder(self.config)
        self.ended: dict[str, str] = {}
        self.refused = 0
        self.num_failures = 0
        rng = random.Random(seed)
        disk = None
        if tiers == "disk":
            shape = LAYOUT.num_layers, LAYOUT.num_kv_heads, LAYOUT.head_dim
            disk = self.recorder.disk(
                DiskTier(
                    directory / "disk",
                    Fingerprint("w", "float32", PAGE_SIZE, *shape, rope="none"),
                    page_bytes=LAYOUT.bytes_per_page,
                    page_size=PAGE_SIZE,
                    max_bytes=1 << 20,
                )
            )
        self.cache = KVCache(
            LAYOUT,
            num_pages,
            host_bytes=self.config.kv_host_bytes or 0,
            disk=disk,
            copier=UnreliableCopier(rng),
            watch=self.recorder.watch,
            clock=self.recorder.clock,
            restore_seconds=0.02,
        )
        self.scheduler = make_scheduler(self.config, self.cache, MAX_MODEL_LEN, self.recorder.clock)
        self.runner = ToyRunner(LAYOUT.num_layers)
        self.recorder.begin(self.config, self.cache, MAX_MODEL_LEN)
        lag = 1 if self.config.async_scheduling else 0
        self.loop = RecordedLoop(self.recorder, self.scheduler, self.cache, self.runner, lag=lag)

    @property
    def log(self) -> Path:
        """The log of this engine."""
        return max(
            Path(str(self.config.replay_log_dir)).iterdir(), key=lambda p: p.stat().st_mtime_ns
        )

    def add(self, name: str, prompt: list[int], max_tokens: int, **options: Any) -> None:
        try:
            self.loop.add(Request(name, np.array(prompt), max_tokens, **options))
        except QueueFull:
            self.refused += 1

    def step(self) -> None:
        try:
            self._note(self.loop.step()[0])
        except IterationError:
            self.num_failures += 1
            self._note(self.loop.fail())

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()
        while self.loop.sync():
            time.sleep(0.001)
        self.close()

    def close(self) -> None:
        self.recorder.close()
        self.cache.close()

    def _note(self, progress: Progress) -> None:
        self.ended |= {name: end.reason.value for name, end in progress.ends.items()}
