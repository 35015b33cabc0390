"""Names, sizes and checksums on the disk do not change by accident."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from disk_pages import FINGERPRINT, META, PAGE_BYTES, content
from hypothesis import given
from hypothesis import strategies as st

from nf_kvcache.disk.capacity import Capacity
from nf_kvcache.disk.format import (
    Meta,
    child_identity,
    page_checksum,
    root_identity,
    subdirectory,
)
from nf_kvcache.fingerprint import Fingerprint


def test_the_format_is_that_of_the_specification() -> None:
    # Values of docs/kv-disk-format.md: whoever changes them changes FORMAT_VERSION.
    assert FINGERPRINT.digest == (
        "6928c1d27be928d8292df7668faf3b1852aff5e2ecbecbe061bfdf33072d9f4c"
    )
    assert subdirectory(FINGERPRINT, 1, 2) == "bf8b2649b4c89a6a/replica-1-rank-2"
    tokens = bytes(range(16))
    identity = child_identity(root_identity(b"salt"), tokens)
    assert identity == 6960403929734198624
    assert page_checksum(identity, b"page") == -7921480860836783515


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Fingerprint)])
def test_everything_in_a_fingerprint_counts(name: str) -> None:
    value = getattr(FINGERPRINT, name)
    other = dataclasses.replace(
        FINGERPRINT, **{name: value + 1 if isinstance(value, int) else value + "x"}
    )
    assert other.digest != FINGERPRINT.digest
    assert Fingerprint.from_dict(json.loads(json.dumps(other.to_dict()))) == other


def test_a_fingerprint_refuses_what_says_nothing() -> None:
    with pytest.raises(ValueError, match="weights is ''"):
        dataclasses.replace(FINGERPRINT, weights="")
    with pytest.raises(ValueError, match="page_size is 0"):
        dataclasses.replace(FINGERPRINT, page_size=0)
    with pytest.raises(ValueError, match="rope"):
        Fingerprint.from_dict({k: v for k, v in FINGERPRINT.to_dict().items() if k != "rope"})


def test_meta_says_what_it_was_made_of() -> None:
    assert Meta.from_json(META.to_json()) == META
    assert (META.page_bytes, META.slot_bytes) == (PAGE_BYTES, 8192)
    for text, message in [
        ("{", "Expecting"),
        ("[]", "no fingerprint"),
        (META.to_json().replace('"version": 1', '"version": 2'), "version 2"),
        (META.to_json().replace('"slot_bytes"', '"other"'), "lacks a size"),
    ]:
        with pytest.raises(ValueError, match=message):
            Meta.from_json(text)


def test_a_checksum_is_of_the_data_and_of_all_tokens_before_it() -> None:
    data = content((b"", (1,)))
    path = [child_identity(root_identity(b"s"), b"aaaa")]
    path.append(child_identity(path[0], b"bbbb"))
    checksum = page_checksum(path[1], data.data)
    other_root = child_identity(child_identity(root_identity(b"t"), b"aaaa"), b"bbbb")
    other_parent = child_identity(child_identity(root_identity(b"s"), b"aaab"), b"bbbb")
    other_tokens = child_identity(path[0], b"bbbc")
    for identity in (other_root, other_parent, other_tokens):
        assert page_checksum(identity, data.data) != checksum
    data[77] ^= 1
    assert page_checksum(path[1], data.data) != checksum


@given(st.integers(100_000, 1 << 44), st.integers(1, 64 << 20))
def test_capacity_is_the_most_that_fits(max_bytes: int, page_bytes: int) -> None:
    meta = Meta.of(FINGERPRINT, page_bytes)
    if max_bytes < Capacity.of(2, meta).total_bytes:
        with pytest.raises(ValueError, match=f"max_bytes is {max_bytes}"):
            Capacity.within(max_bytes, meta)
        return
    capacity = Capacity.within(max_bytes, meta)
    assert capacity.total_bytes <= max_bytes
    assert Capacity.of(capacity.num_slots + 1, meta).total_bytes > max_bytes


@pytest.mark.parametrize("module", ["nf_kvcache.disk", "nf_kvcache.fingerprint"])
def test_nothing_of_the_disk_tier_needs_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
