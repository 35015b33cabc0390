"""Streams do their work in order, and hand on what fails."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from nf_kernels import native_status
from nf_kernels.ops import CPU, REFERENCE
from nf_runtime.device_api import make_device_api
from nf_runtime.device_stream import DeviceStream, InlineStream, LaneStream, Moment

needs_native = pytest.mark.skipif(
    not native_status().available, reason="a lane needs the native kernels"
)


@pytest.fixture(params=["inline", pytest.param("lane", marks=needs_native)])
def stream(request: pytest.FixtureRequest) -> Iterator[DeviceStream]:
    operations = CPU if request.param == "lane" else REFERENCE
    stream = make_device_api(torch.device("cpu"), operations).stream
    yield stream
    stream.close()


def reach(moment: Moment) -> None:
    moment.wait()
    moment.check()


@needs_native
def test_native_operations_of_a_cpu_run_on_a_lane() -> None:
    stream = make_device_api(torch.device("cpu"), CPU).stream
    assert isinstance(stream, LaneStream)
    seen: list[int] = []
    stream.call(lambda: seen.append(threading.get_native_id()))
    stream.record().wait()
    assert seen != [threading.get_native_id()]
    stream.close()
    assert isinstance(make_device_api(torch.device("cpu"), REFERENCE).stream, InlineStream)


def test_calls_and_operations_keep_their_order(stream: DeviceStream) -> None:
    operations = CPU if isinstance(stream, LaneStream) else REFERENCE
    kept = torch.zeros(1, dtype=torch.int64)
    slots = torch.zeros(1, dtype=torch.int64)
    seen: list[int] = []
    with stream:
        for number in range(300):
            sampled = torch.full((1,), number)
            operations["keep_sampled"](sampled=sampled, slots=slots, last_sampled=kept)
            stream.call(lambda: seen.append(int(kept)))
    stream.record().wait()
    assert seen == list(range(300))


@needs_native
def test_a_lane_runs_beside_who_gives_it_work() -> None:
    stream = make_device_api(torch.device("cpu"), CPU).stream
    go = threading.Event()
    stream.call(go.wait)
    moment = stream.record()
    go.set()  # which would never come to this if the call above waited
    moment.wait()
    stream.close()


def test_what_fails_is_raised_where_it_is_waited_for(stream: DeviceStream) -> None:
    later: list[int] = []

    def fail() -> None:
        raise KeyError("no")

    with pytest.raises(KeyError, match="no"):  # noqa: PT012  where, depends on the stream
        stream.call(fail)
        moment = stream.record()
        for _ in range(200):
            stream.call(lambda: later.append(1))
        reach(moment)
    stream.synchronize()
    assert not later  # what comes behind does not run on what is broken
    stream.call(lambda: later.append(2))
    stream.record().wait()
    assert later == [2]


@needs_native
def test_an_operation_that_fails_on_a_lane() -> None:
    stream = make_device_api(torch.device("cpu"), CPU).stream
    with stream:
        CPU["keep_sampled"](
            sampled=torch.zeros(1, dtype=torch.int64),
            slots=torch.full((1,), 7),
            last_sampled=torch.zeros(3, dtype=torch.int64),
        )
    moment = stream.record()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"slots\[0\] is 7; expected 0 to 2"):
            reach(moment)
    stream.synchronize()
    reach(stream.record())  # it goes on
    stream.close()


@needs_native
def test_what_fails_later_does_not_fail_what_was_before() -> None:
    stream = make_device_api(torch.device("cpu"), CPU).stream
    good = stream.record()
    stream.call(lambda: 1 // 0)
    bad = stream.record()
    with pytest.raises(ZeroDivisionError):
        reach(bad)
    reach(good)
    stream.synchronize()
    bad.wait()  # as those do who only want to know when it is over
    stream.close()


def test_calls_compute_in_inference_mode(stream: DeviceStream) -> None:
    """Tensors that were made so may be written to there."""
    with torch.inference_mode():
        tensor = torch.zeros(3)
        with stream:
            stream.call(lambda: tensor.add_(1))
        stream.record().wait()
    assert tensor.tolist() == [1, 1, 1]


@needs_native
def test_a_stream_ends_after_what_it_was_given() -> None:
    stream = make_device_api(torch.device("cpu"), CPU).stream
    seen: list[int] = []

    def slowly() -> None:
        time.sleep(0.05)
        seen.append(1)

    stream.call(slowly)
    stream.close()
    assert seen == [1]
