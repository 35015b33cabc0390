"""How ranks find each other, and which implementation they choose."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nf_kernels.collectives import (
    Communicator,
    CommunicatorError,
    SingleCommunicator,
    connect,
    mscclpp,
    peer_access,
    torch_distributed,
)
from nf_kernels.collectives.rendezvous import Rendezvous

TIMEOUT = 60.0  # of what is expected not to wait
GPUS = torch.cuda.device_count()


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returns or raises, all running at the same time in threads."""
    results: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except Exception as error:
            results[number] = error

    threads = [
        threading.Thread(target=run, args=(number,), name=str(number))
        for number in range(len(calls))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def connect_all(world_size: int, *, devices: str = "cpu", **arguments: Any) -> list[Any]:
    """What `connect` gives to each of several ranks in threads of this process."""

    def rank(number: int) -> Communicator:
        return connect(
            device=devices.format(number), rank=number, world_size=world_size, **arguments
        )

    return at_once(*(lambda number=number: rank(number) for number in range(world_size)))


def test_one_rank_needs_no_address_and_sends_nothing(caplog):
    with caplog.at_level(logging.INFO), connect(device="cpu", rank=0, world_size=1) as comm:
        assert isinstance(comm, SingleCommunicator)
        assert (comm.rank, comm.world_size, comm.invariant) == (0, 1, True)
        x = torch.arange(12.0).view(3, 4)
        kept = x.clone()
        gathered, scattered = torch.zeros(3, 4), torch.zeros(3, 4)
        comm.all_reduce(x)
        comm.all_gather(x, out=gathered)
        comm.all_gather(x, out=x)
        comm.reduce_scatter(x, out=scattered)
        comm.barrier()
        for tensor in (x, gathered, scattered):
            assert torch.equal(tensor, kept)
        with pytest.raises(ValueError, match=r"^out is \[3, 4\]; expected \[2, 4\], the rows of x"):
            comm.all_gather(x[:2], out=gathered)
        with pytest.raises(ValueError, match=r"^x and out overlap"):
            comm.reduce_scatter(x, out=x)
    with pytest.raises(CommunicatorError, match=r"^all_reduce on rank 0 of 1: .* is closed"):
        comm.all_reduce(x)
    assert [record.message for record in caplog.records] == [
        "One rank on cpu: collectives send nothing."
    ]


def test_what_is_used_is_logged_once_for_each_rank(caplog):
    with caplog.at_level(logging.INFO):
        for comm in connect_all(2, address=free_address()):
            comm.close()
    assert sorted(record.message for record in caplog.records) == [
        "Rank 0 of 2 on cpu: collectives by gloo.",
        "Rank 1 of 2 on cpu: collectives by gloo.",
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"world_size": 0}, "^world_size is 0; expected at least 1 rank"),
        ({"rank": 2}, "^rank is 2; expected 0 to 1"),
        ({"rank": -1}, "^rank is -1; expected 0 to 1"),
        ({"timeout": 0}, r"^timeout is 0; expected a positive, finite number of seconds"),
        ({"timeout": float("nan")}, "^timeout is nan; expected"),
        ({"timeout": float("inf")}, "^timeout is inf; expected"),
        ({"backend": "nccl"}, "^backend is 'nccl'; expected one of auto, torch, mscclpp"),
        ({"backend": "mscclpp"}, "^backend is 'mscclpp' and device is cpu; .* use 'torch'"),
        ({"device": "meta"}, "^device is meta; expected the CPU or a CUDA device"),
        ({"device": f"cuda:{GPUS}"}, f"^device is cuda:{GPUS}, and torch sees {GPUS} CUDA"),
        ({"address": None}, "^address is None; expected 'host:port' of rank 0 or a store"),
        ({"address": "localhost"}, "^address is 'localhost'; expected 'host:port' of rank 0"),
        ({"address": ":29500"}, "^address is ':29500'; expected"),
        ({"address": "localhost:0"}, "^address is 'localhost:0'; expected"),
        ({"address": "localhost:65536"}, "^address is 'localhost:65536'; expected"),
        ({"address": "localhost:http"}, "^address is 'localhost:http'; expected"),
    ],
)
def test_wrong_arguments_of_connect(changed, message):
    arguments = {"device": "cpu", "rank": 0, "world_size": 2, "address": "localhost:1"}
    with pytest.raises(ValueError, match=message):
        connect(**arguments | changed)


def test_ranks_that_are_missing_are_named():
    address = free_address()
    with pytest.raises(
        CommunicatorError,
        match=r"^rank 0 of 3 misses rank 1, 2 in 'main' at .* after 0.2 s; start all",
    ):
        connect(device="cpu", rank=0, world_size=3, address=address, timeout=0.2)
    with pytest.raises(
        CommunicatorError,
        match=f"^rank 1 of 3 does not reach rank 0 at {address} within 0.2 s; start rank 0",
    ):
        connect(device="cpu", rank=1, world_size=3, address=address, timeout=0.2)


def test_an_address_where_rank_0_cannot_listen():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CommunicatorError, match=f"^rank 0 cannot serve at {address}: .*in use"):
            connect(device="cpu", rank=0, world_size=2, address=address)


def test_rank_0_listens_at_the_address_alone():
    address = free_address()
    comms = connect_all(2, address=address)
    port = int(address.split(":")[1])
    socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
        socket.create_connection(("127.0.0.2", port), timeout=1)  # on the same interface
    for comm in comms:
        comm.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_an_address_that_all_have_left_is_free_again():
    address = free_address()
    for _ in range(2):
        for comm in connect_all(2, address=address):
            comm.close()


def test_the_interface_that_gloo_was_told_to_use(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no such interface")
    for number, error in enumerate(connect_all(2, address=free_address())):
        assert isinstance(error, CommunicatorError)
        assert str(error).startswith(f"connect failed on rank {number} of 2: ")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two CUDA devices as torch would tell of them, one for each of two ranks in threads."""
    told = SimpleNamespace(
        hosts=["here", "here"], no_access=set(), uuids=["GPU-a", "GPU-b"], no_mscclpp=["", ""]
    )

    def of_this_rank(answers: list[str]) -> str:
        return answers[int(threading.current_thread().name)]

    monkeypatch.setattr(socket, "gethostname", lambda: of_this_rank(told.hosts))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(uuid=told.uuids[index]),
    )
    monkeypatch.setattr(
        torch.cuda,
        "can_device_access_peer",
        lambda device, peer: (device, peer) not in told.no_access,
    )
    monkeypatch.setattr(mscclpp, "why_not", lambda: of_this_rank(told.no_mscclpp))
    monkeypatch.setenv(peer_access.NCCL_VARIABLE, "")
    monkeypatch.delenv(peer_access.NCCL_VARIABLE)
    peer_access._warn_once.cache_clear()

    class Chosen:
        def __init__(self, rendezvous: Rendezvous, *, device: torch.device) -> None:
            self.where = (rendezvous.rank, str(device))

        def barrier(self) -> None:
            pass

    for module, name in [
        (torch_distributed, "TorchCommunicator"),
        (mscclpp, "MscclppCommunicator"),
    ]:
        monkeypatch.setattr(module, name, type(name, (Chosen,), {}))
    return told


NCCL, MSCCLPP = ["TorchCommunicator"] * 2, ["MscclppCommunicator"] * 2


@pytest.mark.parametrize(
    ("told", "chosen", "host_memory", "reason"),
    [
        ({}, MSCCLPP, False, "MSCCL++."),
        ({"no_mscclpp": ["", "not built"]}, NCCL, False, "(MSCCL++: not built)."),
        ({"no_mscclpp": ["not built", ""]}, NCCL, False, "another rank cannot import mscclpp)."),
        ({"hosts": ["here", "there"]}, NCCL, False, "the ranks are on several hosts)."),
        ({"no_access": {(0, 1)}}, NCCL, True, "no access to each other's memory)."),
        ({"no_access": {(1, 0)}}, NCCL, True, "no access to each other's memory)."),
        # A device that is no rank's is of no concern.
        ({"no_access": {(0, 1)}, "hosts": ["here", "there"]}, NCCL, False, "several hosts)."),
    ],
)
def test_choice_on_cuda_devices(machine, caplog, told, chosen, host_memory, reason):
    vars(machine).update(told)
    with caplog.at_level(logging.INFO):
        comms = connect_all(2, devices="cuda:{}", address=free_address())
    assert [type(comm).__name__ for comm in comms] == chosen
    assert [comm.where for comm in comms] == [(0, "cuda:0"), (1, "cuda:1")]
    assert os.environ.get(peer_access.NCCL_VARIABLE) == ("1" if host_memory else None)
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == host_memory
    assert all("NCCL copies through host memory (NCCL_P2P_DISABLE=1)" in w for w in warnings)
    lines = [r.message for r in caplog.records if r.levelno == logging.INFO]
    assert len(lines) == 2
    assert any(line.endswith(reason) for line in lines)


def test_the_warning_comes_once_and_the_setting_of_the_user_stays(machine, caplog, monkeypatch):
    machine.no_access = {(0, 1), (1, 0)}
    monkeypatch.setenv(peer_access.NCCL_VARIABLE, "0")
    for _ in range(2):
        connect_all(2, devices="cuda:{}", address=free_address(), backend="torch")
    assert len(caplog.records) == 1
    assert os.environ[peer_access.NCCL_VARIABLE] == "0"


def test_mscclpp_that_was_asked_for_and_does_not_work(machine):
    for told, message in [
        ({"hosts": ["here", "there"]}, "backend is 'mscclpp', but the ranks are on several hosts"),
        ({"no_mscclpp": ["", "not built"]}, "backend is 'mscclpp', but not built; use 'torch'"),
    ]:
        vars(machine).update(told)
        comms = connect_all(2, devices="cuda:{}", address=free_address(), backend="mscclpp")
        for comm in comms:
            assert isinstance(comm, ValueError)
        assert str(comms[1]).startswith(message)


@pytest.mark.skipif(not mscclpp.why_not(), reason="MSCCL++ is here")
def test_how_to_get_mscclpp_is_told():
    assert mscclpp.why_not().startswith("Python's module mscclpp cannot be imported (No module")
    assert "nf_kernels.collectives.mscclpp" in mscclpp.why_not()
    assert "pip install" in str(mscclpp.__doc__)


SCRATCH = 1 << 12


class StandInForMscclpp:
    """Takes the calls of MSCCL++'s Python API 0.10.0, and writes them down instead of sending."""

    def __init__(self) -> None:
        self.executed: list[tuple[str, int, int]] = []
        self.result = 0
        self.ext = SimpleNamespace(AlgorithmCollectionBuilder=lambda: self)
        self.utils = SimpleNamespace(torch_dtype_to_mscclpp_dtype=str)
        self.ReduceOp = SimpleNamespace(SUM="sum", NOP="nop")

    def CommGroup(self, *, interfaceIpPortTrio: str, rank: int, size: int) -> Any:
        assert interfaceIpPortTrio.startswith("127.0.0.1:")
        return SimpleNamespace(communicator="communicator")

    def RawGpuBuffer(self, nelems: int) -> Any:
        return SimpleNamespace(data=lambda: 4096, bytes=lambda: nelems)

    def build_default_algorithms(
        self, scratch_buffer: int, scratch_buffer_size: int, rank: int
    ) -> list[Any]:
        assert scratch_buffer_size == SCRATCH
        names = ["default_allreduce_packet", "default_allreduce_rsag", "default_allgather_fullmesh"]
        return [self.algorithm(name) for name in names]

    def algorithm(self, name: str) -> Any:
        def execute(
            comm: str,
            input_buffer: int,
            output_buffer: int,
            input_size: int,
            output_size: int,
            dtype: str,
            op: str,
            stream: int,
        ) -> int:
            assert (comm, stream) == ("communicator", 5)
            assert op == ("sum" if "reduce" in name else "nop")
            self.executed.append((name, input_size, output_size))
            return self.result

        return SimpleNamespace(name=name, execute=execute)


def test_what_goes_to_mscclpp_and_what_to_nccl(monkeypatch):
    """With gloo in the place of NCCL."""
    library = StandInForMscclpp()
    monkeypatch.setattr(mscclpp, "_load", lambda: (library, ""))
    monkeypatch.setattr(mscclpp, "_SCRATCH_BYTES", SCRATCH)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    store = dist.HashStore()

    def rank(number: int) -> mscclpp.MscclppCommunicator:
        rendezvous = Rendezvous(store, rank=number, world_size=2, name="", timeout=TIMEOUT)
        return mscclpp.MscclppCommunicator(rendezvous, device=torch.device("cpu"))

    comms = at_once(lambda: rank(0), lambda: rank(1))

    def run(operation: str, x: torch.Tensor, out: torch.Tensor | None = None) -> list[Any]:
        def call(comm: Communicator) -> torch.Tensor:
            if out is None:
                result = x.clone()
                comm.all_reduce(result)
            else:
                result = out.clone()
                getattr(comm, operation)(x, out=result)
            return result

        del library.executed[:]
        return at_once(*(lambda comm=comm: call(comm) for comm in comms))

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32):
        x = torch.ones(2, 16, dtype=dtype)
        run("all_reduce", x)
        assert library.executed == [("default_allreduce_rsag", x.nbytes, x.nbytes)] * 2
        run("all_gather", x[:1], torch.zeros_like(x))
        assert library.executed == [("default_allgather_fullmesh", x.nbytes // 2, x.nbytes)] * 2

    tail, long = torch.ones(3, 4), torch.ones(SCRATCH // 4 + 8)
    for x in (tail, long, torch.ones(2, 16, dtype=torch.int64)):
        for result in run("all_reduce", x):
            assert torch.equal(result, 2 * x)
        assert not library.executed
    for x in (torch.ones(1, 3), torch.ones(1, 16, dtype=torch.int64)):
        for result in run("all_gather", x, torch.zeros_like(x.repeat(2, 1))):
            assert torch.equal(result, x.repeat(2, 1))
        assert not library.executed
    for result in run("reduce_scatter", torch.ones(2, 16), torch.zeros(1, 16)):
        assert torch.equal(result, torch.full((1, 16), 2.0))
    assert not library.executed

    shifted = torch.ones(9)[1:]
    with pytest.raises(
        ValueError, match=r"^x begins at an address that is 4 bytes after a multiple"
    ):
        comms[0].all_reduce(shifted)
    with pytest.raises(ValueError, match=r"^out begins at an address that is 4 bytes after"):
        comms[0].all_gather(torch.ones(4), out=shifted)

    library.result = 4
    with pytest.raises(
        CommunicatorError, match=r"^all_reduce failed on rank 0 of 2: MSCCL.. gives 4"
    ):
        comms[0].all_reduce(torch.ones(8))
    with pytest.raises(CommunicatorError, match="all_reduce has failed before"):
        comms[0].all_reduce(torch.ones(8))
    comms[1].close()
