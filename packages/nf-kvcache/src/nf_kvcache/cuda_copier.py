"""Moves pages between a CUDA device and the host. Has not been executed on a device yet."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nf_kvcache.copier import CopyThread, Download, Event, Layer


class StreamEvent:
    """A moment of a stream."""

    failed = False

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    @property
    def done(self) -> bool:
        """Whether the stream has come to it."""
        come: bool = self.event.query()
        return come

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for it; `timeout` is not kept to, as copies of a device take milliseconds."""
        self.event.synchronize()
        return True


class CudaCopier:
    """Copies on a stream of its own.

    Pages go through one contiguous buffer on each side, because a copy across the bus per page and
    layer costs more than its bytes do. A thread moves them between that buffer
    and the pages of the host.

    Args:
        device: with an index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._thread = CopyThread()
        self.download_seconds = 0.0
        self.upload_seconds = 0.0

    def download(
        self, layers: Sequence[Layer], pages: Sequence[int], targets: Sequence[np.ndarray]
    ) -> Download:
        """Copy pages to the host tier; see `Copier.download`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            index = self._put(pages)
            packed = torch.stack(
                [torch.stack([keys[index], values[index]], 1) for keys, values in layers], 1
            )
            source_read = torch.cuda.Event()
            source_read.record(self._stream)
            staging = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            staging.copy_(packed, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)

        def scatter() -> None:
            started = time.perf_counter()
            arrived.synchronize()
            for data, target in zip(_bytes_by_page(staging, len(layers)), targets, strict=True):
                target[...] = data
            self.download_seconds += time.perf_counter() - started

        return Download(StreamEvent(source_read), self._thread.submit(scatter))

    def upload(
        self, layers: Sequence[Layer], pages: Sequence[int], sources: Sequence[np.ndarray]
    ) -> Event:
        """Copy pages from the host tier; see `Copier.upload`."""
        keys, _ = layers[0]
        shape = (len(pages), len(layers), 2, *keys.shape[1:])
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

        def copy() -> None:
            started = time.perf_counter()
            with torch.cuda.stream(self._stream):
                staging = torch.empty(shape, dtype=keys.dtype, pin_memory=True)
                for data, source in zip(_bytes_by_page(staging, len(layers)), sources, strict=True):
                    data[...] = source
                packed = staging.to(self._device, non_blocking=True)
                index = self._put(pages)
                for number, (target_keys, target_values) in enumerate(layers):
                    target_keys.index_copy_(0, index, packed[:, number, 0])
                    target_values.index_copy_(0, index, packed[:, number, 1])
                self._stream.synchronize()
            self.upload_seconds += time.perf_counter() - started

        return self._thread.submit(copy)

    def duplicate(self, layers: Sequence[Layer], source: int, target: int) -> None:
        """Copy a page to another, on the current stream."""
        for keys, values in layers:
            keys[target].copy_(keys[source])
            values[target].copy_(values[source])

    def hold(self, event: Event) -> None:
        """Let the current stream wait for a moment of this copier's stream."""
        if isinstance(event, StreamEvent):
            torch.cuda.current_stream(self._device).wait_event(event.event)
        else:
            event.wait()

    def close(self) -> None:
        """Finish what was asked for and end."""
        self._thread.close()

    def _put(self, pages: Sequence[int]) -> Tensor:
        """Page numbers on the device."""
        return torch.tensor(pages, dtype=torch.int64, pin_memory=True).to(
            self._device, non_blocking=True
        )


def _bytes_by_page(staging: Tensor, num_layers: int) -> np.ndarray:
    """The bytes of a buffer [pages, layers, 2, ...], as uint8 [pages, layers, 2, bytes]."""
    data: np.ndarray = staging.view(len(staging), num_layers, 2, -1).view(torch.uint8).numpy()
    return data
