"""Collectives between real processes over real sockets.

Run as a program, this file is one rank: it goes through all cases of `CASES` and writes, for each,
what went wrong. The processes of a world start once; each case is then a test of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nf_kernels.collectives import (
    Communicator,
    CommunicatorError,
    connect,
    mscclpp,
)
from nf_kernels.collectives.communicator import DTYPES

SENTINEL = -7
TIMEOUT = 60.0  # of the communicator all cases share: what fails sooner did not wait for it
# Rows and columns; each row takes a multiple of 16 bytes in every dtype, as MSCCL++ wants.
SHAPES = [(1, 8), (2, 8), (3, 16), (5, 24), (64, 8), (17, 40), (128, 256)]

CASES: dict[str, Callable[[Rank], None]] = {}
CPU_ONLY: set[str] = set()


@dataclass
class Rank:
    """What a case is given: one rank of a group of which all ranks run the same case."""

    comm: Communicator
    connect: Callable[..., Communicator]  # to the same ranks again

    @property
    def number(self) -> int:
        return self.comm.rank

    @property
    def world_size(self) -> int:
        return self.comm.world_size

    @property
    def device(self) -> torch.device:
        return self.comm.device

    def tensor(self, array: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, dtype, copy=True)

    def full(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, SENTINEL, dtype=dtype, device=self.device)

    def integers(self, seed: int, shape: tuple[int, ...]) -> list[np.ndarray]:
        """Of every rank, small enough that sums are exact in each dtype."""
        return [
            np.random.default_rng([seed, rank]).integers(-30, 31, shape)
            for rank in range(self.world_size)
        ]

    def rows(self, count: int) -> slice:
        return slice(self.number * count, (self.number + 1) * count)

    def all_come_to(self, point: str, ranks: range) -> bool:
        """Whether these ranks come here while all of them stay, told without a communicator."""
        folder = Path(os.environ["FOLDER_OF_ALL_RANKS"])
        (folder / f"{point} {self.number}").touch()
        until = time.monotonic() + TIMEOUT / 4
        while not all((folder / f"{point} {rank}").exists() for rank in ranks):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True


def case(function: Callable[[Rank], None]) -> Callable[[Rank], None]:
    CASES[function.__name__] = function
    return function


def on_cpu(function: Callable[[Rank], None]) -> Callable[[Rank], None]:
    """Of what is noticed in the operation itself on a CPU alone."""
    CPU_ONLY.add(function.__name__)
    return case(function)


def same(actual: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(actual.double().cpu().numpy(), expected)


@case
def all_reduce_adds_exactly(rank: Rank) -> None:
    for dtype in DTYPES:
        for seed, shape in enumerate(SHAPES):
            parts = rank.integers(seed, shape)
            x = rank.tensor(parts[rank.number], dtype)
            rank.comm.all_reduce(x)
            same(x, sum(parts))


@case
def all_reduce_takes_any_shape(rank: Rank) -> None:
    for seed, shape in enumerate([(), (1,), (13,), (2, 3, 5), (1, 1, 1, 7)]):
        parts = rank.integers(seed, shape)
        x = rank.tensor(parts[rank.number])
        rank.comm.all_reduce(x)
        same(x, sum(parts))


@case
def all_gather_concatenates_rows(rank: Rank) -> None:
    for dtype in DTYPES:
        for seed, shape in enumerate([*SHAPES, (3,), (2, 3, 4)]):
            parts = rank.integers(seed, shape)
            x = rank.tensor(parts[rank.number], dtype)
            out = rank.full((rank.world_size * shape[0], *shape[1:]), dtype)
            rank.comm.all_gather(x, out=out)
            same(out, np.concatenate(parts))
            same(x, parts[rank.number])


@case
def all_gather_along_columns_as_documented(rank: Rank) -> None:
    tokens, width = 5, 8
    parts = rank.integers(0, (tokens, width))
    out = rank.full((rank.world_size * tokens, width), torch.float32)
    rank.comm.all_gather(rank.tensor(parts[rank.number]), out=out)
    columns = out.view(rank.world_size, tokens, width).transpose(0, 1)
    same(columns.reshape(tokens, rank.world_size * width), np.concatenate(parts, axis=1))


@case
def all_gather_in_place(rank: Rank) -> None:
    parts = rank.integers(0, (3, 8))
    out = rank.full((rank.world_size * 3, 8), torch.bfloat16)
    own = out[rank.rows(3)]
    own.copy_(rank.tensor(parts[rank.number]))
    rank.comm.all_gather(own, out=out)
    same(out, np.concatenate(parts))


@case
def reduce_scatter_leaves_each_rank_its_rows(rank: Rank) -> None:
    for dtype in DTYPES:
        for seed, shape in enumerate([*SHAPES, (3,), (2, 3, 4)]):
            parts = rank.integers(seed, (rank.world_size * shape[0], *shape[1:]))
            x = rank.tensor(parts[rank.number], dtype)
            out = rank.full(shape, dtype)
            rank.comm.reduce_scatter(x, out=out)
            same(out, sum(parts)[rank.rows(shape[0])])
            same(x, parts[rank.number])


@case
def bfloat16_rounds_at_each_addition_and_alike_on_all_ranks(rank: Rank) -> None:
    shape = (33, 64)
    parts = [
        torch.randn(shape, generator=torch.Generator().manual_seed(r)).bfloat16()
        for r in range(rank.world_size)
    ]
    x = parts[rank.number].to(rank.device, copy=True)
    rank.comm.all_reduce(x)
    everywhere = torch.empty(rank.world_size * shape[0], shape[1], dtype=x.dtype, device=x.device)
    rank.comm.all_gather(x, out=everywhere)
    stacked = torch.stack(parts).double()
    # Each addition is off by half a unit in the last place of a partial sum: 2^-9 of it.
    bound = (rank.world_size - 1) * 2.0**-8 * stacked.abs().sum(0)
    assert ((x.double().cpu() - stacked.sum(0)).abs() <= bound).all()
    for copy in everywhere.view(rank.world_size, *shape):
        assert torch.equal(copy, x)


@case
def rows_of_an_invariant_sum_do_not_depend_on_the_others(rank: Rank) -> None:
    assert rank.comm.invariant == (rank.world_size == 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(rank.number)
        x = torch.randn(37, 72, generator=generator).to(rank.device, dtype)
        together = x.clone()
        rank.comm.all_reduce(together)
        for first, last in [(0, 1), (36, 37), (3, 20), (5, 6)]:
            alone = x[first:last].clone()
            rank.comm.all_reduce(alone)
            if rank.comm.invariant:
                assert torch.equal(alone, together[first:last]), (dtype, first, last)


@case
def ranges_of_rows_and_nothing_beside_them(rank: Rank) -> None:
    parts = rank.integers(0, (2 * rank.world_size, 8))
    for dtype in DTYPES:
        wide = rank.full((2 * rank.world_size + 5, 8), dtype)
        x = wide[3:-2]
        x.copy_(rank.tensor(parts[rank.number]))
        scattered, gathered = (rank.full((2 * rank.world_size + 5, 8), dtype) for _ in range(2))
        rank.comm.reduce_scatter(x, out=scattered[3:5])
        rank.comm.all_gather(scattered[3:5], out=gathered[3:-2])
        rank.comm.all_reduce(x)
        same(x, sum(parts))
        same(scattered[3:5], sum(parts)[rank.rows(2)])
        same(gathered[3:-2], sum(parts))
        for beside in (
            wide[:3],
            wide[-2:],
            scattered[:3],
            scattered[5:],
            gathered[:3],
            gathered[-2:],
        ):
            assert (beside == SENTINEL).all()


@case
def empty_tensors_send_nothing(rank: Rank) -> None:
    # Only one rank calls, so that whatever were sent would wait for the others.
    if rank.number == 0:
        empty = rank.full((0, 8), torch.float32)
        rank.comm.all_reduce(empty)
        rank.comm.all_gather(empty, out=empty.clone())
        rank.comm.reduce_scatter(empty, out=empty.clone())
    rank.comm.barrier()


@case
def tensors_made_for_inference(rank: Rank) -> None:
    with torch.inference_mode():
        x = torch.ones(3, 8, device=rank.device)
        out = rank.full((3 * rank.world_size, 8), torch.float32)
        rows = rank.full((3, 8), torch.float32)
    rank.comm.all_reduce(x)
    rank.comm.all_gather(x, out=out)
    assert (out == rank.world_size).all()
    rank.comm.reduce_scatter(out, out=rows)
    assert (rows == rank.world_size**2).all()


@case
def wrong_arguments_are_refused_before_anything_is_sent(rank: Rank) -> None:
    # Only one rank calls: the others are in the barrier by then.
    if rank.number == rank.world_size - 1:
        refuse_wrong_arguments(rank)
    rank.comm.barrier()
    x = rank.full((2, 8), torch.float32)
    rank.comm.all_reduce(x)
    assert (x == rank.world_size * SENTINEL).all()


def refuse_wrong_arguments(rank: Rank) -> None:
    world_size = rank.world_size
    x = rank.full((2, 8), torch.float32)
    wide = rank.full((2 * world_size, 8), torch.float32)
    of_three = rank.full((3 * world_size, 8), torch.float32)

    def refused(message: str, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        tensors = [*args, *kwargs.values()]
        before = [tensor.clone() for tensor in tensors]
        with pytest.raises(ValueError, match=message):
            call(*args, **kwargs)
        assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))

    all_reduce, all_gather = rank.comm.all_reduce, rank.comm.all_gather
    reduce_scatter = rank.comm.reduce_scatter
    refused("^x is torch.float64; expected one of torch.float32, torch.bf", all_reduce, x.double())
    refused("^x is torch.bool; expected one of", all_reduce, x > 0)
    refused("^out is torch.uint8; expected one of", all_gather, x, out=wide.to(torch.uint8))
    refused("^out is torch.float16; expected torch.float32", all_gather, x, out=wide.half())
    refused("^out is torch.float16; expected torch.float32", reduce_scatter, wide, out=x.half())
    meta = torch.zeros(2, 8, device="meta")
    with pytest.raises(ValueError, match=rf"^x is on meta; expected {rank.device}, the device of"):
        all_reduce(meta)
    with pytest.raises(ValueError, match=rf"^out is on meta; expected {rank.device}, the device"):
        reduce_scatter(wide, out=meta)
    refused(r"^x \[8, 2\] has strides \[1, 8\]; expected a contiguous", all_reduce, x.t())
    refused(r"^x \[2, 4\] has strides \[8, 1\]; expected a contiguous", all_reduce, x[:, :4])
    refused(r"^out \[\d+, 8\] has strides", all_gather, x, out=wide.t().contiguous().t())
    twice = rf"expected \[{2 * world_size}, 8\], the rows of"
    refused(rf"^out is \[{3 * world_size}, 8\]; {twice} x \[2, 8\]", all_gather, x, out=of_three)
    refused(rf"^out is \[2, 8\]; {twice} x", all_gather, x, out=x.clone())
    refused("^out is .*; expected", all_gather, x, out=wide.view(-1))
    refused("^x is a scalar; expected at least one dimension", all_gather, x[0, 0], out=wide)
    refused(rf"^x is \[{3 * world_size}, 8\]; {twice} out", reduce_scatter, of_three, out=x)
    refused("^out is a scalar", reduce_scatter, wide, out=x[0, 0])
    other = (rank.number + 1) % world_size
    refused("^x and out overlap", all_gather, wide[2 * other : 2 * other + 2], out=wide)
    refused("^x and out overlap", all_gather, wide[1:3], out=wide)
    refused("^x and out overlap", reduce_scatter, wide, out=wide[:2])
    refused("^x and out overlap", reduce_scatter, wide, out=wide[rank.rows(2)])


@case
def a_barrier_waits_for_the_last(rank: Rank) -> None:
    if rank.number == 0:
        time.sleep(0.3)
    # One clock for the processes of a machine.
    entered = torch.tensor([time.monotonic()], dtype=torch.float64)
    rank.comm.barrier()
    left = time.monotonic()
    # As integers, in microseconds: no dtype that is sent holds the seconds exactly.
    micros = (entered * 1e6).long().to(rank.device)
    all_entered = torch.empty(rank.world_size, dtype=torch.int64, device=rank.device)
    rank.comm.all_gather(micros, out=all_entered)
    assert left * 1e6 >= all_entered.max().item()


@case
def two_communicators_at_once(rank: Rank) -> None:
    with rank.connect(name="second") as second:
        x, y = rank.full((4, 8), torch.float32), rank.full((4, 8), torch.float32)
        for _ in range(3):
            rank.comm.all_reduce(x)
            second.all_reduce(y)
            rank.comm.all_reduce(y)
        assert (x == SENTINEL * rank.world_size**3).all()
        assert (y == SENTINEL * rank.world_size**6).all()
        second.barrier()
    rank.comm.all_reduce(x)
    assert (x == SENTINEL * rank.world_size**4).all()


@on_cpu
def two_communicators_in_two_threads(rank: Rank) -> None:
    errors: list[BaseException] = []

    def add(comm: Communicator, start: int) -> None:
        try:
            for value in range(start, start + 50):
                x = torch.full((16, 8), value, dtype=torch.int32)
                comm.all_reduce(x)
                assert (x == value * comm.world_size).all()
        except BaseException as error:
            errors.append(error)

    with rank.connect(name="thread") as other:
        threads = [
            threading.Thread(target=add, args=args) for args in [(rank.comm, 0), (other, 1000)]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        other.barrier()
    assert not errors


@on_cpu
def the_default_group_of_torch_is_left_alone(rank: Rank) -> None:
    assert not dist.is_initialized()
    store = dist.FileStore(os.environ["FOLDER_OF_ALL_RANKS"] + "/store", rank.world_size)
    dist.init_process_group("gloo", store=store, rank=rank.number, world_size=rank.world_size)
    try:
        with rank.connect(name="beside the default group") as comm:
            x, y = torch.ones(8), torch.ones(8)
            comm.all_reduce(x)
            dist.all_reduce(y)
            comm.barrier()
        dist.all_reduce(y)
        assert (x == rank.world_size).all()
        assert (y == rank.world_size**2).all()
    finally:
        dist.destroy_process_group()


@case
def a_store_instead_of_an_address(rank: Rank) -> None:
    host, port = os.environ["STORE_ADDRESS"].split(":")
    store = dist.TCPStore(host, int(port), is_master=rank.number == 0, wait_for_workers=False)
    with rank.connect(address=store) as comm:
        x = rank.full((4, 8), torch.float32)
        comm.all_reduce(x)
        comm.barrier()
    assert (x == SENTINEL * rank.world_size).all()


@case
def a_name_that_is_taken(rank: Rank) -> None:
    with pytest.raises(
        ValueError, match=rf"^rank {rank.number} of the communicator 'main' at .* is present"
    ):
        rank.connect(name="main")
    rank.comm.barrier()


@case
def after_closing(rank: Rank) -> None:
    comm = rank.connect(name="closing")
    comm.barrier()
    comm.close()
    comm.close()
    x = rank.full((2, 8), torch.float32)
    for operation, call in {
        "all_reduce": lambda: comm.all_reduce(x),
        "all_gather": lambda: comm.all_gather(
            x, out=rank.full((2 * rank.world_size, 8), torch.float32)
        ),
        "reduce_scatter": lambda: comm.reduce_scatter(
            rank.full((2 * rank.world_size, 8), torch.float32), out=x
        ),
        "barrier": comm.barrier,
    }.items():
        with pytest.raises(
            CommunicatorError,
            match=rf"^{operation} on rank {rank.number} of {rank.world_size}: the communicator is "
            rf"closed; connect all ranks again",
        ):
            call()
    assert (x == SENTINEL).all()
    rank.comm.barrier()


@on_cpu
def a_peer_that_stays_away(rank: Rank) -> None:
    comm = rank.connect(name="late", timeout=1.0)
    if rank.number == 0:
        started = time.monotonic()
        with pytest.raises(
            CommunicatorError, match=rf"^reduce_scatter failed on rank 0 of {rank.world_size}: "
        ):
            comm.reduce_scatter(torch.ones(rank.world_size, 8), out=torch.ones(1, 8))
        assert 0.9 < time.monotonic() - started < 10
    rank.comm.barrier()
    comm.close()


@on_cpu
def a_peer_that_leaves(rank: Rank) -> None:
    comm = rank.connect(name="left")
    if rank.number == 0:
        comm.close()
    else:
        with pytest.raises(CommunicatorError, match=r"^barrier failed on rank"):
            comm.barrier()
    assert rank.all_come_to("left", range(rank.world_size))
    rank.comm.barrier()


@on_cpu
def a_peer_that_dies(rank: Rank) -> None:
    """The last case: one rank fewer afterwards."""
    x = torch.ones(100)
    rank.comm.all_reduce(x)
    if rank.number == rank.world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    here = f"on rank {rank.number} of {rank.world_size}"
    with pytest.raises(
        CommunicatorError, match=rf"^all_reduce failed {here}: .*start all ranks again and connect$"
    ) as failure:
        rank.comm.all_reduce(x)
    # Those too that wait for a rank which is alive: it left the group when it failed, and what an
    # exception shows of the failure does not hold it back.
    assert rank.all_come_to("death", range(rank.world_size - 1))
    assert isinstance(failure.value.__cause__, RuntimeError)
    with pytest.raises(CommunicatorError, match=rf"^barrier {here}: all_reduce has failed before"):
        rank.comm.barrier()


def run_rank(number: int, world_size: int, device: str, backend: str, address: str) -> None:
    def connect_again(**changed: Any) -> Communicator:
        arguments = {"address": address, "timeout": TIMEOUT, "backend": backend} | changed
        where = f"cuda:{number}" if device == "cuda" else device
        return connect(device=where, rank=number, world_size=world_size, **arguments)

    path = Path(os.environ["FOLDER_OF_ALL_RANKS"], f"{number}.jsonl")
    with path.open("w", buffering=1) as results, connect_again() as comm:
        for name, function in CASES.items():
            if device == "cuda" and name in CPU_ONLY:
                continue
            print(json.dumps({"starts": name}), file=results)
            problem = ""
            try:
                function(Rank(comm, connect_again))
            except Exception:
                problem = traceback.format_exc()
            print(json.dumps({"case": name, "problem": problem}), file=results)
            if "CommunicatorError" in problem:
                break  # the others are gone or elsewhere


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@dataclass(frozen=True)
class World:
    world_size: int
    device: str = "cpu"
    backend: str = "auto"


def needs(condition: bool, reason: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu, pytest.mark.skipif(not condition, reason=reason)]


GPUS = torch.cuda.device_count()
WORLDS = [
    pytest.param(World(2), id="gloo-2"),
    pytest.param(World(4), id="gloo-4"),
    *(
        pytest.param(
            World(size, "cuda", "torch"),
            id=f"nccl-{size}",
            marks=needs(size <= GPUS, f"{size} GPUs"),
        )
        for size in (2, 4)
    ),
    *(
        pytest.param(
            World(size, "cuda", "mscclpp"),
            id=f"mscclpp-{size}",
            marks=needs(size <= GPUS and not mscclpp.why_not(), f"{size} GPUs and MSCCL++"),
        )
        for size in (2, 4)
    ),
]


@pytest.fixture(scope="module", params=WORLDS)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[World, list[dict[str, str]]]:
    """What each rank wrote of each case; of the last that it began and did not end, its death."""
    wanted: World = request.param
    folder = tmp_path_factory.mktemp("world")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "FOLDER_OF_ALL_RANKS": str(folder),
        "STORE_ADDRESS": free_address(),
    }
    address = free_address()
    ranks = []
    for number in range(wanted.world_size):
        arguments = [number, wanted.world_size, wanted.device, wanted.backend, address]
        with (folder / f"{number}.log").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, __file__, *map(str, arguments)],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
            )
    results = []
    try:
        for number, process in enumerate(ranks):
            process.wait(timeout=3 * TIMEOUT)
            path = folder / f"{number}.jsonl"
            text = path.read_text() if path.exists() else ""
            lines = [json.loads(line) for line in text.splitlines()]
            result = {line["case"]: line["problem"] for line in lines if "case" in line}
            for line in lines:
                if "starts" in line and line["starts"] not in result:
                    result[line["starts"]] = f"ended with {process.returncode}"
            log_text = (folder / f"{number}.log").read_text()
            result["the process"] = f"{process.returncode}\n{log_text}"
            results.append(result)
    finally:
        for process in ranks:
            process.kill()
    return wanted, results


@pytest.mark.parametrize("name", CASES)
def test_between_processes(world: tuple[World, list[dict[str, str]]], name: str) -> None:
    wanted, results = world
    if wanted.device == "cuda" and name in CPU_ONLY:
        pytest.skip("on CUDA devices, torch's watchdog ends the process instead")
    for number, result in enumerate(results):
        expected = ""
        if name == "a_peer_that_dies" and number == wanted.world_size - 1:
            expected = f"ended with {-signal.SIGKILL}"
        problem = result.get(name, f"not reached; the process ended with {result['the process']}")
        assert problem == expected, f"rank {number}: {problem}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_rank(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
