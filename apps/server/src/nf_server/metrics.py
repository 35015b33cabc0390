"""The metrics of `GET /metrics`; README.md has the table, and a test compares the two.

What the engine counts is read from its latest snapshot when somebody scrapes; what the HTTP side
counts per token is a plain integer. Nothing here runs in the engine's loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from nf_runtime import AsyncEngine
from nf_server import __version__
from nf_server.kv_metrics import kv_metrics
from nf_server.overlap_metrics import overlap_metrics
from nf_server.request_log import Outcome, RequestRecord

_LATENCY_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)


class ServerMetrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.registry = CollectorRegistry()
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self._requests = Counter(
            "nanoflow_requests",
            "API requests that ended, by how they ended.",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in Outcome:
            self._requests.labels(outcome.value)
        self._ttft = self._histogram(
            "nanoflow_time_to_first_token_seconds",
            "From the arrival of a request to its first token, in the API process.",
        )
        self._tpot = self._histogram(
            "nanoflow_time_per_output_token_seconds",
            "Mean time between the tokens of a request, after the first.",
        )
        self._total = self._histogram(
            "nanoflow_request_seconds", "From the arrival of a request to its end."
        )
        self._queue = self._histogram(
            "nanoflow_request_queue_seconds",
            "From the arrival of a request in the engine to its first iteration, or an end before.",
        )
        self.registry.register(_EngineCollector(engine, self))
        ProcessCollector(registry=self.registry)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(name, help_text, buckets=_LATENCY_BUCKETS, registry=self.registry)

    def rejected(self, code: str) -> None:
        """Count a request that never reached the engine, by the code of its error."""
        # More load, or less, is the operator's business; other rejections are the clients'.
        outcome = Outcome.QUEUE_FULL if code == "queue_full" else Outcome.REJECTED
        self._requests.labels(outcome.value).inc()

    def finished(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        if record.outcome is None:
            raise ValueError("the record has not ended")
        self._requests.labels(record.outcome.value).inc()
        self._total.observe(record.total_seconds)
        for histogram, value in (
            (self._ttft, record.ttft_seconds),
            (self._tpot, record.tpot_seconds),
            (self._queue, record.queue_seconds),
        ):
            if value is not None:
                histogram.observe(value)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition for an Accept header: (body, content type)."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type


class _EngineCollector(Collector):
    """Reads the engine's snapshot at scrape time."""

    def __init__(self, engine: AsyncEngine, totals: ServerMetrics) -> None:
        self._engine = engine
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        yield from self._constants()
        yield from self._tokens()
        yield from self._engine_state()

    def _constants(self) -> Iterator[Metric]:
        info = self._engine.info
        build = GaugeMetricFamily(
            "nanoflow_build_info",
            "What is running; always 1.",
            labels=["version", "torch", "device", "dtype", "model"],
        )
        torch = metadata.version("torch")
        model = str(info.model)
        build.add_metric([__version__, torch, str(info.device), str(info.dtype), model], 1)
        yield build
        startup = GaugeMetricFamily(
            "nanoflow_startup_phase_seconds",
            "Duration of the phases of the engine's start.",
            labels=["phase"],
        )
        for phase, seconds in info.startup_seconds.items():
            startup.add_metric([phase], seconds)
        yield startup

    def _tokens(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "nanoflow_prompt_tokens",
            "Prompt tokens of admitted requests.",
            value=self._totals.prompt_tokens,
        )
        yield CounterMetricFamily(
            "nanoflow_generation_tokens",
            "Tokens that the API process received from the engine.",
            value=self._totals.generation_tokens,
        )

    def _engine_state(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield GaugeMetricFamily(
            "nanoflow_engine_up", "1 while the engine process lives.", value=self._engine.is_alive
        )
        yield GaugeMetricFamily(
            "nanoflow_requests_running",
            "Sequences that hold pages and take part in iterations.",
            value=stats.num_running,
        )
        yield GaugeMetricFamily(
            "nanoflow_requests_waiting",
            "Sequences that wait for a first iteration, for pages after a preemption, or for KV.",
            value=stats.num_waiting,
        )
        yield GaugeMetricFamily(
            "nanoflow_requests_restoring",
            "Those waiting sequences that have pages, and wait for KV from a lower tier.",
            value=stats.num_restoring,
        )
        yield GaugeMetricFamily(
            "nanoflow_queued_prompt_tokens",
            "Prompt tokens of the sequences that are queued.",
            value=stats.queued_prompt_tokens,
        )
        yield GaugeMetricFamily(
            "nanoflow_tenants",
            "Tenants that have requests, and some that had.",
            value=stats.tenants,
        )
        yield from kv_metrics(stats)
        yield from overlap_metrics(stats)
        yield CounterMetricFamily(
            "nanoflow_preemptions",
            "Times that a sequence lost its pages to another one.",
            value=stats.preemptions,
        )
        yield CounterMetricFamily(
            "nanoflow_iterations", "Iterations of the engine.", value=stats.iterations
        )
        yield CounterMetricFamily(
            "nanoflow_iterations_ahead",
            "Iterations that were formed and started while another one ran.",
            value=stats.iterations_ahead,
        )
        yield CounterMetricFamily(
            "nanoflow_iteration_tokens",
            "Tokens that went through the model, prefill and decode.",
            value=stats.iteration_tokens,
        )
        yield CounterMetricFamily(
            "nanoflow_engine_busy_seconds",
            "Time that the engine spent in iterations.",
            value=stats.busy_seconds,
        )
        yield GaugeMetricFamily(
            "nanoflow_last_step_timestamp_seconds",
            "Unix time at which the engine finished its latest iteration; 0 before the first.",
            value=stats.last_step_time,
        )
