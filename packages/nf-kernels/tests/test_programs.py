"""Programs give what direct calls give, on any rows, and refuse what they cannot record."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nf_kernels import lanes, native_status, ops
from nf_kernels.lanes import LAUNCH, SIGNAL, WAIT, CpuProgram, CpuSchedule, NotRecordable

pytestmark = pytest.mark.skipif(not native_status().available, reason="needs the native kernels")

DTYPES = [torch.float32, torch.bfloat16]
ROWS = 23
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, PAGES = 4, 2, 16, 4, 12
EXPERTS, CHOSEN = 5, 2
INPUTS = {"token_ids", "index", "positions", "slots", "page_table", "seq_lens", "query_start"}
BY_REQUEST = {"page_table", "seq_lens", "query_start"}


@pytest.fixture
def two_lanes() -> Iterator[list[lanes.CpuLane]]:
    made = lanes.partition("cpu", [1, 1])
    assert all(isinstance(lane, lanes.CpuLane) for lane in made)
    yield made  # type: ignore[misc]
    for lane in made:
        lane.close()


# Operations: arguments with the most rows, which lie with gaps in wider tensors.


def columns(values: Tensor) -> Tensor:
    """A copy of [T, W] as columns of a wider tensor."""
    wide = torch.full((values.shape[0], values.shape[1] + 7), -777.0).to(values.dtype)
    view = wide[:, 3 : 3 + values.shape[1]]
    view.copy_(values)
    return view


def randn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


def rows_of(dtype: torch.dtype, width: int) -> Tensor:
    return columns(randn(dtype, ROWS, width))


def caches(dtype: torch.dtype) -> dict[str, Tensor]:
    shape = (PAGES, KV_HEADS, PAGE_SIZE, HEAD_DIM)
    return {name: randn(dtype, *shape) for name in ("k_cache", "v_cache")}


def embedding(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "token_ids": torch.randint(40, (ROWS,)),
        "table": ops.CPU.pack(randn(dtype, 40, 24)),
        "out": rows_of(dtype, 24),
    }


def gather_rows(dtype: torch.dtype) -> dict[str, Any]:
    x = columns(randn(dtype, 40, 24))
    return {"x": x, "index": torch.randint(40, (ROWS,)), "out": rows_of(dtype, 24)}


def rms_norm(dtype: torch.dtype) -> dict[str, Any]:
    rows = {name: rows_of(dtype, 40) for name in ("x", "residual", "out")}
    return rows | {"weight": randn(dtype, 40), "eps": 1e-5}


def linear(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": rows_of(dtype, 48),
        "weight": ops.CPU.pack(randn(dtype, 80, 48)),
        "bias": randn(dtype, 80),
        "residual": rows_of(dtype, 80),
        "out": rows_of(dtype, 80),
    }


def linear_to_float(dtype: torch.dtype) -> dict[str, Any]:
    weight = ops.CPU.pack(randn(dtype, 80, 48))
    return {"x": rows_of(dtype, 48), "weight": weight, "out": rows_of(torch.float32, 80)}


def rope_append(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "qkv": rows_of(dtype, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
        "positions": torch.randint(64, (ROWS,)),
        "slots": torch.randperm(PAGES * PAGE_SIZE)[:ROWS],
        "cos_sin": torch.randn(64, HEAD_DIM),
        "out": rows_of(dtype, HEADS * HEAD_DIM),
        "q_norm": randn(dtype, HEAD_DIM),
        "k_norm": randn(dtype, HEAD_DIM),
        "eps": 1e-6,
        **caches(dtype),
    }


def decode_attention(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "q": rows_of(dtype, HEADS * HEAD_DIM),
        "out": rows_of(dtype, HEADS * HEAD_DIM),
        "page_table": torch.randint(PAGES, (ROWS, 9), dtype=torch.int32)[:, 1:6],
        "seq_lens": torch.randint(1, 5 * PAGE_SIZE + 1, (ROWS,), dtype=torch.int32),
        "lse": torch.zeros(ROWS, HEADS),
        "scale": 0.25,
        "window": 7,
        "soft_cap": 5.0,
        **caches(dtype),
    }


QUERY_START = torch.tensor([0, 1, 6, 8, 17, 18, ROWS], dtype=torch.int32)


def prefill_attention(dtype: torch.dtype) -> dict[str, Any]:
    arguments = decode_attention(dtype)
    requests = len(QUERY_START) - 1
    queries = QUERY_START.diff()
    seq_lens = queries + torch.randint(0, 10, (requests,), dtype=torch.int32)
    return arguments | {
        "page_table": arguments["page_table"][:requests],
        "seq_lens": seq_lens,
        "query_start": QUERY_START.clone(),
    }


def swiglu(dtype: torch.dtype) -> dict[str, Any]:
    return {"gate_up": rows_of(dtype, 80), "out": rows_of(dtype, 40)}


def merge_attention(dtype: torch.dtype) -> dict[str, Any]:
    rows = {name: rows_of(dtype, HEADS * HEAD_DIM) for name in ("a", "b", "out")}
    return rows | {name: torch.randn(ROWS, HEADS) for name in ("lse_a", "lse_b", "lse_out")}


def moe_route(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "router_logits": rows_of(dtype, EXPERTS),
        "normalize": True,
        "expert_ids": torch.zeros(ROWS, CHOSEN, dtype=torch.int64),
        "expert_weights": torch.zeros(ROWS, CHOSEN),
    }


def moe_experts(dtype: torch.dtype) -> dict[str, Any]:
    hidden, inner = 48, 32
    gate_up = ops.CPU.pack(randn(dtype, EXPERTS, 2 * inner, hidden))
    down = ops.CPU.pack(randn(dtype, EXPERTS, hidden, inner))
    needed = ops.CPU.scratch_bytes(
        "moe_experts", tokens=ROWS, experts_per_token=CHOSEN, gate_up=gate_up, down=down
    )
    return {
        **{name: rows_of(dtype, hidden) for name in ("x", "residual", "out")},
        "expert_ids": torch.rand(ROWS, EXPERTS).argsort(1)[:, :CHOSEN].contiguous(),
        "expert_weights": torch.rand(ROWS, CHOSEN),
        "gate_up": gate_up,
        "down": down,
        "scratch": torch.empty(needed, dtype=torch.uint8),
    }


CASES: dict[str, tuple[str, Callable[[torch.dtype], dict[str, Any]]]] = {
    make.__name__: (make.__name__.removesuffix("_to_float"), make)
    for make in (
        embedding, gather_rows, rms_norm, linear, linear_to_float, rope_append, prefill_attention,
        decode_attention, swiglu, merge_attention, moe_route, moe_experts,
    )
}  # fmt: skip
WHOLE = {
    "table", "weight", "bias", "cos_sin", "q_norm", "k_norm", "k_cache", "v_cache", "scratch",
}  # fmt: skip
Span = tuple[int, int, int, int]


def is_by_row(operation: str, name: str) -> bool:
    if operation == "gather_rows":
        return name != "x"
    if operation == "moe_experts" and name in ("gate_up", "down"):
        return False
    return name not in WHOLE | BY_REQUEST


def sliced(operation: str, arguments: dict[str, Any], span: Span) -> dict[str, Any]:
    """What a direct call is given for a launch on a span."""
    first_row, num_rows, first_request, num_requests = span
    result = dict(arguments)
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            continue
        if name in BY_REQUEST:
            more = name == "query_start"
            result[name] = value[first_request : first_request + num_requests + more]
        elif is_by_row(operation, name):
            result[name] = value[first_row : first_row + num_rows]
    return result


def base_of(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the same values and layouts in memory of their own."""
    return {
        name: base_of(value).clone().as_strided(value.shape, value.stride(), value.storage_offset())
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def assert_bitwise_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """What lies between the rows included."""
    for name, value in expected.items():
        if isinstance(value, Tensor) and name != "scratch":
            same = torch.equal(
                base_of(got[name]).contiguous().view(torch.uint8),
                base_of(value).contiguous().view(torch.uint8),
            )
            assert same, name


def some_spans(operation: str, generator: np.random.Generator) -> list[Span]:
    """Spans that cover all rows, one of them without any."""
    if operation == "prefill_attention":
        cuts = [0, *sorted(generator.choice(np.arange(1, 6), 2, replace=False).tolist()), 6]
        starts = QUERY_START.tolist()
        spans = [(starts[a], starts[b] - starts[a], a, b - a) for a, b in itertools.pairwise(cuts)]
    else:
        cuts = [0, *sorted(generator.choice(np.arange(1, ROWS), 3, replace=False).tolist()), ROWS]
        spans = [(a, b - a, a, b - a) for a, b in itertools.pairwise(cuts)]
    return [*spans, (5, 0, 2, 0)]


def as_spans(spans: list[Span]) -> np.ndarray:
    return np.array(spans, dtype=np.int64).reshape(-1, 4)


def make_schedule(
    program: CpuProgram,
    commands: list[list[tuple[int, int]]],
    blocks: list[int],
    spans: list[int] | None = None,
) -> CpuSchedule:
    return program.schedule(
        [np.array(rows, dtype=np.int32).reshape(-1, 2) for rows in commands],
        np.array(blocks, dtype=np.int32),
        np.array(spans or [0] * len(blocks), dtype=np.int32),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_spans_give_what_direct_calls_give(name, num_lanes, dtype, two_lanes):
    operation, make = CASES[name]
    torch.manual_seed(len(name))
    generator = np.random.default_rng(len(name))
    arguments = make(dtype)
    got, expected = copied(arguments), copied(arguments)
    program = CpuProgram()
    # The placeholders are as long as the largest, and hold nothing that is ever read.
    inputs = {key: got[key] for key in got if key in INPUTS}
    placeholders = {
        key: torch.full((*value.shape[:-1], value.shape[-1] + 2), -1, dtype=value.dtype)
        if value.dim() == 2
        else torch.full_like(value, -1)
        for key, value in inputs.items()
    }
    for number, placeholder in enumerate(placeholders.values()):
        assert program.input(placeholder) == number
    blocks = [
        program.record(
            ops.CPU[operation],
            **got | placeholders | {key: got[key].clone() for key in got if key == "scratch"},
        )
        for _ in range(num_lanes)
    ]
    spans = some_spans(operation, generator)
    nodes = range(len(spans))
    schedule = make_schedule(
        program,
        [[(LAUNCH, node) for node in nodes if node % num_lanes == i] for i in range(num_lanes)],
        [blocks[node % num_lanes] for node in nodes],
        list(nodes),
    )
    run = schedule.run(two_lanes[:num_lanes], as_spans(spans), list(inputs.values()))
    two_lanes[0].synchronize()
    for span in spans:
        if span[1]:
            ops.CPU[operation](**sliced(operation, expected, span))
    assert not run.failed
    assert_bitwise_equal(got, expected)
    times = run.times()
    assert (times[:-1] > 0).all()
    assert (times[:-1, 0] <= times[:-1, 1]).all()
    assert not times[-1].any()


@pytest.mark.parametrize("start", [3, 1000, -5])
def test_query_start_may_begin_anywhere(start):
    torch.manual_seed(0)
    arguments = prefill_attention(torch.float32)
    moved = arguments | {
        "query_start": arguments["query_start"] + start,
        "out": torch.zeros(ROWS, HEADS * HEAD_DIM),
    }
    for operations in (ops.CPU, ops.REFERENCE):
        operations["prefill_attention"](**arguments)
        operations["prefill_attention"](**moved)
        assert torch.equal(moved["out"], arguments["out"])


def test_inputs_are_given_anew_at_every_run(two_lanes):
    """With other lengths, widths and strides."""
    torch.manual_seed(1)
    arguments = decode_attention(torch.float32)
    program = CpuProgram()
    page_table = torch.zeros(ROWS, 5, dtype=torch.int32)
    seq_lens = torch.zeros(ROWS, dtype=torch.int32)
    program.input(page_table)
    program.input(seq_lens)
    block = program.record(
        ops.CPU["decode_attention"],
        **arguments | {"page_table": page_table, "seq_lens": seq_lens},
    )
    schedule = make_schedule(program, [[(LAUNCH, 0)]], [block])
    runs = []
    for requests, width, stride in [(3, 2, 2), (23, 9, 12), (1, 1, 1), (8, 30, 31)]:
        expected = copied(arguments)
        tables = torch.randint(PAGES, (requests, stride), dtype=torch.int32)[:, :width]
        lengths = torch.randint(1, width * PAGE_SIZE + 1, (requests,), dtype=torch.int32)
        span = (0, requests, 0, requests)
        runs.append(schedule.run(two_lanes[:1], as_spans([span]), [tables, lengths]))
        runs[-1].wait()
        given = expected | {"page_table": tables, "seq_lens": lengths}
        ops.CPU["decode_attention"](**sliced("decode_attention", given, span))
        rows = slice(0, requests)
        assert torch.equal(arguments["out"][rows], expected["out"][rows])
        assert torch.equal(arguments["lse"][rows], expected["lse"][rows])
    assert not any(run.failed for run in runs)


def test_runs_are_queued_one_after_the_other_with_their_own_inputs(two_lanes):
    program = CpuProgram()
    ids = torch.zeros(1, dtype=torch.int64)
    program.input(ids)
    table, out, seen = torch.arange(50.0).view(50, 1), torch.zeros(1, 1), []
    look_up = program.record(ops.CPU["embedding"], token_ids=ids, table=table, out=out)
    tell = program.call(lambda node: seen.append((node, int(out))))
    schedule = make_schedule(
        program,
        [[(LAUNCH, 0), (SIGNAL, 0)], [(WAIT, 0), (LAUNCH, 1)]],
        [look_up, tell],
    )
    for number in range(50):
        schedule.run(two_lanes, as_spans([(0, 1, 0, 0)]), [torch.tensor([number])])
    two_lanes[0].synchronize()
    assert seen == [(1, number) for number in range(50)]


# What is refused.


def test_what_runs_in_plain_torch_or_samples_is_not_recordable():
    program = CpuProgram()
    rows = torch.randn(2, 514)
    arguments = {
        "q": rows,
        "k_cache": torch.randn(2, 1, 4, 514),
        "v_cache": torch.randn(2, 1, 4, 514),
        "page_table": torch.zeros(2, 1, dtype=torch.int32),
        "seq_lens": torch.ones(2, dtype=torch.int32),
        "scale": 0.1,
        "window": 0,
        "out": torch.zeros(2, 514),
    }
    with pytest.raises(NotRecordable, match=r"decode_attention runs in plain torch.*use Cpu"):
        program.record(ops.CPU["decode_attention"], **arguments)
    assert not arguments["out"].any()
    kept = torch.zeros(3, dtype=torch.int64)
    slots = torch.arange(2)
    with pytest.raises(NotRecordable, match="keep_sampled cannot be recorded"):
        program.record(
            ops.CPU["keep_sampled"], sampled=torch.ones_like(slots), slots=slots, last_sampled=kept
        )
    assert not kept.any()
    with pytest.raises(NotRecordable, match="feed_sampled cannot be recorded"):
        program.record(ops.CPU["feed_sampled"], token_ids=slots - 1, slots=slots, last_sampled=kept)
    with pytest.raises(NotRecordable, match="sample cannot be recorded"):
        program.record(
            ops.CPU["sample"],
            logits=torch.randn(2, 8),
            temperature=torch.ones(2),
            top_k=torch.ones(2, dtype=torch.int64),
            top_p=torch.ones(2),
            min_p=torch.zeros(2),
            uniform=torch.rand(2),
            out=kept[:2],
            scratch=torch.empty(ops.CPU.scratch_bytes("sample", vocab_size=8), dtype=torch.uint8),
        )


def test_recording_checks_and_does_not_run(two_lanes):
    program = CpuProgram()
    x, out = torch.randn(4, 8), torch.zeros(4, 8)
    with two_lanes[0]:
        with pytest.raises(ValueError, match=r"weight is torch\.float32"):
            program.record(ops.CPU["rms_norm"], x=x, weight=torch.ones(9), eps=1e-5, out=out)
        program.record(ops.CPU["rms_norm"], x=x, weight=torch.ones(8), eps=1e-5, out=out)
        assert not two_lanes[0]._kept._recent
        two_lanes[0].synchronize()
        assert not out.any()
        ops.CPU["rms_norm"](x=x, weight=torch.ones(8), eps=1e-5, out=out)  # the lane is current
        two_lanes[0].synchronize()
        assert out.any()


def test_inputs_that_are_none_are_refused():
    program = CpuProgram()
    ids = torch.zeros(8, dtype=torch.int64)
    table, out = torch.randn(10, 4), torch.zeros(8, 4)
    with pytest.raises(ValueError, match=r"placeholder is torch.float32 \[10, 4\]; expected"):
        program.input(table)
    with pytest.raises(ValueError, match=r"placeholder is \[0\]; expected the most rows"):
        program.input(ids[:0])
    with pytest.raises(ValueError, match="placeholder has stride 2"):
        program.input(ids[::2])
    program.input(ids)
    with pytest.raises(ValueError, match="placeholder lies in that of input 0"):
        program.input(ids[2:4])
    with pytest.raises(ValueError, match="token_ids begins in the middle of input 0"):
        program.record(ops.CPU["embedding"], token_ids=ids[1:], table=table, out=out[1:])
    with pytest.raises(ValueError, match="expert_ids lies in input 0; expected one of index,"):
        program.record(
            ops.CPU["moe_route"],
            router_logits=torch.randn(4, 3),
            normalize=True,
            expert_ids=ids.view(4, 2),
            expert_weights=torch.zeros(4, 2),
        )
    program.record(ops.CPU["embedding"], token_ids=ids, table=table, out=out)
    with pytest.raises(RuntimeError, match="input was called after record or call; declare all"):
        program.input(torch.zeros(8, dtype=torch.int64))


def test_requests_outside_of_the_inputs_are_refused(two_lanes):
    program = CpuProgram()
    arguments = prefill_attention(torch.float32)
    names = ("page_table", "seq_lens", "query_start")
    placeholders = {name: arguments[name].clone() for name in names}
    for placeholder in placeholders.values():
        program.input(placeholder)
    prefill = program.record(ops.CPU["prefill_attention"], **arguments | placeholders)
    decode = program.record(ops.CPU["decode_attention"], **decode_attention(torch.float32))
    schedule = make_schedule(program, [[(LAUNCH, 0)]], [prefill])
    inputs = [arguments[name] for name in names]
    for shortened, name in enumerate(names):
        given = list(inputs)
        given[shortened] = given[shortened][:-1]
        with pytest.raises(
            ValueError, match=f"requests from 0 on; the run's input has {len(given[shortened])}"
        ):
            schedule.run(two_lanes[:1], as_spans([(0, ROWS, 0, 6)]), given)
        assert name in placeholders
    with pytest.raises(ValueError, match="a span takes 6 requests from 1 on; the operation was"):
        schedule.run(two_lanes[:1], as_spans([(1, ROWS - 1, 1, 6)]), inputs)
    schedule.run(two_lanes[:1], as_spans([(1, ROWS - 2, 1, 5)]), inputs)
    with pytest.raises(ValueError, match=f"query_start runs from 1 to {ROWS}; expected 1 to"):
        two_lanes[0].synchronize()
    one = make_schedule(program, [[(LAUNCH, 0)]], [decode])
    with pytest.raises(ValueError, match="a span has 3 rows of 2 requests; expected one row per"):
        one.run(two_lanes[:1], as_spans([(0, 3, 0, 2)]), inputs)
