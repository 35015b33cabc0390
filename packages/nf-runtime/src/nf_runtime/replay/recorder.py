"""Writes down what an engine is told and asks, so that its decisions can be repeated."""

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from nf_kvcache import KVCache
from nf_runtime.config import EngineConfig
from nf_runtime.errors import ModelLoadError
from nf_runtime.replay.log_format import SUFFIX, LogEnd, Tag
from nf_runtime.replay.log_writer import LogWriter
from nf_runtime.replay.recorded_io import RecordedDisk, RecordedEvent
from nf_runtime.replay.recorded_tokens import RecordedTokens
from nf_runtime.replay.token_names import TokenNames
from nf_scheduler import TokenBudget

if TYPE_CHECKING:
    from nf_kvcache.copier import Event
    from nf_kvcache.disk_store import DiskStore

_log = logging.getLogger(__name__)
_number = itertools.count()  # of the logs that this process has begun

CONFIG_FIELDS = (
    *("policy", "service_levels", "admission", "max_num_seqs", "max_num_batched_tokens"),
    *("max_prefill_chunk", "max_num_queued_reqs", "max_num_queued_tokens", "page_size"),
    *("enable_prefix_caching", "async_scheduling"),
)
"""Fields of `EngineConfig` that decisions depend on."""


class Recorder:
    """The log of one engine, and the stand-ins for what decides what the engine does.

    Args:
        config: Where to write, how much, and whether with tokens.
        clock: Seconds.

    Attributes:
        log: What is written to.
        tokens: Writes prompts and answers to it.
        classes: Of requests that have a service level.
        with_tokens: Whether as they are; else by numbers that only tell which prefixes are alike.

    Raises:
        ModelLoadError: The directory cannot be written.
    """

    def __init__(
        self, config: EngineConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.with_tokens = config.replay_log_tokens
        self.log = _new_log(str(config.replay_log_dir), config.replay_log_max_bytes)
        self.classes = frozenset(config.service_levels)
        self._names = None if self.with_tokens else TokenNames(config.page_size)
        self.tokens = RecordedTokens(self.log, self._names)
        self._source = clock
        self._last_time = 0  # microseconds

    def clock(self) -> float:
        """Seconds, in whole microseconds."""
        now = int(self._source() * 1e6)
        self.log.tag(Tag.CLOCK)
        self.log.number(now - self._last_time)
        self._last_time = now
        return now * 1e-6

    def watch(self, event: "Event") -> RecordedEvent:
        """An event whose answers are written down."""
        return RecordedEvent(event, self.log)

    def disk(self, disk: "DiskStore") -> RecordedDisk:
        """A disk tier whose answers are written down."""
        return RecordedDisk(disk, self.log, self._names)

    def begin(
        self,
        config: EngineConfig,
        kv_cache: KVCache,
        max_model_len: int,
        budgets: Sequence[TokenBudget] = (),
    ) -> None:
        """Begin the log with what the engine is. What was asked before that follows.

        Args:
            config: Of the engine.
            kv_cache: Its cache.
            max_model_len: Tokens of a prompt and its answer.
            budgets: Of its scheduler.

        Raises:
            ModelLoadError: It cannot be created.
        """
        lower = kv_cache.stats().lower
        with _as_load_error(str(config.replay_log_dir)):
            self.log.begin(
                {
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                    "version": metadata.version("nf-runtime"),
                    "model": config.model,
                    "config": {name: getattr(config, name) for name in CONFIG_FIELDS},
                    "max_model_len": max_model_len,
                    "budgets": [list(astuple(budget)) for budget in budgets],
                    "num_pages": kv_cache.num_pages,
                    "host_pages": 0 if lower is None else lower.host_pages_total,
                    "restore_seconds": kv_cache.restore_seconds,
                    "has_disk": config.kv_ssd_dir is not None,
                    "tokens": self.with_tokens,
                }
            )

    def close(self) -> None:
        """End the log."""
        self.log.close(LogEnd.CLOSED)


def _new_log(directory: str, max_bytes: int) -> LogWriter:
    """A log in a directory, beside those of earlier engines.

    These keep up to half of the bound; the oldest are deleted. The new one gets the other half.
    """
    folder = Path(directory)
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    path = folder / f"{moment}-{os.getpid()}-{next(_number)}{SUFFIX}"
    with _as_load_error(directory):
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, max_bytes // 2)
    _log.info("replay log: %s", path)
    return LogWriter(path, max_bytes // 2)


@contextlib.contextmanager
def _as_load_error(directory: str) -> Iterator[None]:
    """Say which option to change when the directory cannot be used."""
    try:
        yield
    except OSError as error:
        raise ModelLoadError(
            f"replay_log_dir is {directory!r}, which cannot be used: {error.strerror}; name a "
            "directory that can be written"
        ) from error


def _make_room(folder: Path, max_bytes: int) -> None:
    """Delete the oldest logs, until the others together are not above a bound."""
    logs = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another engine has deleted it
            state = path.stat()
            logs.append((state.st_mtime_ns, state.st_size, path))
    total = 0
    for _, size, path in sorted(logs, reverse=True):
        total += size
        if total > max_bytes:
            path.unlink(missing_ok=True)
