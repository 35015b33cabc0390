"""The `nanoflow` command line; whatever is heavy is imported by the command that needs it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from nf_server.byte_size import parse_byte_size
from nf_server.service_level import parse_service_levels

app = typer.Typer(
    name="nanoflow",
    help="NanoFlow: serve and run language models.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class LogLevel(StrEnum):
    """Values of --log-level."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class GenerationConfig(StrEnum):
    """Values of --generation-config."""

    AUTO = "auto"
    VLLM = "vllm"


class PolicyName(StrEnum):
    """Values of --policy."""

    FCFS = "fcfs"
    PRIORITY = "priority"
    SHORTEST = "shortest"
    PREFIX = "prefix"
    SLO = "slo"


class AdmissionName(StrEnum):
    """Values of --admission."""

    PREDICT = "predict"
    RESERVE = "reserve"
    GREEDY = "greedy"


class ParallelOutput(StrEnum):
    """Values of --tensor-parallel-output."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"


class SimulatedAdmission(StrEnum):
    """Values of --admission of `simulate`."""

    PREDICT = "predict"
    RESERVE = "reserve"
    GREEDY = "greedy"
    ORACLE = "oracle"


Model = Annotated[str, typer.Argument(help="A Hugging Face model folder, or a hub id.")]
Dtype = Annotated[
    str, typer.Option(help="auto, bfloat16, float16 or float32; auto is the checkpoint's.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer together.", show_default="model's")
]
MaxNumSeqs = Annotated[
    int | None, typer.Option(help="Most sequences in one batch.", show_default="engine's")
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(help="Most tokens in one batch.", show_default="512 on a CPU, 2048 on a GPU"),
]
LoadFormat = Annotated[
    str, typer.Option(help="auto, safetensors, or dummy for random weights from a config alone.")
]
Seed = Annotated[int, typer.Option(help="Seed of the engine.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or hub id of the tokenizer.", show_default="MODEL")
]
MaxNumQueuedReqs = Annotated[
    int,
    typer.Option(help="Requests that may wait for their first token; more are refused.", min=1),
]
MaxNumQueuedTokens = Annotated[
    int | None,
    typer.Option(help="Prompt tokens of these, together.", min=1, show_default="no bound"),
]
PolicyOption = Annotated[
    PolicyName,
    typer.Option(
        help="Who goes first: who came first, the lowest 'priority', the least work, those whose "
        "prefix is cached, or those whose --service-level is due."
    ),
]
ServiceLevels = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[CLASS:]TTFT,TPOT",
        help="For --policy slo: seconds to the first token and per token after it, as 0.5,0.05, "
        "of all requests or of those with this 'request_class'; repeatable.",
    ),
]
AdmissionOption = Annotated[
    AdmissionName,
    typer.Option(
        help="When a request may start: if the predicted peak of all fits the KV cache, if all "
        "could reach their max_tokens, or if it fits now."
    ),
]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        help="Ranks that share the model, each a process with a GPU of its own, or a part of the "
        "CPU.",
        min=1,
    ),
]
TensorParallelOutput = Annotated[
    ParallelOutput,
    typer.Option(
        help="How ranks join the attention output: add up parts of a sum, or gather heads and then "
        "columns; the same tokens."
    ),
]
ExpertParallel = Annotated[
    bool,
    typer.Option(
        "--expert-parallel", help="Give each rank whole experts instead of a part of each."
    ),
]
AsyncScheduling = Annotated[
    bool, typer.Option(help="Form and start each iteration while the one before runs.")
]
KvCacheTokens = Annotated[
    int | None, typer.Option(help="Size of the KV cache in tokens.", show_default="from memory")
]
KvDeviceBytes = Annotated[
    int | None,
    typer.Option(
        parser=parse_byte_size,
        metavar="SIZE",
        help="Size of the KV cache in bytes, as 8GiB, instead of tokens.",
        show_default="from memory",
    ),
]
KvHostBytes = Annotated[
    int | None,
    typer.Option(
        parser=parse_byte_size,
        metavar="SIZE",
        help="Most memory for KV that the device has no room for, as 8GiB.",
        show_default="no host tier; 1GiB with --kv-ssd-dir",
    ),
]
KvSsdDir = Annotated[
    str | None,
    typer.Option(help="Directory for KV that outlives the process.", show_default="no SSD tier"),
]
KvSsdMaxBytes = Annotated[
    int | None,
    typer.Option(
        parser=parse_byte_size,
        metavar="SIZE",
        help="Most bytes in --kv-ssd-dir for this model, as 100GiB.",
        show_default="half of what is free, at most 64GiB",
    ),
]
ReplayLogDir = Annotated[
    str | None,
    typer.Option(
        help="Directory for a log from which `nanoflow replay` repeats what was decided.",
        show_default="no log",
    ),
]
ReplayLogMaxBytes = Annotated[
    int,
    typer.Option(
        parser=parse_byte_size,
        metavar="SIZE",
        help="Most bytes in --replay-log-dir; the log ends at half of it.",
    ),
]
ReplayLogTokens = Annotated[
    bool,
    typer.Option(
        "--replay-log-tokens",
        help="Write prompts and answers into the log; else only which prefixes are alike.",
    ),
]
NativeKernels = Annotated[bool, typer.Option(help="Use the compiled kernels where there are some.")]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Give a request the same tokens in every dtype, whatever else runs; refuse to start "
        "where no operations do.",
    ),
]
GenerationConfigOption = Annotated[
    GenerationConfig,
    typer.Option(
        help="Where default sampling parameters come from: auto is the model's "
        "generation_config.json, vllm the API's own."
    ),
]


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

    options = _engine_options(
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
        _engine_options(
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
            native_kernels=native_kernels,
            deterministic=deterministic,
        ),
        {name: value for name, value in sampling.items() if value is not None},
        prompt,
        chat=chat,
        use_generation_config=generation_config is GenerationConfig.AUTO,
        as_json=as_json,
    )


plan = typer.Typer(help="Say beforehand how a model would run.", no_args_is_help=True)
app.add_typer(plan, name="plan")


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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether weights, KV cache and workspace of MODEL fit; nothing is loaded.

    With several ranks it is the plan of one: its part of the model, and the memory of its device.
    Needs no more than the model's config.json. Exit code: 0 it fits, 1 it does not, or an error.
    """
    from nf_server.commands import plan as command

    options = _engine_options(
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

    options = _engine_options(
        model=model,
        tensor_parallel_size=tensor_parallel_size,
        tensor_parallel_output=tensor_parallel_output.value,
        expert_parallel=expert_parallel,
    )
    raise typer.Exit(command.graph(options, form.value))


@app.command()
def simulate(
    trace: Annotated[
        str,
        typer.Option(
            metavar="FILE.csv",
            help="Trace with the columns TIMESTAMP, ContextTokens, GeneratedTokens.",
        ),
    ],
    requests: Annotated[
        int | None, typer.Option(help="Requests to take.", min=1, show_default="all")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests per second, at random; inf is all at once.",
            show_default="the trace's times; all at once if it has none",
        ),
    ] = None,
    policy: PolicyOption = PolicyName.FCFS,
    service_level: ServiceLevels = None,
    admission: Annotated[
        SimulatedAdmission,
        typer.Option(help="When a request may start; oracle knows how long answers get."),
    ] = SimulatedAdmission.PREDICT,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run the admissions reserve, predict and oracle.")
    ] = False,
    pages: Annotated[int, typer.Option(help="Pages of the KV cache.", min=1)] = 20_000,
    page_size: Annotated[int, typer.Option(help="Tokens of a page.", min=1)] = 16,
    max_tokens: Annotated[int, typer.Option(help="Limit of every answer.", min=1)] = 1024,
    max_model_len: Annotated[
        int, typer.Option(help="Tokens of prompt and answer; longer prompts are left out.", min=2)
    ] = 8192,
    max_num_seqs: Annotated[int, typer.Option(help="Most requests in one batch.", min=1)] = 1024,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Most tokens in one batch.", min=1)
    ] = 2048,
    async_scheduling: AsyncScheduling = True,
    cost: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE.json",
            help="How long iterations take: qwen3-30b-a3b-h200, llama-3-8b-h200, or a file.",
        ),
    ] = "qwen3-30b-a3b-h200",
    seed: Annotated[int, typer.Option(help="Of random arrivals.")] = 0,
    plot: Annotated[
        str, typer.Option(metavar="FILE.svg", help="Where to draw it; svg, png or pdf.")
    ] = "simulation.svg",
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run the scheduler against a trace of requests, in computed time; needs no device.

    Exit code: 0, or 1 after an error.
    """
    from nf_server.commands import simulate as command

    raise typer.Exit(
        command.run(
            trace,
            num_requests=requests,
            rate=rate,
            seed=seed,
            policy=policy.value,
            service_levels=parse_service_levels(service_level or []),
            compare=compare,
            cost=cost,
            plot=None if no_plot else plot,
            as_json=as_json,
            options={
                "num_pages": pages,
                "page_size": page_size,
                "max_tokens": max_tokens,
                "max_model_len": max_model_len,
                "max_num_seqs": max_num_seqs,
                "max_num_batched_tokens": max_num_batched_tokens,
                "admission": admission.value,
                "lag": 1 if async_scheduling else 0,
            },
        )
    )


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


def _engine_options(**options: Any) -> dict[str, Any]:
    """The options that were given; the engine has its own defaults for the others."""
    return {name: value for name, value in options.items() if value is not None}


if __name__ == "__main__":
    main()
