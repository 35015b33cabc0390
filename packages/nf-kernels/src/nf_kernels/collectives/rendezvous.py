"""How the ranks of a communicator find each other before they can exchange tensors."""

from __future__ import annotations

import socket
import threading
import weakref
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from nf_kernels.collectives.communicator import CommunicatorError

# Communicators at one address share the server of this process, which ends with the last of them.
_servers: weakref.WeakValueDictionary[tuple[str, int], TCPStore] = weakref.WeakValueDictionary()
_servers_lock = threading.Lock()


class Rendezvous:
    """The ranks of one communicator, all of them present, and a store of keys they share.

    Args:
        address: `host:port`, where rank 0 serves the keys, or a store of torch that all reach.
        rank: Number of this rank.
        world_size: Number of ranks.
        name: Tells this communicator from others at the same address.
        timeout: Seconds to wait for the other ranks.

    Attributes:
        store: Keys of this communicator alone.
        rank: As given.
        world_size: As given.
        timeout: As given, as torch takes it.
        host: Where rank 0 serves; None with a store.

    Raises:
        ValueError: The address is malformed, or this rank is present already.
        CommunicatorError: Rank 0 cannot serve, or a rank is missing after `timeout`.
    """

    def __init__(
        self, address: str | Store, *, rank: int, world_size: int, name: str, timeout: float
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timedelta(seconds=timeout)
        self.host: str | None = None
        self._where = f"{name!r}"
        shared: Store
        if isinstance(address, str):
            self._where += f" at {address}"
            self.host, port = _parse(address)
            # The server lives as long as this object.
            self._server = _serve(self.host, port, self.timeout) if rank == 0 else None
            shared = self._reach(self.host, port)
        else:
            shared = address
        self.store = PrefixStore(f"nf-kernels/{name}", shared)
        self.store.set_timeout(self.timeout)
        if self.store.add(f"taken/{rank}", 1) > 1:
            raise ValueError(
                f"rank {rank} of the communicator {self._where} is present already; "
                f"expected each rank once: give each process its rank, each communicator its name"
            )
        self.exchange("present", "")

    def agree(self, subject: str, opinion: bool) -> bool:
        """Whether all ranks are of the opinion; every rank must ask, each subject once."""
        return all(answer == "yes" for answer in self.exchange(subject, "yes" if opinion else "no"))

    def exchange(self, subject: str, value: str) -> list[str]:
        """The values of all ranks, in their order; every rank must call, each subject once.

        Raises:
            CommunicatorError: A rank is missing after the time-out.
        """
        keys = [f"{subject}/{rank}" for rank in range(self.world_size)]
        try:
            self.store.set(keys[self.rank], value)
            self.store.wait(keys, self.timeout)
            values = [self.store.get(key).decode() for key in keys]
            # Rank 0 may be about to give up, and the keys would be gone: it is the last to go on.
            if self.store.add(f"{subject}/read", 1) == self.world_size:
                self.store.set(f"{subject}/read by all", "")
            if self.rank == 0:
                self.store.wait([f"{subject}/read by all"], self.timeout)
        except RuntimeError as error:
            raise CommunicatorError(
                f"rank {self.rank} of {self.world_size} misses {self._missing(keys)} in "
                f"{self._where} after {self.timeout.total_seconds():g} s; start all ranks, with "
                f"the same address, name, backend and world_size"
            ) from error
        return values

    def _missing(self, keys: list[str]) -> str:
        try:
            ranks = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
        except RuntimeError:
            return "rank 0, which serves the others"
        return f"rank {', '.join(ranks)}" if ranks else "a rank that stopped or came late"

    def _reach(self, host: str, port: int) -> TCPStore:
        try:
            return TCPStore(
                host, port, is_master=False, timeout=self.timeout, wait_for_workers=False
            )
        except RuntimeError as error:
            raise CommunicatorError(
                f"rank {self.rank} of {self.world_size} does not reach rank 0 at {host}:{port} "
                f"within {self.timeout.total_seconds():g} s; start rank 0, and give all ranks an "
                f"address of it that they reach"
            ) from error


def _parse(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"address is {address!r}; expected 'host:port' of rank 0, "
            f"such as '127.0.0.1:29500' or '[::1]:29500'"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _serve(host: str, port: int, timeout: timedelta) -> TCPStore:
    with _servers_lock:
        server = _servers.get((host, port))
        if server is None:
            try:
                # Left to itself, the server listens on every interface, and anyone may use it.
                listener = socket.create_server(
                    (host, port), family=socket.getaddrinfo(host, port)[0][0]
                )
            except OSError as error:
                raise CommunicatorError(
                    f"rank 0 cannot serve at {host}:{port}: {error}; "
                    f"give an address of this machine with a free port"
                ) from error
            server = TCPStore(
                host,
                port,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
            _servers[host, port] = server
        return server
