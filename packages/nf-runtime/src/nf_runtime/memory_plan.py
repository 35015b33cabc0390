"""What of a device's memory goes where: weights, workspace, KV. Engine and planner share the rule.

The rule: what the weights and the largest iteration leave of the memory that is free, less a
reserve, is for KV. On a CPU, whose memory belongs to others as well, it is a share of all memory at
most, unless a size was given. Of several ranks each has a plan of its own; those on a CPU have
equal parts of its memory.
"""

from dataclasses import dataclass, replace
from math import prod

import torch

from nf_kvcache import KVLayout
from nf_runtime.config import EngineConfig
from nf_runtime.device import DeviceMemory
from nf_runtime.errors import ModelLoadError
from nf_runtime.graph import ElementType, LayerGraph, Rows
from nf_runtime.kv_tiers import host_tier_bytes
from nf_runtime.model_config import ModelConfig
from nf_runtime.models import decoder_graph, find_family, layer_weights, model_weights
from nf_runtime.padded_decodes import graph_sizes
from nf_runtime.parallelism import WHOLE, Shard
from nf_runtime.pipeline.policy import OverlapPolicy
from nf_runtime.pipeline.workspace import plan_workspace

# Of all memory of a CPU: what KV takes when nobody says how much, and what then stays for others.
_CPU_SHARE = 0.1
_CPU_RESERVE = 0.05
# Of all memory of a GPU: what fragmentation and other programs may take.
_GPU_RESERVE = 0.03

# What libraries allocate on a GPU when they first run: kernels, workspaces of cuBLAS and of
# FlashInfer. An estimate: not measured on a GPU yet.
_GPU_LIBRARY_BYTES = 1 << 30
# FlashInfer's workspace, for each stream that attends.
_GPU_ATTENTION_BYTES = 256 << 20
# What a device graph has for each nano-batch: plans of attention for two windows, of 8 MiB each.
_GPU_GRAPH_BYTES = 16 << 20

# Per logit of a sampled row, beside the logit: log-probabilities in float32; with plain torch the
# values and indices of a sort, probabilities and their sums.
_SAMPLING_BYTES = {"cpu": 4, "cuda": 20}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where memory goes. All sizes are bytes.

    Attributes:
        device: Name of the device.
        total_bytes: Its memory.
        free_bytes: What of it can be had, by each rank.
        weight_bytes: Weights of the rank; if they are loaded already, `free_bytes` is what they
            left.
        weights_loaded: Whether they are.
        workspace_bytes: Activations, tables and temporaries of the largest iteration.
        host_tier_bytes: Of the host tier, where that is in the same memory; else 0.
        reserve_bytes: What is left to others when nobody says how large the KV cache is.
        page_bytes: A page of KV.
        page_size: Token slots of a page.
        num_pages: Pages of KV on the device; 0 if nothing fits.
        room_bytes: The most that KV can take.
        max_model_len: The longest sequence, in tokens.
        model_max_len: The longest that was asked for, or that the model allows.
        problem: Why an engine refuses to start so; None if it does not.
        advice: What to change, by the names of `EngineConfig`.
    """

    device: str
    total_bytes: int
    free_bytes: int
    weight_bytes: int
    weights_loaded: bool
    workspace_bytes: int
    host_tier_bytes: int
    reserve_bytes: int
    page_bytes: int
    page_size: int
    num_pages: int
    room_bytes: int
    max_model_len: int
    model_max_len: int
    problem: str | None
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether an engine starts so."""
        return self.problem is None

    @property
    def kv_bytes(self) -> int:
        """KV on the device."""
        return self.num_pages * self.page_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV fits on the device."""
        return self.num_pages * self.page_size

    @property
    def full_sequences(self) -> int:
        """Sequences of the greatest length that fit on the device together."""
        return self.kv_tokens // max(1, self.max_model_len)


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    memory: DeviceMemory,
    dtype: torch.dtype,
    *,
    policy: OverlapPolicy | None = None,
    loaded_weight_bytes: int | None = None,
    rank: int = 0,
) -> MemoryPlan:
    """Divide the memory of a device.

    Args:
        config: Which sizes were given.
        model: What is to run.
        memory: Of the device, as it is now, or as somebody says.
        dtype: Of weights, activations and KV.
        policy: What chooses plans, whose lanes may need memory each; None runs all sequentially.
        loaded_weight_bytes: Weights of the rank that are in that memory by now; None before they
            are loaded.
        rank: Whose plan it is.

    Raises:
        ModelLoadError: max_model_len is more than the model was made for, or the model cannot be
            divided between so many ranks.
    """
    config = config.on_device(memory.kind)
    shard = config.shard(rank)
    local = shard.local(model)
    if memory.kind == "cpu":
        memory = replace(
            memory,
            total_bytes=memory.total_bytes // shard.size,
            free_bytes=memory.free_bytes // shard.size,
        )
    wanted_len = config.max_model_len or model.max_position
    if wanted_len > model.max_position:
        raise ModelLoadError(
            f"max_model_len is {wanted_len}; the model was made for at most {model.max_position}"
        )
    page_size = config.page_size
    layout = KVLayout(
        local.num_layers, local.num_kv_heads, local.head_dim, dtype, page_size=page_size
    )
    page_bytes = layout.bytes_per_page
    is_loaded = loaded_weight_bytes is not None
    weights = loaded_weight_bytes
    if weights is None:
        weights = weight_bytes(model, dtype, shard)
    workspace = workspace_bytes(config, model, dtype, memory.kind, wanted_len, policy)
    if memory.kind == "cuda":
        workspace += _gpu_attention_bytes(config, policy, page_bytes)
    host_tier = host_tier_bytes(config) if memory.kind == "cpu" else 0
    reserve = int(memory.total_bytes * (_CPU_RESERVE if memory.kind == "cpu" else _GPU_RESERVE))
    room = memory.free_bytes - workspace - host_tier - (0 if is_loaded else weights)
    if config.kv_cache_tokens is not None:
        num_pages = config.kv_cache_tokens // page_size
    elif config.kv_device_bytes is not None:
        num_pages = config.kv_device_bytes // page_bytes
    else:
        room -= reserve
        share = int(memory.total_bytes * _CPU_SHARE) if memory.kind == "cpu" else room
        useful = config.max_num_seqs * -(-wanted_len // page_size)
        num_pages = max(0, min(min(room, share) // page_bytes, useful))
    max_len = wanted_len
    if config.max_model_len is None:
        max_len = min(wanted_len, num_pages * page_size)
    division = _Division(config, memory, weights, is_loaded, workspace, host_tier, dtype)
    problem, advice = division.judge(room, num_pages, page_bytes, wanted_len)
    return MemoryPlan(
        device=memory.name,
        total_bytes=memory.total_bytes,
        free_bytes=memory.free_bytes,
        weight_bytes=weights,
        weights_loaded=is_loaded,
        workspace_bytes=workspace,
        host_tier_bytes=host_tier,
        reserve_bytes=reserve,
        page_bytes=page_bytes,
        page_size=page_size,
        num_pages=num_pages,
        room_bytes=max(0, room),
        max_model_len=max_len,
        model_max_len=wanted_len,
        problem=problem,
        advice=advice,
    )


def weight_bytes(model: ModelConfig, dtype: torch.dtype, shard: Shard = WHOLE) -> int:
    """Bytes of all weights of a rank, as they are before an operation set packs them."""
    family = find_family(model.architecture)
    specs = [*model_weights(model, shard)]
    for layer in range(model.num_layers):
        specs += layer_weights(model, family, layer, shard)
    return sum(prod(spec.shape) for spec in specs) * dtype.itemsize


def workspace_bytes(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    kind: str,
    max_len: int,
    policy: OverlapPolicy | None = None,
) -> int:
    """Bytes of everything but weights and KV that the largest iteration needs.

    Args:
        config: Its largest iteration, on its device.
        model: What runs.
        dtype: Of activations.
        kind: Of device: `cpu` or `cuda`.
        max_len: Of the longest sequence, in tokens.
        policy: What chooses plans; None runs all sequentially.
    """
    shard = config.shard()
    graph = decoder_graph(model, shard)
    workspace = plan_workspace(graph, dtype.itemsize)
    total = workspace.num_bytes(tokens=config.batch_tokens, selected=config.max_num_seqs)
    total += _gathered_bytes(config, graph, dtype)
    total += max_len * model.head_dim * 4  # the table of RoPE
    total += config.max_num_seqs * model.vocab_size * _SAMPLING_BYTES[kind]
    if model.sparse_layers:  # x, gate and up, activated, and the result of every chosen expert
        lanes = 1 if policy is None else len(policy.lanes_of("moe_experts"))
        per_row = 2 * model.hidden_size + 3 * len(shard.expert_inner(model))
        total += lanes * config.batch_tokens * model.experts_per_token * per_row * 4
    return total + (_GPU_LIBRARY_BYTES if kind == "cuda" else 0)


def _gpu_attention_bytes(
    config: EngineConfig, policy: OverlapPolicy | None, page_bytes: int
) -> int:
    """What attention on lanes and in device graphs needs, besides that on the whole device."""
    plans = () if policy is None or policy.plan_set is None else policy.plan_set.plans
    lanes = set[int]()
    if policy is not None:
        lanes = {*policy.lanes_of("decode_attention"), *policy.lanes_of("prefill_attention")} - {0}
    total = len(lanes) * _GPU_ATTENTION_BYTES
    if sizes := graph_sizes(config, "cuda"):
        nano_batches = max((len(plan.nano_batches) for plan in plans), default=1)
        total += _GPU_ATTENTION_BYTES + len(sizes) * nano_batches * _GPU_GRAPH_BYTES
        total += page_bytes  # the page of what fills up their batches
    return total


def _gathered_bytes(config: EngineConfig, graph: LayerGraph, dtype: torch.dtype) -> int:
    """What the largest all-gather needs: rows lie rank by rank before they are put in place."""
    largest = 0
    for operation in (operation for part in graph.parts for operation in part):
        if operation.kind == "all_gather":
            edge = graph.edges[operation.reads["x"]]
            rows = config.max_num_seqs if operation.rows is Rows.SELECTED else config.batch_tokens
            element = 4 if edge.element is ElementType.FLOAT32 else dtype.itemsize
            largest = max(largest, rows * edge.width * element)
    return config.tensor_parallel_size * largest


def format_bytes(count: int) -> str:
    """A size for people, such as `1.5 GiB`."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


@dataclass(frozen=True, slots=True)
class _Division:
    """What is judged."""

    config: EngineConfig
    memory: DeviceMemory
    weights: int
    is_loaded: bool
    workspace: int
    host_tier: int
    dtype: torch.dtype

    def judge(
        self, room: int, num_pages: int, page_bytes: int, wanted_len: int
    ) -> tuple[str | None, tuple[str, ...]]:
        """Why this cannot be, if it cannot; and what to change."""
        config, page_size = self.config, self.config.page_size
        explicit = config.kv_cache_tokens is not None or config.kv_device_bytes is not None
        needed_pages = -(-(config.max_model_len or 1) // page_size)
        if room < needed_pages * page_bytes or (explicit and num_pages * page_bytes > room):
            wanted = max(num_pages, needed_pages) if explicit else needed_pages
            return self._too_little(room, wanted * page_bytes, page_bytes)
        if num_pages < needed_pages:
            setting = "kv_cache_tokens" if config.kv_device_bytes is None else "kv_device_bytes"
            return (
                f"the KV cache has {num_pages} pages of {page_size} tokens, less than one sequence "
                f"of {wanted_len}",
                (f"lower max_model_len or raise {setting}",),
            )
        if config.max_model_len is None and num_pages * page_size < wanted_len:
            needed = -(-wanted_len // page_size)
            more = ""
            if needed * page_bytes <= room:
                more = f", or set kv_cache_tokens to {needed * page_size}"
                if config.kv_device_bytes is not None:
                    more = f", or set kv_device_bytes to {needed * page_bytes}"
            return None, (
                f"sequences of the model's {wanted_len} tokens do not fit, the longest have "
                f"{num_pages * page_size}: set max_model_len to that if it is enough{more}",
            )
        return None, ()

    def _too_little(self, room: int, wanted: int, page_bytes: int) -> tuple[str, tuple[str, ...]]:
        config = self.config
        fixed = [f"the workspace of an iteration {format_bytes(self.workspace)}"]
        if not self.is_loaded:
            fixed.insert(0, f"the weights take {format_bytes(self.weights)}")
        if self.host_tier:
            fixed.append(f"the host tier {format_bytes(self.host_tier)}")
        problem = (
            f"{self.memory.name} has {format_bytes(self.memory.free_bytes)} of memory free: "
            f"{', '.join(fixed)} and {format_bytes(wanted)} of KV do not fit"
        )
        advice = []
        if room >= page_bytes:
            num_bytes = room // page_bytes * page_bytes
            tokens = room // page_bytes * config.page_size
            if config.kv_cache_tokens is not None:
                advice.append(f"set kv_cache_tokens to {tokens} or less")
            if config.kv_device_bytes is not None:
                size = format_bytes(num_bytes)
                advice.append(f"set kv_device_bytes to {num_bytes} ({size}) or less")
            if config.max_model_len is not None and tokens < config.max_model_len:
                advice.append(f"set max_model_len to {tokens} or less")
        if self.host_tier and room + self.host_tier >= wanted:
            advice.append("lower kv_host_bytes")
        if self.workspace > max(0, wanted - room) and self.workspace > 64 << 20:
            advice.append("lower max_num_batched_tokens and max_num_seqs, which make the workspace")
        if self.dtype == torch.float32:
            advice.append("set dtype to bfloat16, which halves weights and KV")
        if not advice:
            advice.append("choose a smaller model, or a device with more memory")
        return problem, tuple(advice)
