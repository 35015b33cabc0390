"""The process that an `AsyncEngine` runs its engine in: `python -m nf_runtime.engine_process FD`.

FD is one end of a socket pair. The process ends when the other end closes, so it never outlives
its parent, however that died.
"""

import contextlib
import gc
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict
from typing import Any, Protocol

from nf_runtime.config import EngineConfig
from nf_runtime.engine_types import EngineStats, TokenOutput
from nf_runtime.errors import EngineDeadError, NanoFlowError
from nf_runtime.messages import HEADER, output_to_json, pack, request_from_json, stats_to_json
from nf_scheduler import QueueFull

_SETTLE_SECONDS = 0.02  # how often KV that is on its way is looked after between requests


class EngineProcess:
    """Runs the engine loop; a thread reads the socket, another writes it.

    The loop itself touches no socket, so that a slow reader on the other side never holds it up.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._outgoing: queue.SimpleQueue[dict[str, Any] | _Later | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, daemon=True)
        threading.Thread(target=self._read, daemon=True).start()
        self._writer.start()

    def run(self) -> int:
        """Load, then serve until told to stop; gives the exit status."""
        try:
            return self._serve()
        except NanoFlowError as error:
            self._fail(str(error), expected=True)
        except Exception as error:
            traceback.print_exc()
            self._fail(f"{type(error).__name__}: {error}", expected=False)
        return 1

    def _serve(self) -> int:
        config = EngineConfig(**self._commands.get()["config"])
        started = time.monotonic()
        from nf_runtime.engine import Engine  # torch, which takes its time, counts as a phase

        imported = time.monotonic() - started
        engine = Engine(config)
        # Also while there is nothing to do.
        engine.watch_ranks(lambda reason: self._commands.put({"rank_ended": reason}))
        info = asdict(engine.info)
        info["startup_seconds"] = {"import": imported} | info["startup_seconds"]
        # What is loaded stays: looking through it at every collection would stop the loop.
        gc.collect()
        gc.freeze()
        # With stats, because an SSD tier may hold pages by now.
        self._outgoing.put({"ready": info, "stats": stats_to_json(engine.stats)})
        while True:
            while not engine.has_work or not self._commands.empty():
                command = self._next_command(engine)
                if "add" in command:
                    self._add(engine, command["add"])
                elif "abort" in command:
                    engine.abort(command["abort"])
                elif "rank_ended" in command:
                    raise EngineDeadError(command["rank_ended"])
                elif "ask" in command:
                    self._answer(engine, command["ask"])
                else:
                    engine.close()
                    self._finish()
                    return 0
            outputs = engine.step()
            self._outgoing.put(_Iteration(outputs, engine.stats))

    def _next_command(self, engine: Any) -> dict[str, Any]:
        """Wait for a command; while there is nothing to do, KV goes on to the lower tiers."""
        if not engine.has_work:
            while engine.settle():
                with contextlib.suppress(queue.Empty):
                    return self._commands.get(timeout=_SETTLE_SECONDS)
                self._outgoing.put(_Iteration([], engine.stats))
        return self._commands.get()

    def _add(self, engine: Any, value: dict[str, Any]) -> None:
        try:
            engine.add(request_from_json(value))
        except (ValueError, QueueFull) as error:
            refused = {
                "request_id": value["request_id"],
                "message": str(error),
                "overloaded": isinstance(error, QueueFull),
            }
            self._outgoing.put({"refused": refused})

    def _answer(self, engine: Any, question: dict[str, Any]) -> None:
        """Do what was asked between two iterations, and tell what came of it."""
        number = question["number"]
        try:
            if "overlap" in question:
                engine.set_overlap(question["overlap"])
                self._outgoing.put({"answer": {"number": number, "value": None}})
            else:
                self._outgoing.put(_TimelineAnswer(number, engine))
        except NanoFlowError as error:
            self._outgoing.put({"answer": {"number": number, "error": str(error)}})

    def _fail(self, message: str, *, expected: bool) -> None:
        self._outgoing.put({"failed": {"message": message, "expected": expected}})
        self._finish()

    def _finish(self) -> None:
        """Write what is queued, then end the writer."""
        self._outgoing.put(None)
        self._writer.join()

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as stream:
                while len(header := stream.read(HEADER.size)) == HEADER.size:
                    body = stream.read(*HEADER.unpack(header))
                    self._commands.put(json.loads(body))
        except Exception:
            traceback.print_exc()
        finally:
            # The parent is gone, if in the middle of a message: there is nobody to clean up for.
            os._exit(1)

    def _write(self) -> None:
        try:
            while (item := self._outgoing.get()) is not None:
                message = item if isinstance(item, dict) else item.to_json()
                self._connection.sendall(pack(message))
        except OSError:  # the parent is gone
            os._exit(1)
        except Exception:  # without a writer the loop would compute for nobody
            traceback.print_exc()
            os._exit(1)


class _Later(Protocol):
    """A message that is made by the writer, so that the loop goes on meanwhile."""

    def to_json(self) -> dict[str, Any]:
        """The message."""


class _TimelineAnswer:
    """The iterations that were timed, as a trace, which takes a while to make."""

    def __init__(self, number: int, engine: Any) -> None:
        self._number = number
        self._traces = engine.executor.timeline.traces
        self._utilisation = engine.utilisation()

    def to_json(self) -> dict[str, Any]:
        from nf_runtime.chrome_trace import chrome_trace

        trace = chrome_trace(self._traces, self._utilisation)
        return {"answer": {"number": self._number, "value": trace}}


class _Iteration:
    """What one iteration gave; turned into JSON by the writer, beside the next iteration."""

    def __init__(self, outputs: list[TokenOutput], stats: EngineStats) -> None:
        self.outputs = outputs
        self.stats = stats

    def to_json(self) -> dict[str, Any]:
        return {
            "outputs": [output_to_json(output) for output in self.outputs],
            "stats": stats_to_json(self.stats),
        }


def main() -> int:
    """Run on the socket whose number is the first argument."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # Ctrl-C reaches every process of the terminal; the parent decides what becomes of the engine.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return EngineProcess(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    sys.exit(main())
