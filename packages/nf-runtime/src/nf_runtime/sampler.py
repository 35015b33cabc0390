"""Chooses the next token of every request in the batch at once."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nf_kernels.ops import OperationSet
from nf_runtime.logprobs import RowLogprobs
from nf_runtime.sampling_params import SamplingParams
from nf_scheduler import Batch


@dataclass(slots=True)
class RequestSampling:
    """What the sampler knows of one request.

    Attributes:
        params: How its tokens are chosen.
        seed: Its seed, in [0, 2**64).
        prompt_token_ids: int32 [n].
        stop_token_ids: Tokens that end it, forbidden before `params.min_tokens`.
        output_counts: int32 [V] on the device, how often the answer has each token; with
            penalties only.
        seen: bool [V] on the device, whether prompt or answer have it; with penalties only.
        slot: Where its parameters are in the sampler's arrays; -1 before it runs.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: np.ndarray
    stop_token_ids: frozenset[int]
    output_counts: Tensor | None = field(default=None)
    seen: Tensor | None = field(default=None)
    slot: int = -1


@dataclass(frozen=True, slots=True)
class _PromptSpan:
    """`count` rows from `row` on: a prompt from `position` on, whose logprobs are wanted."""

    request_id: str
    request: RequestSampling
    row: int
    position: int
    count: int


class Sampler:
    """Samples with the parameters of each request, vectorized over the batch.

    A draw depends on the request's logits, seed and position alone, so that a seed gives the same
    tokens whatever else is in the batch.
    """

    def __init__(
        self,
        operations: OperationSet,
        *,
        vocab_size: int,
        max_requests: int,
        device: torch.device,
    ) -> None:
        self._sample = operations["sample"]
        self._scratch = torch.empty(
            operations.scratch_bytes("sample", vocab_size=vocab_size),
            dtype=torch.uint8,
            device=device,
        )
        self._vocab_size = vocab_size
        self._device = device
        self._requests: dict[str, RequestSampling] = {}
        self._slot_owner: list[str | None] = [None] * max_requests
        # Structure of arrays by slot: an iteration picks its rows with one index each.
        self._temperature = np.zeros(max_requests, dtype=np.float32)
        self._top_k = np.zeros(max_requests, dtype=np.int64)
        self._top_p = np.ones(max_requests, dtype=np.float32)
        self._min_p = np.zeros(max_requests, dtype=np.float32)
        self._seed = np.zeros(max_requests, dtype=np.uint64)
        self._special = np.zeros(max_requests, dtype=bool)  # needs more than these arrays

    def add(self, request_id: str, request: RequestSampling) -> None:
        """Announce a request, before its first iteration."""
        if request.params.has_penalties:
            seen = torch.zeros(self._vocab_size, dtype=torch.bool)
            seen[torch.from_numpy(request.prompt_token_ids).long()] = True
            request.seen = seen.to(self._device)
            request.output_counts = torch.zeros(
                self._vocab_size, dtype=torch.int32, device=self._device
            )
        self._requests[request_id] = request

    def remove(self, request_id: str) -> None:
        """Forget a request that has finished."""
        request = self._requests.pop(request_id)
        self._leave_slot(request_id, request)

    def _leave_slot(self, request_id: str, request: RequestSampling) -> None:
        """Disown its slot: a later request may get the same name and the same slot."""
        if request.slot >= 0 and self._slot_owner[request.slot] == request_id:
            self._slot_owner[request.slot] = None

    def sample(
        self, logits: Tensor, request_ids: list[str], slots: np.ndarray, positions: np.ndarray
    ) -> tuple[Tensor, dict[str, RowLogprobs]]:
        """Choose a token for each row.

        Args:
            logits: float32 [S, V], changed in place.
            request_ids: Request of each row.
            slots: int32 [S], their slots.
            positions: int32 [S], the position of each new token in its sequence.

        Returns:
            int64 [S] on the device, and log-probabilities by request, for those that want them.
        """
        self._settle(request_ids, slots)
        wanting = [
            (row, count)
            for row in np.flatnonzero(self._special[slots]).tolist()
            if (count := self._requests[request_ids[row]].params.logprobs) is not None
        ]
        wanted_rows = [row for row, _ in wanting]
        raw = logits[wanted_rows] if wanting else None
        for row in np.flatnonzero(self._special[slots]).tolist():
            self._adjust(logits[row], self._requests[request_ids[row]], int(positions[row]))
        out = torch.empty(len(request_ids), dtype=torch.int64, device=self._device)
        self._sample(
            logits=logits,
            temperature=self._put(self._temperature[slots]),
            top_k=self._put(self._top_k[slots]),
            top_p=self._put(self._top_p[slots]),
            min_p=self._put(self._min_p[slots]),
            uniform=self._put(uniform(self._seed[slots], positions)),
            out=out,
            scratch=self._scratch,
        )
        for row in np.flatnonzero(self._special[slots]).tolist():
            self._count(self._requests[request_ids[row]], out[row : row + 1])
        if raw is None:
            return out, {}
        rows = row_logprobs(raw, out[wanted_rows], [count for _, count in wanting])
        return out, {request_ids[row]: r for row, r in zip(wanted_rows, rows, strict=True)}

    def prompt_rows(self, batch: Batch) -> np.ndarray:
        """Rows, int64, whose logits tell the probability of a prompt token that was asked for."""
        rows = [np.arange(span.row, span.row + span.count) for span in self._prompt_spans(batch)]
        return np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)

    def prompt_logprobs(
        self, batch: Batch, logits: Tensor
    ) -> dict[str, tuple[int, list[RowLogprobs]]]:
        """Log-probabilities of the prompt tokens that follow the rows of `prompt_rows`.

        Args:
            batch: The iteration's.
            logits: float32 [rows, V].

        Returns:
            By request, the position of the first row in its sequence, and one entry per row.
        """
        result: dict[str, tuple[int, list[RowLogprobs]]] = {}
        done = 0
        for span in self._prompt_spans(batch):
            first = span.position + 1
            following = span.request.prompt_token_ids[first : first + span.count]
            rows = row_logprobs(
                logits[done : done + span.count],
                self._put(following.astype(np.int64)),
                [span.request.params.prompt_logprobs or 0] * span.count,
            )
            result[span.request_id] = (span.position, rows)
            done += span.count
        return result

    def _prompt_spans(self, batch: Batch) -> list["_PromptSpan"]:
        spans = []
        for i in range(batch.num_decodes, len(batch)):
            request = self._requests[batch.request_ids[i]]
            if request.params.prompt_logprobs is None:
                continue
            row, end = int(batch.query_start[i]), int(batch.query_start[i + 1])
            position = int(batch.context_lens[i])
            # The last prompt position tells of the first answer token, not of the prompt.
            count = min(end - row, len(request.prompt_token_ids) - 1 - position)
            if count > 0:
                spans.append(_PromptSpan(batch.request_ids[i], request, row, position, count))
        return spans

    def _settle(self, request_ids: list[str], slots: np.ndarray) -> None:
        """Write the parameters of requests that are new in their slot."""
        for request_id, slot in zip(request_ids, slots.tolist(), strict=True):
            if self._slot_owner[slot] == request_id:
                continue
            self._slot_owner[slot] = request_id
            request = self._requests[request_id]
            self._leave_slot(request_id, request)  # after a preemption it may get another one
            request.slot = slot
            params = request.params
            self._temperature[slot] = params.temperature
            self._top_k[slot] = min(max(params.top_k, 0), self._vocab_size)
            self._top_p[slot] = params.top_p
            self._min_p[slot] = params.min_p
            self._seed[slot] = request.seed
            self._special[slot] = bool(
                params.has_penalties
                or params.logit_bias
                or params.min_tokens
                or params.logprobs is not None
            )

    def _adjust(self, logits: Tensor, request: RequestSampling, position: int) -> None:
        """Apply bias, penalties and the minimum length to one row of logits, in place."""
        params = request.params
        if request.seen is not None and request.output_counts is not None:
            if params.repetition_penalty != 1.0:
                factor = params.repetition_penalty
                penalized = torch.where(logits > 0, logits / factor, logits * factor)
                logits.copy_(torch.where(request.seen, penalized, logits))
            logits.sub_(request.output_counts * params.frequency_penalty)
            logits.sub_((request.output_counts > 0) * params.presence_penalty)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=self._device)
            values = list(params.logit_bias.values())
            logits.index_add_(0, ids, torch.tensor(values, device=self._device).float())
        if position - len(request.prompt_token_ids) < params.min_tokens and request.stop_token_ids:
            logits[torch.tensor(sorted(request.stop_token_ids), device=self._device)] = -torch.inf

    def _count(self, request: RequestSampling, sampled: Tensor) -> None:
        """Remember a sampled token, int64 [1], for the penalties."""
        if request.seen is not None and request.output_counts is not None:
            one = torch.ones(1, dtype=torch.int32, device=self._device)
            request.output_counts.index_add_(0, sampled, one)
            request.seen.index_fill_(0, sampled, True)

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per row, from its seed and position alone (SplitMix64).

    Args:
        seeds: uint64 [S].
        positions: Integers [S].

    Returns:
        float32 [S], multiples of 2**-24.
    """
    x = _mix(seeds) + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    numbers: np.ndarray = np.multiply(_mix(x) >> np.uint64(40), 2.0**-24, dtype=np.float32)
    return numbers


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def row_logprobs(logits: Tensor, token_ids: Tensor, counts: list[int]) -> list[RowLogprobs]:
    """Log-probabilities of some positions.

    Args:
        logits: float32 [S, V].
        token_ids: int64 [S], the token at each position.
        counts: How many of the most likely tokens to report for each.
    """
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1))
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top, ids = logprobs.topk(min(max(counts, default=0), logits.shape[1]), dim=-1)
    rows = zip(
        token_ids.tolist(),
        chosen.squeeze(1).tolist(),
        ranks.tolist(),
        ids.tolist(),
        top.tolist(),
        counts,
        strict=True,
    )
    return [
        RowLogprobs(token, logprob, rank, top_ids[:count], top_values[:count])
        for token, logprob, rank, top_ids, top_values, count in rows
    ]
