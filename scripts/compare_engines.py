#!/usr/bin/env python3
"""Compare the speed of two checkouts' engines, in turns, in one run.

    scripts/compare_engines.py ../before/.venv/bin/python .venv/bin/python

Each interpreter loads the model once, in a process of its own, and then both generate the same
answers in turns: a few seconds of a slow machine hit both. Prints, for each load, the median of
time before by time after over all pairs, with quartiles; above 1 the second one is faster.
"""

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

SERVANT = """
import json, sys, time
import numpy as np
from nf_runtime import LLM, SamplingParams

options = json.loads(sys.argv[1])
llm = LLM(options.pop("model"), skip_tokenizer_init=True, **options)
print("ready", flush=True)
for line in sys.stdin:
    load = json.loads(line)
    random = np.random.default_rng(load["seed"])
    vocabulary = llm.engine.info.vocab_size
    prompts = [
        {"prompt_token_ids": random.integers(0, vocabulary, load["prompt"]).tolist()}
        for _ in range(load["requests"])
    ]
    params = SamplingParams(temperature=0, max_tokens=load["tokens"], ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    digest = [output.outputs[0].token_ids for output in outputs]
    print(json.dumps({"seconds": seconds, "tokens": digest}), flush=True)
"""

LOADS = (
    {"requests": 1, "prompt": 16, "tokens": 32},
    {"requests": 8, "prompt": 64, "tokens": 24},
    {"requests": 32, "prompt": 64, "tokens": 16},
    {"requests": 2, "prompt": 400, "tokens": 1},
)


class Servant:
    """An engine in a process of its own."""

    def __init__(self, python: str, options: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [python, "-c", SERVANT, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def run(self, load: dict[str, int]) -> dict[str, Any]:
        """Generate the answers of a load; seconds and tokens."""
        if self._process.stdin is None:
            raise RuntimeError("the engine's process has no stdin")
        self._process.stdin.write(json.dumps(load) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read())
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()

    def _read(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit("an engine ended; see its messages above")
        return line


def main() -> int:
    """Print a line of JSON for each load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("before", help="Python of the checkout before.")
    parser.add_argument("after", help="Python of the checkout after.")
    parser.add_argument("--model", default="models/nanoflow-demo")
    parser.add_argument("--options", default="{}", help="Options of LLM, as JSON.")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    options = {"model": arguments.model, "enable_prefix_caching": False}
    options |= json.loads(arguments.options)
    engines = [Servant(python, options) for python in (arguments.before, arguments.after)]
    try:
        for load in LOADS:
            times: list[list[float]] = [[], []]
            same = True
            for turn in range(arguments.rounds + 1):
                order = (0, 1) if turn % 2 else (1, 0)
                answers = {i: engines[i].run(load | {"seed": turn}) for i in order}
                same &= answers[0]["tokens"] == answers[1]["tokens"]
                if turn:  # the first round warms up
                    for i in (0, 1):
                        times[i].append(answers[i]["seconds"])
            ratios = [before / after for before, after in zip(*times, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                json.dumps(
                    load
                    | {
                        "before_by_after": round(middle, 4),
                        "quartiles": [round(low, 4), round(high, 4)],
                        "before_ms": round(statistics.median(times[0]) * 1e3, 2),
                        "after_ms": round(statistics.median(times[1]) * 1e3, 2),
                        "same_tokens": same,
                    }
                ),
                flush=True,
            )
    finally:
        for engine in engines:
            engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
