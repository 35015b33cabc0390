"""Reading a cache without an engine."""

from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from disk_pages import FINGERPRINT, META, PAGE_BYTES, Owner, content, open_tier, tokens_of

from nf_kvcache.disk import DiskReader, NotACache, PageGone
from nf_kvcache.disk.reader import view_page


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    owner = Owner(open_tier(tmp_path))
    owner.write_path(b"a", [1, 2, 3])
    owner.write_path(b"b", [1, 2])
    assert owner.flush()
    yield owner
    owner.tier.close()


def text(*numbers: int) -> np.ndarray:
    return np.concatenate([tokens_of(number) for number in numbers])


def test_a_cache_is_read_while_its_server_runs(owner: Owner, tmp_path: Path) -> None:
    (path,) = DiskReader.caches(tmp_path)
    with DiskReader(path) as reader:
        assert reader.meta == META
        assert len(reader) == 5
        assert len(reader.match(text(1, 2, 3, 4)[:-1], b"a")) == 3
        assert len(reader.match(text(1, 2, 3), b"b")) == 2
        assert reader.match(text(1, 2, 3), b"c") == []
        assert reader.match(text(2, 3), b"a") == []
        pages = reader.match(text(1, 2, 3), b"a")
        for stop, page in enumerate(pages, start=1):
            array = reader.read(page)
            assert array.shape == (2, 2, 2, 4, 56)
            assert array.dtype == np.float32
            expected = content((b"a", (1, 2, 3)[:stop]))[:PAGE_BYTES]
            assert array.tobytes() == expected.tobytes()

        owner.write((b"a", (1, 2, 3, 4)))
        assert owner.flush()
        assert len(reader.match(text(1, 2, 3, 4), b"a")) == 4


def test_pages_that_went_are_not_read(owner: Owner, tmp_path: Path) -> None:
    with DiskReader(*DiskReader.caches(tmp_path)) as reader:
        pages = reader.match(text(1, 2, 3), b"a")
        for number in range(100, 200):
            owner.write((b"", (number,)))
            owner.settle()
        assert owner.flush()
        assert owner.tier.stats().evictions > 0
        assert len(reader.match(text(1, 2, 3), b"a")) < 3
        with pytest.raises(PageGone, match="holds something else"):
            reader.read(pages[-1])
        (file,) = owner.tier._directory.path.glob("segment*")
        file.unlink()
        with pytest.raises(PageGone, match="No such file"):
            reader.read(pages[0])


def test_what_is_no_cache_is_refused(owner: Owner, tmp_path: Path) -> None:
    with pytest.raises(NotACache, match=r"meta\.json"):
        DiskReader(tmp_path)
    (path,) = DiskReader.caches(tmp_path)
    owner.tier.close()
    owner.tier.close = lambda: None  # type: ignore[method-assign]
    with sqlite3.connect(path / "index.sqlite") as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(NotACache, match="no index of version 1"):
        DiskReader(path)
    (path / "index.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(NotACache, match="cannot be read"):
        DiskReader(path)
    (path / "index.sqlite").unlink()
    with pytest.raises(NotACache, match="cannot be read"):
        DiskReader(path)


@pytest.mark.parametrize(
    ("name", "itemsize", "dtype"),
    [("float32", 4, "f4"), ("float16", 2, "f2"), ("bfloat16", 2, "u2"), ("float8_e4m3fn", 1, "u1")],
)
def test_pages_are_viewed_as_the_fingerprint_says(name: str, itemsize: int, dtype: str) -> None:
    count = 2 * 2 * 2 * 4 * 56
    fingerprint = dataclasses.replace(FINGERPRINT, dtype=name, layout="kv,token,layer,dim,head")
    meta = dataclasses.replace(META, fingerprint=fingerprint, page_bytes=count * itemsize)
    array = view_page(bytes(count * itemsize), meta)
    assert array.shape == (2, 4, 2, 56, 2)
    assert array.dtype == np.dtype(dtype)
    with pytest.raises(NotACache, match="do not fit"):
        view_page(b"", dataclasses.replace(meta, page_bytes=count * itemsize + 1))
    if name == "float32":
        with pytest.raises(NotACache, match="of 2 bytes cannot be float32"):
            view_page(b"", dataclasses.replace(meta, page_bytes=count * 2))


def test_the_example_of_the_specification_runs(owner: Owner, tmp_path: Path) -> None:
    document = Path(__file__).parents[3] / "docs" / "kv-disk-format.md"
    code = document.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (path,) = DiskReader.caches(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", code, str(path), "a", *map(str, text(1, 2, 3))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == [
        f"slot {owner.slots[(b'a', (1, 2, 3)[:i])]}: intact" for i in (1, 2, 3)
    ]
