"""`nanoflow plan`: how a model would run, said before it is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nf_server.commands.failure import fail
from nf_server.commands.flags import as_flags

if TYPE_CHECKING:
    from nf_runtime.memory_plan import MemoryPlan

_BAR_WIDTH = 40


def memory(engine_options: dict[str, Any], device_memory: int | None, *, as_json: bool) -> int:
    """Print where the memory of a device would go; the exit code, 0 if all fits.

    Args:
        engine_options: Fields of `EngineConfig`.
        device_memory: Bytes of a device that is free and need not be here; None measures.
        as_json: Print one JSON object instead of a table.
    """
    # The imports take seconds, and come after what can be wrong without them.
    from nf_runtime import EngineConfig, NanoFlowError
    from nf_runtime.device import (
        DeviceMemory,
        measure_memory,
        name_device,
        pick_device,
        pick_dtype,
    )
    from nf_runtime.memory_plan import plan_memory
    from nf_runtime.model_source import find_model
    from nf_runtime.models import decoder_graph, read_config
    from nf_runtime.pipeline.plan_store import find_policy

    try:
        config = EngineConfig(**engine_options)
        model = read_config(find_model(config.model, config_only=True))
        if device_memory is None:
            device = pick_device(config.device)
            there, measured_on = measure_memory(device), name_device(device)
        else:
            measured_on = ""  # of a device that is not here, no plans were measured
            name = "cuda" if config.device == "auto" else config.device
            kind = name.partition(":")[0]
            there = DeviceMemory(name, kind, device_memory, device_memory)
        dtype = pick_dtype(config.dtype, model)
        policy = find_policy(
            config.overlap,
            graph=decoder_graph(model, config.shard()),
            model=model,
            device=measured_on,
            dtype=str(dtype).removeprefix("torch."),
            plan_dir=config.plan_dir,
            tensor_parallel_size=config.tensor_parallel_size,
        )
        plan = plan_memory(config, model, there, dtype, policy=policy)
    except NanoFlowError as error:
        fail(error)
    advice = [as_flags(text) for text in plan.advice]
    print(_as_json(plan, advice) if as_json else _as_table(plan, advice))
    return 0 if plan.fits else 1


def _as_json(plan: MemoryPlan, advice: list[str]) -> str:
    values = asdict(plan) | {
        "advice": advice,
        "fits": plan.fits,
        "kv_bytes": plan.kv_bytes,
        "kv_tokens": plan.kv_tokens,
        "full_sequences": plan.full_sequences,
    }
    return json.dumps(values, indent=2)


def _as_table(plan: MemoryPlan, advice: list[str]) -> str:
    from nf_runtime.memory_plan import format_bytes

    parts = {
        "weights": plan.weight_bytes,
        "workspace": plan.workspace_bytes,
        "KV cache": plan.kv_bytes,
        "host tier": plan.host_tier_bytes,
    }
    scale = max(plan.free_bytes, sum(parts.values()), 1)
    lines = [
        f"{plan.device}: {format_bytes(plan.free_bytes)} free of {format_bytes(plan.total_bytes)}",
        "",
    ]
    for name, size in parts.items():
        if size or name != "host tier":
            bar = "#" * round(_BAR_WIDTH * size / scale)
            lines.append(f"  {name:<10} {format_bytes(size):>10}  {bar}".rstrip())
    left = plan.free_bytes - sum(parts.values())
    lines.append(f"  {'left' if left >= 0 else 'missing':<10} {format_bytes(abs(left)):>10}")
    lines += [
        "",
        f"KV cache: {plan.kv_tokens} tokens in {plan.num_pages} pages of {plan.page_size}, "
        f"{format_bytes(plan.page_bytes)} each; room for {plan.full_sequences} sequences of "
        f"{plan.max_model_len} tokens",
    ]
    if plan.problem is None:
        lines.append("It fits.")
    else:
        lines.append(f"It does not fit: {plan.problem}.")
    lines += [f"  - {text}" for text in advice]
    return "\n".join(lines)
