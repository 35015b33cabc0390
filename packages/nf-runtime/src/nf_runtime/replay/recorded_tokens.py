"""The tokens of live requests, as a replay log tells them."""

import numpy as np

from nf_kvcache.kv_cache import salt_digest
from nf_runtime.replay.log_writer import LogWriter
from nf_runtime.replay.token_names import NO_PAGES, STOP_TOKEN, TokenNames, name_of
from nf_scheduler import Batch, Request


class _LiveRequest:
    """How far a request is: the digest of its full pages, and the tokens after them."""

    __slots__ = ("digest", "num_outputs", "open_page", "request", "stops_from")

    def __init__(self, request: Request, digests: list[bytes], page_size: int) -> None:
        self.request = request
        self.digest = digests[-1] if digests else NO_PAGES
        rest = request.prompt_token_ids[len(digests) * page_size :]
        self.open_page: list[int] = rest.tolist()
        self.num_outputs = 0
        self.stops_from = min(request.min_tokens, request.max_tokens + 1)


class RecordedTokens:
    """Writes prompts and sampled ids, as names of pages or as they are.

    Args:
        log: Where to write.
        names: Of pages; None writes the tokens themselves.
    """

    def __init__(self, log: LogWriter, names: TokenNames | None) -> None:
        self._log = log
        self._names = names
        self._live: dict[str, _LiveRequest] = {}
        self._written: _LiveRequest | None = None  # the last one, which may yet be refused

    def can_fork(self, request: Request) -> bool:
        """Whether a request may begin with the pages of the one that it names."""
        parent = self._live.get(request.fork_of or "")
        return parent is None or request.can_fork(parent.request)

    def write_prompt(self, request: Request) -> None:
        """Write what of a new request is not a number: prompt, stop ids, salt, tenant."""
        log, names = self._log, self._names
        if names is None:
            log.array(request.prompt_token_ids)
            log.array(np.array(sorted(request.stop_token_ids), dtype=np.int32))
            log.text(request.cache_salt)
            log.text(request.tenant)
            return
        digests = names.digests(request.prompt_token_ids)
        self._written = _LiveRequest(request, digests, names.page_size)
        log.number(request.prompt_len)
        for digest in digests:
            log.word(name_of(digest))
        log.number(bool(request.stop_token_ids))
        log.text(names.alias(salt_digest(request.cache_salt)))
        log.text(names.alias(request.tenant.encode()))

    def write_sampled(self, batch: Batch, token_ids: np.ndarray) -> None:
        """Write the sampled ids of an iteration, int32 [n]."""
        rows = np.flatnonzero(batch.samples)
        tokens = token_ids[rows]
        if self._names is None:
            self._log.array(tokens)
            return
        news: list[tuple[int, int]] = []
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            name = self._append(batch.request_ids[row], token)
            if name:
                news.append((row, name))
        self._log.number(len(news))
        for row, name in news:
            self._log.number(row)
            self._log.word(name)

    def took(self) -> None:
        """The request that was written last was taken."""
        if self._written is not None:
            self._live[self._written.request.request_id] = self._written

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._live.pop(request_id, None)

    def _append(self, request_id: str, token: int) -> int:
        """Count a token that a request has sampled; what stands for it in the log."""
        live, names = self._live.get(request_id), self._names
        if live is None or names is None:  # it has ended: the token is dropped
            return 0
        live.num_outputs += 1
        live.open_page.append(token)
        name = 0
        if len(live.open_page) == names.page_size:
            live.digest = names.digest(live.digest, np.array(live.open_page, dtype=np.int32))
            live.open_page.clear()
            name = name_of(live.digest)
        is_stop = token in live.request.stop_token_ids and live.num_outputs >= live.stops_from
        return STOP_TOKEN if is_stop else name
