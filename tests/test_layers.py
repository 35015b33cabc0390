"""The core is torch-free: planning and scheduling import where torch cannot be."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK_TORCH = """
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
importlib.import_module(sys.argv[1])
"""


def import_without_torch(module: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK_TORCH, module], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "module",
    [
        "nf_kernels.cost",
        "nf_kvcache",
        "nf_kvcache.disk",
        "nf_kvcache.fingerprint",
        "nf_kvcache.index",
        "nf_kvcache.tier",
        "nf_runtime",
        "nf_runtime.chrome_trace",
        "nf_runtime.config",
        "nf_runtime.dataflow",
        "nf_runtime.engine_types",
        "nf_runtime.fan_out",
        "nf_runtime.graph",
        "nf_runtime.iteration_output",
        "nf_runtime.measured",
        "nf_runtime.model_config",
        "nf_runtime.models",
        "nf_runtime.parallelism",
        "nf_runtime.pipeline.compiler",
        "nf_runtime.pipeline.happens_before",
        "nf_runtime.pipeline.node_cost",
        "nf_runtime.pipeline.plan",
        "nf_runtime.plan_buckets",
        "nf_runtime.pipeline.plan_store",
        "nf_runtime.pipeline.policy",
        "nf_runtime.pipeline.random_order",
        "nf_runtime.pipeline.schedules",
        "nf_runtime.pipeline.templates",
        "nf_runtime.pipeline.workspace",
        "nf_runtime.sampling_params",
        "nf_runtime.scheduling",
        "nf_runtime.timeline",
        "nf_scheduler",
        "nf_scheduler.sim",
    ],
)
def test_imports_with_torch_blocked(module: str) -> None:
    result = import_without_torch(module)
    assert result.returncode == 0, result.stderr


def test_the_block_blocks() -> None:
    result = import_without_torch("nf_kvcache.kv_cache")
    assert result.returncode != 0
    assert "torch is blocked" in result.stderr
