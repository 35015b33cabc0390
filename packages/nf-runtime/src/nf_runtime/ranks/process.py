"""The process of a rank besides rank 0: `python -m nf_runtime.ranks.process FD`.

FD is one end of a socket pair. The process ends when the other end closes, so it never outlives
rank 0, however that died.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nf_runtime.config import EngineConfig
from nf_runtime.errors import NanoFlowError
from nf_runtime.ranks.frames import (
    Kind,
    pack_message,
    receive,
    send,
    unpack_duplicate,
    unpack_iteration,
)


class RankProcess:
    """Loads a part of a model and runs what it is told.

    One thread reads the socket, so that the end of rank 0 is seen whatever else goes on. Another
    waits for the iterations that were launched, so that one that fails ends the process at once:
    the other ranks, which wait for it in a collective, learn of it by their connections.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames: queue.SimpleQueue[tuple[Kind, bytes]] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[bool | threading.Event] = queue.SimpleQueue()
        # For each iteration True, at the end False; an event is set when it is come to.
        self._is_serving = False
        threading.Thread(target=self._read, daemon=True).start()

    def run(self) -> int:
        """Load, then run until told to stop; gives the exit status."""
        try:
            self._serve()
        except Exception as error:
            self._fail(error)
        return 0

    def _serve(self) -> None:
        first = self._message("config")
        rank = first["rank"]
        with contextlib.suppress(OSError):  # where processes have no such file
            Path("/proc/self/comm").write_text(f"nanoflow-rank-{rank}", encoding="utf-8")
        logging.basicConfig(
            level=first["log_level"], format=f"%(levelname)s %(name)s (rank {rank}): %(message)s"
        )
        config = EngineConfig(**first["engine"])
        # Late: torch takes its time, and the reader should be there before.
        from pydantic import TypeAdapter

        from nf_kernels.collectives import connect
        from nf_kvcache.copier import make_copier
        from nf_runtime.device_peaks import measure_network
        from nf_runtime.loaded_model import load_model
        from nf_runtime.pipeline.plan import Plan, PlanSet
        from nf_runtime.pipeline.policy import Choice, OverlapPolicy, Reason
        from nf_runtime.ranks.following_sampler import FollowingSampler

        loaded = load_model(config, rank)
        self._send({"loaded": loaded.weights.num_bytes})
        plan_sets = TypeAdapter(PlanSet | None)
        policy = OverlapPolicy(loaded.graph, plan_sets.validate_python(self._message("size")))
        self._send({"sized": asdict(loaded.plan_memory(policy))})
        start = self._message("start")
        communicator = connect(
            device=loaded.device,
            rank=rank,
            world_size=config.tensor_parallel_size,
            address=start["address"],
        )
        copier = make_copier(loaded.device)
        kv_cache = loaded.make_kv_cache(start["num_pages"], copier=copier)
        sampler = FollowingSampler(loaded.device)
        executor = loaded.make_executor(
            kv_cache.layers,
            sampler,
            start["max_model_len"],
            communicator=communicator,
            policy=policy,
        )
        waiter = threading.Thread(target=self._wait_for_iterations, args=(executor,), daemon=True)
        waiter.start()
        self._is_serving = True
        self._send({"ready": True})
        choices: list[Choice] = []
        while True:
            kind, body = self._frames.get()
            if kind is Kind.ITERATION:
                batch, page_tables, sampler.prompt_rows, number = unpack_iteration(body)
                executor.launch(batch, page_tables, choice=choices[number])
                self._launched.put(True)
            elif kind is Kind.POLICY:
                policy = OverlapPolicy(loaded.graph, plan_sets.validate_json(body))
                executor.set_policy(policy)
                choices.clear()
            elif kind is Kind.PLAN:
                plan = Plan.model_validate_json(body)
                choices.append(Choice(plan, Reason.PLANNED))
            elif kind is Kind.DUPLICATE:
                pages = unpack_duplicate(body)
                executor.call(partial(copier.duplicate, kv_cache.layers, *pages))
            elif kind is Kind.NETWORK:
                polled = threading.Event()  # all that was launched
                self._launched.put(polled)
                polled.wait()
                executor.measure(partial(measure_network, communicator=communicator))
            else:  # what is left is to stop
                break
        self._launched.put(False)
        waiter.join()
        executor.close()
        # Rank 0 leaves the group as well then: NCCL lets no rank leave alone.
        self._send({"stopped": True})
        communicator.close()
        kv_cache.close()

    def _wait_for_iterations(self, executor: Any) -> None:
        try:
            while launched := self._launched.get():
                if isinstance(launched, threading.Event):
                    launched.set()
                else:
                    executor.poll()
        except Exception as error:
            self._fail(error)

    def _read(self) -> None:
        with self._connection.makefile("rb") as stream:
            while (frame := receive(stream)) is not None:
                if frame[0] is Kind.STOP and not self._is_serving:
                    os._exit(0)  # in the middle of loading: there is nothing to end
                self._frames.put(frame)
        os._exit(1)  # rank 0 is gone: there is nobody to clean up for

    def _message(self, name: str) -> Any:
        """What rank 0 says next, which goes by this name."""
        _, body = self._frames.get()
        return json.loads(body)[name]

    def _send(self, message: dict[str, Any]) -> None:
        send(self._connection, Kind.MESSAGE, pack_message(message))

    def _fail(self, error: Exception) -> None:
        """Say why, and end, whatever other threads do."""
        from nf_kernels.collectives import CommunicatorError

        # That another rank has ended is for that one to explain.
        by_peer = isinstance(error, CommunicatorError)
        expected = isinstance(error, NanoFlowError)
        if not by_peer and not expected:
            traceback.print_exception(error)
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        try:
            self._send({"failed": {"message": message, "by_peer": by_peer}})
        finally:
            os._exit(1)


def main() -> int:
    """Run on the socket whose number is the first argument."""
    # Ctrl-C reaches every process of the terminal; rank 0 decides what becomes of the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return RankProcess(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    sys.exit(main())
