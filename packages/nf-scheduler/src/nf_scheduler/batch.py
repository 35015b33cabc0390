"""The work of one iteration, as numbers that travel."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

_HEADER = struct.Struct("<4sHxxqIII")  # magic, version, iteration, requests, decodes, tokens
_MAGIC = b"NFBT"
_VERSION = 1


@dataclass(slots=True, eq=False)
class Batch:
    """What the scheduler chose for an iteration: n requests, decodes first, then prefill chunks.

    Two batches are equal when all their fields are, element by element.

    Attributes:
        iteration: 0, 1, 2, …
        request_ids: n names.
        slots: int32 [n]; index of the request in [0, max_num_seqs), the same for as long as it
            runs.
        num_decodes: the first so many requests have exactly one new token, which was sampled
            before.
        query_start: int32 [n + 1]; request i has new tokens query_start[i] to query_start[i + 1].
        context_lens: int32 [n]; tokens of each request whose KV is in pages before this iteration.
        token_ids: int32 [query_start[n]]; -1 stands for a token sampled by an iteration that was
            not yet committed: it is on the device, the last one sampled for that slot.
        samples: bool [n]; a token is sampled from the last row of these requests.
    """

    iteration: int
    request_ids: list[str]
    slots: np.ndarray
    num_decodes: int
    query_start: np.ndarray
    context_lens: np.ndarray
    token_ids: np.ndarray
    samples: np.ndarray

    @property
    def num_tokens(self) -> int:
        """New tokens of all requests together."""
        return len(self.token_ids)

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.request_ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Batch):
            return NotImplemented
        return (
            self.iteration == other.iteration
            and self.request_ids == other.request_ids
            and self.num_decodes == other.num_decodes
            and np.array_equal(self.slots, other.slots)
            and np.array_equal(self.query_start, other.query_start)
            and np.array_equal(self.context_lens, other.context_lens)
            and np.array_equal(self.token_ids, other.token_ids)
            and np.array_equal(self.samples, other.samples)
        )

    def to_bytes(self) -> bytes:
        """Serialize for another process or a log.

        Little-endian: a header (magic, version, iteration, numbers of requests, decodes and
        tokens), the arrays one after another, the lengths of the ids in bytes (uint32 [n]), the ids
        in UTF-8.
        """
        ids = [request_id.encode() for request_id in self.request_ids]
        return b"".join(
            (
                _HEADER.pack(
                    _MAGIC, _VERSION, self.iteration, len(ids), self.num_decodes, self.num_tokens
                ),
                self.slots.astype("<i4", copy=False).tobytes(),
                self.query_start.astype("<i4", copy=False).tobytes(),
                self.context_lens.astype("<i4", copy=False).tobytes(),
                self.token_ids.astype("<i4", copy=False).tobytes(),
                self.samples.astype("?", copy=False).tobytes(),
                np.array([len(name) for name in ids], dtype="<u4").tobytes(),
                *ids,
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Batch:
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: `data` is not a batch, of another version, or cut short.
        """
        if len(data) < _HEADER.size or data[:4] != _MAGIC:
            raise ValueError("These bytes are not a Batch: they do not begin with its header.")
        _, version, iteration, n, num_decodes, num_tokens = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise ValueError(f"This Batch has format version {version}; expected {_VERSION}.")
        at = _HEADER.size

        def take(count: int, dtype: str) -> np.ndarray:
            nonlocal at
            kind = np.dtype(dtype)
            if at + count * kind.itemsize > len(data):
                raise ValueError(f"This Batch is cut short: it has only {len(data)} bytes.")
            array = np.frombuffer(data, kind, count, at).astype(kind.newbyteorder("="))
            at += array.nbytes
            return array

        slots, query_start, context_lens = take(n, "<i4"), take(n + 1, "<i4"), take(n, "<i4")
        token_ids, samples = take(num_tokens, "<i4"), take(n, "?")
        names = [take(length, "u1").tobytes().decode() for length in take(n, "<u4").tolist()]
        if at != len(data):
            raise ValueError(f"This Batch has {len(data) - at} bytes too many.")
        return cls(
            iteration, names, slots, num_decodes, query_start, context_lens, token_ids, samples
        )
