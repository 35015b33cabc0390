"""Small graphs of every family, and what is done to schedules to see whether a check notices."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from nf_runtime.graph import LayerGraph, Operation
from nf_runtime.model_config import ConfigReader, ModelConfig
from nf_runtime.models import FAMILIES, decoder_graph
from nf_runtime.pipeline.schedule import Code, Schedule

_SMALL: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}
MODELS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "dense": {"architectures": ["LlamaForCausalLM"]},
        "biased": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
        "window": {"architectures": ["MistralForCausalLM"], "sliding_window": 20},
        "qkv-bias": {"architectures": ["Qwen2ForCausalLM"]},
        "qk-norm": {"architectures": ["Qwen3ForCausalLM"]},
        "experts": {"architectures": ["MixtralForCausalLM"]},
        "mixed": {"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0, 2]},
        "mixed-by-step": {"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2},
    }
)
"""What config.json says beyond sizes, by a short name."""


def small_config(model: str, num_layers: int = 3) -> ModelConfig:
    values = {**_SMALL, **MODELS[model], "num_hidden_layers": num_layers}
    family = FAMILIES[values["architectures"][0]]
    return family.read_config(ConfigReader(values, Path("config.json")), {})


def small_graph(model: str, num_layers: int = 3) -> LayerGraph:
    return decoder_graph(small_config(model, num_layers))


def with_collectives(graph: LayerGraph) -> LayerGraph:
    """The same on two ranks: an all-reduce behind what adds to the residual."""

    def reduced(layer: tuple[Operation, ...]) -> tuple[Operation, ...]:
        operations: list[Operation] = []
        for operation in layer:
            operations.append(operation)
            if "hidden" in operation.writes.values():
                reduce = Operation(
                    f"{operation.name}_reduce",
                    "all_reduce",
                    reads={"x": "hidden"},
                    writes={"out": "hidden"},
                )
                operations.append(reduce)
        return tuple(operations)

    return replace(graph, layers=tuple(reduced(layer) for layer in graph.layers))


def commands_of(schedule: Schedule) -> list[list[tuple[int, int]]]:
    return [[(code, argument) for code, argument in lane.tolist()] for lane in schedule.commands]


def with_commands(schedule: Schedule, lanes: list[list[tuple[int, int]]]) -> Schedule:
    arrays = tuple(np.array(lane, dtype=np.int32).reshape(-1, 2) for lane in lanes)
    return replace(schedule, commands=arrays)


def without_command(schedule: Schedule, lane: int, place: int) -> Schedule:
    lanes = commands_of(schedule)
    del lanes[lane][place]
    return with_commands(schedule, lanes)


def waits_of(schedule: Schedule) -> list[tuple[int, int, int]]:
    """Lane, place there, and event of every wait."""
    return [
        (lane, place, argument)
        for lane, commands in enumerate(commands_of(schedule))
        for place, (code, argument) in enumerate(commands)
        if code == Code.WAIT
    ]


def check_complete(schedule: Schedule) -> None:
    """Each node is launched once, and each event signalled once, before it is waited for."""
    order = schedule.launch_order
    assert len(order) == sum(map(len, schedule.commands))
    seen = Counter((code, argument) for _, code, argument in order if code is not Code.WAIT)
    launches = {(Code.LAUNCH, number): 1 for number in range(len(schedule.nodes))}
    assert seen == launches | {(Code.SIGNAL, event): 1 for event in range(schedule.num_events)}
    assert {event for _, _, event in waits_of(schedule)} == set(range(schedule.num_events))
    for lane, commands in enumerate(commands_of(schedule)):
        assert all(
            schedule.nodes[argument, 4] == lane
            for code, argument in commands
            if code == Code.LAUNCH
        )


def known_of(schedule: Schedule) -> dict[int, list[int]]:
    """For each node, how many commands of every lane have begun before it starts, at least."""
    known = [[0] * len(schedule.commands) for _ in schedule.commands]
    events: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {}
    for lane, code, argument in schedule.launch_order:
        if code is Code.WAIT:
            known[lane] = [max(pair) for pair in zip(known[lane], events[argument], strict=True)]
        elif code is Code.LAUNCH:
            found[argument] = known[lane].copy()
        known[lane][lane] += 1
        if code is Code.SIGNAL:
            events[argument] = known[lane].copy()
    return found


def places_of(schedule: Schedule) -> dict[int, tuple[int, int]]:
    """Lane and place there of every launch."""
    return {
        argument: (lane, place)
        for lane, commands in enumerate(commands_of(schedule))
        for place, (code, argument) in enumerate(commands)
        if code == Code.LAUNCH
    }


def number_of(schedule: Schedule, operation: str, layer: int, nano_batch: int = 0) -> int:
    """The node of an operation that has a nano-batch."""
    (number,) = (
        number
        for number in range(len(schedule.nodes))
        for node in (schedule.node(number),)
        if (node.operation.name, node.layer) == (operation, layer)
        and node.first <= nano_batch < node.end
    )
    return number


def is_ordered(schedule: Schedule, first: int, second: int) -> bool:
    """Whether one node has ended before another starts, whatever the lanes' speeds."""
    lane, place = places_of(schedule)[first]
    return known_of(schedule)[second][lane] > place


def same_schedule(mine: Schedule, other: Schedule) -> bool:
    return (
        mine.num_events == other.num_events
        and np.array_equal(mine.nodes, other.nodes)
        and np.array_equal(mine.placed, other.placed)
        and len(mine.commands) == len(other.commands)
        and all(map(np.array_equal, mine.commands, other.commands))
    )
