"""The CUDA library on a device: every tile against a product in float64, and the copy."""

from __future__ import annotations

import pytest
import torch

from nf_kernels.cuda import library
from nf_kernels.cuda.tiles import Tile, all_tiles

pytestmark = pytest.mark.gpu

SENTINEL = -777.0
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
each_tile = pytest.mark.parametrize("tile", all_tiles(), ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def tested_function(request, record_property) -> None:
    """Name what is tested in the report, for docs/gpu-status.md."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if isinstance(parameters.get("tile"), Tile):
        record_property("function", f"gemm/{parameters['tile']}")
    elif "copy" in request.node.name:
        record_property("function", "copy")


@pytest.fixture(scope="module")
def cuda() -> library.CudaLibrary:
    loaded = library.load()
    if loaded is None:
        pytest.skip(library.status().reason)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"{torch.cuda.get_device_name()} is not of compute capability 9.0")
    return loaded


def randn(*shape, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def multiply(cuda, tile, x, weight, *, out, sm_count=0, **options):
    shape = {"m": x.shape[0], "n": weight.shape[0], "k": x.shape[1], "dtype": x.dtype}
    needed = cuda.workspace_bytes(tile=tile, sm_count=sm_count, **shape)
    # Not zeroed: the library has to do without.
    workspace = torch.full((needed,), 0xA5, dtype=torch.uint8, device="cuda") if needed else None
    cuda.gemm(
        x=x,
        weight=weight,
        out=out,
        tile=tile,
        sm_count=sm_count,
        workspace=workspace,
        **options,
    )
    torch.cuda.synchronize()


def assert_product(out, x, weight, bias=None, residual=None):
    """Within one rounding of the float64 product, and what float32 loses in the sums."""
    expected = x.double() @ weight.double().T
    for term in (bias, residual):
        if term is not None:
            expected = expected + term.double()
    depth = x.shape[1]
    torch.testing.assert_close(
        out.double(), expected, rtol=UNIT[out.dtype], atol=depth**0.5 * 2.0**-18
    )


@each_dtype
@each_tile
def test_all_terms_at_odd_rows(cuda, tile, dtype):
    for m in (1, 3, 16, 17, 63, 64, 65, 129, 257):
        x, weight = randn(m, 520, dtype=dtype), randn(328, 520, dtype=dtype, seed=1)
        bias, residual = randn(328, dtype=dtype, seed=2), randn(m, 328, dtype=dtype, seed=3)
        for options in ({}, {"bias": bias}, {"residual": residual},
                        {"bias": bias, "residual": residual}):  # fmt: skip
            out = torch.full((m, 328), SENTINEL, dtype=dtype, device="cuda")
            multiply(cuda, tile, x, weight, out=out, **options)
            assert_product(out, x, weight, **options)


@each_tile
@pytest.mark.parametrize("sm_count", [2, 8, 9, 24, 66, 131, 0])
def test_any_number_of_sms(cuda, tile, sm_count):
    available = torch.cuda.get_device_properties(0).multi_processor_count
    if sm_count > available:
        pytest.skip(f"the device has {available} SMs")
    for m, n, k in ((33, 4096, 4096), (300, 1032, 2048)):
        x = randn(m, k, dtype=torch.bfloat16)
        weight = randn(n, k, dtype=torch.bfloat16, seed=1)
        out = torch.full((m, n), SENTINEL, dtype=x.dtype, device="cuda")
        multiply(cuda, tile, x, weight, out=out, sm_count=sm_count)
        assert_product(out, x, weight)


@each_tile
def test_views_in_place_and_repeated(cuda, tile):
    wide_x, wide_out = randn(40, 1024, dtype=torch.float16), randn(40, 640, dtype=torch.float16)
    x, out = wide_x[:37, 256:768], wide_out[:37, 128:512]
    weight = randn(384, 512, dtype=torch.float16, seed=1)
    residual, around = out.clone(), wide_out.clone()
    multiply(cuda, tile, x, weight, out=out, residual=out)
    assert_product(out, x, weight, residual=residual)
    first = out.clone()
    around[:37, 128:512] = out
    assert torch.equal(wide_out, around)
    for _ in range(3):
        out.copy_(residual)
        multiply(cuda, tile, x, weight, out=out, residual=out)
        assert torch.equal(out, first)


@each_tile
def test_uncut_tiles_give_a_row_the_same_bits_in_any_batch(cuda, tile):
    if tile.schedule == "stream_k":
        pytest.skip("how stream_k adds up depends on the number of rows")
    x = randn(200, 2048, dtype=torch.bfloat16)
    weight = randn(1024, 2048, dtype=torch.bfloat16, seed=1)
    whole = torch.empty(200, 1024, dtype=x.dtype, device="cuda")
    multiply(cuda, tile, x, weight, out=whole)
    for first, last, sm_count in ((0, 1, 0), (7, 70, 16), (63, 200, 64)):
        part = torch.empty(last - first, 1024, dtype=x.dtype, device="cuda")
        multiply(cuda, tile, x[first:last], weight, out=part, sm_count=sm_count)
        assert torch.equal(part, whole[first:last])


def test_the_best_tile_is_taken_and_empty_products_are_nothing(cuda):
    x, weight = randn(5, 64, dtype=torch.bfloat16), randn(32, 64, dtype=torch.bfloat16, seed=1)
    out = torch.empty(5, 32, dtype=x.dtype, device="cuda")
    multiply(cuda, None, x, weight, out=out)
    assert_product(out, x, weight)
    cuda.gemm(x=x[:0], weight=weight, out=out[:0])
    cuda.gemm(x=x, weight=weight[:0], out=out[:, :0])


def test_a_product_runs_on_the_current_stream(cuda):
    x = torch.zeros(4, 4096, dtype=torch.bfloat16, device="cuda")
    weight = randn(4096, 4096, dtype=x.dtype, seed=1)
    out = torch.empty(4, 4096, dtype=x.dtype, device="cuda")
    tile = "16x64x128_1x1_pingpong"
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        x.add_(1)
        cuda.gemm(x=x, weight=weight, out=out, tile=tile)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_product(out, x, weight)


@pytest.mark.parametrize(("changed", "message"), [
    ({"sm_count": -1}, "sm_count is -1; expected 1 to"),
    ({"sm_count": 10000}, "sm_count is 10000; expected 1 to"),
    ({"tile": "1x1"}, "tile is '1x1'; expected one of"),
    ({"tile": "128x256x64_2x1_cooperative", "sm_count": 1}, "sm_count is less than the tile"),
    ({"tile": "16x128x128_1x1_stream_k"}, "workspace is None; expected uint8"),
    ({"tile": "16x128x128_1x1_stream_k",
      "workspace": lambda: torch.empty(8, dtype=torch.uint8, device="cuda")},
     r"workspace is torch\.uint8 \[8\]; expected"),
    ({"tile": "16x128x128_1x1_stream_k",
      "workspace": lambda: torch.empty(1 << 20, dtype=torch.uint8)}, "workspace is on cpu"),
    ({"bias": lambda: torch.zeros(64, dtype=torch.bfloat16)}, "bias is on cpu; expected all of"),
])  # fmt: skip
def test_what_only_a_device_tells_is_refused(cuda, changed, message):
    arguments = {name: value() if callable(value) else value for name, value in changed.items()}
    out = torch.full((2, 64), SENTINEL, dtype=torch.bfloat16, device="cuda")
    x, weight = randn(2, 4096, dtype=out.dtype), randn(64, 4096, dtype=out.dtype)
    with pytest.raises(ValueError, match=message):
        cuda.gemm(x=x, weight=weight, out=out, **arguments)
    assert (out == SENTINEL).all()


@pytest.mark.parametrize("sm_count", [1, 8, 33, 0])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 65535, 65536, 65537, 10_000_001])
def test_a_copy_is_exact_and_touches_nothing_beside(cuda, size, sm_count):
    src = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
    wide = torch.full((size + 64,), 7, dtype=torch.uint8, device="cuda")
    cuda.copy(src, wide[16 : 16 + size], sm_count)
    torch.cuda.synchronize()
    assert torch.equal(wide[16 : 16 + size], src)
    assert (wide[:16] == 7).all()
    assert (wide[16 + size :] == 7).all()
