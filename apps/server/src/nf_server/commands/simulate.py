"""`nanoflow simulate`: a scheduler against a trace, without a model and without a device."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nf_scheduler import POLICIES, Policy, ServiceLevel, SloAware
from nf_scheduler.sim import (
    IterationCost,
    Simulation,
    SimulationConfig,
    SimulationReport,
    Trace,
    load_cost,
    read_trace,
)
from nf_server.commands.failure import fail

_COMPARED = ("reserve", "predict", "oracle")


def run(
    trace: str,
    *,
    num_requests: int | None,
    rate: float | None,
    seed: int,
    policy: str,
    service_levels: dict[str, dict[str, float]],
    compare: bool,
    cost: str,
    plot: str | None,
    as_json: bool,
    options: dict[str, Any],
) -> int:
    """Simulate, print what came of it, and draw it; the exit code.

    Args:
        trace: Path of the trace.
        num_requests: Most requests to take; None takes all.
        rate: Requests per second; None takes the trace's times.
        seed: Of random arrivals.
        policy: Who goes first.
        service_levels: For the policy `slo`: targets by class.
        compare: Simulate reserving, predicting and knowing the lengths of answers.
        cost: Name or path of a cost file.
        plot: Path of the picture; None draws none.
        as_json: Print one JSON object instead of a table.
        options: Fields of `SimulationConfig`.
    """
    admissions = _COMPARED if compare else (options.pop("admission"),)
    options.pop("admission", None)
    try:
        if plot is not None:
            from nf_server.plots import check_plots

            check_plots(plot)
        costs = load_cost(cost)
        configs = [SimulationConfig(**options, admission=name) for name in admissions]
        # A context without room for an answer of one token is no context.
        requests = read_trace(
            trace,
            num_requests=num_requests,
            rate=rate,
            max_prompt_len=configs[0].max_model_len - 1,
            seed=seed,
        )
        reports = {
            config.admission: _simulate(requests, config, costs, policy, service_levels)
            for config in configs
        }
    except (ValueError, ImportError) as error:
        fail(error)
    if plot is not None:
        from nf_server.plots import draw_timelines

        draw_timelines(reports, f"{Path(trace).name}, {policy}, {costs.name}", plot)
    if as_json:
        values = {name: report.to_dict() for name, report in reports.items()}
        print(json.dumps({"cost": costs.name, "policy": policy, "runs": values}))
    else:
        print(_table(reports, costs, requests, configs[0]))
        if plot is not None:
            print(f"\nPages, requests and tokens over time: {plot}")
    return 0


def _simulate(
    trace: Trace,
    config: SimulationConfig,
    cost: IterationCost,
    policy: str,
    service_levels: dict[str, dict[str, float]],
) -> SimulationReport:
    with tqdm(
        total=len(trace), desc=config.admission, unit="request", disable=None, file=sys.stderr
    ) as bar:
        return Simulation(trace, config, cost, _make_policy(policy, service_levels)).run(bar.update)


def _make_policy(name: str, service_levels: dict[str, dict[str, float]]) -> Policy:
    if name != SloAware.name:
        return POLICIES[name]()
    return SloAware({key: ServiceLevel(**targets) for key, targets in service_levels.items()})


def _table(
    reports: dict[str, SimulationReport],
    cost: IterationCost,
    trace: Trace,
    config: SimulationConfig,
) -> str:
    rows: list[tuple[str, Sequence[str]]] = [
        ("", list(reports)),
        *_throughput(reports),
        *_latencies(reports),
    ]

    def add(label: str, form: str, *names: str) -> None:
        for name in names:
            rows.append((label, [format(getattr(r, name), form) for r in reports.values()]))

    add("preemptions", "d", "num_preemptions")
    add("requests preempted", ".2%", "preempted_share")
    add("requests running", ".0f", "mean_running")
    add("pages in use", ".0%", "mean_pages")
    add("  at the peak", ".0%", "peak_pages")
    add("iterations", "d", "num_iterations")
    add("  tokens in each", ".0f", "tokens_per_iteration")
    add("device busy", ".1%", "busy_share")
    width = max(len(label) for label, _ in rows)
    lines = [
        f"{len(trace)} requests; {config.num_pages} pages of {config.page_size} tokens; "
        f"{cost.name}",
        cost.source,
        "",
    ]
    if trace.num_too_long:
        lines.insert(
            1,
            f"{trace.num_too_long} prompts are longer than the context of {config.max_model_len} "
            "tokens and were left out.",
        )
    lines += [
        f"{label:<{width}}" + "".join(f"{value:>14}" for value in values) for label, values in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _throughput(reports: dict[str, SimulationReport]) -> list[tuple[str, list[str]]]:
    runs = list(reports.values())
    rows = [
        ("requests/s", [f"{run.requests_per_second:.2f}" for run in runs]),
        ("output tokens/s", [f"{run.output_tokens_per_second:.0f}" for run in runs]),
        ("all tokens/s", [f"{run.total_tokens_per_second:.0f}" for run in runs]),
    ]
    for name in ("reserve", "oracle"):
        if len(runs) > 1 and name in reports:
            base = reports[name].requests_per_second
            ratios = [f"{run.requests_per_second / base:.3f}" for run in runs]
            rows.append((f"  beside {name}", ratios))
    return rows


def _latencies(reports: dict[str, SimulationReport]) -> list[tuple[str, list[str]]]:
    rows = []
    for label, name in (("TTFT", "ttft"), ("TPOT", "tpot"), ("latency", "latency")):
        spreads = [getattr(report, name) for report in reports.values()]
        for level in ("p50", "p90", "p99"):
            values = [f"{getattr(spread, level):.4g} s" for spread in spreads]
            rows.append((f"{label} {level}", values))
    return rows
