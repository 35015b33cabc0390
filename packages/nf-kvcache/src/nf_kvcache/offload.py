"""Pages on their way down to the host."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from nf_kvcache.copier import Copier, Event, Layer
from nf_kvcache.host_tier import HostTier
from nf_kvcache.prefix_match import Tail


class LayerOrder:
    """For every layer, the last copy that reads its pages on the device.

    Whoever is about to write to the pages of a layer holds for it: a page that was given to
    somebody else may still be on its way to the host. The thread that writes to layers may be
    another one than that which orders other copies.
    """

    def __init__(self, copier: Copier, num_layers: int) -> None:
        self._copier = copier
        self._lock = threading.Lock()
        self._last: list[Event | None] = [None] * num_layers

    def read_by(self, event: Event, layer: int | None = None) -> None:
        """Say that a copy reads pages of one layer, or of all, until `event`."""
        with self._lock:
            for number in range(len(self._last)) if layer is None else (layer,):
                self._last[number] = event

    def hold(self, layer: int) -> None:
        """Let the computation wait until the pages of a layer may be written to."""
        with self._lock:
            event = self._last[layer]
        if event is not None:
            self._copier.hold(event)
            with self._lock:  # by now there may be another copy to hold for
                if self._last[layer] is event:
                    self._last[layer] = None


class IterationOffload:
    """The pages that an iteration fills: each layer's part is copied as soon as it is complete.

    The owner calls `before_append` and `after_append` around what writes K and V of a layer, on the
    thread that orders the computation, and `abandon` if the iteration fails. That thread may be
    another one than that of the cache.

    Args:
        layers: of the device.
        pages: of the device, which become full.
        targets: pages of the host for them.

    Attributes:
        num_recorded: layers whose copy was ordered.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        pages: list[int],
        targets: list[int],
        *,
        host: HostTier,
        copier: Copier,
        order: LayerOrder,
    ) -> None:
        self.num_recorded = 0
        self._layers = layers
        self._pages = pages
        self._targets = targets
        self._host = host
        self._copier = copier
        self._order = order
        self._events: list[Event] = []
        self._abandoned = False

    def before_append(self, layer: int) -> None:
        """K and V of a layer are about to be written."""
        self._order.hold(layer)

    def after_append(self, layer: int) -> None:
        """K and V of a layer were written for all tokens of the iteration."""
        if self._pages:
            part = slice(layer, layer + 1)
            download = self._copier.download(
                self._layers[part],
                self._pages,
                [self._host.page(page, part) for page in self._targets],
            )
            self._order.read_by(download.source_read, layer)
            self._events.append(download.done)
        self.num_recorded += 1  # the last step: another thread may ask whether all is done

    def abandon(self) -> None:
        """The iteration has failed: what was copied is of no use."""
        self._abandoned = True

    @property
    def done(self) -> bool:
        """Whether no copy is under way any more, and none will be."""
        if not self._abandoned and self.num_recorded < len(self._layers):
            return False
        return not self._events or self._events[-1].done

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the copies that were ordered."""
        return not self._events or self._events[-1].wait(timeout)

    @property
    def failed(self) -> bool:
        """Whether the pages of the host are incomplete; to be asked when it is done."""
        return self._abandoned or any(event.failed for event in self._events)


@dataclass(slots=True)
class HostArrival:
    """A page of the host that is being filled.

    Attributes:
        copy: what fills it.
        page: of the host.
        node: place in the index; 0 until it is known, or if nobody wants it any more.
        salt: of the root of `node`.
        tail: a preempted sequence and what is kept of it, if the page is for that.
    """

    copy: Event
    page: int
    node: int = 0
    salt: bytes = b""
    tail: tuple[str, Tail] | None = None
