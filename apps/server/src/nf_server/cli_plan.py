"""`nanoflow plan`: the commands about how a model would run."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from nf_server.byte_size import parse_byte_size
from nf_server.cli_options import (
    CudaGraphs,
    Device,
    Dtype,
    ExpertParallel,
    KvCacheTokens,
    KvDeviceBytes,
    KvHostBytes,
    LoadFormat,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    Model,
    NativeKernels,
    NativePrograms,
    Overlap,
    ParallelOutput,
    PlanDir,
    Seed,
    TensorParallelOutput,
    TensorParallelSize,
    engine_options,
)

plan = typer.Typer(
    help="Say how a model would run, and measure by which plans it should.", no_args_is_help=True
)


@plan.command()
def memory(
    model: Model,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_byte_size,
            metavar="SIZE",
            help="Plan for a device with so much memory, as 80GiB, all of it free; it need not be "
            "in this machine.",
            show_default="what is free now",
        ),
    ] = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    kv_cache_tokens: KvCacheTokens = None,
    kv_device_bytes: KvDeviceBytes = None,
    kv_host_bytes: KvHostBytes = None,
    tensor_parallel_size: TensorParallelSize = 1,
    tensor_parallel_output: TensorParallelOutput = ParallelOutput.ALL_REDUCE,
    expert_parallel: ExpertParallel = False,
    overlap: Overlap = "auto",
    plan_dir: PlanDir = None,
    cuda_graphs: CudaGraphs = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether weights, KV cache and workspace of MODEL fit; nothing is loaded.

    With several ranks it is the plan of one: its part of the model, and the memory of its device.
    Needs no more than the model's config.json. Exit code: 0 it fits, 1 it does not, or an error.
    """
    from nf_server.commands import plan as command

    options = engine_options(
        model=model,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_tokens=kv_cache_tokens,
        kv_device_bytes=kv_device_bytes,
        kv_host_bytes=kv_host_bytes,
        tensor_parallel_size=tensor_parallel_size,
        tensor_parallel_output=tensor_parallel_output.value,
        expert_parallel=expert_parallel,
        overlap=overlap,
        plan_dir=plan_dir,
        cuda_graphs=cuda_graphs,
    )
    raise typer.Exit(command.memory(options, device_memory, as_json=as_json))


class GraphFormat(StrEnum):
    """Values of --format of `plan graph`."""

    TEXT = "text"
    DOT = "dot"
    JSON = "json"


@plan.command(name="graph")
def plan_graph(
    model: Model,
    form: Annotated[
        GraphFormat, typer.Option("--format", help="A table, a graph for Graphviz, or JSON.")
    ] = GraphFormat.TEXT,
    tensor_parallel_size: TensorParallelSize = 1,
    tensor_parallel_output: TensorParallelOutput = ParallelOutput.ALL_REDUCE,
    expert_parallel: ExpertParallel = False,
) -> None:
    """Print what MODEL computes, operation by operation, and what each waits for.

    With several ranks it is what one of them computes.

    Needs no more than the model's config.json. Exit code: 0, or 1 after an error.
    """
    from nf_server.commands import plan_graph as command

    options = engine_options(
        model=model,
        tensor_parallel_size=tensor_parallel_size,
        tensor_parallel_output=tensor_parallel_output.value,
        expert_parallel=expert_parallel,
    )
    raise typer.Exit(command.graph(options, form.value))


@plan.command(name="show")
def plan_show(
    source: Annotated[
        str, typer.Argument(metavar="TEMPLATE|FILE", help="A plan's name, or a file with plans.")
    ],
    model: Annotated[str, typer.Option(help="A Hugging Face model folder, or a hub id.")],
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the plan as --overlap takes it, to change it."),
    ] = False,
    tensor_parallel_size: TensorParallelSize = 1,
    tensor_parallel_output: TensorParallelOutput = ParallelOutput.ALL_REDUCE,
    expert_parallel: ExpertParallel = False,
) -> None:
    """Print the lanes of a plan for a model, and what each of them runs in which order.

    Needs no more than the model's config.json. A plan that cannot be run is refused, with the
    reason. Exit code: 0, or 1 after an error.
    """
    from nf_server.commands import plan_show as command

    options = engine_options(
        model=model,
        tensor_parallel_size=tensor_parallel_size,
        tensor_parallel_output=tensor_parallel_output.value,
        expert_parallel=expert_parallel,
    )
    raise typer.Exit(command.show(source, options, as_json=as_json))


@plan.command(name="measure")
def plan_measure(
    model: Model,
    loads: Annotated[
        str | None,
        typer.Option(
            metavar="LOAD,...",
            help="Batches to measure, each as DECODESxCONTEXT, +PREFILL or both, such as "
            "32x1024,32x128+256,+512.",
            show_default="decodes alone, half prefill, prefill alone, as far as they fit",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Iterations of each plan with each load.", min=4)
    ] = 15,
    plan_dir: PlanDir = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to write, instead of --plan-dir."
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    kv_cache_tokens: KvCacheTokens = None,
    kv_device_bytes: KvDeviceBytes = None,
    tensor_parallel_size: TensorParallelSize = 1,
    tensor_parallel_output: TensorParallelOutput = ParallelOutput.ALL_REDUCE,
    expert_parallel: ExpertParallel = False,
    load_format: LoadFormat = "auto",
    seed: Seed = 0,
    native_kernels: NativeKernels = True,
    native_programs: NativePrograms = True,
) -> None:
    """Measure which plans are faster for MODEL on this device, for `--overlap auto`.

    Runs made-up batches by every plan that ships, in turns with the sequential one. A plan is taken
    for batches for which it was faster in three of four iterations. A saved plan set that knows
    more is not replaced. Exit code: 0, 1 after an error, 130 after Ctrl+C, with what was measured
    by then saved.
    """
    from nf_server.commands import plan_measure as command

    options = engine_options(
        model=model,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_tokens=kv_cache_tokens,
        kv_device_bytes=kv_device_bytes,
        tensor_parallel_size=tensor_parallel_size,
        tensor_parallel_output=tensor_parallel_output.value,
        expert_parallel=expert_parallel,
        load_format=load_format,
        seed=seed,
        native_kernels=native_kernels,
        native_programs=native_programs,
        cuda_graphs=False,  # which have no times of operations
    )
    raise typer.Exit(
        command.measure(options, loads, rounds=rounds, plan_dir=plan_dir, output=output)
    )
