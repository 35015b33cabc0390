"""The format on disk: names, sizes, checksums. docs/kv-disk-format.md is its specification."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import xxhash

from nf_kvcache.fingerprint import Fingerprint

FORMAT_VERSION = 1
BLOCK_BYTES = 4096  # slots begin and end on multiples of it, as O_DIRECT wants
SEGMENT_BYTES = 64 << 20
MAX_SALT_BYTES = 64
ROOT = 0  # what stands for the parent where there is none; rows count from 1

LOCK_NAME = "lock"
META_NAME = "meta.json"
INDEX_NAME = "index.sqlite"
DAMAGED_SUFFIX = ".damaged"
APPLICATION_ID = 0x4E464B56  # "NFKV", in the header of the index

SCHEMA = """
CREATE TABLE page (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    parent   INTEGER NOT NULL,
    salt     BLOB,
    slot     INTEGER NOT NULL UNIQUE,
    tokens   BLOB NOT NULL,
    checksum INTEGER NOT NULL,
    used     INTEGER NOT NULL
);
CREATE INDEX page_by_prefix ON page (parent, tokens);
"""


def segment_name(segment: int) -> str:
    """Name of a segment file."""
    return f"segment-{segment:05d}.kv"


def subdirectory(fingerprint: Fingerprint, replica: int, rank: int) -> str:
    """Where, below the cache directory, the pages of one rank lie."""
    text = f"nf-kvcache {FORMAT_VERSION} {fingerprint.digest}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{digest}/replica-{replica}-rank-{rank}"


def root_identity(salt: bytes) -> int:
    """Identity of the empty prefix under a salt."""
    return xxhash.xxh3_64_intdigest(salt)


def child_identity(parent: int, tokens: bytes) -> int:
    """Identity of the prefix that ends with `tokens` (int32, little-endian) after its parent's."""
    return xxhash.xxh3_64_intdigest(tokens, seed=parent)


def page_checksum(identity: int, data: bytes | memoryview) -> int:
    """Checksum of a page, bound to the prefix it belongs to, so that neither may change alone.

    Args:
        identity: of the prefix that ends with the page.
        data: its bytes, without padding.

    Returns:
        A signed number of 64 bits, as SQLite stores it.
    """
    checksum = xxhash.xxh3_64_intdigest(data, seed=identity)
    return checksum - (1 << 64) if checksum >> 63 else checksum


@dataclass(frozen=True, slots=True)
class Meta:
    """What meta.json says of the files beside it.

    Attributes:
        version: of the format.
        fingerprint: of the model and of its KV.
        page_bytes: of a page without padding.
        slot_bytes: of a page with padding.
        slots_per_segment: in each segment file but the last, which may have fewer.
    """

    version: int
    fingerprint: Fingerprint
    page_bytes: int
    slot_bytes: int
    slots_per_segment: int

    @classmethod
    def of(cls, fingerprint: Fingerprint, page_bytes: int) -> Meta:
        """The layout of files for pages of this size."""
        slot_bytes = -(-page_bytes // BLOCK_BYTES) * BLOCK_BYTES
        slots_per_segment = max(1, SEGMENT_BYTES // slot_bytes)
        return cls(FORMAT_VERSION, fingerprint, page_bytes, slot_bytes, slots_per_segment)

    def to_json(self) -> str:
        """The text of meta.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Meta:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is no JSON, of another version, or lacks something.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(values.get("fingerprint"), Mapping):
            raise ValueError(f"{META_NAME} has no fingerprint.")
        if values.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{META_NAME} has version {values.get('version')!r}; expected {FORMAT_VERSION}."
            )
        try:
            sizes = {
                name: int(values[name])
                for name in ("page_bytes", "slot_bytes", "slots_per_segment")
            }
        except (KeyError, TypeError) as error:
            raise ValueError(f"{META_NAME} lacks a size: {error}.") from None
        if min(sizes.values()) < 1:
            raise ValueError(f"{META_NAME} has a size below 1: {sizes}.")
        return cls(FORMAT_VERSION, Fingerprint.from_dict(values["fingerprint"]), **sizes)
