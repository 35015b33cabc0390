"""What the tests of several operations share: tolerances, and attention over shuffled pages."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from nf_kernels import native_status, ops
from nf_kernels.native import native_module
from nf_kernels.ops.cuda import INVARIANT, CudaOperations

SENTINEL = -777.0  # what stands beside an output that is a view; must stay


def assert_close(
    actual: Tensor, expected: Tensor, *, atol: float = 5e-6, rtol: float = 5e-6
) -> None:
    """Compare a result with the same computed in float64: one rounding to its dtype may differ."""
    unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[actual.dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol + unit, atol=atol, equal_nan=True
    )


def row_view(source: Tensor, pad: int) -> Tensor:
    """A copy of `source` [T, W] as columns of a wider tensor that holds SENTINEL elsewhere."""
    rows, width = source.shape
    wide = torch.full((rows, width + 2 * pad), SENTINEL, dtype=source.dtype)
    view = wide[:, pad : pad + width]
    view.copy_(source)
    return view


def assert_only_view_written(view: Tensor, pad: int) -> None:
    wide = view.as_strided((view.shape[0], view.shape[1] + 2 * pad), (view.stride(0), 1), 0)
    if pad:
        assert (wide[:, :pad] == SENTINEL).all()
        assert (wide[:, -pad:] == SENTINEL).all()


@dataclass
class PagedCase:
    """Requests whose keys and values lie on shuffled pages; every slot not in use holds NaN."""

    arguments: dict[str, Any]  # of prefill_attention
    keys: list[Tensor]  # of each request, [seq_len, G, d], in order
    values: list[Tensor]
    pad: int

    def as_float64(self) -> dict[str, Any]:
        """The same values computed and written in float64, without views."""
        wide = {
            name: value.to(torch.float64, copy=True).contiguous()
            for name, value in self.arguments.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return {**self.arguments, **wide}


def paged_case(
    *,
    query_lens: list[int],
    context_lens: list[int],
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    page_size: int = 4,
    window: int = 0,
    dtype: torch.dtype = torch.float32,
    pad: int = 0,
    seed: int = 0,
) -> PagedCase:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    seq_lens = [q + c for q, c in zip(query_lens, context_lens, strict=True)]
    pages = [-(-n // page_size) for n in seq_lens]
    total = sum(pages) + 1
    order = torch.randperm(total, generator=generator)
    # The last page of the order belongs to nobody and fills the unused entries of the table.
    width = max(pages, default=0) + 1
    wide_table = torch.full((len(seq_lens), width + 3), int(order[-1]), dtype=torch.int32)
    shape = (total, kv_heads, page_size, head_dim)
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    filled: list[list[Tensor]] = [[], []]
    taken = 0
    for request, count in enumerate(pages):
        table = order[taken : taken + count]
        wide_table[request, :count] = table
        taken += count
        for cache, of_requests in zip(caches, filled, strict=True):
            rows = randn(seq_lens[request], kv_heads, head_dim)
            of_requests.append(rows)
            for position, row in enumerate(rows):
                page = int(table[position // page_size])
                cache[page, :, position % page_size] = row
    tokens = sum(query_lens)
    row_width = kv_heads * group * head_dim
    arguments = {
        "q": row_view(randn(tokens, row_width), pad),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "page_table": wide_table[:, :width],
        "query_start": torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "scale": head_dim**-0.5,
        "window": window,
        "out": row_view(torch.zeros(tokens, row_width, dtype=dtype), pad),
    }
    return PagedCase(arguments, filled[0], filled[1], pad)


def _isas() -> list[str]:
    module = native_module()
    return ["none"] if module is None else module.usable_isas()


@pytest.fixture(scope="module", params=_isas())
def native(request: pytest.FixtureRequest) -> Iterator[ops.OperationSet]:
    """The native operations, with each instruction set of this processor."""
    module = native_module()
    if module is None:
        pytest.skip(f"no native kernels: {native_status().reason}")
    before = module.isa()
    module.use_isa(request.param)
    yield ops.load("cpu")
    module.use_isa(before)


def _cuda_operations(flashinfer: Callable[[], Any]) -> ops.OperationSet:
    """The CUDA operations on the CPU, over what stands in for FlashInfer."""
    operations = CudaOperations(library=flashinfer, device_type="cpu")
    return ops.OperationSet(
        name="cuda",
        functions=operations.functions(),
        invariant=INVARIANT,
        pack=lambda weight: weight,
        scratch={},
        prepare=operations.prepare,
    )


def _beside_this_file(name: str) -> ModuleType:
    """A module that tests cannot import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        return importlib.import_module(name)


@pytest.fixture(scope="session")
def flashinfer_stand_in() -> ModuleType:
    return _beside_this_file("flashinfer_stand_in")


@pytest.fixture(scope="session")
def cuda_driver_stand_in() -> ModuleType:
    return _beside_this_file("cuda_driver_stand_in")


@pytest.fixture(scope="module")
def stood_in(flashinfer_stand_in: ModuleType) -> ops.OperationSet:
    """The CUDA operations over the stand-in, on the CPU."""
    return _cuda_operations(lambda: flashinfer_stand_in.FLASHINFER)


def _unavailable() -> NoReturn:
    raise AssertionError("FlashInfer was asked for")


@pytest.fixture(scope="module")
def without_flashinfer() -> ops.OperationSet:
    """The CUDA operations where nothing may ask for FlashInfer, on the CPU."""
    return _cuda_operations(_unavailable)


# Functions of this file, for tests that cannot import it.


@pytest.fixture(scope="session", name="assert_close")
def _assert_close() -> Callable[..., None]:
    return assert_close


@pytest.fixture(scope="session", name="row_view")
def _row_view() -> Callable[[Tensor, int], Tensor]:
    return row_view


@pytest.fixture(scope="session", name="assert_only_view_written")
def _assert_only_view_written() -> Callable[[Tensor, int], None]:
    return assert_only_view_written


@pytest.fixture(scope="session", name="paged_case")
def _paged_case() -> Callable[..., PagedCase]:
    return paged_case
