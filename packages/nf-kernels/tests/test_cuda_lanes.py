"""Lanes of a CUDA device over a stand-in for the driver, which has the rules of the real one."""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nf_kernels import lanes
from nf_kernels.cuda.library import CudaLibrary
from nf_kernels.lanes.cuda import MECHANISMS, CudaLane, current_lane, grant_sms
from nf_kernels.lanes.cuda import runtime as cuda_runtime
from nf_kernels.ops import REFERENCE
from nf_kernels.ops.cuda import CudaOperations

H200 = [18, 18, 16, 16, 16, 16, 16, 16]  # SMs by cluster: 16 groups of 8, and 4 over
SHARES = st.lists(st.floats(0.001, 1000), min_size=1, max_size=12)
LAYOUTS = st.lists(st.integers(8, 20), min_size=1, max_size=9)


@pytest.fixture
def outer(monkeypatch, cuda_driver_stand_in):
    """The stream outside of lanes; torch.cuda behaves as if there were a device."""
    stand_in = cuda_driver_stand_in
    current = [stand_in.Stream()]

    @contextlib.contextmanager
    def use(stream):
        current.append(stream)
        yield
        current.pop()

    properties = SimpleNamespace(multi_processor_count=sum(H200))
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "synchronize": lambda device: None,
        "get_device_properties": lambda device: properties,
        "Stream": stand_in.Stream,
        "ExternalStream": stand_in.Stream,
        "Event": stand_in.TorchEvent,
        "current_stream": lambda device: current[-1],
        "stream": use,
        "is_current_stream_capturing": lambda: current[-1].is_capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return current[0]


@pytest.fixture
def driver(monkeypatch, outer, cuda_driver_stand_in):
    made = cuda_driver_stand_in.Driver(H200)
    monkeypatch.setattr(cuda_runtime, "_driver", lambda: made)
    return made


def contexts_of(driver, made: list[lanes.Lane]):
    return [driver.of_stream[lane.stream.cuda_stream] for lane in made]


# Arithmetic


@given(st.integers(1, 40), st.sampled_from([2, 4, 8]), st.integers(0, 20), SHARES)
def test_sms_are_granted_in_groups_disjoint_and_none_is_left(groups, size, remainder, shares):
    granted = grant_sms(groups=groups, group_size=size, remainder=remainder, shares=shares)
    total = groups * size + remainder
    assert len(granted) == len(shares)
    assert {unit for part in granted for unit in part.units} == set(range(total))
    for part in granted:
        assert len(part.units) >= size
        assert len(part.units) == len(part.groups) * size + remainder * part.remainder
    if groups >= len(shares):
        units = [unit for part in granted for unit in part.units]
        assert len(units) == len(set(units))
        assert sum(part.remainder for part in granted) == (remainder > 0)
    else:
        for one, other in itertools.combinations(granted, 2):  # of one context, or disjoint
            assert one == other or not set(one.units) & set(other.units)


def test_the_remainder_goes_where_it_is_missed_most():
    granted = grant_sms(groups=16, group_size=8, remainder=4, shares=[100, 32])
    assert [len(part.units) for part in granted] == [100, 32]
    assert [part.remainder for part in granted] == [True, False]


# Green contexts


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(LAYOUTS, SHARES)
def test_lanes_have_all_sms_and_share_none(
    monkeypatch, outer, cuda_driver_stand_in, layout, shares
):
    driver = cuda_driver_stand_in.Driver(layout)
    monkeypatch.setattr(cuda_runtime, "_driver", lambda: driver)
    sms = sum(layout)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=sms),
    )
    made = lanes.partition("cuda", shares)
    contexts = contexts_of(driver, made)
    assert frozenset().union(*(context.sms for context in contexts)) == frozenset(range(sms))
    for lane, context in zip(made, contexts, strict=True):
        assert len(lane.units) == len(context.sms) == lane.sm_count
        assert lane.share == len(context.sms) / sms
        assert lane.exclusive == (contexts.count(context) == 1)
        assert lane.sm_cap == 0
    for one, other in itertools.combinations(set(map(id, contexts)), 2):
        a, b = (next(c for c in contexts if id(c) == number) for number in (one, other))
        assert not a.sms & b.sms
    if len(shares) <= sum(size // 8 for size in layout):
        assert all(lane.exclusive for lane in made)
    for lane in made:
        lane.close()
        lane.close()
    assert not any(context.alive for context in driver.contexts)
    assert not driver.of_stream


@pytest.mark.parametrize(("shares", "granted"), [
    ([1], [132]),
    ([1, 1], [68, 64]),
    ([0.4, 0.4, 0.2], [56, 52, 24]),
    ([0.9, 0.1], [116, 16]),
    ([0.999, 0.001], [124, 8]),
])  # fmt: skip
def test_an_h200_is_divided_by_eights(driver, shares, granted):
    made = lanes.partition("cuda:0", shares, mechanism="green_contexts")
    assert [lane.sm_count for lane in made] == granted
    assert sum(lane.share for lane in made) == pytest.approx(1)


def test_more_lanes_than_groups_share_contexts_and_say_so(driver):
    made = lanes.partition("cuda", [1] * 20)
    assert len(driver.contexts) == 16
    assert [lane.exclusive for lane in made] == [i in range(4, 16) for i in range(20)]
    contexts = contexts_of(driver, made)
    assert contexts[0] is contexts[16]
    made[0].close()
    assert contexts[16].alive
    made[16].close()
    assert not contexts[16].alive


def test_the_error_of_the_driver_is_named(driver, monkeypatch):
    monkeypatch.setattr(driver, "cuGreenCtxCreate", lambda *arguments: (915, None))
    expected = "^cuGreenCtxCreate failed: CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION$"
    with pytest.raises(RuntimeError, match=expected):
        lanes.partition("cuda", [1, 1])


@pytest.mark.parametrize(("function", "failing_call", "lanes_asked"), [
    ("cuGreenCtxCreate", 2, 2),
    ("cuGreenCtxStreamCreate", 1, 1),
    ("cuGreenCtxStreamCreate", 2, 2),
    ("cuGreenCtxStreamCreate", 18, 20),  # of a context that has a lane
])  # fmt: skip
def test_what_was_made_before_a_failure_is_given_back(
    driver, monkeypatch, function, failing_call, lanes_asked
):
    create, calls = getattr(driver, function), itertools.count(1)

    def fail(*arguments):
        return (1, None) if next(calls) == failing_call else create(*arguments)

    monkeypatch.setattr(driver, function, fail)
    with pytest.raises(RuntimeError, match=f"^{function} failed: CUDA_ERROR_INVALID_VALUE$"):
        lanes.partition("cuda", [1] * lanes_asked)
    assert driver.contexts
    assert not any(context.alive for context in driver.contexts)
    assert not driver.of_stream


def test_without_cuda_bindings_it_is_said_what_to_do(outer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.driver", None)
    with pytest.raises(RuntimeError, match=r"pip install 'nf-kernels\[cuda\]', or choose mech"):
        lanes.partition("cuda", [1, 1])


# The other mechanisms


def test_capped_lanes_have_a_number_of_sms_and_the_small_go_first(outer):
    made = lanes.partition("cuda", [2, 1, 2, 6], mechanism="capped")
    assert [lane.sm_cap for lane in made] == [24, 12, 24, 72]
    assert [lane.share for lane in made] == [24 / 132, 12 / 132, 24 / 132, 72 / 132]
    assert [lane.stream.priority for lane in made] == [-1, -2, -1, 0]
    assert all(lane.units == tuple(range(132)) and not lane.exclusive for lane in made)


def test_there_are_no_more_priorities_than_the_device_has(outer):
    made = lanes.partition("cuda", [1, 2, 3, 4, 5, 6, 7, 8], mechanism="capped")
    assert [lane.stream.priority for lane in made] == [-5, -5, -5, -4, -3, -2, -1, 0]


def test_shared_lanes_have_the_whole_device(outer):
    made = lanes.partition("cuda", [2, 1], mechanism="shared")
    for lane in made:
        assert (lane.sm_count, lane.sm_cap, lane.share, lane.exclusive) == (132, 0, 1.0, False)
        assert lane.stream.priority == 0


@pytest.mark.parametrize(("device", "mechanism", "message"), [
    ("cuda", "cores", "mechanism is 'cores'; expected one of green_contexts, capped, shared on c"),
    ("cpu", "capped", "mechanism is 'capped'; expected one of cores, shared on cpu"),
])  # fmt: skip
def test_a_mechanism_of_another_device_is_refused(device, mechanism, message):
    with pytest.raises(ValueError, match=message):
        lanes.partition(device, [1, 1], mechanism=mechanism)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("shares", [[], [1, 0], [float("nan")]])
def test_impossible_shares_are_refused(driver, mechanism, shares):
    with pytest.raises(ValueError, match=r"shares(\[\d\])? is"):
        lanes.partition("cuda", shares, mechanism=mechanism)
    assert not driver.contexts


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_it_is_said():
    with pytest.raises(RuntimeError, match="device is 'cuda', and torch finds no CUDA device"):
        lanes.partition("cuda", [1])


# A lane's life


def test_work_goes_to_the_lane_after_what_the_stream_outside_has_queued(driver, outer):
    first, second = lanes.partition("cuda", [1, 1])
    assert current_lane() is None
    with first:
        assert current_lane() is first
        assert torch.cuda.current_stream(0) is first.stream
        with second:
            assert current_lane() is second
        assert torch.cuda.current_stream(0) is first.stream
    assert torch.cuda.current_stream(0) is outer
    assert first.stream.log == [("wait", outer)]
    assert second.stream.log == []  # between lanes only what `wait` says


def test_events_order_lanes_and_tell_the_time(driver):
    first, second = lanes.partition("cuda", [1, 1])
    begin, end = first.record(), second.record()
    second.wait(begin)
    assert second.stream.log[-1] == ("wait", begin.event)
    with pytest.raises(ValueError, match="an event is not done yet"):
        end.seconds_since(begin)
    begin.wait()
    end.wait()
    assert end.seconds_since(begin) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="event is a object; expected one of a lane of CUDA"):
        first.wait(object())


def test_a_closed_lane_says_so(driver):
    (lane,) = lanes.partition("cuda", [1])
    with lane, pytest.raises(RuntimeError, match="closed inside of its own `with`"):
        lane.close()
    stream = lane.stream
    lane.close()
    assert ("synchronize", None) in stream.log
    with pytest.raises(RuntimeError, match="the lane is closed"), lane:
        pass
    with pytest.raises(RuntimeError, match="the lane is closed"):
        lane.synchronize()


def test_a_lane_keeps_the_tensors_of_what_is_queued(driver):
    (lane,) = lanes.partition("cuda", [1])
    operations = CudaOperations(device_type="cpu").functions()

    def queue() -> weakref.ref[torch.Tensor]:
        out = torch.zeros(2, 3)
        with lane:
            operations["linear"](x=torch.ones(2, 4), weight=torch.ones(3, 4), out=out)
        return weakref.ref(out)

    kept = [queue() for _ in range(300)]
    gc.collect()
    assert all(reference() is not None for reference in kept)
    events = [event for what, event in lane.stream.log if what == "record"]
    assert len(events) == 1  # of the first 256
    events[0].synchronize()
    kept += [queue() for _ in range(212)]
    gc.collect()
    assert [reference() is not None for reference in kept] == [False] * 256 + [True] * 256
    lane.synchronize()
    gc.collect()
    assert not any(reference() is not None for reference in kept)


def test_a_lane_leaves_the_tensors_of_what_is_captured_to_the_owner_of_the_graph(driver):
    (lane,) = lanes.partition("cuda", [1])
    operations = CudaOperations(device_type="cpu").functions()
    out = torch.zeros(2, 3)
    kept = weakref.ref(out)
    lane.stream.is_capturing = True
    for _ in range(300):
        with lane:
            operations["linear"](x=torch.ones(2, 4), weight=torch.ones(3, 4), out=out)
    del out
    gc.collect()
    assert kept() is None
    assert not [event for what, event in lane.stream.log if what == "record"]


def test_a_lane_lets_go_of_its_tensors_when_the_device_has_failed(
    driver, cuda_driver_stand_in, monkeypatch
):
    (lane,) = lanes.partition("cuda", [1])
    operations = CudaOperations(device_type="cpu").functions()
    out = torch.zeros(2, 3)
    with lane:
        operations["linear"](x=torch.ones(2, 4), weight=torch.ones(3, 4), out=out)
    kept = weakref.ref(out)
    del out

    def fail(stream):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda_driver_stand_in.Stream, "synchronize", fail)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        lane.synchronize()
    gc.collect()
    assert kept() is None


class Library:
    """The built library of CUTLASS kernels, in torch, for bfloat16 and `least_sms` or more."""

    def __init__(self, least_sms: int = 1) -> None:
        self.least_sms = least_sms
        self.calls: list[tuple[int, str]] = []

    def best_tile(self, m, n, k, sm_count=0):
        if sm_count < self.least_sms:
            raise ValueError(f"sm_count is {sm_count}; expected enough for one of 1 tiles")
        return f"tile of {m}x{n}x{k}"

    def takes(self, tile, *, m, n, k, sm_count, dtype=torch.bfloat16):
        return dtype == torch.bfloat16

    def workspace_bytes(self, *, m, n, k, tile=None, sm_count=0, dtype=torch.bfloat16):
        assert (tile, dtype) == (f"tile of {m}x{n}x{k}", torch.bfloat16)
        return 4 * sm_count

    def gemm(
        self, *, x, weight, out, bias=None, residual=None, tile=None, sm_count=0, workspace=None
    ):
        assert workspace.shape == (4 * sm_count,)
        self.calls.append((sm_count, tile))
        REFERENCE["linear"](x=x, weight=weight, out=out, bias=bias, residual=residual)


def test_the_library_that_stands_in_has_the_arguments_of_the_real_one():
    for name in ("best_tile", "takes", "workspace_bytes", "gemm"):
        mine, real = (
            [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
            for method in (getattr(Library, name), getattr(CudaLibrary, name))
        )
        assert mine == real, name


def test_a_capped_lane_multiplies_on_its_sms(outer):
    library = Library()
    operations = CudaOperations(cutlass=lambda device: library, device_type="cpu").functions()
    capped = lanes.partition("cuda", [1, 2], mechanism="capped")
    shared = lanes.partition("cuda", [1, 2], mechanism="shared")
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    expected, out = torch.zeros(4, 16).bfloat16(), torch.zeros(4, 16).bfloat16()
    operations["linear"](x=x, weight=weight, out=expected)
    for lane in (*capped, *shared):
        with lane:
            operations["linear"](x=x, weight=weight, out=out)
        assert torch.equal(out, expected)
        out.zero_()
    assert library.calls == [(44, "tile of 4x16x64"), (88, "tile of 4x16x64")]
    with capped[0]:  # what CUTLASS does not take
        operations["linear"](x=x.float(), weight=weight.float(), out=out.float())
        operations["linear"](x=x[:, :60], weight=weight[:, :60], out=out)
    assert len(library.calls) == 2


def test_a_capped_lane_multiplies_by_cublas_what_the_library_was_not_built_for(outer):
    library = Library(least_sms=50)
    operations = CudaOperations(cutlass=lambda device: library, device_type="cpu").functions()
    small, large = lanes.partition("cuda", [1, 2], mechanism="capped")
    for lane, dtype in ((small, torch.bfloat16), (large, torch.float16)):
        x, weight, out = (torch.ones(8, 8).to(dtype) for _ in range(3))
        with lane:
            operations["linear"](x=x, weight=weight, out=out)
        assert out.eq(8).all()
    assert not library.calls


def test_memory_of_a_lane_goes_with_it(outer, flashinfer_stand_in):
    operations = CudaOperations(
        library=lambda: flashinfer_stand_in.FLASHINFER,
        cutlass=lambda device: Library(),
        device_type="cpu",
    )
    (lane, _) = lanes.partition("cuda", [1, 1], mechanism="capped")
    x = torch.ones(2, 8).bfloat16()
    cache = torch.zeros(3, 1, 4, 64).bfloat16()
    tokens = torch.arange(2)
    with lane:
        operations.linear(x=x, weight=x, out=torch.zeros(2, 2).bfloat16())
        operations.linear(x=x, weight=torch.ones(8, 8).bfloat16(), out=x.clone())
        operations.rope_append(
            qkv=torch.ones(2, 192).bfloat16(),
            positions=tokens,
            slots=tokens,
            cos_sin=torch.ones(2, 64),
            k_cache=cache,
            v_cache=cache.clone(),
            out=torch.zeros(2, 64).bfloat16(),
        )
        state = operations._streams.current(x.device)
        memory = [weakref.ref(tensor) for tensor in state.buffers.values()]
        memory += [weakref.ref(array) for arrays in state.whole_caches.values() for array in arrays]
        del state
    assert len(memory) == 7
    assert isinstance(lane, CudaLane)
    lane.close()
    del lane, _
    gc.collect()
    assert not any(reference() is not None for reference in memory)
