"""The table of metrics in README.md equals what is exported."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

README = Path(__file__).resolve().parents[1] / "README.md"
ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<kind>\w+) \|(?P<labels>[^|]*)\| [^|]+ \|$")


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    rows = {}
    for line in README.read_text(encoding="utf-8").splitlines():
        if match := ROW.match(line):
            labels = frozenset(re.findall(r"`(\w+)`", match["labels"]))
            rows[match["name"]] = (match["kind"], labels)
    return rows


def exported(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    rows = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("process_") or family.name.endswith("_created"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        rows[name] = (family.type, frozenset(labels))
    return rows


def test_metrics_table_equals_what_is_exported(scripted: Callable[..., Any]) -> None:
    text = httpx.get(f"{scripted([]).url}/metrics").text
    assert documented() == exported(text)


def test_metric_values(scripted: Callable[..., Any]) -> None:
    server = scripted([])
    response = httpx.get(f"{server.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    for line in (
        "nanoflow_requests_running 1.0",
        "nanoflow_requests_waiting 2.0",
        "nanoflow_requests_restoring 1.0",
        "nanoflow_queued_prompt_tokens 48.0",
        "nanoflow_tenants 3.0",
        'nanoflow_kv_pages{state="used",tier="device"} 3.0',
        'nanoflow_kv_pages{state="cached",tier="device"} 1.0',
        'nanoflow_kv_pages{state="free",tier="device"} 4.0',
        'nanoflow_kv_pages{state="used",tier="host"} 2.0',
        'nanoflow_kv_pages{state="free",tier="host"} 4.0',
        'nanoflow_kv_pages{state="used",tier="disk"} 3.0',
        'nanoflow_kv_pages{state="cached",tier="disk"} 20.0',
        'nanoflow_kv_pages{state="free",tier="disk"} 7.0',
        'nanoflow_prefix_tokens_total{result="hit_device"} 11.0',
        'nanoflow_prefix_tokens_total{result="hit_host"} 5.0',
        'nanoflow_prefix_tokens_total{result="hit_disk"} 0.0',
        'nanoflow_kv_moved_bytes_total{direction="device_to_host"} 6.0',
        'nanoflow_kv_moved_bytes_total{direction="disk_to_host"} 400.0',
        'nanoflow_kv_moving_seconds_total{direction="host_to_disk"} 0.75',
        'nanoflow_kv_evictions_total{tier="disk"} 11.0',
        'nanoflow_kv_dropped_pages_total{reason="host full"} 8.0',
        'nanoflow_kv_dropped_pages_total{reason="disk busy"} 3.0',
        'nanoflow_kv_dropped_pages_total{reason="disk queue full"} 13.0',
        'nanoflow_kv_dropped_pages_total{reason="disk failed"} 14.0',
        'nanoflow_kv_disk_errors_total{error="ENOSPC"} 15.0',
        "nanoflow_kv_damaged_pages_total 12.0",
        "nanoflow_kv_disk_degraded 1.0",
        "nanoflow_kv_restores 1.0",
        "nanoflow_kv_restores_cut_total 2.0",
        'nanoflow_prefix_tokens_total{result="miss"} 16.0',
        "nanoflow_preemptions_total 4.0",
        "nanoflow_last_step_timestamp_seconds 1000.0",
        'nanoflow_overlap_steps_total{mode="nanoflow",reason="planned"} 7.0',
        'nanoflow_overlap_steps_total{mode="sequential",reason="no_bucket"} 2.0',
        "nanoflow_cuda_graph_steps_total 5.0",
        'nanoflow_overlap_gain_ratio{mode="nanoflow"} 1.25',
        'nanoflow_startup_phase_seconds{phase="weights"} 0.5',
        'nanoflow_requests_total{outcome="stop"} 0.0',
        'nanoflow_requests_total{outcome="queue_full"} 0.0',
        "nanoflow_engine_up 1.0",
    ):
        assert line in lines, line
    assert any(line.startswith("process_cpu_seconds_total ") for line in lines)


def test_scrapes_do_not_take_from_each_other(scripted: Callable[..., Any]) -> None:
    server = scripted([])
    httpx.post(f"{server.url}/v1/completions", json={"prompt": ""})
    texts = [httpx.get(f"{server.url}/metrics").text for _ in range(2)]
    for text in texts:
        assert 'nanoflow_requests_total{outcome="rejected"} 1.0' in text


def test_openmetrics_is_served_on_request(scripted: Callable[..., Any]) -> None:
    url = f"{scripted([]).url}/metrics"
    response = httpx.get(url, headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.rstrip().endswith("# EOF")
