"""The metrics of overlap: which plans ran, why, and what they gain."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nf_runtime import EngineStats


def overlap_metrics(stats: EngineStats) -> Iterator[Metric]:
    """Iterations by plan and reason, those of graphs, and the gain of each plan compared."""
    steps = CounterMetricFamily(
        "nanoflow_overlap_steps",
        "Iterations by the plan that they ran by, and why.",
        labels=["mode", "reason"],
    )
    for mode, reasons in stats.overlap_steps.items():
        for reason, count in reasons.items():
            steps.add_metric([mode, reason], count)
    yield steps
    yield CounterMetricFamily(
        "nanoflow_cuda_graph_steps",
        "Iterations of decodes that a GPU was given as one graph.",
        value=stats.cuda_graph_steps,
    )
    gain = GaugeMetricFamily(
        "nanoflow_overlap_gain_ratio",
        "Measured time of sequential iterations by that of a plan's, with batches alike.",
        labels=["mode"],
    )
    for mode, ratio in stats.overlap_gain.items():
        gain.add_metric([mode], ratio)
    yield gain
