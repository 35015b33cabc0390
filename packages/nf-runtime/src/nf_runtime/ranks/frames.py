"""What rank 0 and the other ranks say to each other: frames on a socket, nothing pickled.

A frame is its kind (1 byte), the length of its body (4 bytes, little-endian) and the body. While
starting, both sides send JSON objects with one key: rank 0 `config`, `size` and `start`; another
rank `loaded`, `sized` and `ready`, at the end `stopped`, and `failed` when it has to end. In
between, rank 0 sends policies, plans, iterations, copies of pages and what is measured, and at last
that it is to stop.
"""

import json
import socket
import struct
from enum import IntEnum
from typing import Any, BinaryIO

import numpy as np

from nf_scheduler import Batch

_HEADER = struct.Struct("<BI")
_SIZES = struct.Struct("<IIII")  # number of the plan, bytes of the batch, pages, prompt rows
_PAGES = struct.Struct("<II")


class Kind(IntEnum):
    """What a frame is."""

    MESSAGE = ord("M")
    """A JSON object."""
    POLICY = ord("O")
    """The plan set that plans will be of, as JSON, or null; those before are not used any more."""
    PLAN = ord("P")
    """A plan that iterations will run by, as JSON; they name it by its number, counted from 0 anew
    after each `POLICY`."""
    ITERATION = ord("I")
    """A batch, its page tables, its plan, and the prompt rows whose logits are wanted."""
    DUPLICATE = ord("D")
    """A page of KV, and the one it is copied to."""
    NETWORK = ord("N")
    """Sums over all ranks are measured."""
    STOP = ord("S")
    """Nothing more will be sent."""


def send(connection: socket.socket, kind: Kind, body: bytes) -> None:
    """Send a frame.

    Raises:
        OSError: The other side is gone.
    """
    connection.sendall(_HEADER.pack(kind, len(body)) + body)


def receive(stream: BinaryIO) -> tuple[Kind, bytes] | None:
    """The next frame; None when the other side is gone, if in the middle of one."""
    try:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        kind, length = _HEADER.unpack(header)
        body = stream.read(length)
    except OSError:
        return None
    return None if len(body) < length else (Kind(kind), body)


def pack_message(message: dict[str, Any]) -> bytes:
    """The body of a `MESSAGE`."""
    return json.dumps(message, separators=(",", ":")).encode()


def pack_iteration(
    batch: Batch, page_tables: np.ndarray, prompt_rows: np.ndarray, plan: int
) -> bytes:
    """The body of an `ITERATION`.

    Args:
        batch: n requests.
        page_tables: int32 [n, pages].
        prompt_rows: int64.
        plan: Its number.
    """
    data = batch.to_bytes()
    return b"".join(
        (
            _SIZES.pack(plan, len(data), page_tables.shape[1], len(prompt_rows)),
            data,
            page_tables.astype("<i4", copy=False).tobytes(),
            prompt_rows.astype("<i8", copy=False).tobytes(),
        )
    )


def unpack_iteration(body: bytes) -> tuple[Batch, np.ndarray, np.ndarray, int]:
    """What `pack_iteration` was given."""
    plan, size, width, num_prompt_rows = _SIZES.unpack_from(body)
    start = _SIZES.size + size
    batch = Batch.from_bytes(body[_SIZES.size : start])
    tables = np.frombuffer(body, "<i4", len(batch) * width, start).reshape(len(batch), width)
    rows = np.frombuffer(body, "<i8", num_prompt_rows, start + tables.nbytes)
    return batch, tables, rows, plan


def pack_duplicate(source: int, target: int) -> bytes:
    """The body of a `DUPLICATE`: numbers of two pages."""
    return _PAGES.pack(source, target)


def unpack_duplicate(body: bytes) -> tuple[int, int]:
    """What `pack_duplicate` was given."""
    source, target = _PAGES.unpack(body)
    return source, target
