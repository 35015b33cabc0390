"""The metrics of the KV cache and its tiers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nf_kvcache.stats import LowerTierStats
from nf_kvcache.tier import Tier
from nf_runtime import EngineStats


def kv_metrics(stats: EngineStats) -> Iterator[Metric]:
    """Pages by tier, hits by tier, and what went between the tiers."""
    pages = GaugeMetricFamily(
        "nanoflow_kv_pages",
        "Pages of the KV cache: used by sequences, cached for reuse, or free.",
        labels=["tier", "state"],
    )
    for (where, state), count in _pages_by_state(stats).items():
        pages.add_metric([where, state], count)
    yield pages
    prefix = CounterMetricFamily(
        "nanoflow_prefix_tokens",
        "Prompt tokens looked up in the prefix cache, by result.",
        labels=["result"],
    )
    for tier in Tier:
        hits = stats.prefix_hit_tokens_by_tier.get(tier.label, 0)
        prefix.add_metric([f"hit_{tier.label}"], hits)
    prefix.add_metric(["miss"], stats.prefix_queried_tokens - stats.prefix_hit_tokens)
    yield prefix
    yield from _transfers(stats.lower_tiers)


def _pages_by_state(stats: EngineStats) -> dict[tuple[str, str], int]:
    """Pages by (tier, state); what there is no tier for is left out."""
    free = stats.kv_pages_total - stats.kv_pages_used - stats.kv_pages_cached
    pages = {
        ("device", "used"): stats.kv_pages_used,
        ("device", "cached"): stats.kv_pages_cached,
        ("device", "free"): free,
    }
    lower = stats.lower_tiers
    if lower is not None:
        pages["host", "used"] = lower.host_pages_used
        pages["host", "cached"] = lower.host_pages_cached
        pages["host", "free"] = lower.host_pages_free
        if (disk := lower.disk) is not None:
            pages["disk", "used"] = disk.pages_queued
            pages["disk", "cached"] = disk.pages_stored
            pages["disk", "free"] = disk.slots_total - disk.pages_queued - disk.pages_stored
    return pages


def _transfers(lower: LowerTierStats | None) -> Iterator[Metric]:
    """What went between the tiers, what was lost, and why; 0 where there is no such tier."""
    moved = {
        direction: (0, 0.0)
        for direction in ("device_to_host", "host_to_device", "host_to_disk", "disk_to_host")
    }
    evictions = {"host": 0, "disk": 0}
    dropped = {"host full": 0, "disk busy": 0}
    errors: Mapping[str, int] = {}
    damaged, degraded, restores, cut = 0, False, 0, 0
    if lower is not None:
        moved["device_to_host"] = lower.downloaded_bytes, lower.download_seconds
        moved["host_to_device"] = lower.uploaded_bytes, lower.upload_seconds
        evictions["host"] = lower.host_evictions
        dropped["host full"] = lower.skipped_pages
        dropped["disk busy"] = lower.unwritten_pages
        restores, cut = lower.restores_under_way, lower.restores_cut
        if (disk := lower.disk) is not None:
            moved["host_to_disk"] = disk.bytes_written, disk.write_seconds
            moved["disk_to_host"] = disk.bytes_read, disk.read_seconds
            evictions["disk"] = disk.evictions
            dropped |= {f"disk {reason}": count for reason, count in disk.writes_dropped.items()}
            dropped["disk failed"] = disk.writes_failed
            errors, damaged, degraded = disk.errors, disk.pages_damaged, disk.is_degraded
    size = CounterMetricFamily(
        "nanoflow_kv_moved_bytes", "KV moved between tiers.", labels=["direction"]
    )
    time = CounterMetricFamily(
        "nanoflow_kv_moving_seconds",
        "Time during which KV was moved between tiers.",
        labels=["direction"],
    )
    for direction, (num_bytes, seconds) in moved.items():
        size.add_metric([direction], num_bytes)
        time.add_metric([direction], seconds)
    yield size
    yield time
    yield _counter(
        "nanoflow_kv_evictions", "Pages of a lower tier given up for others.", "tier", evictions
    )
    yield _counter(
        "nanoflow_kv_dropped_pages", "Pages that did not get to a lower tier.", "reason", dropped
    )
    yield _counter("nanoflow_kv_disk_errors", "Errors of the SSD tier.", "error", errors)
    yield CounterMetricFamily(
        "nanoflow_kv_damaged_pages",
        "Pages of the SSD tier that were dropped, because they or what they build on were damaged.",
        value=damaged,
    )
    yield GaugeMetricFamily(
        "nanoflow_kv_disk_degraded",
        "1 while nothing is written to the SSD tier because of an error.",
        value=degraded,
    )
    yield GaugeMetricFamily(
        "nanoflow_kv_restores", "Prefixes on their way up from a lower tier.", value=restores
    )
    yield CounterMetricFamily(
        "nanoflow_kv_restores_cut",
        "Restores that brought less than was found, because of damage or time.",
        value=cut,
    )


def _counter(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
