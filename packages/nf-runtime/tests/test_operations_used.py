"""Which operations an engine runs, and what `deterministic` promises."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nf_kernels import native_status, ops
from nf_runtime import LLM, SamplingParams
from nf_runtime.errors import ModelLoadError

needs_native = pytest.mark.skipif(
    not native_status().available, reason="needs the compiled extension"
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


class Counting(ops.OperationSet):
    """An operation set that counts calls by operation."""

    def __init__(self, inner: ops.OperationSet, calls: Counter[tuple[str, str]]) -> None:
        def counted(name: str) -> Any:
            def call(**arguments: Any) -> None:
                calls[inner.name, name] += 1
                inner[name](**arguments)

            return call

        super().__init__(
            name=inner.name,
            functions={name: counted(name) for name in inner},
            invariant=inner.invariant,
            pack=inner.pack,
            scratch={n: lambda n=n, **shape: inner.scratch_bytes(n, **shape) for n in inner},
        )


@needs_native
def test_an_engine_on_a_cpu_runs_native_operations_alone(
    family: str, tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[tuple[str, str]] = Counter()
    # What the native set falls back to, and what it is, are counted apart.
    for name in ops.OPERATION_NAMES:
        plain = getattr(ops.reference, name)

        def counted(*, _plain: Any = plain, _name: str = name, **arguments: Any) -> None:
            calls["reference", _name] += 1
            _plain(**arguments)

        monkeypatch.setattr(ops.reference, name, counted)
    monkeypatch.setattr(ops, "CPU", Counting(ops.CPU, calls))
    llm = LLM(tiny_checkpoint(family), skip_tokenizer_init=True, kv_cache_tokens=2048)
    prompts = [{"prompt_token_ids": list(range(n, 2 * n))} for n in (5, 40, 90)]
    llm.generate(prompts, [GREEDY, GREEDY, SamplingParams(max_tokens=9, top_k=5, ignore_eos=True)])
    llm.shutdown()
    used = {name for _, name in calls}
    assert {"embedding", "linear", "rms_norm", "prefill_attention", "decode_attention"} <= used
    assert {"rope_append", "gather_rows", "sample"} <= used
    assert "swiglu" in used or "moe_experts" in used
    assert {kind for kind, _ in calls} == {"cpu"}


@needs_native
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_deterministic_tokens_do_not_depend_on_load_chunks_or_cache(
    family: str, tiny_checkpoint: Any, dtype: str
) -> None:
    path: Path = tiny_checkpoint(family)
    rng = np.random.default_rng(0)
    shared = rng.integers(200, size=48).tolist()
    prompts = [
        {"prompt_token_ids": shared[: 16 * (i % 4)] + rng.integers(200, size=7 + 5 * i).tolist()}
        for i in range(8)
    ]

    def tokens(prompt_list: list[Any], **options: Any) -> list[list[int]]:
        llm = LLM(
            path,
            dtype=dtype,
            deterministic=True,
            skip_tokenizer_init=True,
            **{"kv_cache_tokens": 4096, **options},
        )
        outputs = llm.generate(prompt_list, GREEDY)
        llm.shutdown()
        return [list(output.outputs[0].token_ids) for output in outputs]

    together = tokens(prompts)
    assert len(set(map(tuple, together))) > 1
    assert [tokens([prompt])[0] for prompt in prompts[-3:]] == together[-3:]
    assert tokens(prompts, max_prefill_chunk=9, max_num_batched_tokens=32) == together
    assert tokens(prompts, enable_prefix_caching=False) == together
    assert tokens(prompts, kv_cache_tokens=256) == together  # with preemptions


def test_deterministic_is_refused_where_it_cannot_be_kept(tiny_checkpoint: Any) -> None:
    with pytest.raises(ModelLoadError, match=r"deterministic is set, but the reference operations"):
        LLM(
            tiny_checkpoint("llama3"),
            skip_tokenizer_init=True,
            kv_cache_tokens=512,
            native_kernels=False,
            deterministic=True,
        )


def test_index_arrays_of_attention_are_announced_with_their_copies_on_the_host(
    tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = ops.load("cpu")
    announced: dict[tuple[int, ...], ops.AttentionBatch] = {}
    attended = Counter[str]()

    def key(arrays: dict[str, Any]) -> tuple[int, ...]:
        names = ("page_table", "seq_lens", "query_start")
        return tuple(arrays[n].data_ptr() for n in names if arrays.get(n) is not None)

    def prepare(batches: Any) -> None:
        announced.clear()
        for batch in batches:
            arrays = {n: getattr(batch, n) for n in ("page_table", "seq_lens", "query_start")}
            announced[key(arrays)] = batch

    def attention(name: str) -> Any:
        def call(**arguments: Any) -> None:
            batch = announced[key(arguments)]
            assert batch.host_page_table is not None
            assert batch.host_page_table.equal(arguments["page_table"])
            seq_lens, query_start = batch.on_host()
            assert seq_lens.equal(arguments["seq_lens"])
            assert query_start[-1] == len(arguments["q"])
            attended[name] += 1
            inner[name](**arguments)

        return call

    functions = {n: attention(n) if n.endswith("_attention") else inner[n] for n in inner}
    functions["merge_attention"] = inner["merge_attention"]
    announcing = ops.OperationSet(
        name=inner.name,
        functions=functions,
        invariant=inner.invariant,
        pack=inner.pack,
        scratch={n: lambda n=n, **shape: inner.scratch_bytes(n, **shape) for n in inner},
        prepare=prepare,
    )
    monkeypatch.setattr(ops, "load", lambda device, native=True: announcing)
    llm = LLM(tiny_checkpoint("llama3"), skip_tokenizer_init=True, max_num_batched_tokens=32)
    prompts = [{"prompt_token_ids": list(range(n, 2 * n))} for n in (5, 40, 90)]
    llm.generate(prompts, GREEDY)
    llm.shutdown()
    assert attended["decode_attention"] > 20
    assert attended["prefill_attention"] > 4
