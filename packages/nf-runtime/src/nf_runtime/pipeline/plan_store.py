"""The plan sets that were measured on this machine, as files. Torch-free."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from nf_runtime.graph import LayerGraph
from nf_runtime.model_config import ModelConfig
from nf_runtime.pipeline.plan import PlanError, PlanSet, read_plan_set
from nf_runtime.pipeline.policy import OverlapPolicy, make_policy

_log = logging.getLogger(__name__)

# What of a config does not change what is computed.
_NOT_SHAPES = frozenset({"eos_token_ids", "max_position", "dtype", "rope"})


class PlanTarget(NamedTuple):
    """What plans are measured for.

    Attributes:
        model: Fingerprint of the model's shapes.
        device: Name of the device.
        dtype: Such as `bfloat16`.
        tensor_parallel_size: Ranks of a replica.
    """

    model: str
    device: str
    dtype: str
    tensor_parallel_size: int = 1


def default_directory() -> Path:
    """Where plan sets are kept when nobody says where."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nanoflow" / "plans"


def model_fingerprint(model: ModelConfig) -> str:
    """What models have in common that compute alike: architecture and all sizes."""
    shapes = {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in asdict(model).items()
        if name not in _NOT_SHAPES
    }
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def find_plan_set(
    directory: Path, *, model: str, device: str, dtype: str, tensor_parallel_size: int
) -> PlanSet | None:
    """The plan set that was measured last for a model on a device, if there is one.

    Files that cannot be read are left out, with a line in the log.

    Args:
        directory: With plan sets, `*.json`; it may be missing.
        model: Its fingerprint.
        device: Its name.
        dtype: Such as `bfloat16`.
        tensor_parallel_size: Ranks of a replica.
    """
    paths = sorted(directory.glob("*.json"), key=_age)
    for path in paths:
        try:
            found = read_plan_set(path)
        except PlanError as error:
            _log.warning("%s; it is left out", error)
            continue
        wanted = (model, device, dtype)
        if (found.model, found.device, found.dtype) == wanted and (
            found.tensor_parallel_size == tensor_parallel_size
        ):
            _log.info("overlap auto: plans of %s", path)
            return found
    return None


def _age(path: Path) -> float:
    """Less for a newer file; most for one that has gone meanwhile."""
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def file_name(plan_set: PlanSet) -> str:
    """Where in the directory a plan set is kept; a newer one for the same takes its place."""
    key = json.dumps([plan_set.device, plan_set.dtype, plan_set.tensor_parallel_size])
    return f"{plan_set.model}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"


def find_policy(
    overlap: str,
    *,
    graph: LayerGraph,
    model: ModelConfig,
    device: str,
    dtype: str,
    plan_dir: str | None = None,
    tensor_parallel_size: int = 1,
) -> OverlapPolicy:
    """The policy that `EngineConfig.overlap` asks for.

    Args:
        overlap: See there.
        graph: The model's.
        model: What runs.
        device: Its name.
        dtype: Such as `bfloat16`.
        plan_dir: Where the plan sets of `auto` are; None is `default_directory`.
        tensor_parallel_size: Ranks of a replica.

    Raises:
        PlanError: It names no plan, or one that does not fit the model.
    """
    measured = None
    if overlap == "auto":
        measured = find_plan_set(
            default_directory() if plan_dir is None else Path(plan_dir),
            model=model_fingerprint(model),
            device=device,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
        )
        if measured is None:
            _log.info(
                "overlap auto: no plans were measured for this model in %s on %s; every iteration "
                "runs sequentially. `nanoflow plan measure` measures some",
                dtype,
                device,
            )
    return make_policy(overlap, graph, measured=measured)
