"""The options that commands share, as typer takes them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from nf_server.byte_size import parse_byte_size


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
Overlap = Annotated[
    str,
    typer.Option(
        metavar="WORD|FILE",
        help="Plans by which operations run beside each other: auto takes those that `nanoflow "
        "plan measure` found faster here, off none; or nanoflow, nanoflow-4, pd-multiplex, "
        "two-batch, co-resident; or a file with a plan or plan set.",
    ),
]
PlanDir = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Where the plan sets of --overlap auto are.",
        show_default="~/.cache/nanoflow/plans",
    ),
]
NativePrograms = Annotated[
    bool, typer.Option(help="On a CPU, run recorded operations without Python.")
]
CudaGraphs = Annotated[
    bool,
    typer.Option(help="On a GPU, launch iterations of decodes as one graph where that is faster."),
]
TimelineEvery = Annotated[
    int, typer.Option(help="Note the times of one in so many iterations; 0 of none.", min=0)
]


def engine_options(**options: Any) -> dict[str, Any]:
    """The options that were given; the engine has its own defaults for the others."""
    return {name: value for name, value in options.items() if value is not None}
