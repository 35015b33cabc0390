"""Plans of attention: made once for announced arrays, and refused for lengths that do not fit."""

from __future__ import annotations

import gc
import math
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nf_kernels.ops import AttentionBatch
from nf_kernels.ops.cuda import CudaOperations, stream_states
from nf_kernels.ops.cuda.stream_states import StreamState, StreamStates

BF16 = torch.bfloat16


def decode_call(paged_case, **changed):
    case = paged_case(query_lens=[1, 1, 1], context_lens=[5, 0, 40], head_dim=64, dtype=BF16)
    arguments = case.arguments | changed
    del arguments["query_start"]
    return arguments


def announced(arguments):
    return AttentionBatch(arguments["page_table"], arguments["seq_lens"])


@pytest.fixture
def plans_made_by(flashinfer_stand_in, stood_in):
    """How often FlashInfer plans in a call of decode attention."""

    def count(arguments) -> int:
        before = flashinfer_stand_in.Wrapper.plans
        stood_in["decode_attention"](**arguments)
        return flashinfer_stand_in.Wrapper.plans - before

    return count


def test_a_plan_is_made_once_for_announced_arrays(stood_in, plans_made_by, paged_case):
    arguments = decode_call(paged_case)
    other = decode_call(paged_case)
    stood_in.prepare([announced(arguments), announced(other)])
    layers = [arguments, arguments, arguments | {"window": 4}, arguments | {"window": 4}, other]
    assert [plans_made_by(layer) for layer in layers] == [1, 0, 1, 0, 1]
    stood_in.prepare([announced(arguments)])
    assert plans_made_by(arguments) == 1
    stood_in.prepare([])
    assert [plans_made_by(arguments) for _ in range(2)] == [1, 1]


def test_arrays_that_change_have_their_own_plan(stood_in, paged_case):
    arguments = decode_call(paged_case)
    stood_in["decode_attention"](**arguments)
    first = arguments["out"].clone()
    arguments["seq_lens"][2] = 17  # in place: not announced, so this is seen
    stood_in["decode_attention"](**arguments)
    assert not torch.equal(arguments["out"][2], first[2])
    assert torch.equal(arguments["out"][:2], first[:2])


def test_two_plans_of_one_iteration_do_not_share_a_wrapper(stood_in, paged_case):
    short = decode_call(paged_case)
    long = decode_call(paged_case, seq_lens=torch.tensor([6, 1, 30], dtype=torch.int32))
    expected = []
    for arguments in (short, long):
        stood_in["decode_attention"](**arguments)
        expected.append(arguments["out"].clone())
    stood_in.prepare([announced(short), announced(long)])
    for _ in range(2):
        for arguments, want in zip((short, long), expected, strict=True):
            stood_in["decode_attention"](**arguments)
            assert torch.equal(arguments["out"], want)
    stood_in.prepare([])


def test_a_plan_that_is_found_is_of_as_many_queries_and_pages(stood_in, paged_case):
    case = paged_case(query_lens=[2, 3], context_lens=[5, 40], head_dim=64, dtype=BF16)
    arguments = case.arguments
    names = ("page_table", "seq_lens", "query_start")
    arrays = [arguments[name] for name in names]
    stood_in.prepare([AttentionBatch(*arrays, *(array.clone() for array in arrays))])
    stood_in["prefill_attention"](**arguments)
    fewer = {name: arguments[name][:4] for name in ("q", "out")}
    with pytest.raises(ValueError, match=r"^query_start runs from 0 to 5; expected 0 to 4, the r"):
        stood_in["prefill_attention"](**arguments | fewer)
    highest = max(
        int(entry)
        for table, length in zip(arrays[0], arrays[1], strict=True)
        for entry in table[: -(-int(length) // 4)]
    )
    expected, caches = arguments["out"].clone(), ("k_cache", "v_cache")
    for pages, fits in ((highest + 1, True), (highest, False)):
        smaller = arguments | {name: arguments[name][:pages] for name in caches}
        if fits:
            stood_in["prefill_attention"](**smaller)
            assert torch.equal(arguments["out"], expected)
            continue
        message = rf"^page_table has {highest} in use; expected 0 to {highest - 1}$"
        with pytest.raises(ValueError, match=message):
            stood_in["prefill_attention"](**smaller)
    stood_in.prepare([])


class Graph:
    """Stands for a device graph."""


@pytest.fixture
def captured(flashinfer_stand_in, monkeypatch):
    """The calls of FlashInfer's kernels, to be made again as a graph would."""
    calls = []
    run = flashinfer_stand_in.Wrapper.run

    def noted(self, *arguments, **by_name):
        calls.append(lambda: run(self, *arguments, **by_name))
        run(self, *arguments, **by_name)

    monkeypatch.setattr(flashinfer_stand_in.Wrapper, "run", noted)
    return calls


def test_a_graph_reads_the_plan_that_was_announced_last(
    stood_in, plans_made_by, paged_case, captured
):
    arguments, graph = decode_call(paged_case), Graph()
    in_graph = replace(announced(arguments), device_graph=graph)
    stood_in.prepare([in_graph])
    layers = [arguments, arguments | {"window": 4}]
    assert [plans_made_by(layer) for layer in layers] == [1, 1]
    assert [plans_made_by(layer) for layer in layers] == [0, 0]  # what is captured plans nothing
    launch = captured[-2:]
    before = arguments["out"].clone()
    arguments["seq_lens"].copy_(torch.tensor([3, 1, 22]))
    arguments["page_table"][2, :10] = arguments["page_table"][2, :10].flip(0)
    launch[0]()
    launch[1]()
    assert torch.equal(arguments["out"], before)  # the plan is still that of before
    expected = []
    stood_in.prepare([])
    for layer in layers:
        stood_in["decode_attention"](**layer)
        expected.append(arguments["out"].clone())
    assert not torch.equal(expected[1], before)
    for host in ({}, {"host_page_table": arguments["page_table"].clone()}):
        stood_in.prepare([replace(in_graph, **host)])
        arguments["out"].zero_()
        for call, want in zip(launch, expected, strict=True):
            call()
            assert torch.equal(arguments["out"], want)
    stood_in.prepare([])


def test_plans_of_a_graph_go_with_it(flashinfer_stand_in, paged_case):
    operations = CudaOperations(library=lambda: flashinfer_stand_in.FLASHINFER, device_type="cpu")
    arguments, graph = decode_call(paged_case), Graph()
    operations.prepare([replace(announced(arguments), device_graph=graph)])
    operations.decode_attention(**arguments)
    (plans,) = operations._attention._plans._in_graphs.values()
    (wrapper,) = (weakref.ref(wrapper.flashinfer) for wrapper in plans.values())
    del plans
    operations.prepare([])
    assert wrapper() is not None
    del graph
    gc.collect()
    assert wrapper() is None


def test_a_graph_waits_until_the_device_has_read_its_last_plan(flashinfer_stand_in, paged_case):
    operations = CudaOperations(library=lambda: flashinfer_stand_in.FLASHINFER, device_type="cpu")
    arguments, graph = decode_call(paged_case), Graph()
    batch = replace(announced(arguments), device_graph=graph)
    operations.prepare([batch])
    operations.decode_attention(**arguments)
    (plans,) = operations._attention._plans._in_graphs.values()
    (wrapper,) = plans.values()
    planned = flashinfer_stand_in.Wrapper.plans
    order = []
    wrapper.staged = SimpleNamespace(
        synchronize=lambda: order.append(flashinfer_stand_in.Wrapper.plans - planned)
    )
    operations.prepare([batch])
    assert order == [0]  # it waited, and before it planned
    assert flashinfer_stand_in.Wrapper.plans == planned + 1


@pytest.mark.parametrize("failing", ["plan", "run"])
@pytest.mark.parametrize("is_announced", [False, True])
def test_a_wrapper_that_fails_is_used_again(
    flashinfer_stand_in, monkeypatch, paged_case, failing, is_announced
):
    operations = CudaOperations(library=lambda: flashinfer_stand_in.FLASHINFER, device_type="cpu")
    arguments = decode_call(paged_case)
    idle = operations._streams.current(arguments["q"].device).idle.setdefault("fa2", [])

    def fail(*arguments, **by_name):
        raise RuntimeError("out of workspace")

    operations.prepare([announced(arguments)] if is_announced else [])
    operations.decode_attention(**arguments)
    operations.prepare([announced(arguments)] if is_announced else [])
    (wrapper,) = idle
    with monkeypatch.context() as patch:
        patch.setattr(flashinfer_stand_in.Wrapper, failing, fail)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="out of workspace"):
                operations.decode_attention(**arguments)
    operations.prepare([])
    assert idle == [wrapper]


def test_threads_that_come_to_a_stream_at_once_find_one_state(monkeypatch):
    made = []

    def slowly() -> StreamState:
        time.sleep(0.01)
        made.append(StreamState())
        return made[-1]

    monkeypatch.setattr(stream_states, "StreamState", slowly)
    states, found, together = StreamStates(), [], threading.Barrier(4)

    def look() -> None:
        together.wait()
        found.append(states.current(torch.device("cpu")))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert all(state is made[0] for state in found)


def test_a_wrapper_is_not_planned_again_before_the_device_has_read_its_last_plan(
    flashinfer_stand_in, paged_case
):
    operations = CudaOperations(library=lambda: flashinfer_stand_in.FLASHINFER, device_type="cpu")
    arguments = decode_call(paged_case)
    idle = operations._streams.current(arguments["q"].device).idle.setdefault("fa2", [])
    operations.decode_attention(**arguments)
    (first,) = idle
    read = False
    first.staged = SimpleNamespace(query=lambda: read)
    operations.decode_attention(**arguments)
    assert len(idle) == 2
    idle[1].staged = first.staged
    read = True
    operations.decode_attention(**arguments)
    assert len(idle) == 2


@pytest.mark.parametrize(("name", "values", "message"), [
    ("query_start", [0, 2, 4], "query_start runs from 0 to 4; expected 0 to 3, the rows of q"),
    ("query_start", [1, 2, 3], "query_start runs from 1 to 3; expected 0 to 3"),
    ("query_start", [0, 0, 3], "request 0 has 0 queries by query_start"),
    ("query_start", [0, 5, 3], "request 1 has -2 queries by query_start"),
    ("seq_lens", [13, 8], "13 tokens by seq_lens; .*at most 12 tokens, the page_table's width"),
    ("seq_lens", [1, 8], "request 0 has 2 queries by query_start and 1 tokens by seq_lens"),
    ("seq_lens", [9, 0], "request 1 has 1 queries by query_start and 0 tokens by seq_lens"),
    ("host_page_table", [[4, 5, 2], [1, 3, 0]], "page_table has 5 in use; expected 0 to 4"),
    ("host_page_table", [[4, 0, 2], [1, -3, 0]], "page_table has -3 in use; expected 0 to 4"),
])  # fmt: skip
def test_lengths_that_do_not_fit_are_refused(stood_in, name, values, message):
    cache = {n: torch.randn(5, 1, 4, 64).to(BF16) for n in ("k_cache", "v_cache")}
    arrays = {
        "page_table": torch.tensor([[4, 0, 2], [1, 3, 0]], dtype=torch.int32),
        "query_start": torch.tensor([0, 2, 3], dtype=torch.int32),
        "seq_lens": torch.tensor([9, 8], dtype=torch.int32),
    }
    host = {"host_page_table": arrays["page_table"].clone()}
    changed = torch.tensor(values, dtype=torch.int32)
    if name == "host_page_table":
        host[name] = changed
    else:
        arrays[name] = changed
    stood_in.prepare([AttentionBatch(**arrays, **host)])
    out = torch.zeros(3, 128, dtype=BF16)
    with pytest.raises(ValueError, match=message):
        stood_in["prefill_attention"](
            q=torch.randn(3, 128).to(BF16), scale=0.1, window=0, out=out, **arrays, **cache
        )
    assert not out.any()
    stood_in.prepare([])


@pytest.mark.parametrize(("changed", "message"), [
    ({"q": torch.zeros(3, 100).to(BF16)}, "q has rows of 100; expected a multiple of 2 KV heads"),
    ({"q": torch.zeros(3, 256).double()}, "q is torch.float64; expected torch.float32, torch.bf"),
    ({"q": torch.zeros(3, 256)}, "k_cache is torch.bfloat16 .*expected torch.float32"),
    ({"window": -1}, "window is -1; expected 0"),
    ({"soft_cap": math.nan}, "soft_cap is nan; expected 0"),
    ({"seq_lens": torch.tensor([1])}, "seq_lens is torch.int64 .*expected torch.int32"),
    ({"lse": torch.zeros(3, 5)}, "lse is torch.float32"),
])  # fmt: skip
def test_wrong_arguments_of_attention_are_refused(stood_in, paged_case, changed, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        stood_in["decode_attention"](**(decode_call(paged_case) | changed))
