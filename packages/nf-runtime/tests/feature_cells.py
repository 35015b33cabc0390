"""Cells of the feature matrix: what is switched on, what is asked, and an engine that is watched.

Not here yet: structured output (JSON), which the engine does not have. It will be one more entry of
`VALUES`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nf_runtime import LLM, RequestOutput, SamplingParams
from nf_runtime.timeline import IterationTrace
from nf_scheduler import Batch

VOCAB_SIZE, PAGE = 200, 16
TOKEN_BUDGET = 96  # less than the longest prompt, so that it is cut without a chunk size, too
NEW_TOKENS = 20
LARGE_POOL, SMALL_POOL = 52, 11  # pages; all requests need 45 of them, the longest 10
KIB = 1 << 10
HOST_BYTES = 2048 * KIB  # 170 pages

VALUES: dict[str, tuple[Any, ...]] = {
    "family": ("mistral", "mixtral"),  # with a sliding window; a mixture of experts
    "mode": ("sync", "async", "nanoflow", "nanoflow-4", "pd-multiplex", "co-resident"),
    "chunk": (16, 64, None),
    "pool": ("large pool", "small pool"),
    "prefix": ("no cache", "cache"),
    "tier": ("device", "host", "host and SSD"),
    "sampling": ("greedy", "seeded", "penalties", "logprobs", "stop"),
}
"""What a cell chooses from."""


@dataclass(frozen=True)
class Cell:
    """One combination of features."""

    family: str
    mode: str
    chunk: int | None
    pool: str
    prefix: str
    tier: str
    sampling: str

    def __str__(self) -> str:
        values = (getattr(self, each.name) for each in fields(self))
        return ", ".join("no chunks" if value is None else str(value) for value in values)

    @property
    def is_legal(self) -> bool:
        """Lower tiers keep prefixes: an engine without a prefix cache refuses them."""
        return self.tier == "device" or self.prefix == "cache"

    @property
    def has_several_lanes(self) -> bool:
        return self.mode not in ("sync", "async")

    @property
    def pairs(self) -> frozenset[tuple[tuple[str, Any], ...]]:
        """Every two of its values, with their names."""
        values = [(each.name, getattr(self, each.name)) for each in fields(self)]
        return frozenset(itertools.combinations(values, 2))

    def options(self, directory: Path) -> dict[str, Any]:
        """Of the engine."""
        chosen: dict[str, Any] = {
            "async_scheduling": self.mode != "sync",
            "overlap": self.mode if self.has_several_lanes else "off",
            "max_prefill_chunk": self.chunk,
            "kv_cache_tokens": PAGE * (SMALL_POOL if self.pool == "small pool" else LARGE_POOL),
            "enable_prefix_caching": self.prefix == "cache",
        }
        if self.tier != "device":
            chosen["kv_host_bytes"] = HOST_BYTES
        if self.tier == "host and SSD":
            chosen |= {"kv_ssd_dir": str(directory), "kv_ssd_max_bytes": 4096 * KIB}
        return chosen


def reference_of(cell: Cell) -> Cell:
    """The cell without any feature but its sampling."""
    return Cell(cell.family, "sync", None, "large pool", "no cache", "device", cell.sampling)


@cache
def all_cells() -> tuple[Cell, ...]:
    """The full product, without what no engine takes."""
    product = itertools.product(*VALUES.values())
    return tuple(cell for cell in itertools.starmap(Cell, product) if cell.is_legal)


@cache
def covering_cells() -> tuple[Cell, ...]:
    """Few cells in which every two values that go together meet: greedily, so always the same."""
    left = set().union(*(cell.pairs for cell in all_cells()))
    chosen = []
    while left:
        best = max(all_cells(), key=lambda cell: len(cell.pairs & left))
        chosen.append(best)
        left -= best.pairs
    return tuple(chosen)


def _random_tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, count).tolist()


_STEM = _random_tokens(0, 40)
# Most end just before a page does, so that answers soon need another one.
PROMPTS = [
    _random_tokens(1, 126),
    *(_STEM + _random_tokens(2 + i, more) for i, more in enumerate((54, 38, 7))),
    *(_random_tokens(9 + length, length) for length in (1, 15, 30, 63)),
]
_CROWD = [_random_tokens(100 + i, 139) for i in range(7)]  # needs more pages than the large pool


@dataclass(frozen=True)
class Answer:
    """What a request got: all that a feature might change."""

    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, tuple[float, int]]] | None
    prompt_logprobs: list[dict[int, tuple[float, int]] | None] | None


Answers = list[Answer]


def answers_of(outputs: Sequence[RequestOutput]) -> Answers:
    """The answers of outputs that have one each."""

    def plain(row: Any) -> Any:
        return row and {token: (entry.logprob, entry.rank) for token, entry in row.items()}

    def rows(given: Any) -> Any:
        return given and [plain(row) for row in given]

    return [
        Answer(
            answer.token_ids,
            answer.finish_reason,
            answer.stop_reason,
            rows(answer.logprobs),
            rows(output.prompt_logprobs),
        )
        for output in outputs
        for answer in output.outputs
    ]


def differences(found: Answers, expected: Answers) -> list[str]:
    """Where answers are not what they should be; numbers have to be equal bit by bit."""
    told = []
    if len(found) != len(expected):
        told.append(f"{len(found)} answers; expected {len(expected)}")
    for number, (mine, other) in enumerate(zip(found, expected, strict=False)):
        for each in fields(Answer):
            got, wanted = getattr(mine, each.name), getattr(other, each.name)
            if got != wanted:
                told.append(f"answer {number}, {each.name}: {_first_difference(got, wanted)}")
    return told


def _first_difference(got: Any, wanted: Any) -> str:
    if not isinstance(got, list) or not isinstance(wanted, list):
        return f"{got!r}; expected {wanted!r}"
    for place, (mine, other) in enumerate(zip(got, wanted, strict=False)):
        if mine != other:
            return f"at {place}: {mine!r}; expected {other!r}"
    return f"{len(got)} entries; expected {len(wanted)}"


def sampling_params(sampling: str, greedy: Answers | None) -> list[SamplingParams]:
    """Of each prompt.

    Args:
        sampling: One of those in `VALUES`.
        greedy: What is answered without, from which stop ids are taken.
    """
    plain: dict[str, Any] = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    special: Callable[[int], dict[str, Any]] = {
        "greedy": lambda i: {},
        "seeded": lambda i: {"temperature": 0.9, "top_p": 0.95, "seed": 40 + i},
        "penalties": lambda i: {
            "repetition_penalty": 1.4,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
        },
        # What has asked for log-probabilities of its prompt finds no prefix: only one does.
        "logprobs": lambda i: {"logprobs": 3, "prompt_logprobs": 1 if i == 2 else None},
        "stop": lambda i: _stop(i, greedy[i].token_ids if greedy is not None else []),
    }[sampling]
    return [SamplingParams(**(plain | special(i))) for i in range(len(PROMPTS))]


STOPS_AT, HELD_BACK = 12, 9  # tokens


def _stop(number: int, tokens: list[int]) -> dict[str, Any]:
    """Every second request stops at a token that greedy has; the others may not yet."""
    if number % 2:
        return {"stop_token_ids": [tokens[STOPS_AT]]}
    return {"stop_token_ids": [tokens[2]], "min_tokens": HELD_BACK}


@dataclass
class Seen:
    """What happened in an engine.

    Attributes:
        traces: Of all iterations.
        largest_chunk: Most tokens of one prompt in one iteration.
    """

    traces: list[IterationTrace] = field(default_factory=list)
    largest_chunk: int = 0

    @property
    def overlaps(self) -> int:
        """Pairs of nano-operations that ran at the same time on different lanes."""
        return sum(trace.overlaps() for trace in self.traces)


def load(path: Path, **options: Any) -> tuple[LLM, Seen]:
    """An engine of a tiny model on native kernels, and what will have happened in it."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 160,
        "max_num_seqs": 8,
        "max_num_batched_tokens": TOKEN_BUDGET,
        "admission": "greedy",
        "timeline_every": 1,
    }
    llm = LLM(str(path), skip_tokenizer_init=True, **(defaults | options))
    return llm, watch(llm)


def watch(llm: LLM) -> Seen:
    """Note all that an engine does from now on; let it measure no gain, which runs sequentially."""
    executor, seen = llm.engine.executor, Seen()
    launch, add = executor.launch, executor.timeline.add

    def noted_launch(batch: Batch, *arguments: Any) -> None:
        chunks = np.diff(batch.query_start)[batch.num_decodes :]
        seen.largest_chunk = max(seen.largest_chunk, int(chunks.max(initial=0)))
        launch(batch, *arguments)

    def noted_add(trace: IterationTrace) -> None:
        add(trace)
        seen.traces.append(trace)

    executor.launch = noted_launch  # type: ignore[method-assign]
    executor.timeline.add = noted_add  # type: ignore[method-assign]
    executor.timeline.revise = lambda choice, *_: choice  # type: ignore[method-assign]
    return seen


def generate(
    llm: LLM, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[RequestOutput]:
    """Answers to prompts, all at once."""
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(given, params, use_tqdm=False)


def crowd_out(llm: LLM) -> None:
    """Give all pages of the device to others."""
    generate(llm, _CROWD, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
