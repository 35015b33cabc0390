"""What an engine does once, before it can run: it starts ranks, and finds what cannot work."""

import logging
from dataclasses import asdict

from nf_kernels import ops
from nf_kernels.cost import Category
from nf_runtime.config import EngineConfig
from nf_runtime.device import pick_device
from nf_runtime.errors import ModelLoadError
from nf_runtime.graph import LayerGraph
from nf_runtime.loaded_model import LoadedModel
from nf_runtime.model_source import find_model
from nf_runtime.models import read_config
from nf_runtime.pipeline.policy import OverlapPolicy
from nf_runtime.ranks.group import RankGroup

_log = logging.getLogger(__name__)


def start_ranks(config: EngineConfig) -> RankGroup:
    """Start the other ranks, once it is clear that the model can be divided between them.

    Args:
        config: Of the engine.

    Raises:
        ModelLoadError: It cannot.
    """
    config.shard().check(read_config(find_model(config.model)))
    return RankGroup(config, pick_device(config.device, 0, config.tensor_parallel_size).type)


def agree_on_memory(
    loaded: LoadedModel, policy: OverlapPolicy, group: RankGroup | None
) -> tuple[int, int]:
    """Pages of KV and the greatest length, for which every rank has the room.

    Args:
        loaded: Of rank 0.
        policy: Whose plans iterations run by.
        group: The other ranks, if there are any.

    Raises:
        ModelLoadError: A rank has too little.
    """
    if group is not None:
        plans = policy.plan_set
        group.tell({"size": None if plans is None else plans.model_dump(mode="json")})
    own = asdict(loaded.plan_memory(policy))
    sized = [own] if group is None else [own, *group.collect("sized")]
    for rank, plan in enumerate(sized):
        if plan["problem"] is not None:
            where = f"rank {rank} of {len(sized)}: " if rank else ""
            raise ModelLoadError(f"{where}{plan['problem']}; {', or '.join(plan['advice'])}")
    smallest = min(sized, key=lambda plan: int(plan["num_pages"]))
    for advice in smallest["advice"]:
        _log.warning("%s", advice)
    return smallest["num_pages"], smallest["max_model_len"]


def require_invariance(graph: LayerGraph, operations: ops.OperationSet, ranks: int) -> None:
    """Refuse operations whose rows depend on what else is in the batch.

    Args:
        graph: What is computed.
        operations: By which implementation.
        ranks: On how many.

    Raises:
        ModelLoadError: There are some.
    """
    parts = (graph.prologue, *graph.layers, graph.epilogue)
    needed = {"sample"} | {
        operation.kind
        for part in parts
        for operation in part
        if operation.category is not Category.NETWORK
    }
    if varying := sorted(needed - operations.invariant):
        raise ModelLoadError(
            f"deterministic is set, but the {operations.name} operations {', '.join(varying)} "
            f"depend on what else is in the batch; use the native kernels of a CPU, or leave it off"
        )
    if ranks > 2:  # the order of addition depends on the place in the tensor (`Communicator`)
        raise ModelLoadError(
            f"deterministic is set and tensor_parallel_size is {ranks}, but sums over more than 2 "
            f"ranks depend on what else is in the batch; set it to 2 or 1, or leave deterministic "
            f"off"
        )
