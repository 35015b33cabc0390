"""A row of a native result is bitwise the same in any batch and chunk, on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_kernels import num_threads, set_num_threads

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**20)
PADS = st.tuples(*[st.integers(0, 20)] * 2)  # of the batch's rows, and of the single row
quick = settings(max_examples=60, deadline=None)


@pytest.fixture
def set_threads() -> Iterator[None]:
    before = num_threads()
    yield set_num_threads
    set_num_threads(before)


@given(st.integers(2, 20), st.integers(1, 300), DTYPES, PADS, SEEDS)
@quick
def test_rms_norm_and_swiglu(native, row_view, rows, width, dtype, pads, seed):
    torch.manual_seed(seed)
    x, gate_up = torch.randn(rows, width).to(dtype), torch.randn(rows, 2 * width).to(dtype)
    weight = torch.randn(width).to(dtype)

    def run(selected, pad):
        results = [row_view(torch.zeros_like(x[selected]), pad) for _ in range(2)]
        source = row_view(x[selected], pad)
        native["rms_norm"](x=source, weight=weight, eps=1e-6, out=results[0])
        native["swiglu"](gate_up=row_view(gate_up[selected], pad), out=results[1])
        return results

    together = run(slice(None), pads[0])
    for row in range(rows):
        alone = run(slice(row, row + 1), pads[1])
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_rows[row])


@given(st.integers(2, 12), st.integers(4, 128).map(lambda n: 2 * n), DTYPES, PADS, SEEDS)
@quick
def test_rope_append(native, row_view, tokens, head_dim, dtype, pads, seed):
    torch.manual_seed(seed)
    heads, kv_heads, page_size = 3, 2, 4
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    positions, slots = torch.randint(9, (tokens,)), torch.randperm(16)[:tokens]
    cos_sin = torch.rand(9, head_dim)
    norm = torch.randn(head_dim).to(dtype)

    def run(selected, pad, k_cache, v_cache):
        source = row_view(qkv[selected], pad)
        out = row_view(torch.zeros_like(source[:, : heads * head_dim]), pad)
        native["rope_append"](
            qkv=source,
            positions=positions[selected],
            slots=slots[selected],
            cos_sin=cos_sin,
            k_cache=k_cache,
            v_cache=v_cache,
            out=out,
            q_norm=norm,
            k_norm=norm,
            eps=1e-6,
        )
        return out

    caches = [torch.zeros(4, kv_heads, page_size, head_dim, dtype=dtype) for _ in range(4)]
    together = run(slice(None), pads[0], *caches[:2])
    for token in range(tokens):
        alone = run(slice(token, token + 1), pads[1], *caches[2:])
        assert torch.equal(alone[0], together[token])
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 80)), min_size=1, max_size=3),
    sizes=st.fixed_dictionaries(
        {
            "kv_heads": st.integers(1, 2),
            "group": st.sampled_from([1, 2, 3, 7, 32]),
            "head_dim": st.one_of(
                st.integers(1, 24).map(lambda n: 8 * n), st.sampled_from([64, 128])
            ),
            "page_size": st.sampled_from([3, 8, 16, 64]),
            "window": st.sampled_from([0, 0, 1, 5, 16, 33]),
            "dtype": DTYPES,
            "seed": SEEDS,
        }
    ),
    pads=PADS,
    data=st.data(),
)
@quick
def test_attention(native, paged_case, row_view, lengths, sizes, pads, data):
    queries, contexts = (list(column) for column in zip(*lengths, strict=True))
    case = paged_case(query_lens=queries, context_lens=contexts, pad=pads[0], **sizes)
    whole = case.arguments
    native["prefill_attention"](**whole)
    request = data.draw(st.integers(0, len(queries) - 1), label="request")
    first_row = sum(queries[:request])
    begin = 0
    while begin < queries[request]:  # the same queries, cut into chunks
        end = begin + data.draw(st.integers(1, queries[request] - begin), label="chunk")
        rows = slice(first_row + begin, first_row + end)
        chunk = {
            **whole,
            "q": row_view(whole["q"][rows], pads[1]),
            "page_table": whole["page_table"][request : request + 1].clone(),
            "query_start": torch.tensor([0, end - begin], dtype=torch.int32),
            "seq_lens": torch.tensor([contexts[request] + end], dtype=torch.int32),
            "out": row_view(torch.zeros_like(whole["q"][rows]), pads[1]),
        }
        native["prefill_attention"](**chunk)
        assert torch.equal(chunk["out"], whole["out"][rows])
        if end - begin == 1:  # what a decode of that token gives
            chunk["out"].zero_()
            del chunk["query_start"]
            native["decode_attention"](**chunk)
            assert torch.equal(chunk["out"], whole["out"][rows])
        begin = end


def test_threads_change_nothing(native, paged_case, set_threads):
    torch.manual_seed(0)
    x, gate_up = torch.randn(50, 1000), torch.randn(50, 2000)
    qkv, slots = torch.randn(50, 32 * 64), torch.randperm(64)[:50]
    attention = paged_case(
        query_lens=[70, 1, 9], context_lens=[30, 200, 0], kv_heads=3, head_dim=64, page_size=16
    ).arguments
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        outs = [torch.empty_like(x), torch.empty_like(x), torch.empty(50, 16 * 64)]
        caches = [torch.zeros(8, 8, 8, 64) for _ in range(2)]
        native["rms_norm"](x=x, weight=x[0].contiguous(), eps=1e-6, out=outs[0])
        native["swiglu"](gate_up=gate_up, out=outs[1])
        native["rope_append"](
            qkv=qkv,
            positions=slots,
            slots=slots,
            cos_sin=x[:64, :64].repeat(2, 1)[:64],
            k_cache=caches[0],
            v_cache=caches[1],
            out=outs[2],
        )
        attention["out"].zero_()
        native["prefill_attention"](**attention)
        results.append([*outs, *caches, attention["out"].clone()])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)
