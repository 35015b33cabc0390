"""Plans of the pipeline beside the sequential one, on the shapes of Llama 3 8B."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpu_bench import Bench, Missing, first_line
from gpu_section_report import Report

_LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
_ROUNDS = 5


def pipeline(bench: Bench, report: Report) -> None:
    """Each template, decode-heavy and prefill-heavy, at several contexts; dummy weights."""
    try:
        from nf_runtime.config import EngineConfig
        from nf_runtime.engine import Engine
        from nf_runtime.pipeline.plan import PlanError
        from nf_runtime.pipeline.templates import TEMPLATES
        from nf_runtime.probe import Load, Probe
    except ModuleNotFoundError as error:
        raise Missing(f"nf_runtime does not import: {first_line(error)}") from error
    rehearse = bench.device.type == "cpu"
    contexts = (32, 64) if rehearse else (512, 2048, 8192)
    tokens = 64 if rehearse else 2048
    with tempfile.TemporaryDirectory() as directory:
        shape = _TINY if rehearse else _LLAMA_3_8B
        config = {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": contexts[-1] + tokens,
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
            **shape,
        }
        (Path(directory) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        engine = Engine(
            EngineConfig(
                model=directory,
                device=str(bench.device),
                dtype="bfloat16",
                load_format="dummy",
                max_num_batched_tokens=tokens,
                max_num_seqs=tokens,
                overlap="off",
            )
        )
        try:
            for size, gain in engine.executor.device_graphs.gains.items():
                report.row(graph="sequential", decodes=size, gain=gain)
            plans = []
            for name, template in TEMPLATES.items():
                try:
                    plans.append(template(engine.graph))
                except PlanError as error:
                    report.row(plan=name, skipped=str(error))
            probe = Probe(engine)
            report.row(
                roof="engine",
                flops_per_second=probe.peaks.flops_per_second,
                bytes_per_second=probe.peaks.bytes_per_second,
            )
            for context, load in _loads(contexts, tokens, engine.info.num_pages * 16, Load):
                for measured in probe.measure(plans[1:], load, rounds=_ROUNDS):
                    report.row(
                        plan=measured.plan,
                        context=context,
                        decodes=load.decodes,
                        prefill=load.prefill,
                        wall_ms=measured.wall_ms,
                        iteration_ms=measured.seconds * 1e3,
                        tokens_per_second=measured.tokens_per_second,
                        gain=measured.gain,
                        gain_low=measured.quartiles[0],
                        gain_high=measured.quartiles[1],
                        concurrency=measured.concurrency,
                        compute=measured.compute,
                        memory=measured.memory,
                    )
            probe.close()
        finally:
            engine.close()


def _loads(
    contexts: tuple[int, ...], tokens: int, kv_tokens: int, load: type
) -> Iterator[tuple[int, object]]:
    """Decodes alone, decodes with a prompt beside them, at each context, as far as they fit."""
    for context in contexts:
        decodes = max(1, min(tokens // 2, 256, kv_tokens // (context + 32) - 1))
        yield context, load(decodes, context, 0)
        prefill = min(tokens - decodes, max(1, kv_tokens - decodes * (context + 32)))
        yield context, load(decodes, context, prefill)
