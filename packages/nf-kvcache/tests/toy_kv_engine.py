"""A model without weights, which runs sequences on a cache as an engine does."""

from __future__ import annotations

import numpy as np
import torch

from nf_kvcache import KVCache, KVLayout

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float32, page_size=4)


class ToyEngine:
    """K and V of a token say which it is, where, and in which layer; it looks at all it reads."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.tokens: dict[str, list[int]] = {}  # of each sequence whose KV is on the device

    def start(self, seq: str, tokens, total: int | None = None, *, resume: bool = False) -> int:
        """Begin a sequence, wait for what can be restored; give the tokens that were found."""
        found = self.cache.match(np.array(tokens[:-1], dtype=np.int32), seq=seq if resume else "")
        self.cache.reserve(seq, total or len(tokens), found)
        while (came := self.cache.restored(seq)) is None:
            self.cache.wait(0.01)
        self.tokens[seq] = list(tokens[: came.num_tokens])
        self.check(seq)
        return came.num_tokens

    def run(self, *work: tuple[str, list[int]], commit: bool = True) -> None:
        """One iteration: the next tokens of some sequences."""
        seqs = [seq for seq, _ in work]
        context = np.array([len(self.tokens[seq]) for seq in seqs], dtype=np.int32)
        lengths = np.array([len(tokens) for _, tokens in work], dtype=np.int32)
        offload = self.cache.begin_iteration(seqs, context, lengths)
        tables = self.cache.page_tables(seqs)
        for layer in range(LAYOUT.num_layers):
            if offload is not None:
                offload.before_append(layer)
            for row, (_, tokens) in enumerate(work):
                for i, token in enumerate(tokens):
                    self.write(layer, tables[row], int(context[row]) + i, token)
            if offload is not None:
                offload.after_append(layer)
        for seq, tokens in work:
            self.tokens[seq] += tokens
            if commit:
                self.cache.commit(seq, np.array(tokens, dtype=np.int32))

    def fill(self, seq: str, tokens) -> int:
        """Begin a sequence and compute what was not found of it."""
        found = self.start(seq, tokens)
        self.run((seq, list(tokens[found:])))
        return found

    def end(self, seq: str) -> None:
        """Look at a sequence for the last time and release it."""
        self.check(seq)
        self.cache.release(seq)
        del self.tokens[seq]

    def write(self, layer: int, table: np.ndarray, position: int, token: int) -> None:
        page, slot = table[position // LAYOUT.page_size], position % LAYOUT.page_size
        keys, values = self.cache.layers[layer]
        keys[page, :, slot] = self.value(layer, position, token)
        values[page, :, slot] = -self.value(layer, position, token)

    def check(self, seq: str) -> None:
        """Every token's KV is what the model wrote for it."""
        table = self.cache.page_tables([seq])[0]
        for position, token in enumerate(self.tokens[seq]):
            page, slot = table[position // LAYOUT.page_size], position % LAYOUT.page_size
            for layer, (keys, values) in enumerate(self.cache.layers):
                wanted = self.value(layer, position, token)
                assert (keys[page, :, slot] == wanted).all(), (seq, position, layer)
                assert (values[page, :, slot] == -wanted).all(), (seq, position, layer)

    @staticmethod
    def value(layer: int, position: int, token: int) -> float:
        return float(1 + layer + 10 * position + 10_000 * token)


PAGE = 4096  # a slot of the host, which is what the small page of the tests is rounded up to


def make(num_pages=8, host_pages=32, **options) -> ToyEngine:
    return ToyEngine(KVCache(LAYOUT, num_pages, host_bytes=host_pages * PAGE, **options))


def crowd_out(engine: ToyEngine, num_pages: int, token: int = 900) -> None:
    """Have pages of the device taken by others."""
    engine.fill("crowd", [token + i for i in range(num_pages * LAYOUT.page_size)])
    engine.end("crowd")
