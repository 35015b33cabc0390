"""Many requests that come, go and vanish: nothing is lost and nothing is left behind."""

import asyncio
import os
import random
import time
from pathlib import Path

import pytest

from nf_runtime import AsyncEngine, EngineConfig, RequestOptions, SamplingParams

MODEL = Path(__file__).resolve().parents[1] / "models" / "nanoflow-demo"


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


async def soak(seconds: float) -> None:
    """Clients with random prompts, lengths and patience, on a cache too small for all of them."""
    config = EngineConfig(
        model=str(MODEL), kv_cache_tokens=4096, max_num_seqs=32, admission="greedy"
    )
    engine = await AsyncEngine.start(config)
    randomness = random.Random(0)

    def options() -> RequestOptions:
        return RequestOptions(
            tenant=randomness.choice(["", "a", "b"]),
            timeout_seconds=randomness.choice([None, None, 0.05, 5.0]),
        )

    counts = {"finished": 0, "abandoned": 0, "timed out": 0}

    async def client(deadline: float) -> None:
        while time.monotonic() < deadline:
            prompt = [randomness.randrange(1, 4096) for _ in range(randomness.randrange(1, 400))]
            length = randomness.randrange(1, 400)
            patience = randomness.randrange(1, 600)  # tokens, after which the client leaves
            params = SamplingParams(max_tokens=length, ignore_eos=True, temperature=0.5)
            stream = engine.submit(prompt, params, options=options())
            received, in_time = 0, True
            async for deltas in stream:
                received += sum(len(delta.token_ids) for delta in deltas)
                in_time &= all(delta.finish_reason != "timeout" for delta in deltas)
                if received >= patience:
                    break
            await stream.aclose()
            if not in_time:
                counts["timed out"] += 1
            elif received < patience:
                assert received == length
                counts["finished"] += 1
            else:
                counts["abandoned"] += 1

    try:
        await asyncio.gather(*(client(time.monotonic() + seconds / 4) for _ in range(48)))
        resident = resident_bytes(engine.pid)
        await asyncio.gather(*(client(time.monotonic() + seconds * 3 / 4) for _ in range(48)))
        for _ in range(500):
            if engine.stats.kv_pages_used == 0:
                break
            await asyncio.sleep(0.01)
        stats = engine.stats
        assert (stats.num_running, stats.num_waiting, stats.kv_pages_used) == (0, 0, 0)
        assert min(counts.values()) > 10, counts
        assert stats.preemptions > 0
        assert resident_bytes(engine.pid) < resident * 1.1 + 2**25
    finally:
        await engine.shutdown()


def test_soak_for_some_seconds() -> None:
    asyncio.run(soak(8))


@pytest.mark.long
def test_soak_for_half_an_hour() -> None:
    asyncio.run(soak(1800))
