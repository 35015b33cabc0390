"""Where memory goes: the rule that engine and planner share, beside what an engine takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf_runtime import LLM, EngineConfig, SamplingParams, loaded_model
from nf_runtime.device import DeviceMemory, _container_memory, _machine_memory, measure_memory
from nf_runtime.errors import ModelLoadError
from nf_runtime.memory_plan import MemoryPlan, format_bytes, plan_memory, weight_bytes
from nf_runtime.memory_plan import workspace_bytes as planned_workspace
from nf_runtime.models import decoder_graph, read_config
from nf_runtime.pipeline.policy import make_policy

MakeCheckpoint = Callable[..., Path]
GIB = 1 << 30

# Llama 3 8B: weights of 15 GiB in bfloat16, 128 KiB of KV per token.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Any:

    path = tmp_path_factory.mktemp("llama-8b")
    (path / "config.json").write_text(json.dumps(LLAMA_8B))
    return read_config(path)


def gpu(gibibytes: float) -> DeviceMemory:
    size = int(gibibytes * GIB)
    return DeviceMemory("cuda:0", "cuda", size, size)


def cpu(gibibytes: float) -> DeviceMemory:
    size = int(gibibytes * GIB)
    return DeviceMemory("cpu", "cpu", size, size)


def plan(model: Any, memory: DeviceMemory, **options: Any) -> MemoryPlan:
    dtype = options.pop("torch_dtype", torch.bfloat16)
    return plan_memory(EngineConfig(model="m", **options), model, memory, dtype)


def test_the_largest_batch_depends_on_the_device(llama_8b: Any) -> None:
    config = EngineConfig(model="m")
    assert config.on_device("cpu").batch_tokens == 512
    assert config.on_device("cuda").batch_tokens == 2048
    assert EngineConfig(model="m", max_num_batched_tokens=7).on_device("cuda").batch_tokens == 7
    planned = plan(llama_8b, gpu(80)).workspace_bytes
    assert planned == plan(llama_8b, gpu(80), max_num_batched_tokens=2048).workspace_bytes
    assert planned > plan(llama_8b, gpu(80), max_num_batched_tokens=512).workspace_bytes


def test_weights_and_workspace_are_those_of_the_engine(
    family: str, tiny_checkpoint: MakeCheckpoint
) -> None:
    """Of every family: what the engine allocates is planned, and not much more is."""
    path = tiny_checkpoint(family)
    options = {"kv_cache_tokens": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    model = read_config(path)
    with LLM(str(path), skip_tokenizer_init=True, native_kernels=False, **options) as llm:
        engine = llm.engine
        assert weight_bytes(model, torch.float32) == engine.info.weight_bytes
        executor = engine.executor
        taken = executor.workspace_bytes
    config = EngineConfig(model=str(path), **options)
    planned = planned_workspace(config, model, torch.float32, "cpu", 256)
    if model.sparse_layers:  # what plain torch allocates for each expert as it comes to it
        rows = 64 * model.experts_per_token
        taken_by_experts = rows * (2 * model.hidden_size + 3 * model.expert_intermediate_size) * 4
    else:
        taken_by_experts = 0
    assert taken <= planned <= 3 * (taken + taken_by_experts)


def test_native_kernels_need_no_more_scratch_than_planned(tiny_checkpoint: MakeCheckpoint) -> None:
    path = tiny_checkpoint("qwen3-moe")
    options = {"kv_cache_tokens": 256, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    with LLM(str(path), skip_tokenizer_init=True, **options) as llm:
        executor = llm.engine.executor
        taken = executor.workspace_bytes
    config = EngineConfig(model=str(path), **options)
    assert taken <= planned_workspace(config, read_config(path), torch.float32, "cpu", 256)


@pytest.mark.parametrize("programs", [True, False])
def test_each_lane_of_experts_has_scratch_that_is_planned(
    programs: bool, tiny_checkpoint: MakeCheckpoint
) -> None:
    """It is there before the first batch, and goes with the plans that need it."""
    path = tiny_checkpoint("qwen3-moe")
    options = {"kv_cache_tokens": 256, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    prompts = [{"prompt_token_ids": [1 + i, 2, 3]} for i in range(6)]
    overlap = {"overlap": "co-resident", "native_programs": programs}
    with LLM(str(path), skip_tokenizer_init=True, **options, **overlap) as llm:
        executor = llm.engine.executor
        co_resident = executor.policy
        at_first = executor.workspace_bytes
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        assert llm.engine.stats.overlap_steps["co-resident"]["planned"] > 0
        assert executor.workspace_bytes == at_first
        llm.engine.set_overlap("off")
        alone = executor.workspace_bytes
        for word in ("off", "co-resident"):
            llm.engine.set_overlap(word)
            again = llm.generate(prompts, params)
            assert [output.outputs[0].token_ids for output in again] == tokens
        assert executor.workspace_bytes == at_first
    arguments = EngineConfig(model=str(path), **options), read_config(path), torch.float32
    assert co_resident.lanes_of("moe_experts") == {0, 1, 2}
    assert alone <= planned_workspace(*arguments, "cpu", 256) < at_first
    assert at_first <= planned_workspace(*arguments, "cpu", 256, co_resident)


def test_an_engine_plans_for_the_lanes_of_its_plans(
    tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint("qwen3-moe")
    options: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 512}
    options |= {"kv_cache_tokens": 256}
    config, model = EngineConfig(model=str(path), **options), read_config(path)
    needed = planned_workspace(config, model, torch.float32, "cpu", 256)
    needed += plan_memory(config, model, cpu(1), torch.float32).kv_bytes
    free = DeviceMemory("cpu", "cpu", needed, needed)
    monkeypatch.setattr(loaded_model, "measure_memory", lambda device: free)
    LLM(str(path), skip_tokenizer_init=True, overlap="off", **options).shutdown()
    with pytest.raises(ModelLoadError, match=r"cpu has .* of memory free: the workspace of an"):
        LLM(str(path), skip_tokenizer_init=True, overlap="co-resident", **options)


def test_a_gpu_gives_kv_what_is_left(llama_8b: Any) -> None:
    result = plan(llama_8b, gpu(80), max_num_seqs=1024)
    assert result.fits
    assert result.weight_bytes == 16_060_522_496
    assert result.page_bytes == 16 * 128 * 1024
    left = result.total_bytes - result.weight_bytes - result.workspace_bytes - result.reserve_bytes
    assert 0 <= left - result.kv_bytes < result.page_bytes
    assert result.kv_tokens == result.num_pages * 16
    assert result.full_sequences == result.kv_tokens // 8192


def test_no_more_kv_than_all_sequences_together_can_use(llama_8b: Any) -> None:
    result = plan(llama_8b, gpu(80), max_num_seqs=2)
    assert result.num_pages == 2 * 8192 // 16


def test_a_cpu_belongs_to_others_too(llama_8b: Any) -> None:
    result = plan(llama_8b, cpu(200))
    assert 0 <= 0.1 * result.total_bytes - result.kv_bytes < result.page_bytes
    given = plan(llama_8b, cpu(200), kv_device_bytes=100 * GIB)
    assert given.fits
    assert given.kv_bytes == 100 * GIB


def test_on_a_cpu_the_host_tier_is_in_the_same_memory(llama_8b: Any) -> None:
    options = {"kv_device_bytes": 10 * GIB, "kv_host_bytes": 10 * GIB}
    result = plan(llama_8b, cpu(30), **options)
    assert not result.fits
    assert result.host_tier_bytes == 10 * GIB
    assert any("lower kv_host_bytes" in advice for advice in result.advice)
    assert plan(llama_8b, gpu(30), **options).host_tier_bytes == 0


def test_what_does_not_fit_is_said_with_what_to_change(llama_8b: Any) -> None:
    result = plan(llama_8b, gpu(16))
    assert result.problem is not None
    assert result.problem.startswith(
        "cuda:0 has 16.0 GiB of memory free: the weights take 15.0 GiB"
    )
    assert result.num_pages == 0
    assert plan(llama_8b, gpu(8)).advice == (
        "choose a smaller model, or a device with more memory",
    )
    wide = plan(llama_8b, gpu(20), torch_dtype=torch.float32)
    assert "set dtype to bfloat16, which halves weights and KV" in wide.advice
    busy = plan(llama_8b, gpu(18), max_num_batched_tokens=32768)
    assert any("lower max_num_batched_tokens" in advice for advice in busy.advice)
    short = plan(llama_8b, gpu(80), kv_cache_tokens=4096, max_model_len=8192)
    assert short.problem == (
        "the KV cache has 256 pages of 16 tokens, less than one sequence of 8192"
    )
    assert short.advice == ("lower max_model_len or raise kv_cache_tokens",)
    with pytest.raises(ModelLoadError, match="max_model_len is 8193; the model was made for"):
        plan(llama_8b, gpu(80), max_model_len=8193)


def test_the_context_is_cut_where_no_length_was_asked_for(llama_8b: Any) -> None:
    result = plan(llama_8b, gpu(80), kv_cache_tokens=4096)
    assert result.fits
    assert result.max_model_len == 4096
    (advice,) = result.advice
    assert "the longest have 4096: set max_model_len to that" in advice
    assert "set kv_cache_tokens to 8192" in advice


@given(
    free=st.integers(1, 64 * GIB),
    kind=st.sampled_from(["cpu", "cuda"]),
    kv=st.none() | st.integers(1, 1 << 38),
    in_tokens=st.booleans(),
    max_len=st.none() | st.integers(1, 8192),
    host=st.none() | st.integers(1, 32 * GIB),
)
def test_what_is_advised_helps(
    llama_8b: Any,
    free: int,
    kind: str,
    kv: int | None,
    in_tokens: bool,
    max_len: int | None,
    host: int | None,
) -> None:
    """A plan that fits stays within the memory; numbers that are advised lead to one that does."""
    options: dict[str, Any] = {"max_model_len": max_len, "kv_host_bytes": host}
    if kv is not None:
        options["kv_cache_tokens" if in_tokens else "kv_device_bytes"] = kv
    memory = DeviceMemory("d", kind, 64 * GIB, free)
    for _ in range(3):
        result = plan(llama_8b, memory, **options)
        if result.fits:
            taken = result.weight_bytes + result.workspace_bytes + result.kv_bytes
            assert taken + result.host_tier_bytes <= free
            assert 1 <= result.max_model_len <= result.kv_tokens
            return
        assert result.advice
        changes = [advice.split() for advice in result.advice if advice.startswith("set ")]
        numbers = {words[1]: int(words[3]) for words in changes if words[3].isdecimal()}
        if not numbers:
            return
        options |= numbers
    pytest.fail(f"what was advised does not help: {options}")


def test_the_engine_measures_what_its_weights_left(tiny_checkpoint: MakeCheckpoint) -> None:
    path = tiny_checkpoint("llama3")
    with LLM(str(path), skip_tokenizer_init=True, max_num_seqs=4) as llm:
        info = llm.engine.info
    memory = measure_memory(torch.device("cpu"))
    config = EngineConfig(model=str(path), max_num_seqs=4)
    expected = plan_memory(config, read_config(path), memory, torch.float32)
    assert (info.num_pages, info.max_model_len) == (expected.num_pages, expected.max_model_len)


def test_memory_of_a_machine_and_of_a_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4096 kB\nMemFree: 1 kB\nMemAvailable: 1024 kB\n")
    total, free = _machine_memory(meminfo)
    assert free == 1 << 20
    assert total > free
    assert _machine_memory(tmp_path / "missing") == (total, total)
    assert _container_memory(tmp_path) == (None, None)
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_memory(tmp_path) == (None, None)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 200\n")
    assert _container_memory(tmp_path) == (1000, 500)
    measured = measure_memory(torch.device("cpu"))
    assert 0 < measured.free_bytes <= measured.total_bytes


def test_sizes_are_written_for_people() -> None:
    assert [format_bytes(size) for size in (512, 3 << 20, 3 * GIB // 2, -GIB)] == [
        *("0.5 KiB", "3.0 MiB", "1.5 GiB", "-1.0 GiB"),
    ]


def test_graphs_of_a_gpu_take_memory_by_their_sizes(llama_8b: Any) -> None:
    page_bytes = plan(llama_8b, gpu(80)).page_bytes
    sizes = {1: 1, 256: 15}  # by max_num_seqs
    for requests, count in sizes.items():
        options = {"max_num_seqs": requests}
        without = plan(llama_8b, gpu(80), cuda_graphs=False, **options).workspace_bytes
        more = plan(llama_8b, gpu(80), **options).workspace_bytes - without
        assert more == (256 << 20) + count * (16 << 20) + page_bytes
    on_cpu = [plan(llama_8b, cpu(80), cuda_graphs=on).workspace_bytes for on in (True, False)]
    assert on_cpu[0] == on_cpu[1]


def test_lanes_and_nano_batches_of_a_gpu_take_memory_for_attention(llama_8b: Any) -> None:
    config = EngineConfig(model="m", max_num_seqs=1)
    graph = decoder_graph(llama_8b)
    sizes = {}
    for overlap in ("off", "nanoflow-4"):
        for graphs in (False, True):
            made = plan_memory(
                replace(config, cuda_graphs=graphs),
                llama_8b,
                gpu(80),
                torch.bfloat16,
                policy=make_policy(overlap, graph),
            )
            sizes[overlap, graphs] = made.workspace_bytes
    # Prompts attend on one lane, decodes on another; four nano-batches have a plan each.
    assert sizes["nanoflow-4", False] - sizes["off", False] == 2 * (256 << 20)
    more = {
        overlap: sizes[overlap, True] - sizes[overlap, False] for overlap in ("off", "nanoflow-4")
    }
    assert more["nanoflow-4"] - more["off"] == 3 * (16 << 20)
