"""What goes into an engine and what comes out of it. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nf_kvcache.stats import LowerTierStats
from nf_runtime.errors import InvalidRequestError
from nf_runtime.logprobs import RowLogprobs
from nf_runtime.sampling_params import SamplingParams
from nf_scheduler import FinishReason, Ledger

_MAX_PRIORITY = 1000


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine runs.

    Attributes:
        model: Directory or hub id, as it was given.
        dtype: Such as `bfloat16`.
        device: Such as `cpu` or `cuda:0`.
        vocab_size: Token ids are below this.
        max_model_len: Tokens of prompt and answer together.
        num_pages: Pages of the KV cache.
        page_size: Token slots of a page.
        eos_token_ids: End-of-sequence tokens.
        weight_bytes: Of all weights, on all ranks.
        startup_seconds: Duration of each phase of starting.
        overlap: By which plans iterations run since the start, in a line.
    """

    model: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    num_pages: int
    page_size: int
    eos_token_ids: tuple[int, ...]
    weight_bytes: int
    startup_seconds: dict[str, float]
    overlap: str = ""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Where an engine stands after an iteration. Counters only grow.

    Attributes:
        num_running: Requests with pages.
        num_waiting: Requests without, and those whose KV is on its way up from a lower tier.
        num_restoring: The latter of these.
        queued_prompt_tokens: Prompt tokens of those in the queue.
        tenants: Tenants that have requests, and some that had.
        kv_pages_total: Pages of the KV cache.
        kv_pages_used: Pages that requests refer to.
        kv_pages_cached: Unused pages that a later prompt may find.
        preemptions: Counter of requests that gave up their pages.
        refused: Counter of requests that the queue had no room for.
        timeouts: Counter of requests that ran out of time.
        prefix_queried_tokens: Counter of prompt tokens looked up.
        prefix_hit_tokens: Counter of prompt tokens found.
        prefix_hit_tokens_by_tier: The same by where they were found.
        iterations: Counter.
        iterations_ahead: Counter of those that were started while another one ran.
        iteration_tokens: Counter of tokens computed.
        busy_seconds: Counter of time spent in iterations.
        last_step_time: Unix time of the last iteration; 0 before the first.
        overlap_steps: Counter of iterations by plan and by why they ran by it.
        cuda_graph_steps: Counter of iterations that were launched as one graph.
        overlap_gain: For each plan, measured time of sequential iterations by that of its own.
        lower_tiers: Of the tiers of the KV cache below the device; None if there are none.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_restoring: int = 0
    queued_prompt_tokens: int = 0
    tenants: int = 0
    kv_pages_total: int = 0
    kv_pages_used: int = 0
    kv_pages_cached: int = 0
    preemptions: int = 0
    refused: int = 0
    timeouts: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_hit_tokens_by_tier: Mapping[str, int] = field(default_factory=dict)
    iterations: int = 0
    iterations_ahead: int = 0
    iteration_tokens: int = 0
    busy_seconds: float = 0.0
    last_step_time: float = 0.0
    overlap_steps: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    cuda_graph_steps: int = 0
    overlap_gain: Mapping[str, float] = field(default_factory=dict)
    lower_tiers: LowerTierStats | None = None


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What besides the prompt decides when and next to whom a request runs.

    Attributes:
        cache_salt: Only requests with the same one share KV.
        priority: For the policy `priority`: lower goes first.
        tenant: Who asks. Tenants that wait get equal shares.
        request_class: For the policy `slo`: which service level it has.
        timeout_seconds: It ends so long after its arrival, whatever it has by then.

    Raises:
        InvalidRequestError: One of them is of another type or out of range.
    """

    cache_salt: str = ""
    priority: int = 0
    tenant: str = ""
    request_class: str = ""
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("cache_salt", "tenant", "request_class"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise InvalidRequestError(f"{name} is {value!r}; expected a string", param=name)
        if type(self.priority) is not int or abs(self.priority) > _MAX_PRIORITY:
            raise InvalidRequestError(
                f"priority is {self.priority!r}; expected an integer from -{_MAX_PRIORITY} to "
                f"{_MAX_PRIORITY}, lower goes first",
                param="priority",
            )
        seconds = self.timeout_seconds
        if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
            raise InvalidRequestError(
                f"timeout_seconds is {seconds!r}; expected a number above 0",
                param="timeout_seconds",
            )


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate, checked already (see `nf_runtime.validation`).

    Attributes:
        request_id: Unique among live requests.
        prompt_token_ids: At least one.
        params: How its tokens are chosen; `n` is not looked at.
        seed: In [0, 2**64).
        options: When and next to whom it runs.
        fork_of: A request with the same prompt, to begin with its KV.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    options: RequestOptions = RequestOptions()
    fork_of: str | None = None


@dataclass(slots=True)
class TokenOutput:
    """One token of one request, or its end.

    Attributes:
        request_id: Of the request.
        token_id: None when it ends without a token (aborted).
        finish_reason: `stop`, `length`, `abort` or `timeout`, on the last output.
        stop_token: The token that ended it.
        logprobs: Of this token, when wanted.
        prompt_logprobs: With the first token, when wanted; None for the first prompt token.
        ledger: On the last output.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    logprobs: RowLogprobs | None = None
    prompt_logprobs: list[RowLogprobs] | None = None
    ledger: Ledger | None = None
