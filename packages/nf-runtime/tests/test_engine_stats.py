"""What an engine says of its queue, and of those that it did not take or could not finish."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nf_runtime import EngineConfig, RequestOptions, SamplingParams
from nf_runtime.engine import Engine
from nf_runtime.engine_types import EngineRequest, TokenOutput
from nf_scheduler import QueueFull


def test_queue_refusals_timeouts_and_tenants(tiny_checkpoint: Callable[..., Path]) -> None:
    now = 0.0
    config = EngineConfig(
        model=str(tiny_checkpoint("llama3")),
        kv_cache_tokens=1024,
        max_num_seqs=1,
        max_num_queued_reqs=2,
    )
    engine = Engine(config, clock=lambda: now)

    def add(name: str, length: int, options: RequestOptions) -> None:
        params = SamplingParams(temperature=0, max_tokens=4)
        engine.add(EngineRequest(name, [1] * length, params, seed=0, options=options))

    def step_to_the_end() -> list[TokenOutput]:
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        return [output for output in outputs if output.finish_reason is not None]

    assert engine.stats.tenants == 0
    add("runs", 5, RequestOptions(tenant="one"))
    engine.step()
    add("waits", 7, RequestOptions(tenant="one"))
    add("waits in vain", 11, RequestOptions(tenant="two", timeout_seconds=3))
    with pytest.raises(QueueFull, match="2 requests are queued"):
        add("is refused", 13, RequestOptions(tenant="three"))
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.num_restoring) == (1, 2, 0)
    assert (stats.queued_prompt_tokens, stats.tenants) == (7 + 11, 2)
    assert (stats.refused, stats.timeouts) == (1, 0)
    now = 3.0
    ends = {output.request_id: output for output in step_to_the_end()}
    assert {name: str(output.finish_reason) for name, output in ends.items()} == {
        "runs": "length",
        "waits": "length",
        "waits in vain": "timeout",
    }
    ledger = ends["waits in vain"].ledger
    assert ledger is not None
    assert (ledger.arrival, ledger.first_scheduled, ledger.finished) == (0.0, None, 3.0)
    assert (ledger.first_token, ledger.output_tokens) == (None, 0)
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.queued_prompt_tokens) == (0, 0, 0)
    assert (stats.refused, stats.timeouts, stats.tenants) == (1, 1, 0)
    engine.close()
