"""`nanoflow simulate`: its options."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from nf_server.cli_options import AsyncScheduling, PolicyName, PolicyOption, ServiceLevels
from nf_server.service_level import parse_service_levels


class SimulatedAdmission(StrEnum):
    """Values of --admission of `simulate`."""

    PREDICT = "predict"
    RESERVE = "reserve"
    GREEDY = "greedy"
    ORACLE = "oracle"


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
