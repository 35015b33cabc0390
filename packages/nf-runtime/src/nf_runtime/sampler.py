"""Chooses the next token of every request in the batch at once."""

from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nf_kernels.ops import OperationSet
from nf_runtime.device_stream import DeviceStream
from nf_runtime.row_logprobs import PendingLogprobs
from nf_runtime.sampling_params import SamplingParams
from nf_runtime.staging import StagingBuffer
from nf_scheduler import Batch


@dataclass(slots=True)
class RequestSampling:
    """What the sampler knows of one request.

    What is on the device is read and written in the order of the device's work alone.

    Attributes:
        params: How its tokens are chosen.
        seed: Its seed, in [0, 2**64).
        prompt_token_ids: int32 [n].
        stop_token_ids: Tokens that end it, forbidden before `params.min_tokens`.
        output_counts: int32 [V] on the device, how often the answer has each token; with
            penalties only.
        seen: bool [V] on the device, whether prompt or answer have it; with penalties only.
        bias: Token ids, int64, and what is added to their logits, float32, on the device; with
            `params.logit_bias` only.
        stop_ids: int64 on the device, `stop_token_ids`; with `params.min_tokens` only.
        slot: Where its parameters are in the sampler's arrays; -1 before it runs.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: np.ndarray
    stop_token_ids: frozenset[int]
    output_counts: Tensor | None = field(default=None)
    seen: Tensor | None = field(default=None)
    bias: tuple[Tensor, Tensor] | None = field(default=None)
    stop_ids: Tensor | None = field(default=None)
    slot: int = -1


@dataclass(frozen=True, slots=True)
class _PromptSpan:
    """`count` rows from `row` on: a prompt from `position` on, whose logprobs are wanted."""

    request_id: str
    request: RequestSampling
    row: int
    position: int
    count: int


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How to sample one iteration, written down before it runs.

    Attributes:
        slots: int32 [S], of the requests that sample.
        arrays: What goes to the device, by name.
        special: Of the rows that need more than these: row, request, its name, and the position of
            the new token.
        prompt_spans: Rows of prompts whose log-probabilities are wanted.
        prompt_rows: int64, these rows.
    """

    slots: np.ndarray
    arrays: dict[str, np.ndarray]
    special: list[tuple[int, RequestSampling, str, int]]
    prompt_spans: list[_PromptSpan]
    prompt_rows: np.ndarray


class TokenSampler(Protocol):
    """What chooses tokens for an executor. `Sampler` is one."""

    def plan(self, batch: Batch) -> SamplingPlan:
        """As `Sampler.plan`."""

    def sample(
        self, logits: Tensor, plan: SamplingPlan, staged: StagingBuffer, stream: DeviceStream
    ) -> tuple[Tensor, PendingLogprobs | None]:
        """As `Sampler.sample`."""

    def prompt_logprobs(
        self, plan: SamplingPlan, logits: Tensor, stream: DeviceStream
    ) -> list[tuple[int, PendingLogprobs]]:
        """As `Sampler.prompt_logprobs`."""


class Sampler:
    """Samples with the parameters of each request, vectorized over the batch.

    A draw depends on the request's logits, seed and position alone, so that a seed gives the same
    tokens whatever else is in the batch. `plan` is called when an iteration is launched, `sample`
    and `prompt_logprobs` as a part of it; other requests may come and go in between.
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
        self._one = torch.ones(1, dtype=torch.int32, device=device)
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
        params = request.params
        if params.has_penalties:
            seen = torch.zeros(self._vocab_size, dtype=torch.bool)
            seen[torch.from_numpy(request.prompt_token_ids).long()] = True
            request.seen = seen.to(self._device)
            request.output_counts = torch.zeros(
                self._vocab_size, dtype=torch.int32, device=self._device
            )
        if params.logit_bias:
            ids, values = list(params.logit_bias), list(params.logit_bias.values())
            request.bias = (
                torch.tensor(ids, device=self._device),
                torch.tensor(values, device=self._device).float(),
            )
        if params.min_tokens and request.stop_token_ids:
            request.stop_ids = torch.tensor(sorted(request.stop_token_ids), device=self._device)
        self._requests[request_id] = request

    def remove(self, request_id: str) -> None:
        """Forget a request that has finished."""
        request = self._requests.pop(request_id)
        self._leave_slot(request_id, request)

    def _leave_slot(self, request_id: str, request: RequestSampling) -> None:
        """Disown its slot: a later request may get the same name and the same slot."""
        if request.slot >= 0 and self._slot_owner[request.slot] == request_id:
            self._slot_owner[request.slot] = None

    def plan(self, batch: Batch) -> SamplingPlan:
        """Write down how to sample an iteration."""
        rows = np.flatnonzero(batch.samples)
        slots = batch.slots[rows]
        request_ids = [batch.request_ids[row] for row in rows.tolist()]
        self._settle(request_ids, slots)
        positions = batch.context_lens[rows] + np.diff(batch.query_start)[rows]
        spans = self._prompt_spans(batch)
        prompt_rows = [np.arange(span.row, span.row + span.count) for span in spans]
        return SamplingPlan(
            slots=slots,
            arrays={
                "sample_slots": slots.astype(np.int64),
                "temperature": self._temperature[slots],
                "top_k": self._top_k[slots],
                "top_p": self._top_p[slots],
                "min_p": self._min_p[slots],
                "uniform": uniform(self._seed[slots], positions),
            },
            special=[
                (row, self._requests[name], name, int(positions[row]))
                for row in np.flatnonzero(self._special[slots]).tolist()
                for name in (request_ids[row],)
            ],
            prompt_spans=spans,
            prompt_rows=np.concatenate([np.empty(0, dtype=np.int64), *prompt_rows]),
        )

    def sample(
        self, logits: Tensor, plan: SamplingPlan, staged: StagingBuffer, stream: DeviceStream
    ) -> tuple[Tensor, PendingLogprobs | None]:
        """Have a token chosen for each row.

        Args:
            logits: float32 [S, V], changed in place.
            plan: Of the iteration.
            staged: Where its arrays are.
            stream: That is to do it.

        Returns:
            int64 [S] on the device, and the log-probabilities of those that want them, if any; both
            to be read when the stream has got there.
        """
        special = _SpecialRows(plan.special) if plan.special else None
        if special is not None:
            stream.call(partial(special.adjust, logits))
        out = torch.empty(len(plan.slots), dtype=torch.int64, device=self._device)
        parameters = ("temperature", "top_k", "top_p", "min_p", "uniform")
        self._sample(
            logits=logits,
            **{name: staged.on_device(name) for name in parameters},
            out=out,
            scratch=self._scratch,
        )
        if special is None:
            return out, None
        stream.call(partial(special.count, out, self._one))
        return out, special.logprobs

    def prompt_logprobs(
        self, plan: SamplingPlan, logits: Tensor, stream: DeviceStream
    ) -> list[tuple[int, PendingLogprobs]]:
        """Log-probabilities of the prompt tokens that follow the rows of `plan.prompt_rows`.

        Args:
            plan: Of the iteration.
            logits: float32 [rows, V].
            stream: That is to compute them.

        Returns:
            For each prompt, the position of its first row in its sequence, and one entry per row.
        """
        result = []
        done = 0
        for span in plan.prompt_spans:
            first = span.position + 1
            following = span.request.prompt_token_ids[first : first + span.count]
            token_ids = torch.from_numpy(following.astype(np.int64)).to(self._device)
            rows = PendingLogprobs(
                [span.request_id] * span.count,
                [span.request.params.prompt_logprobs or 0] * span.count,
            )
            stream.call(partial(rows.compute, logits[done : done + span.count], token_ids))
            result.append((span.position, rows))
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


class _SpecialRows:
    """Rows that need more than the sampler's arrays: penalties, biases, log-probabilities.

    Args:
        rows: As `SamplingPlan.special`.

    Attributes:
        logprobs: Of the rows that want them; None if there are none.
    """

    def __init__(self, rows: list[tuple[int, RequestSampling, str, int]]) -> None:
        wanting = [
            (row, name, request.params.logprobs)
            for row, request, name, _ in rows
            if request.params.logprobs is not None
        ]
        self.logprobs = (
            PendingLogprobs([name for _, name, _ in wanting], [count for _, _, count in wanting])
            if wanting
            else None
        )
        self._rows = rows
        self._wanted_rows = [row for row, _, _ in wanting]
        self._raw: Tensor | None = None

    def adjust(self, logits: Tensor) -> None:
        """Apply bias, penalties and minimum lengths to logits, float32 [S, V], in place."""
        if self.logprobs is not None:
            self._raw = logits[self._wanted_rows]
        for row, request, _, position in self._rows:
            _adjust(logits[row], request, position)

    def count(self, sampled: Tensor, one: Tensor) -> None:
        """Remember sampled tokens, int64 [S], for the penalties, and how likely they were.

        Args:
            sampled: The tokens.
            one: int32 [1] on the device: 1.
        """
        for row, request, _, _ in self._rows:
            if request.seen is not None and request.output_counts is not None:
                request.output_counts.index_add_(0, sampled[row : row + 1], one)
                request.seen.index_fill_(0, sampled[row : row + 1], True)
        if self.logprobs is not None and self._raw is not None:
            self.logprobs.compute(self._raw, sampled[self._wanted_rows])


def _adjust(logits: Tensor, request: RequestSampling, position: int) -> None:
    """Apply bias, penalties and the minimum length to one row of logits, in place."""
    params = request.params
    if request.seen is not None and request.output_counts is not None:
        if params.repetition_penalty != 1.0:
            factor = params.repetition_penalty
            penalized = torch.where(logits > 0, logits / factor, logits * factor)
            logits.copy_(torch.where(request.seen, penalized, logits))
        logits.sub_(request.output_counts * params.frequency_penalty)
        logits.sub_((request.output_counts > 0) * params.presence_penalty)
    if request.bias is not None:
        ids, values = request.bias
        logits.index_add_(0, ids, values)
    length = position - len(request.prompt_token_ids)
    if request.stop_ids is not None and length < params.min_tokens:
        logits[request.stop_ids] = -torch.inf


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
