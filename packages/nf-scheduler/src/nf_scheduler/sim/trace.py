"""Requests as somebody has recorded them: when they came, how long they were."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceError(ValueError):
    """A file that is no trace, or a trace that does not serve its purpose."""


@dataclass(slots=True, frozen=True)
class Trace:
    """n requests in the order of their arrival.

    Attributes:
        arrivals: float64 [n], seconds from the first.
        prompt_lens: int64 [n], tokens of each prompt.
        output_lens: int64 [n], tokens that each answer would have without a limit.
        num_too_long: requests of the file that were left out, because prompt and one token do not
            fit into the context.
    """

    arrivals: np.ndarray
    prompt_lens: np.ndarray
    output_lens: np.ndarray
    num_too_long: int = 0

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.arrivals)


def read_trace(
    path: str | Path,
    *,
    num_requests: int | None = None,
    rate: float | None = None,
    max_prompt_len: int,
    seed: int = 0,
) -> Trace:
    """Read a CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens.

    Timestamps are seconds or ISO 8601. Where they are neither, as in traces that had them removed,
    the requests come at `rate`, or all at once.

    Args:
        path: of the file.
        num_requests: most requests to take, from its beginning; None takes all.
        rate: requests per second on average, at random intervals (a Poisson process), in place of
            timestamps; `inf` is all at once.
        max_prompt_len: longer prompts are left out and counted.
        seed: of the intervals.

    Raises:
        TraceError: the file cannot be read, has other columns or other than numbers in them, or
            there is no request left.
    """
    if rate is not None and not rate > 0:
        raise TraceError(f"rate is {rate}; expected requests per second, above 0.")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if not set(_COLUMNS) <= set(rows.fieldnames or ()):
                raise TraceError(
                    f"{path} has the columns {rows.fieldnames}; expected {', '.join(_COLUMNS)}."
                )
            parsed = list(_requests(path, rows, max_prompt_len, num_requests))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path} cannot be read as a trace: {error}.") from error
    kept = [request for request in parsed if request is not None]
    if not kept:
        raise TraceError(f"{path} has no request with a prompt of 1 to {max_prompt_len} tokens.")
    times = [time for time, _, _ in kept]
    return Trace(
        arrivals=_arrivals(times, rate, seed),
        prompt_lens=np.array([prompt for _, prompt, _ in kept]),
        output_lens=np.array([output for _, _, output in kept]),
        num_too_long=len(parsed) - len(kept),
    )


def _requests(
    path: str | Path,
    rows: Iterable[dict[str, str]],
    max_prompt_len: int,
    num_requests: int | None,
) -> Iterator[tuple[float | None, int, int] | None]:
    """(time, prompt, answer) of each row, None for one that is too long; until there are enough."""
    taken = 0
    for line, row in enumerate(rows, start=2):
        if taken == num_requests:
            return
        try:
            prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (TypeError, ValueError):
            raise TraceError(
                f"{path}, line {line}: ContextTokens is {row['ContextTokens']!r} and "
                f"GeneratedTokens {row['GeneratedTokens']!r}; expected whole numbers."
            ) from None
        if prompt < 1 or output < 1:
            raise TraceError(
                f"{path}, line {line}: a request of {prompt} and {output} tokens; expected at "
                "least one of each."
            )
        if prompt > max_prompt_len:
            yield None
            continue
        taken += 1
        yield _time(row["TIMESTAMP"]), prompt, output


def _time(text: str) -> float | None:
    """Seconds; None for what is no time."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _arrivals(times: list[float | None], rate: float | None, seed: int) -> np.ndarray:
    count = len(times)
    if rate is not None:
        if math.isinf(rate):
            return np.zeros(count)
        gaps = np.random.default_rng(seed).exponential(1.0 / rate, count)
        return np.asarray(np.cumsum(gaps) - gaps[0])
    if any(time is None for time in times):
        return np.zeros(count)
    known = np.array(times, dtype=np.float64)
    return np.asarray(np.sort(known) - known.min())
