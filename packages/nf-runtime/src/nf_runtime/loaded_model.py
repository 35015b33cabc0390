"""A model as one rank has loaded it, and what runs it there."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nf_kernels import ops
from nf_kernels.collectives import Communicator
from nf_kvcache import KVCache
from nf_kvcache.copier import Copier
from nf_runtime.checkpoint import Checkpoint
from nf_runtime.config import EngineConfig
from nf_runtime.device import measure_memory, pick_device, pick_dtype
from nf_runtime.executor import Executor
from nf_runtime.graph import LayerGraph
from nf_runtime.kv_tiers import make_kv_cache
from nf_runtime.memory_plan import MemoryPlan, plan_memory
from nf_runtime.model_config import ModelConfig
from nf_runtime.model_source import find_model
from nf_runtime.models import decoder_graph, find_family, read_config
from nf_runtime.padded_decodes import graph_sizes
from nf_runtime.parallelism import Shard
from nf_runtime.pipeline.policy import OverlapPolicy
from nf_runtime.replay.recorder import Recorder
from nf_runtime.rope import cos_sin_table
from nf_runtime.sampler import TokenSampler
from nf_runtime.weights import ModelWeights, load_weights, make_weights, pack_weights


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A rank's part of a model, on its device.

    Attributes:
        config: Of the engine, on the kind of device.
        model: The whole model.
        shard: Which part it is.
        device: Where.
        dtype: Of weights, activations and KV.
        graph: What the rank computes.
        weights: Of that, packed.
        operations: That do it.
        weights_digest: Tells the weights from others; empty where nobody asks.
    """

    config: EngineConfig
    model: ModelConfig
    shard: Shard
    device: torch.device
    dtype: torch.dtype
    graph: LayerGraph
    weights: ModelWeights
    operations: ops.OperationSet
    weights_digest: str

    def plan_memory(self, policy: OverlapPolicy) -> MemoryPlan:
        """Where the memory of the device goes, now that the weights are there.

        Args:
            policy: What will choose plans.
        """
        return plan_memory(
            self.config,
            self.model,
            measure_memory(self.device),
            self.dtype,
            policy=policy,
            loaded_weight_bytes=self.weights.num_bytes,
            rank=self.shard.rank,
        )

    def make_kv_cache(
        self, num_pages: int, *, recorder: Recorder | None = None, copier: Copier | None = None
    ) -> KVCache:
        """The rank's KV cache; as `nf_runtime.kv_tiers.make_kv_cache`."""
        return make_kv_cache(
            self.config,
            self.shard.local(self.model),
            num_pages,
            dtype=self.dtype,
            device=self.device,
            weights_digest=self.weights_digest,
            numerics=self.operations.name + (" deterministic" if self.config.deterministic else ""),
            recorder=recorder,
            copier=copier,
            spare_pages=min(1, len(self._graph_sizes)),
        )

    @property
    def _graph_sizes(self) -> tuple[int, ...]:
        return graph_sizes(self.config, self.device.type)

    def make_executor(
        self,
        kv_layers: list[tuple[Tensor, Tensor]],
        sampler: TokenSampler,
        max_model_len: int,
        *,
        communicator: Communicator | None,
        policy: OverlapPolicy | None = None,
        timeline_every: int = 0,
    ) -> Executor:
        """What runs batches; arguments as of `Executor`.

        Raises:
            PlanError: A plan of the policy does not fit.
        """
        config = self.config
        return Executor(
            self.graph,
            self.weights,
            kv_layers,
            self.operations,
            sampler,
            cos_sin=cos_sin_table(self.model, max_model_len).to(self.device),
            page_size=config.page_size,
            max_tokens=config.batch_tokens,
            max_requests=config.max_num_seqs,
            policy=policy,
            asynchronous=config.async_scheduling,
            communicator=communicator,
            programs=config.native_programs,
            graph_sizes=self._graph_sizes,
            timeline_every=timeline_every,
        )


def load_model(
    config: EngineConfig, rank: int = 0, *, check: Callable[[], None] = lambda: None
) -> LoadedModel:
    """Load the part of a model that a rank has.

    Args:
        config: Of the engine.
        rank: Which one.
        check: Called before each layer; what it raises ends the loading.

    Raises:
        ModelLoadError: The model cannot be loaded, or cannot be divided so.
    """
    path = find_model(config.model)
    model = read_config(path)
    device = pick_device(config.device, rank, config.tensor_parallel_size)
    config = config.on_device(device.type)
    dtype = pick_dtype(config.dtype, model)
    family = find_family(model.architecture)
    shard = config.shard(rank)
    graph = decoder_graph(model, shard)
    if config.load_format == "dummy":
        weights = make_weights(
            model, family, dtype=dtype, device=device, seed=config.seed, shard=shard, check=check
        )
    else:
        weights = load_weights(
            model, family, Checkpoint(path), dtype=dtype, device=device, shard=shard, check=check
        )
    operations = ops.load(device, native=config.native_kernels)
    digest = weights.digest() if config.kv_ssd_dir is not None else ""
    pack_weights(weights, graph, operations)
    return LoadedModel(config, model, shard, device, dtype, graph, weights, operations, digest)
