"""What a replay log says in place of tokens."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

NO_PAGES = b""
"""The digest of no pages, which the first page of a prompt follows."""

STOP_TOKEN = 2**31 - 1
"""Stands for a stop id that ends its request."""


class TokenNames:
    """Names for pages of tokens: the same for the same tokens behind the same tokens.

    Scheduler and KV cache never look at a token but to find out whether two prefixes are alike, in
    whole pages, and whether it is a stop id. So a number per full page will do: a hash of all
    tokens up to its end, under a key that is made here and kept nowhere. Nobody can find out by
    trying what a page holds, and logs of two processes cannot be compared.

    Args:
        page_size: Tokens of a page.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._key = os.urandom(32)

    def digest(self, above: bytes, tokens: np.ndarray) -> bytes:
        """Of a page, int32 [page_size], that follows those with the digest `above`."""
        return hashlib.blake2b(
            above + tokens.astype("<i4", copy=False).tobytes(), digest_size=16, key=self._key
        ).digest()

    def digests(self, tokens: np.ndarray) -> list[bytes]:
        """Of each full page of a prompt."""
        digest, digests = NO_PAGES, []
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            digest = self.digest(digest, tokens[start : start + self.page_size])
            digests.append(digest)
        return digests

    def alias(self, secret: bytes) -> str:
        """A name for something that is to be told from others and nothing else."""
        return hashlib.blake2b(secret, digest_size=8, key=self._key).hexdigest() if secret else ""


def name_of(digest: bytes) -> int:
    """The number that stands for a page in the log, from 0 to `STOP_TOKEN` - 1."""
    return int.from_bytes(digest[:8], "little") % STOP_TOKEN


def named_tokens(length: int, names: Sequence[int], page_size: int) -> np.ndarray:
    """Tokens that are alike where those were that were named: int32 [length].

    Each page has its name as its last token; all others are 0.
    """
    tokens = np.zeros(length, dtype=np.int32)
    tokens[page_size - 1 :: page_size] = names
    return tokens
