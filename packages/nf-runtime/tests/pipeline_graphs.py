"""Small graphs of every family, and what is done to schedules to see whether a check notices."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from nf_runtime.graph import LayerGraph, Operation
from nf_runtime.model_config import ConfigReader
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


def small_graph(model: str, num_layers: int = 3) -> LayerGraph:
    values = {**_SMALL, **MODELS[model], "num_hidden_layers": num_layers}
    family = FAMILIES[values["architectures"][0]]
    return decoder_graph(family.read_config(ConfigReader(values, Path("config.json")), {}))


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


def starts_signalled(schedule: Schedule) -> set[int]:
    """Events of starts: signalled with a launch behind them that waits for nothing in between."""
    ends = set()
    for commands in commands_of(schedule):
        previous = None
        for code, argument in commands:
            if code == Code.SIGNAL and previous == Code.LAUNCH:
                ends.add(argument)
            previous = code
    return set(range(schedule.num_events)) - ends


def same_schedule(mine: Schedule, other: Schedule) -> bool:
    return (
        mine.num_events == other.num_events
        and np.array_equal(mine.nodes, other.nodes)
        and np.array_equal(mine.placed, other.placed)
        and len(mine.commands) == len(other.commands)
        and all(map(np.array_equal, mine.commands, other.commands))
    )
