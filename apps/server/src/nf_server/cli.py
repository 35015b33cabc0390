"""The `nanoflow` command line; whatever is heavy is imported by the command that needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from nf_server.cli_options import (
    AdmissionName,
    AdmissionOption,
    AsyncScheduling,
    CudaGraphs,
    Deterministic,
    Device,
    Dtype,
    ExpertParallel,
    GenerationConfig,
    GenerationConfigOption,
    KvCacheTokens,
    KvDeviceBytes,
    KvHostBytes,
    KvSsdDir,
    KvSsdMaxBytes,
    LoadFormat,
    LogLevel,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumQueuedReqs,
    MaxNumQueuedTokens,
    MaxNumSeqs,
    Model,
    NativeKernels,
    NativePrograms,
    Overlap,
    ParallelOutput,
    PlanDir,
    PolicyName,
    PolicyOption,
    ReplayLogDir,
    ReplayLogMaxBytes,
    ReplayLogTokens,
    Seed,
    ServiceLevels,
    TensorParallelOutput,
    TensorParallelSize,
    TimelineEvery,
    Tokenizer,
    engine_options,
)
from nf_server.cli_plan import plan
from nf_server.cli_simulate import simulate
from nf_server.service_level import parse_service_levels

app = typer.Typer(
    name="nanoflow",
    help="NanoFlow: serve and run language models.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Name that clients use; repeatable.", show_default="from MODEL"),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    max_num_queued_reqs: MaxNumQueuedReqs = 1024,
    max_num_queued_tokens: MaxNumQueuedTokens = None,
    policy: PolicyOption = PolicyName.FCFS,
    service_level: ServiceLevels = None,
    admission: AdmissionOption = AdmissionName.PREDICT,
    tensor_parallel_size: TensorParallelSize = 1,
    tensor_parallel_output: TensorParallelOutput = ParallelOutput.ALL_REDUCE,
    expert_parallel: ExpertParallel = False,
    async_scheduling: AsyncScheduling = True,
    overlap: Overlap = "auto",
    plan_dir: PlanDir = None,
    native_programs: NativePrograms = True,
    cuda_graphs: CudaGraphs = True,
    timeline_every: TimelineEvery = 64,
    kv_cache_tokens: KvCacheTokens = None,
    kv_device_bytes: KvDeviceBytes = None,
    kv_host_bytes: KvHostBytes = None,
    kv_ssd_dir: KvSsdDir = None,
    kv_ssd_max_bytes: KvSsdMaxBytes = None,
    load_format: LoadFormat = "auto",
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    generation_config: GenerationConfigOption = GenerationConfig.AUTO,
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Reuse the KV of prompts that begin alike.")
    ] = True,
    native_kernels: NativeKernels = True,
    deterministic: Deterministic = False,
    replay_log_dir: ReplayLogDir = None,
    replay_log_max_bytes: ReplayLogMaxBytes = "1GiB",  # type: ignore[assignment]
    replay_log_tokens: ReplayLogTokens = False,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds for requests in flight after SIGTERM or Ctrl+C.", min=0)
    ] = 30.0,
    log_level: Annotated[LogLevel, typer.Option(help="Least severe records to log.")] = (
        LogLevel.INFO
    ),
) -> None:
    """Serve MODEL through an OpenAI-compatible HTTP API."""
    from nf_server.commands import serve as command

    options = engine_options(
        model=model,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_queued_reqs=max_num_queued_reqs,
        max_num_queued_tokens=max_num_queued_tokens,
        policy=policy.value,
        service_levels=parse_service_levels(service_level) if service_level else None,
        admission=admission.value,
        tensor_parallel_size=tensor_parallel_size,
        tensor_parallel_output=tensor_parallel_output.value,
        expert_parallel=expert_parallel,
        async_scheduling=async_scheduling,
        overlap=overlap,
        plan_dir=plan_dir,
        native_programs=native_programs,
        cuda_graphs=cuda_graphs,
        timeline_every=timeline_every,
        kv_cache_tokens=kv_cache_tokens,
        kv_device_bytes=kv_device_bytes,
        kv_host_bytes=kv_host_bytes,
        kv_ssd_dir=kv_ssd_dir,
        kv_ssd_max_bytes=kv_ssd_max_bytes,
        load_format=load_format,
        seed=seed,
        enable_prefix_caching=enable_prefix_caching,
        native_kernels=native_kernels,
        deterministic=deterministic,
        replay_log_dir=replay_log_dir,
        replay_log_max_bytes=replay_log_max_bytes,
        replay_log_tokens=replay_log_tokens,
    )
    raise typer.Exit(
        command.run(
            options,
            host=host,
            port=port,
            served_model_names=served_model_name or [],
            use_generation_config=generation_config is GenerationConfig.AUTO,
            shutdown_timeout=shutdown_timeout,
            log_level=log_level.value,
        )
    )


@app.command()
def replay(
    log: Annotated[str, typer.Argument(help="A log that `serve --replay-log-dir` has written.")],
    show: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST",
            help="Print these iterations, each in a line.",
            show_default="none",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: an object per line, the last for the whole.")
    ] = False,
) -> None:
    """Repeat the decisions of an engine from its log: no model, no device.

    Scheduler, KV cache and loop are the real ones; each iteration, its pages and each end of a
    request are compared with the log. Exit code: 0 all the same, 1 an error, 3 something differs.
    """
    from nf_server.commands import replay as command

    raise typer.Exit(command.run(log, show=show, as_json=as_json))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help='The prompt; "-" reads it from stdin.')],
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt through the chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token.", show_default="model's")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 makes repetition less likely.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Makes the sampling repeatable.", show_default="none")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end.")
    ] = False,
    generation_config: GenerationConfigOption = GenerationConfig.AUTO,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    kv_cache_tokens: KvCacheTokens = None,
    kv_device_bytes: KvDeviceBytes = None,
    tensor_parallel_size: TensorParallelSize = 1,
    tensor_parallel_output: TensorParallelOutput = ParallelOutput.ALL_REDUCE,
    expert_parallel: ExpertParallel = False,
    load_format: LoadFormat = "auto",
    tokenizer: Tokenizer = None,
    overlap: Overlap = "auto",
    plan_dir: PlanDir = None,
    native_programs: NativePrograms = True,
    cuda_graphs: CudaGraphs = True,
    timeline_every: TimelineEvery = 64,
    native_kernels: NativeKernels = True,
    deterministic: Deterministic = False,
) -> None:
    """Generate one answer in the terminal."""
    from nf_server.commands import generate as command

    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or None,
        "seed": seed,
        "ignore_eos": ignore_eos,
    }
    command.run(
        engine_options(
            model=model,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            kv_cache_tokens=kv_cache_tokens,
            kv_device_bytes=kv_device_bytes,
            tensor_parallel_size=tensor_parallel_size,
            tensor_parallel_output=tensor_parallel_output.value,
            expert_parallel=expert_parallel,
            load_format=load_format,
            overlap=overlap,
            plan_dir=plan_dir,
            native_programs=native_programs,
            cuda_graphs=cuda_graphs,
            timeline_every=timeline_every,
            native_kernels=native_kernels,
            deterministic=deterministic,
        ),
        {name: value for name, value in sampling.items() if value is not None},
        prompt,
        chat=chat,
        use_generation_config=generation_config is GenerationConfig.AUTO,
        as_json=as_json,
    )


@app.command()
def timeline(
    model: Model,
    overlap: Overlap = "auto",
    decodes: Annotated[
        int, typer.Option(help="Requests of the batch with one new token each.", min=0)
    ] = 32,
    context: Annotated[int, typer.Option(help="Tokens of each before it.", min=0)] = 256,
    prefill: Annotated[
        int, typer.Option(help="New tokens of one more request of the batch.", min=0)
    ] = 128,
    iterations: Annotated[int, typer.Option(help="Iterations of each plan.", min=1)] = 15,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="FILE.json", help="Where to write the trace, for Perfetto."
        ),
    ] = "timeline.json",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plan_dir: PlanDir = None,
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
    """Show when the operations of MODEL run, and what overlap gains, with a made-up batch.

    Iterations by the plan that --overlap gives such a batch take turns with sequential ones.
    Prints what was measured and a picture, and writes a trace for Perfetto or chrome://tracing.
    Exit code: 0, or 1 after an error.
    """
    from nf_server.commands import timeline as command

    options = engine_options(
        model=model,
        overlap=overlap,
        plan_dir=plan_dir,
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
        command.timeline(
            options, (decodes, context, prefill), rounds=iterations, output=output, as_json=as_json
        )
    )


app.add_typer(plan, name="plan")
app.command()(simulate)


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what to paste into a bug report."""
    from nf_server.commands import env as command

    command.run(as_json)


@app.command()
def version() -> None:
    """Print the version."""
    from nf_server import __version__

    typer.echo(__version__)


def main() -> None:
    """Entry point of the `nanoflow` command."""
    app()


if __name__ == "__main__":
    main()
