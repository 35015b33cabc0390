"""The KV cache of an engine, with the tiers below the device that its config asks for."""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nf_kvcache import KVCache, KVLayout
from nf_kvcache.copier import Copier
from nf_kvcache.disk import CacheInUse, DiskTier
from nf_kvcache.fingerprint import Fingerprint
from nf_runtime.config import EngineConfig
from nf_runtime.errors import ModelLoadError
from nf_runtime.model_config import ModelConfig
from nf_runtime.replay.recorder import Recorder

_log = logging.getLogger(__name__)

_MAX_DEFAULT_SSD_BYTES = 64 << 30
_DEFAULT_HOST_BYTES = 1 << 30

# What a config says about the model that changes no KV.
_WITHOUT_EFFECT = ("dtype", "eos_token_ids", "rope", "tied_embeddings")


def make_kv_cache(
    config: EngineConfig,
    model: ModelConfig,
    num_pages: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    weights_digest: str,
    numerics: str,
    recorder: Recorder | None = None,
    copier: Copier | None = None,
    spare_pages: int = 0,
) -> KVCache:
    """The KV cache of one rank.

    Args:
        config: Which tiers there are, and how large.
        model: Whose KV, with the KV heads of the rank.
        num_pages: Of the device.
        dtype: Of the KV.
        device: Where the model runs.
        weights_digest: Tells the weights from others; only looked at for an SSD tier.
        numerics: What besides decides the last bits of the KV; only looked at for an SSD tier.
        recorder: Writes down what decides the decisions of the cache.
        copier: Copies pages; by default that of the device.
        spare_pages: Of the device, that no request is given.

    Raises:
        ModelLoadError: A tier cannot be had.
    """
    layout = KVLayout(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        page_size=config.page_size,
        dtype=dtype,
    )
    disk = None
    if config.kv_ssd_dir is not None:
        fingerprint = _fingerprint(model, layout, weights_digest, numerics)
        disk = _open_disk(config.kv_ssd_dir, config.kv_ssd_max_bytes, layout, fingerprint)
    options: dict[str, Any] = {"disk": disk, "copier": copier}
    if recorder is not None:
        options["disk"] = None if disk is None else recorder.disk(disk)
        options |= {"watch": recorder.watch, "clock": recorder.clock}
    try:
        return KVCache(
            layout,
            num_pages,
            device=device,
            prefix_caching=config.enable_prefix_caching,
            host_bytes=host_tier_bytes(config),
            spare_pages=spare_pages,
            **options,
        )
    except BaseException as error:
        if disk is not None:
            disk.close()
        if isinstance(error, ValueError):
            raise ModelLoadError(f"kv_host_bytes is too small: {error}") from error
        raise


def host_tier_bytes(config: EngineConfig) -> int:
    """Bound of the host tier; 0 is none."""
    if config.kv_host_bytes is not None:
        return config.kv_host_bytes
    if config.kv_ssd_dir is None:
        return 0
    return _DEFAULT_HOST_BYTES


def default_ssd_bytes(directory: str) -> int:
    """Bound of an SSD tier that none was given for: half of what is free, at most 64 GiB.

    What the directory holds already counts as free, so that the bound is the same after a restart.

    Raises:
        OSError: The directory cannot be made or read.
    """
    os.makedirs(directory, exist_ok=True)
    held = sum(file.stat().st_blocks * 512 for file in Path(directory).rglob("*"))
    return min(_MAX_DEFAULT_SSD_BYTES, (shutil.disk_usage(directory).free + held) // 2)


def _open_disk(
    directory: str, max_bytes: int | None, layout: KVLayout, fingerprint: Fingerprint
) -> DiskTier:
    try:
        if max_bytes is None:
            max_bytes = default_ssd_bytes(directory)
        disk = DiskTier(
            directory,
            fingerprint,
            page_bytes=layout.bytes_per_page,
            page_size=layout.page_size,
            max_bytes=max_bytes,
        )
    except OSError as error:
        raise ModelLoadError(
            f"kv_ssd_dir is {directory!r}, which cannot be used: {error}; name a directory that "
            "can be written"
        ) from error
    except CacheInUse as error:
        raise ModelLoadError(f"kv_ssd_dir is {directory!r}: {error}") from error
    except ValueError as error:
        raise ModelLoadError(f"kv_ssd_max_bytes is too small: {error}") from error
    stats = disk.stats()
    _log.info(
        "SSD tier: %s, %d pages, %.1f MiB at most, %s; %d pages are there already",
        directory,
        stats.slots_total,
        max_bytes / 2**20,
        stats.io,
        stats.pages_found,
    )
    return disk


def _fingerprint(
    model: ModelConfig, layout: KVLayout, weights_digest: str, numerics: str
) -> Fingerprint:
    """What has to be the same in the process that wrote KV and in the one that reads it."""
    shape = {k: v for k, v in asdict(model).items() if k not in _WITHOUT_EFFECT}
    # Some kinds of RoPE take the model's context for their own.
    rope = asdict(model.rope) | {"max_position": model.max_position}
    return Fingerprint(
        weights=f"{weights_digest}-{_digest(shape)}",
        dtype=str(layout.dtype).removeprefix("torch."),
        page_size=layout.page_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        rope=_digest(rope),
        numerics=numerics,
    )


def _digest(values: dict[str, object]) -> str:
    text = json.dumps(values, sort_keys=True, default=sorted)  # frozensets have no order
    return hashlib.sha256(text.encode()).hexdigest()[:16]
