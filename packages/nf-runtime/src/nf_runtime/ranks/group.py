"""The other ranks, as rank 0 sees them: it starts them, tells them what to do, sees them end."""

import contextlib
import json
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from nf_kernels import num_threads, set_num_threads
from nf_kernels.collectives import Communicator, CommunicatorError, connect
from nf_runtime.config import EngineConfig
from nf_runtime.device_peaks import measure_network
from nf_runtime.errors import EngineDeadError, ModelLoadError, NanoFlowError
from nf_runtime.executor import Executor
from nf_runtime.pipeline.plan import Plan, PlanSet
from nf_runtime.ranks.frames import (
    Kind,
    pack_duplicate,
    pack_iteration,
    pack_message,
    receive,
    send,
)
from nf_scheduler import Batch

_log = logging.getLogger(__name__)

_THREADS = "OMP_NUM_THREADS"
_STOP_SECONDS = 10.0
# A collective fails as soon as a connection closes; why that closed may take a moment to be known.
_CAUSE_SECONDS = 10.0
_ROOT_CAUSE_SECONDS = 1.0


class RankGroup:
    """The processes of all ranks but rank 0, which is the caller's.

    Where one of them ends, the group has failed, and the rest of it is ended. Until `started`,
    errors are those of loading a model.

    Args:
        config: Of the engine.
        device: Kind of device that the ranks run on, `cpu` or `cuda`. On a CPU they share the
            cores, rank 0 included, until `close`; unless OMP_NUM_THREADS says how many threads.
    """

    def __init__(self, config: EngineConfig, device: str) -> None:
        self.size = config.tensor_parallel_size
        self._lost: list[tuple[bool, str]] = []  # whether because of another rank, and how
        self._change = threading.Condition()
        self._reason: str | None = None
        self._is_started = self._is_closing = False
        self._watchers: list[Callable[[str], None]] = []
        self._plans: dict[Plan, int] = {}  # those that the other ranks know, of the last policy
        self._threads = (num_threads(), torch.get_num_threads())
        environment = dict(os.environ)
        if device == "cpu" and _THREADS not in environment:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            share = max(1, cores // self.size)
            environment[_THREADS] = str(share)
            _use_threads(share, share)
        self._members: list[_Member] = []
        self._communicator: Communicator | None = None
        try:
            for rank in range(1, self.size):
                member = _Member(rank, environment, self._lose)
                self._members.append(member)
                level = logging.getLogger().getEffectiveLevel()
                values = {"engine": config.to_dict(), "rank": rank, "log_level": level}
                self._send(member, Kind.MESSAGE, pack_message({"config": values}))
        except BaseException:
            self.close()
            raise

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to all other ranks.

        Raises:
            ModelLoadError: A rank has ended.
        """
        self._broadcast(Kind.MESSAGE, pack_message(message))

    def collect(self, name: str) -> list[Any]:
        """Wait for what all other ranks say next, by rank; it goes by this name.

        Raises:
            ModelLoadError: A rank has ended instead.
        """
        said = []
        for member in self._members:
            message = member.messages.get()
            if message is None:
                raise self.failure()
            said.append(message[name])
        return said

    def connect(self, device: torch.device, *, num_pages: int, max_model_len: int) -> Communicator:
        """Let all ranks make their KV cache and connect; gives the communicator of rank 0.

        `close` closes it.

        Raises:
            ModelLoadError: A rank has ended instead.
        """
        address = f"127.0.0.1:{_free_port()}"
        start = {"num_pages": num_pages, "max_model_len": max_model_len, "address": address}
        self.tell({"start": start})
        results: queue.SimpleQueue[Communicator | Exception] = queue.SimpleQueue()

        def run() -> None:
            try:
                results.put(connect(device=device, rank=0, world_size=self.size, address=address))
            except Exception as error:
                results.put(error)

        # A rank that ends meanwhile would be missed for minutes only.
        thread = threading.Thread(target=run, daemon=True, name="nf-connect")
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            self.check()
        result = results.get()
        if isinstance(result, Exception):
            raise self.failure(result) from result
        self._communicator = result
        return result

    def started(self) -> None:
        """Say that the engine has started: what happens from here on ends an engine."""
        self._is_started = True

    def watch(self, watcher: Callable[[str], None]) -> None:
        """Have a function called, on another thread, when a rank ends, with the reason."""
        with self._change:
            self._watchers.append(watcher)
            is_late = bool(self._lost)
        if is_late:
            watcher(str(self.failure()))

    def set_policy(self, plan_set: PlanSet | None) -> None:
        """Let the other ranks forget all plans, and have the lanes of others; what runs goes on.

        Args:
            plan_set: Those that will be run by, which rank 0 has found to fit; None is the
                sequential plan.

        Raises:
            EngineDeadError: A rank has ended.
        """
        self._plans.clear()
        body = "null" if plan_set is None else plan_set.model_dump_json()
        self._broadcast(Kind.POLICY, body.encode())

    def launch(
        self, batch: Batch, page_tables: np.ndarray, prompt_rows: np.ndarray, plan: Plan
    ) -> None:
        """Start an iteration on the other ranks; as `Executor.before_launch`.

        Raises:
            EngineDeadError: A rank has ended.
        """
        number = self._plans.get(plan)
        if number is None:
            number = self._plans[plan] = len(self._plans)
            self._broadcast(Kind.PLAN, plan.model_dump_json().encode())
        self._broadcast(Kind.ITERATION, pack_iteration(batch, page_tables, prompt_rows, number))

    def duplicate(self, source: int, target: int) -> None:
        """Copy a page of KV to another on the other ranks, behind what was launched there.

        Raises:
            EngineDeadError: A rank has ended.
        """
        self._broadcast(Kind.DUPLICATE, pack_duplicate(source, target))

    def measure_network(self, executor: Executor) -> float:
        """As `device_peaks.measure_network`, behind what was launched.

        Args:
            executor: Of rank 0.

        Raises:
            EngineDeadError: A rank has ended.
        """
        if self._communicator is None:
            raise RuntimeError("the ranks are not connected; call connect first")
        self._broadcast(Kind.NETWORK, b"")
        try:
            return executor.measure(partial(measure_network, communicator=self._communicator))
        except Exception as error:
            raise self.failure(error) from error
        except BaseException as error:  # an interrupt: the other ranks wait in a sum
            self.failure(error)
            raise

    def check(self) -> None:
        """Raise `failure` if a rank has ended."""
        if self._lost or self._reason is not None:
            raise self.failure()

    def failure(self, cause: BaseException | None = None) -> NanoFlowError:
        """End all ranks; gives the error that says which has ended first, and how.

        Args:
            cause: What rank 0 has seen of it: it may have failed by itself.
        """
        with self._change:
            if self._reason is None:
                self._reason = self._describe(cause)
        for member in self._members:
            member.process.kill()
        return (EngineDeadError if self._is_started else ModelLoadError)(self._reason)

    def close(self) -> None:
        """Have the other ranks do what they were told, and end; those that take long are killed."""
        with self._change:
            self._is_closing = True
            has_failed = self._reason is not None
        deadline = time.monotonic() + _STOP_SECONDS
        all_stopped = not has_failed  # else all have been killed
        try:
            if not has_failed:
                for member in self._members:
                    member.stop()
                for member in self._members:
                    all_stopped &= member.wait_stopped(deadline)
            if self._communicator is not None:
                if all_stopped:
                    self._communicator.close()
                else:
                    self._communicator.abort()
        finally:
            for member in self._members:
                status = member.end(deadline)
                if status and not has_failed:
                    _log.warning("rank %d of %d %s", member.rank, self.size, member.how_it_ended)
            self._members.clear()
            _use_threads(*self._threads)

    def _describe(self, cause: BaseException | None) -> str:
        """Which rank has ended, and how; waits until that is known."""
        if cause is None or isinstance(cause, CommunicatorError):
            self._change.wait_for(lambda: bool(self._lost), _CAUSE_SECONDS)
        if self._lost:
            # Ranks end because one has; the first to be seen need not be that one.
            self._change.wait_for(
                lambda: any(not by_peer for by_peer, _ in self._lost), _ROOT_CAUSE_SECONDS
            )
            return min(self._lost)[1]
        return f"rank 0 of {self.size} failed: {type(cause).__name__}: {cause}"

    def _lose(self, rank: int, how: str, by_peer: bool) -> None:
        """A rank has ended; called by the thread that reads what it says."""
        with self._change:
            if self._is_closing or self._reason is not None:
                return
            self._lost.append((by_peer, f"rank {rank} of {self.size} {how}"))
            self._change.notify_all()
            watchers = list(self._watchers)
        reason = str(self.failure())
        for watcher in watchers:
            watcher(reason)

    def _broadcast(self, kind: Kind, body: bytes) -> None:
        self.check()
        for member in self._members:
            self._send(member, kind, body)

    def _send(self, member: "_Member", kind: Kind, body: bytes) -> None:
        try:
            send(member.connection, kind, body)
        except OSError as error:
            raise self.failure() from error


class _Member:
    """The process of a rank, our end of its socket, and the thread that reads it.

    Attributes:
        rank: Its number.
        process: Its process.
        messages: What it has said; None at its end.
        how_it_ended: Once it has.
    """

    def __init__(
        self, rank: int, environment: dict[str, str], lose: Callable[[int, str, bool], None]
    ) -> None:
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",  # not from the current directory, which may hold anybody's files
                    "-m",
                    "nf_runtime.ranks.process",
                    str(theirs.fileno()),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environment,
            )
        self.messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.rank = rank
        self.how_it_ended = ""
        self._lose = lose
        self._reader = threading.Thread(target=self._read, daemon=True, name=f"nf-rank-{rank}")
        self._reader.start()

    def stop(self) -> None:
        """Ask it to end; one that has ended does not mind."""
        with contextlib.suppress(OSError):
            send(self.connection, Kind.STOP, b"")

    def wait_stopped(self, deadline: float) -> bool:
        """Wait until it has done all it was told, or has ended; kill it if it takes long.

        Args:
            deadline: When that is, by `time.monotonic`.

        Returns:
            Whether it has done all.
        """
        while True:
            try:
                message = self.messages.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.process.kill()
                return False
            if message is None or "stopped" in message:
                return message is not None

    def end(self, deadline: float) -> int:
        """Wait until everything of it has ended, and kill it if it takes long.

        Args:
            deadline: When that is, by `time.monotonic`.

        Returns:
            The exit status; negative is the number of a signal.
        """
        try:
            status = self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._reader.join()
        self.connection.close()
        return status

    def _read(self) -> None:
        failed: dict[str, Any] | None = None
        with self.connection.makefile("rb") as stream:
            while (frame := receive(stream)) is not None:
                message = json.loads(frame[1])
                if "failed" in message:
                    failed = message["failed"]
                else:
                    self.messages.put(message)
        status = self.process.wait()
        how = _how_it_ended(status) if failed is None else f"failed: {failed['message']}"
        self.how_it_ended = how
        self._lose(self.rank, how, failed is not None and failed["by_peer"])
        self.messages.put(None)


def _how_it_ended(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _use_threads(native: int, torch_threads: int) -> None:
    """Let operations of this process run on so many threads."""
    set_num_threads(native)
    torch.set_num_threads(torch_threads)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
