"""Iterations of decodes that are recorded once and launched again: the same tokens."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded_device import GraphDevice, RecordedWork

from nf_runtime import LLM, EngineConfig, SamplingParams
from nf_runtime import device_graphs as module
from nf_runtime.padded_decodes import graph_sizes, no_decodes, pad_decodes
from nf_runtime.pipeline.workspace import Layout

MakeCheckpoint = Callable[..., Path]
PROMPTS = [[3, 5, 8], [13, 21], [34, 55, 89, 144], [7], [9, 9, 9]]
SIZES = (1, 2, 4, 8)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> GraphDevice:
    """What engines in this process run on, with graphs whatever they gain."""
    device = GraphDevice()
    monkeypatch.setattr("nf_runtime.executor.make_device_api", lambda *_: device)
    monkeypatch.setattr("nf_runtime.loaded_model.graph_sizes", _sizes_here)
    monkeypatch.setattr(module, "_LEAST_GAIN", 0.0)
    monkeypatch.setattr(module, "_ROUNDS", 1)
    return device


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are so small that threads cost more than they help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _sizes_here(config: EngineConfig, kind: str) -> tuple[int, ...]:
    assert kind == "cpu"
    return SIZES if config.cuda_graphs else ()


def load(path: Path, **options: Any) -> LLM:
    return LLM(
        str(path),
        skip_tokenizer_init=True,
        dtype="float32",
        native_kernels=False,
        **{"max_num_seqs": 8, "kv_cache_tokens": 512, "max_model_len": 96, "timeline_every": 0}
        | options,
    )


def answers(llm: LLM, prompts: list[list[int]] = PROMPTS, **fields: Any) -> list[Any]:
    params = [
        SamplingParams(**{"temperature": 0.0, "max_tokens": 3 + 2 * i, "logprobs": 2} | fields)
        for i in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    return [
        (output.outputs[0].token_ids, [
            {token: pytest.approx(entry.logprob, abs=1e-4) for token, entry in row.items()}
            for row in output.outputs[0].logprobs or ()
        ])
        for output in outputs
    ]  # fmt: skip


def launches(llm: LLM) -> int:
    return llm.engine.stats.cuda_graph_steps


def test_graphs_run_sequentially_what_a_plan_leaves_in_one_piece(
    device: GraphDevice, tiny_checkpoint: MakeCheckpoint
) -> None:
    with load(tiny_checkpoint("llama3"), overlap="pd-multiplex") as llm:
        graphs = llm.engine.executor.device_graphs
        assert {graph.plan.name for graph in graphs.captured} == {"sequential"}
        answers(llm)
        assert launches(llm) > 0
        assert llm.engine.stats.overlap_steps["sequential"]["one_nano_batch"] > 0


@pytest.mark.parametrize("overlap", ["off", "nanoflow", "co-resident"])
@pytest.mark.parametrize("family", ["llama3", "qwen3", "mistral"])
def test_graphs_give_the_tokens_of_streams(
    device: GraphDevice, tiny_checkpoint: MakeCheckpoint, family: str, overlap: str
) -> None:
    path = tiny_checkpoint(family)
    with load(path, overlap=overlap, cuda_graphs=False) as llm:
        wanted = answers(llm)
        assert launches(llm) == 0
        assert not device.graphs
    with load(path, overlap=overlap) as llm:
        graphs = llm.engine.executor.device_graphs
        assert [graph.size for graph in graphs.captured] == [8, 4, 2, 1]
        plan = {"off": "sequential"}.get(overlap, overlap)
        # One decode is in one piece, whatever the plan.
        names = [plan, plan, plan, "sequential"]
        assert [graph.plan.name for graph in graphs.captured] == names
        assert answers(llm) == wanted
        # Requests end one by one, so that every size had its turn, filled up or not.
        decodes = sum(llm.engine.executor.timeline.steps.values())
        assert decodes / 2 < launches(llm) < decodes
        assert llm.engine.stats.kv_pages_used == 0


def test_a_graph_that_reads_old_arrays_is_noticed(
    device: GraphDevice, tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint("llama3")
    with load(path, cuda_graphs=False) as llm:
        wanted = answers(llm)
    with load(path) as llm:
        monkeypatch.setattr(module.FixedArrays, "take", lambda self, buffer: None)
        assert answers(llm) != wanted
        assert launches(llm) > 0


def test_what_fills_a_batch_up_touches_no_page_of_a_request(
    device: GraphDevice, tiny_checkpoint: MakeCheckpoint
) -> None:
    with load(tiny_checkpoint("llama3")) as llm:
        layers = llm.engine.kv_cache.layers
        spare = llm.engine.kv_cache.num_pages
        assert all(len(cache) == spare + 1 for layer in layers for cache in layer)
        assert all(cache[spare].any() for layer in layers for cache in layer)
        for layer in layers:
            for cache in layer:
                cache[:].fill_(float("nan"))
        answers(llm, PROMPTS[:3])
        assert launches(llm) > 0
        # Three requests have a page each; of the others, only what fills up has written.
        written = [page for page in range(spare + 1) if not layers[0][0][page].isnan().all()]
        assert len(written) == 4
        assert spare in written


def test_ids_that_are_on_the_device_alone_are_read_there(
    device: GraphDevice, tiny_checkpoint: MakeCheckpoint
) -> None:
    path = tiny_checkpoint("llama3")
    tokens = []
    for asynchronous in (False, True):
        with load(path, async_scheduling=asynchronous) as llm:
            tokens.append(answers(llm, seed=5, temperature=1.0))
            assert launches(llm) > 0
    assert tokens[0] == tokens[1]


def test_pages_go_to_the_host_behind_a_graph(
    device: GraphDevice, tiny_checkpoint: MakeCheckpoint
) -> None:
    path = tiny_checkpoint("llama3")
    prompts = [[5 * i + 1, 2, 3] for i in range(4)]
    options = {"kv_cache_tokens": 128, "kv_host_bytes": 1 << 20, "page_size": 4}
    with load(path, cuda_graphs=False) as llm:
        wanted = answers(llm, prompts, max_tokens=20)
    with load(path, **options) as llm:
        first = answers(llm, prompts, max_tokens=20)
        assert launches(llm) > 15
        answers(llm, [[100 + i, 4] for i in range(4)], max_tokens=25)  # crowds the device out
        longer = [p + list(tokens) for p, (tokens, _) in zip(prompts, first, strict=True)]
        again = answers(llm, longer, max_tokens=3)
        tiers = llm.engine.stats.prefix_hit_tokens_by_tier
        assert sum(count for tier, count in tiers.items() if str(tier) != "device") > 0
    assert first == wanted
    with load(path, cuda_graphs=False) as llm:
        assert answers(llm, longer, max_tokens=3) == again


def test_edges_that_move_leave_graphs_what_they_were_captured_with(
    device: GraphDevice, tiny_checkpoint: MakeCheckpoint
) -> None:
    path = tiny_checkpoint("llama3")
    with load(path, cuda_graphs=False) as llm:
        wanted = answers(llm)
    with load(path) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        logits = llm.engine.executor._activations.rows("logits", 0, 1, Layout.BY_EDGE).data_ptr()
        llm.generate([{"prompt_token_ids": list(range(60))}], params)
        moved = llm.engine.executor._activations.rows("logits", 0, 1, Layout.BY_EDGE).data_ptr()
        assert moved != logits
        assert len(device.graphs) == len(SIZES)  # a request makes nothing be captured
        done = launches(llm)
        assert answers(llm) == wanted
        assert launches(llm) > done


def test_a_swap_of_plans_captures_those_of_the_new_one(
    device: GraphDevice, tiny_checkpoint: MakeCheckpoint
) -> None:
    with load(tiny_checkpoint("llama3"), overlap="off") as llm:
        wanted = answers(llm)
        for overlap in ("nanoflow", "off"):
            llm.engine.set_overlap(overlap)
            done = launches(llm)
            assert answers(llm) == wanted
            assert launches(llm) > done


def test_one_size_that_cannot_be_captured_leaves_the_others(
    device: GraphDevice, tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = device.capture

    def sometimes(work: Callable[[], object]) -> Any:
        if not device.graphs:
            device.graphs.append(RecordedWork([]))
            raise torch.OutOfMemoryError("out of memory")
        return capture(work)

    monkeypatch.setattr(device, "capture", sometimes)
    with load(tiny_checkpoint("llama3")) as llm:
        assert [graph.size for graph in llm.engine.executor.device_graphs.captured] == [4, 2, 1]
        answers(llm)
        assert launches(llm) > 0


def test_graphs_are_given_up_before_lanes_are(
    device: GraphDevice, tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, int]] = []
    with load(tiny_checkpoint("llama3"), overlap="nanoflow") as llm:
        graphs = llm.engine.executor.device_graphs

        def note(what: str) -> Callable[[], None]:
            return lambda: order.append((what, len(graphs.captured)))

        for what in ("synchronize", "release", "close"):
            monkeypatch.setattr(device, what, note(what))
        llm.engine.set_overlap("off")
        assert order[:2] == [("synchronize", 4), ("release", 0)]
        llm.engine.executor.close()
        assert order[-2:] == [("synchronize", 4), ("close", 0)]
        monkeypatch.undo()


def test_hooks_and_timed_iterations_run_by_streams(
    device: GraphDevice, tiny_checkpoint: MakeCheckpoint
) -> None:
    with load(tiny_checkpoint("llama3"), timeline_every=1) as llm:
        answers(llm)
        assert launches(llm) == 0
        assert llm.engine.executor.timeline.traces
    with load(tiny_checkpoint("llama3")) as llm:
        seen: list[int] = []
        llm.engine.executor.before_layer.append(lambda layer, edges: seen.append(layer))
        answers(llm)
        assert launches(llm) == 0
        assert seen


def test_what_cannot_be_captured_runs_by_streams_and_is_said(
    device: GraphDevice, tiny_checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_checkpoint("mixtral")  # whose experts ask the host which tokens they have
    with load(path, cuda_graphs=False) as llm:
        wanted = answers(llm)
    with caplog.at_level(logging.WARNING), load(path) as llm:
        assert answers(llm) == wanted
        assert launches(llm) == 0
    for size in SIZES:
        assert f"{size} decodes run without a device graph: operation not perm" in caplog.text


def test_a_graph_that_computes_something_else_is_not_used(
    device: GraphDevice,
    tiny_checkpoint: MakeCheckpoint,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch = RecordedWork.launch

    def shortened(self: RecordedWork) -> None:
        launch(RecordedWork(self.calls[:-1]))

    monkeypatch.setattr(RecordedWork, "launch", shortened)
    with caplog.at_level(logging.WARNING), load(tiny_checkpoint("llama3")) as llm:
        answers(llm)
        assert launches(llm) == 0
    assert "from those of its streams" in caplog.text


def test_a_graph_that_gains_nothing_is_not_used(
    device: GraphDevice, tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LEAST_GAIN", 1e9)
    with load(tiny_checkpoint("llama3")) as llm:
        graphs = llm.engine.executor.device_graphs
        assert sorted(graphs.gains) == list(SIZES)
        assert not graphs.captured
        answers(llm)
        assert launches(llm) == 0


@pytest.mark.parametrize(
    ("options", "kind", "sizes"),
    [
        ({}, "cuda", (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)),
        ({"max_num_seqs": 20}, "cuda", (1, 2, 4, 6, 8, 12, 16, 20)),
        ({"max_num_seqs": 1}, "cuda", (1,)),
        ({"max_num_batched_tokens": 5}, "cuda", (1, 2, 4, 5)),
        (
            {"max_num_seqs": 1024},
            "cuda",
            (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256),
        ),
        ({"cuda_graphs": False}, "cuda", ()),
        ({"tensor_parallel_size": 2}, "cuda", ()),
        ({}, "cpu", ()),
    ],
)
def test_sizes(options: dict[str, Any], kind: str, sizes: tuple[int, ...]) -> None:
    assert graph_sizes(EngineConfig(model="m", **options).on_device(kind), kind) == sizes


def test_a_padded_batch() -> None:
    nothing = np.zeros((0, 3), dtype=np.int32)
    batch, tables = pad_decodes(no_decodes(), nothing, size=2, page=7)
    assert len(batch) == batch.num_decodes == batch.num_tokens == 2
    assert batch.samples.all()
    assert tables.tolist() == [[7, 7, 7], [7, 7, 7]]
    own = np.array([[4, 2, 0]], dtype=np.int32)
    single, _ = pad_decodes(no_decodes(), nothing, size=1, page=0)
    batch, tables = pad_decodes(single, own, size=2, page=7)
    assert batch.query_start.tolist() == [0, 1, 2]
    assert tables.tolist() == [[4, 2, 0], [7, 7, 7]]
