"""The command line: quick help, one line per error, and what it prints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
DEMO_MODEL = str(ROOT / "models" / "nanoflow-demo")


def nanoflow(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nf_server.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        **kwargs,
    )


def only_error_line(result: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "nanoflow: error:" in line]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = nanoflow("--help")
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0
    commands = ("serve", "replay", "generate", "timeline", "plan", "simulate", "env", "version")
    for command in commands:
        assert command in result.stdout
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["serve", "--help"],
        ["plan", "memory", "--help"],
        ["plan", "graph", "--help"],
        ["plan", "show", "--help"],
        ["plan", "measure", "--help"],
        ["timeline", "--help"],
        ["simulate", "--help"],
        ["replay", "--help"],
        ["version"],
    ],
)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from nf_server.cli import app\n"
        f"try:\n    app({arguments!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'fastapi', 'uvicorn', 'nf_runtime'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == "[]"


def test_no_arguments_shows_the_help() -> None:
    result = nanoflow()
    assert "serve" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["serve", "m", "--prot", "1"],
        ["serve", "m", "--port", "70000"],
        ["serve", "m", "--generation-config", "x"],
        ["serve", "m", "--max-model-len", "many"],
        ["generate", "m"],
        ["tune"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = nanoflow(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "--help" in result.stderr


def test_busy_port_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        start = time.perf_counter()
        result = nanoflow("serve", "/no/such/model", "--port", str(port))
        seconds = time.perf_counter() - start
    line = only_error_line(result)
    assert f"port {port} on 127.0.0.1 is already in use" in line
    assert "--port" in line
    assert seconds < 2


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_impossible_host(host: str) -> None:
    line = only_error_line(nanoflow("serve", "m", "--host", host))
    assert "--host" in line


@pytest.mark.parametrize("command", [["serve"], ["generate"]])
def test_missing_model_is_one_line(command: list[str]) -> None:
    arguments = ["/no/such/model"]
    arguments += ["--port", "0"] if command == ["serve"] else ["x"]
    assert "/no/such/model" in only_error_line(nanoflow(*command, *arguments))


def test_corrupt_weights_are_one_line_that_names_the_file(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(DEMO_MODEL) / name).read_bytes())
    weights = (Path(DEMO_MODEL) / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    result = nanoflow("serve", str(tmp_path), "--port", "0")
    assert "model.safetensors" in only_error_line(result)
    assert "Ready on" not in result.stdout


@pytest.mark.parametrize(
    ("option", "value"), [("--dtype", "int3"), ("--device", "abacus"), ("--load-format", "x")]
)
def test_wrong_values_are_one_line(option: str, value: str) -> None:
    line = only_error_line(nanoflow("serve", DEMO_MODEL, "--port", "0", option, value))
    assert value in line


def test_plan_memory_reads_the_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((Path(DEMO_MODEL) / "config.json").read_bytes())
    arguments = ["plan", "memory", str(tmp_path), "--device-memory", "1GiB", "--device", "cpu"]
    result = nanoflow(*arguments, "--kv-device-bytes", "64MiB")
    assert result.returncode == 0, result.stderr
    assert "cpu: 1.0 GiB free of 1.0 GiB" in result.stdout
    assert "  KV cache     64.0 MiB  ##" in result.stdout
    assert "It fits." in result.stdout


def test_plan_memory_says_which_option_to_change(tmp_path: Path) -> None:
    arguments = ["plan", "memory", DEMO_MODEL, "--device", "cuda", "--device-memory", "2GiB"]
    result = nanoflow(*arguments, "--kv-device-bytes", "3GiB", "--json")
    assert result.returncode == 1
    plan = json.loads(result.stdout)
    assert not plan["fits"]
    assert (plan["device"], plan["total_bytes"]) == ("cuda", 2 << 30)
    assert "3.0 GiB of KV do not fit" in plan["problem"]
    (advice,) = plan["advice"]
    assert advice.startswith("set --kv-device-bytes to ")
    fitting = advice.split()[3]
    assert nanoflow(*arguments, "--kv-device-bytes", fitting).returncode == 0


def test_plan_memory_counts_what_each_lane_of_experts_needs(tmp_path: Path) -> None:
    config = json.loads((Path(DEMO_MODEL) / "config.json").read_text())
    config |= {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    config |= {"num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    planned = {}
    for overlap in ("off", "co-resident"):
        result = nanoflow("plan", "memory", str(tmp_path), "--overlap", overlap, "--json")
        assert result.returncode == 0, result.stderr
        planned[overlap] = json.loads(result.stdout)["workspace_bytes"]
    per_row = 2 * config["hidden_size"] + 3 * config["intermediate_size"]
    assert planned["co-resident"] - planned["off"] == 2 * 512 * 2 * per_row * 4


def test_plan_memory_counts_the_graphs_of_a_gpu() -> None:
    planned = []
    for options in ([], ["--no-cuda-graphs"]):
        gpu = ("--device", "cuda", "--device-memory", "80GiB")
        result = nanoflow("plan", "memory", DEMO_MODEL, *gpu, *options, "--json")
        assert result.returncode == 0, result.stderr
        planned.append(json.loads(result.stdout))
    graphs = 256 * 2**20 + 15 * 16 * 2**20 + planned[0]["page_bytes"]
    assert planned[0]["workspace_bytes"] - planned[1]["workspace_bytes"] == graphs


def test_plan_memory_is_what_the_engine_does() -> None:
    options = ["--kv-device-bytes", "3MiB", "--dtype", "float32"]
    plan = json.loads(nanoflow("plan", "memory", DEMO_MODEL, *options, "--json").stdout)
    assert plan["num_pages"] == (3 << 20) // plan["page_bytes"]
    result = nanoflow("generate", DEMO_MODEL, "x", "--max-tokens", "1", *options)
    assert result.returncode == 0, result.stderr
    capped = f"the longest have {plan['kv_tokens']}"
    assert (capped in result.stderr) == (plan["kv_tokens"] < plan["model_max_len"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--device", "abacus"], "abacus"),
        (["--max-model-len", "1000000"], "1000000"),
        (["--kv-cache-tokens", "64", "--kv-device-bytes", "1MiB"], "both size the KV cache"),
        (["--overlap", "nothing"], "overlap is 'nothing', which is no file"),
    ],
)
def test_plan_memory_refuses_what_serve_refuses(options: list[str], expected: str) -> None:
    assert expected in only_error_line(nanoflow("plan", "memory", DEMO_MODEL, *options))


def test_plan_graph_reads_the_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((Path(DEMO_MODEL) / "config.json").read_bytes())
    result = nanoflow("plan", "graph", str(tmp_path))
    assert result.returncode == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "LlamaForCausalLM, 6 layers"
    assert "layers 0 to 5, each" in lines
    assert "decode_attention memory decode query[256] attended[256] rope_append" in lines
    joined = "output_proj compute all attended[256], hidden[256] hidden[256] decode_attention, "
    assert joined + "prefill_attention, embedding, down_proj of the layer before" in lines
    assert lines[-1] == "logits compute selected selected_normed[256] logits[4096] final_norm"


def test_plan_graph_of_a_rank() -> None:
    options = ["--tensor-parallel-size", "2", "--tensor-parallel-output"]
    result = nanoflow("plan", "graph", DEMO_MODEL, *options, "all_gather")
    assert result.returncode == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "LlamaForCausalLM, 6 layers, rank 0 of 2"
    gather = "attended_all_gather network all attended[128] all_attended[256] decode_attention, "
    assert gather + "prefill_attention" in lines
    assert "down_all_reduce network all partial[256] partial[256] down_proj" in lines
    logits = "logits_all_gather network selected local_logits[2048] logits[4096] logits"
    assert lines[-1] == logits


def test_a_size_that_does_not_divide_the_model_is_one_line() -> None:
    arguments = ["generate", DEMO_MODEL, "x", "--tensor-parallel-size", "3"]
    line = only_error_line(nanoflow(*arguments))
    assert "must divide the model's 4 attention heads: set it to 2, or to 1" in line


def test_generate_by_two_ranks() -> None:
    arguments = ["generate", DEMO_MODEL, "def f(", "--temperature", "0", "--max-tokens", "8"]
    arguments += ["--dtype", "float32", "--kv-cache-tokens", "512"]
    one, two = (nanoflow(*arguments, "--tensor-parallel-size", size) for size in "12")
    assert two.returncode == 0, two.stderr
    assert one.stdout == two.stdout != ""


def test_plan_graph_for_programs() -> None:
    graph = json.loads(nanoflow("plan", "graph", DEMO_MODEL, "--format", "json").stdout)
    assert len(graph["operations"]) == 1 + 6 * 10 + 3
    flow = {"from": [0, "down_proj"], "to": [1, "input_norm"], "data": "hidden"}
    assert flow in graph["flows"]
    dot = nanoflow("plan", "graph", DEMO_MODEL, "--format", "dot").stdout
    assert dot.startswith("digraph model {")
    assert dot.rstrip().endswith("}")
    assert 'n1_down_proj -> n2_input_norm [label="hidden"];' in dot
    assert dot.count(" -> ") == len(graph["flows"])
    assert dot.count("[label=") == len(graph["operations"]) + len(graph["flows"])


def test_plan_graph_of_what_is_no_model(tmp_path: Path) -> None:
    assert str(tmp_path) in only_error_line(nanoflow("plan", "graph", str(tmp_path)))


def test_version() -> None:
    assert nanoflow("version").stdout.strip() == "0.1.0"


def test_env_as_json() -> None:
    result = nanoflow("env", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["system"]["python"].startswith("3.")
    assert report["packages"]["torch"]
    assert report["cpu"]["cores"] >= 1
    assert report["cpu"]["memory_gib"] > 0
    assert "cpu" in report["torch"]["devices"]
    native = report["extensions"]["nf_kernels"]
    assert native["available"] in (True, False)
    assert native["available"] or native["reason"]


def test_env_as_text_has_every_section() -> None:
    result = nanoflow("env")
    for section in ("system", "packages", "cpu", "torch", "extensions"):
        assert f"\n{section}\n" in "\n" + result.stdout
    assert "nf-kernels" in result.stdout


def test_generate_prints_text_to_stdout_and_speed_to_stderr() -> None:
    arguments = ["generate", DEMO_MODEL, "def fibonacci(n):", "--max-tokens", "24"]
    result = nanoflow(*arguments, "--temperature", "0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "tokens/s" in result.stderr.splitlines()[-1]
    assert "tokens/s" not in result.stdout
    as_json = nanoflow(*arguments, "--temperature", "0", "--json")
    answer = json.loads(as_json.stdout)
    assert answer["text"] + "\n" == result.stdout
    assert answer["completion_tokens"] == 24
    assert answer["finish_reason"] == "length"


def test_generate_chat_from_stdin() -> None:
    result = nanoflow("generate", DEMO_MODEL, "-", "--chat", "--max-tokens", "4", input="x = 1")
    assert result.returncode == 0, result.stderr


def test_generate_with_a_bad_parameter_is_one_line_and_early() -> None:
    start = time.perf_counter()
    line = only_error_line(nanoflow("generate", DEMO_MODEL, "x", "--temperature", "-1"))
    assert "temperature" in line
    assert time.perf_counter() - start < 5


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    rows = [f"XXX,{10 + 7 * i % 400},{1 + 13 * i % 300}" for i in range(200)]
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\nXXX,9999,3\n"
    )
    return str(path)


def test_simulate_prints_a_table_and_draws(trace: str, tmp_path: Path) -> None:
    picture = tmp_path / "simulation.svg"
    arguments = ["--trace", trace, "--rate", "50", "--policy", "shortest", "--pages", "500"]
    result = nanoflow("simulate", *arguments, "--plot", str(picture))
    assert result.returncode == 0, result.stderr
    for text in (
        "200 requests; 500 pages of 16 tokens",
        "1 prompts are longer than the context of 8192 tokens and were left out",
        "not measured",
        "requests/s",
        "TTFT p99",
        "TPOT p50",
        "preemptions",
        "pages in use",
        str(picture),
    ):
        assert text in result.stdout
    assert "pages in use" in picture.read_text() or "<svg" in picture.read_text()


def test_simulate_compares_admissions_as_json(trace: str, tmp_path: Path) -> None:
    arguments = ["--trace", trace, "--requests", "150", "--pages", "300", "--compare", "--json"]
    result = nanoflow("simulate", *arguments, "--no-plot", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    runs = json.loads(result.stdout)["runs"]
    assert list(runs) == ["reserve", "predict", "oracle"]
    assert {run["num_requests"] for run in runs.values()} == {150}
    assert runs["predict"]["requests_per_second"] > runs["reserve"]["requests_per_second"]
    assert not list(tmp_path.glob("*.svg"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cost", "nothing"], "cost is 'nothing'"),
        (["--plot", "picture.gif"], "--plot is 'picture.gif'; expected a name that ends in .svg"),
        (["--plot", "no/such/folder/x.svg"], "whose folder does not exist"),
        (["--rate", "0"], "rate is 0"),
        (["--max-model-len", "5"], "has no request with a prompt of 1 to 4 tokens"),
    ],
)
def test_simulate_refuses_bad_input_in_one_line(
    trace: str, arguments: list[str], message: str
) -> None:
    result = nanoflow("simulate", "--trace", trace, *arguments)
    assert message in only_error_line(result)


def test_simulate_without_a_trace_that_can_be_read() -> None:
    assert "cannot be read as a trace" in only_error_line(
        nanoflow("simulate", "--trace", "missing.csv", "--no-plot")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--service-level", "fast"], "--service-level is 'fast'; expected [CLASS:]TTFT,TPOT"),
        (["--service-level", "1,2", "--service-level", "2,3"], "gives the class '' twice"),
        (["--policy", "best"], "'best' is not one of"),
    ],
)
def test_serve_refuses_bad_scheduling_options(arguments: list[str], message: str) -> None:
    result = nanoflow("serve", DEMO_MODEL, "--port", "0", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "slo"], "there are no service_levels"),
        (["--service-level", "1,2"], "policy is 'fcfs', which does not look at them"),
        (["--policy", "slo", "--service-level", "0,2"], "in seconds above 0"),
    ],
)
def test_serve_refuses_levels_that_do_not_fit(arguments: list[str], message: str) -> None:
    assert message in only_error_line(nanoflow("serve", DEMO_MODEL, "--port", "0", *arguments))
