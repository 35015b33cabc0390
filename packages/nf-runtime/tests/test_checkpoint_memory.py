"""Loading takes little more memory than the weights themselves, also with few and large tensors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HIDDEN, INNER, LAYERS, VOCAB = 1536, 8192, 3, 2000

# The difference to what the process had before: importing torch is not loading.
MEASURE = """
import json, sys
import torch
from nf_runtime import LLM

def memory(name):
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(name))
    return int(line.split()[1]) * 1024

torch.ones(64, 64) @ torch.ones(64, 64)
before = memory("VmRSS")
llm = LLM(
    sys.argv[1],
    skip_tokenizer_init=True,
    max_model_len=64,
    kv_cache_tokens=64,
    max_num_seqs=4,
    max_num_batched_tokens=16,
)
print(json.dumps({"grown": memory("VmHWM") - before, "weights": llm.engine.info.weight_bytes}))
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """About 300 MB in three layers."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": VOCAB,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": (HIDDEN // 3, HIDDEN),
            prefix + "self_attn.v_proj.weight": (HIDDEN // 3, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            prefix + "mlp.gate_proj.weight": (INNER, HIDDEN),
            prefix + "mlp.up_proj.weight": (INNER, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, INNER),
        }
    tensors = {name: torch.full(shape, 0.01).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_loading(checkpoint: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["weights"] > 250e6
    ratio = measured["grown"] / measured["weights"]
    print(f"peak memory of loading: {ratio:.3f} of the weights")
    assert 1.0 <= ratio < 1.2
