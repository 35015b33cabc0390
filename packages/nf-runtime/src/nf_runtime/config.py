"""How an engine is set up."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nf_runtime.errors import NanoFlowError
from nf_runtime.parallelism import OUTPUTS, Shard
from nf_scheduler import POLICIES, SloAware

DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
POLICY_NAMES = tuple(POLICIES)
ADMISSIONS = ("predict", "reserve", "greedy")

# On a GPU the dense batch of the paper; on a CPU less, because decodes wait for all of it.
_BATCH_TOKENS = {"cpu": 512, "cuda": 2048}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_OPTIONAL = (
    *("max_model_len", "max_num_batched_tokens", "max_prefill_chunk"),
    *("kv_cache_tokens", "kv_device_bytes"),
    *("kv_host_bytes", "kv_ssd_max_bytes", "max_num_queued_reqs", "max_num_queued_tokens"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine is set up.

    Attributes:
        model: Directory in the Hugging Face layout, or a hub id.
        tokenizer: Another directory or hub id to take the tokenizer from.
        dtype: `auto` takes the checkpoint's.
        device: `auto` takes a GPU where there is one; `cuda:1` names one.
        max_model_len: Tokens of prompt and answer together; None takes the model's.
        load_format: `auto` and `safetensors` read weights, `dummy` makes random ones.
        seed: Of random weights and of requests without a seed.
        max_num_seqs: Requests that run at once.
        max_num_batched_tokens: New tokens of one iteration; None takes what suits the kind of
            device: 512 on a CPU, 2048 on a GPU.
        max_num_queued_reqs: Requests that wait for their first iteration; more are refused. None is
            no bound.
        max_num_queued_tokens: Prompt tokens of these, together.
        policy: Who goes first: `fcfs`, `priority`, `shortest`, `prefix` or `slo`
            (`nf_scheduler.policy`).
        service_levels: For the policy `slo`: seconds to the first token (`ttft`) and per token
            after it (`tpot`) by class of requests; the class "" is that of all others.
        admission: When a request may start: `predict` fits the predicted peak of all running
            requests into the KV cache, `reserve` what they could use at most, `greedy` what they
            use now (`nf_scheduler.admission`).
        max_prefill_chunk: New tokens of one request in one iteration; None takes
            `max_num_batched_tokens`.
        kv_cache_tokens: Token slots of the KV cache on the device; None takes what fits
            (`nf_runtime.memory_plan`).
        kv_device_bytes: The same in bytes.
        kv_host_bytes: Bound of the host tier, which keeps KV that the device has no room for; None
            is no host tier, or one of 1 GiB where there is an SSD tier, whose pages go through it.
        kv_ssd_dir: Directory of the SSD tier, which keeps KV beyond the end of the process; None is
            no SSD tier.
        kv_ssd_max_bytes: Bound of the SSD tier; None takes half of what is free, at most 64 GiB.
        page_size: Token slots of a page.
        enable_prefix_caching: Reuse the KV of prompts that begin alike.
        native_kernels: False runs every operation in plain torch.
        deterministic: Run only operations whose rows do not depend on each other, so that a request
            gets the same tokens in every dtype, whatever else runs, and refuse to start where there
            are none.
        tensor_parallel_size: Ranks that share the model, each a process with a device of its own;
            on a CPU they share its cores and its memory. Bytes of KV are those of each rank.
        tensor_parallel_output: How they join the attention output, one of
            `nf_runtime.parallelism.OUTPUTS`.
        expert_parallel: A rank has some experts whole, instead of a part of each.
        async_scheduling: Form and start each iteration while the one before runs. False waits for
            every iteration before it forms the next.
        overlap: Which plans run operations beside each other: `auto` those that were measured to be
            faster for this model on this device, `off` none; or the name of a template
            (`nf_runtime.pipeline.templates`), or the path of a plan or plan set.
        plan_dir: Directory with the plan sets of `auto`; None takes the user's cache directory.
        native_programs: Record native operations of a CPU once and run them without Python. False
            gives them to one lane from Python, one by one.
        cuda_graphs: Launch iterations of decodes alone on a GPU as one recorded graph each, where
            that is measured to be faster at the start. False launches each operation.
        timeline_every: One of so many iterations has the times of its operations noted; 0: none.
        replay_log_dir: Directory for logs from which decisions can be repeated
            (`nf_runtime.replay`); None writes none.
        replay_log_max_bytes: Bound of all logs in it; the one of this engine ends when it has half.
        replay_log_tokens: Write prompts and answers as they are. False writes numbers that only
            tell which prefixes are alike.
    """

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    load_format: str = "auto"
    seed: int = 0
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_prefill_chunk: int | None = None
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    policy: str = "fcfs"
    service_levels: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    admission: str = "predict"
    kv_cache_tokens: int | None = None
    kv_device_bytes: int | None = None
    kv_host_bytes: int | None = None
    kv_ssd_dir: str | None = None
    kv_ssd_max_bytes: int | None = None
    page_size: int = 16
    enable_prefix_caching: bool = True
    native_kernels: bool = True
    deterministic: bool = False
    tensor_parallel_size: int = 1
    tensor_parallel_output: str = OUTPUTS[0]
    expert_parallel: bool = False
    async_scheduling: bool = True
    overlap: str = "auto"
    plan_dir: str | None = None
    native_programs: bool = True
    cuda_graphs: bool = True
    timeline_every: int = 64
    replay_log_dir: str | None = None
    replay_log_max_bytes: int = 1 << 30
    replay_log_tokens: bool = False

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            NanoFlowError: A field has a value that no engine can run with.
        """
        choices = {
            "dtype": (self.dtype, DTYPES),
            "load_format": (self.load_format, LOAD_FORMATS),
            "policy": (self.policy, POLICY_NAMES),
            "admission": (self.admission, ADMISSIONS),
            "tensor_parallel_output": (self.tensor_parallel_output, OUTPUTS),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise NanoFlowError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
        if not _DEVICE.fullmatch(self.device):
            raise NanoFlowError(
                f"device is {self.device!r}; expected auto, cpu, cuda, or cuda: and a number"
            )
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_prefill_chunk",
            "max_num_queued_reqs",
            "max_num_queued_tokens",
            "kv_cache_tokens",
            "kv_device_bytes",
            "kv_host_bytes",
            "kv_ssd_max_bytes",
            "page_size",
            "tensor_parallel_size",
            "replay_log_max_bytes",
        ):
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise NanoFlowError(f"{name} is {value!r}; expected a positive integer")
        if type(self.timeline_every) is not int or self.timeline_every < 0:
            raise NanoFlowError(
                f"timeline_every is {self.timeline_every!r}; expected a number of iterations, or 0 "
                "for none"
            )
        if not self.overlap:
            raise NanoFlowError(
                "overlap is empty; expected auto, off, the name of a template or a file"
            )
        self._check_service_levels()
        self._check_parallelism()
        if self.kv_cache_tokens is not None and self.kv_device_bytes is not None:
            raise NanoFlowError(
                f"kv_cache_tokens is {self.kv_cache_tokens} and kv_device_bytes is "
                f"{self.kv_device_bytes}: both size the KV cache of the device; set one of them"
            )
        if self.kv_ssd_dir is None and self.kv_ssd_max_bytes is not None:
            raise NanoFlowError(
                f"kv_ssd_max_bytes is {self.kv_ssd_max_bytes}, but there is no SSD tier to bound; "
                "set kv_ssd_dir as well"
            )
        if self.replay_log_tokens and self.replay_log_dir is None:
            raise NanoFlowError(
                "replay_log_tokens is set, but there is no replay log; set replay_log_dir as well"
            )
        if self.has_lower_tiers and not self.enable_prefix_caching:
            raise NanoFlowError(
                "enable_prefix_caching is False, but the host and SSD tiers keep prefixes; leave "
                "out kv_host_bytes and kv_ssd_dir, or enable prefix caching"
            )

    def _check_parallelism(self) -> None:
        size = self.tensor_parallel_size
        if size == 1 and self.expert_parallel:
            raise NanoFlowError(
                "expert_parallel is set and tensor_parallel_size is 1, which has all experts on "
                "one rank; raise tensor_parallel_size, or leave it out"
            )
        if size > 1 and self.has_lower_tiers:
            name = "kv_host_bytes" if self.kv_ssd_dir is None else "kv_ssd_dir"
            raise NanoFlowError(
                f"tensor_parallel_size is {size} and {name} is set, but KV of several ranks is "
                f"kept on their devices alone; leave one of them out"
            )
        if size > 1 and self.device.startswith("cuda:"):
            raise NanoFlowError(
                f"tensor_parallel_size is {size} and device is {self.device!r}, which is one GPU; "
                f"set device to cuda, which takes the first {size}"
            )

    def _check_service_levels(self) -> None:
        if self.service_levels and self.policy != SloAware.name:
            raise NanoFlowError(
                f"service_levels are given and policy is {self.policy!r}, which does not look at "
                f"them; set policy to {SloAware.name!r}, or leave them out"
            )
        if self.policy == SloAware.name and not self.service_levels:
            raise NanoFlowError(
                f"policy is {SloAware.name!r}, and there are no service_levels; give at least one, "
                'such as {"": {"ttft": 1.0, "tpot": 0.1}}'
            )
        for name, targets in self.service_levels.items():
            known = isinstance(targets, Mapping) and targets.keys() <= {"ttft", "tpot"}
            if not known or not all(
                isinstance(seconds, int | float) and seconds > 0 for seconds in targets.values()
            ):
                raise NanoFlowError(
                    f"service_levels[{name!r}] is {targets!r}; expected ttft, tpot or both, in "
                    "seconds above 0"
                )

    @property
    def batch_tokens(self) -> int:
        """New tokens of one iteration, once that is known (`on_device`)."""
        if self.max_num_batched_tokens is None:
            raise RuntimeError("max_num_batched_tokens is None; call on_device first")
        return self.max_num_batched_tokens

    def shard(self, rank: int = 0) -> Shard:
        """The part of the model that a rank has."""
        return Shard(
            rank, self.tensor_parallel_size, self.expert_parallel, self.tensor_parallel_output
        )

    def on_device(self, kind: str) -> "EngineConfig":
        """The same, with what depends on the device.

        Args:
            kind: `cpu` or `cuda`.
        """
        return replace(
            self, max_num_batched_tokens=self.max_num_batched_tokens or _BATCH_TOKENS[kind]
        )

    @property
    def has_lower_tiers(self) -> bool:
        """Whether KV is kept outside the device."""
        return self.kv_host_bytes is not None or self.kv_ssd_dir is not None

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
