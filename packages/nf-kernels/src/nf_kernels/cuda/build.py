"""Compile the CUDA library: `python -m nf_kernels.cuda.build`.

Needs nvcc, a C++ compiler and the headers of CUTLASS, but no device and no torch. A kernel takes
most of a minute and 3.5 GB; those whose sources have not changed are not compiled again.
"""

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from nf_kernels.cuda import place, sources
from nf_kernels.cuda.tiles import Tile, all_tiles, find_tile
from nf_kernels.cuda.toolchain import Toolchain, find_toolchain

RECORD = "build.json"
"""Of the last build, in its folder of objects: date, fingerprint, compiler, headers, kernels."""

_BYTES_PER_JOB = 3.5 * 2**30

# Warnings of CUTLASS's own headers are not ours to mend: they come in by -isystem.
_COMPILE = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)
_LINK = ("-shared", "-cudart=static", "-Xlinker=--no-undefined")


@dataclass(frozen=True, slots=True)
class _Unit:
    """A translation unit: its name, and its text where it is generated."""

    name: str
    text: str | None


def build(
    tiles: Sequence[Tile],
    *,
    dtypes: Sequence[str] = tuple(sources.DTYPES),
    jobs: int | None = None,
    library: Path | None = None,
    objects: Path | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Compile what is not up to date, and link the library.

    Args:
        tiles: That the library gets.
        dtypes: That each of them is compiled for, keys of `sources.DTYPES`.
        jobs: Kernels that are compiled at the same time; None: as many as cores and free memory
            allow.
        library: The file to write; None: as `place.library_to_build`.
        objects: Folder of compiled kernels; None: as `place.object_folder`.
        report: Gets a line of progress for each kernel.

    Returns:
        The library.

    Raises:
        ValueError: There are no tiles or no dtypes, or one that there is not.
        RuntimeError: A tool is missing, or something does not compile.
        OSError: A folder cannot be written.
    """
    if not tiles:
        raise ValueError("tiles is empty; expected one tile or more")
    unknown = set(dtypes) - set(sources.DTYPES)
    if unknown or not dtypes:
        raise ValueError(f"dtypes is {list(dtypes)}; expected some of {list(sources.DTYPES)}")
    tiles, dtypes = list(dict.fromkeys(tiles)), list(dict.fromkeys(dtypes))
    toolchain = find_toolchain()
    library = library or place.library_to_build()
    objects = objects or place.object_folder()
    units = [
        _Unit(sources.kernel_name(tile, dtype), sources.kernel_source(tile, dtype))
        for tile in tiles
        for dtype in dtypes
    ]
    units += [_Unit("tiles", sources.table_source(tiles, dtypes)), _Unit("nf_cuda", None)]
    for folder in (objects, library.parent):
        folder.mkdir(parents=True, exist_ok=True)
    _compile_all(units, toolchain, objects, jobs or _default_jobs(), report)
    _link(toolchain, [objects / f"{unit.name}.o" for unit in units], library)
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "fingerprint": sources.fingerprint(),
        "nvcc": toolchain.nvcc_release,
        "cutlass": toolchain.headers_version,
        "kernels": [*(unit.name for unit in units[:-2]), "copy"],
    }
    (objects / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    report(f"wrote {library}")
    return library


def _compile_all(
    units: list[_Unit],
    toolchain: Toolchain,
    objects: Path,
    jobs: int,
    report: Callable[[str], None],
) -> None:
    keys = {unit: _key(unit, toolchain) for unit in units}
    stale = [unit for unit in units if _built_key(objects, unit) != keys[unit]]
    if len(stale) < len(units):
        report(f"{len(units) - len(stale)} of {len(units)} files are up to date")
    with ThreadPoolExecutor(jobs) as pool:
        running = {
            pool.submit(_compile, unit, toolchain, objects, keys[unit]): unit for unit in stale
        }
        try:
            for done, future in enumerate(as_completed(running), start=1):
                seconds = future.result()
                report(f"[{done}/{len(stale)}] {running[future].name}, {seconds:.0f} s")
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _key(unit: _Unit, toolchain: Toolchain) -> str:
    """A digest of all that an object is made of."""
    digest = hashlib.sha256()
    for text in (*_COMPILE, toolchain.nvcc_version, toolchain.headers_version):
        digest.update(text.encode() + b"\0")
    place_of_sources = sources.folder()
    for name in sources.HEADERS:
        digest.update((place_of_sources / name).read_bytes())
    digest.update(_text(unit).encode())
    return digest.hexdigest()


def _text(unit: _Unit) -> str:
    if unit.text is not None:
        return unit.text
    return (sources.folder() / f"{unit.name}.cu").read_text(encoding="utf-8")


def _built_key(objects: Path, unit: _Unit) -> str | None:
    """The key of the object that there is."""
    key, built = objects / f"{unit.name}.key", objects / f"{unit.name}.o"
    return key.read_text(encoding="utf-8") if key.is_file() and built.is_file() else None


def _compile(unit: _Unit, toolchain: Toolchain, objects: Path, key: str) -> float:
    """Compile one unit; gives the seconds it took."""
    started = time.monotonic()
    source, built = objects / f"{unit.name}.cu", objects / f"{unit.name}.o"
    key_file = built.with_suffix(".key")
    key_file.unlink(missing_ok=True)
    source.write_text(_text(unit), encoding="utf-8")
    folders: list[str | Path] = ["-isystem", toolchain.headers, "-I", sources.folder()]
    command = [toolchain.nvcc, *_COMPILE, *folders, "-c", source, "-o", built]
    _run(command, unit.name, objects)
    key_file.write_text(key, encoding="utf-8")
    return time.monotonic() - started


def _link(toolchain: Toolchain, built: list[Path], library: Path) -> None:
    """Link to a file beside the library first, so that nobody loads half of one."""
    unfinished = library.with_name(f"{library.name}.{os.getpid()}")
    try:
        exports = f"-Xlinker=--version-script={sources.folder() / sources.EXPORTS}"
        files: list[str | Path] = [*built, "-o", unfinished]
        _run([toolchain.nvcc, *_LINK, exports, *files], "link", built[0].parent)
        unfinished.replace(library)
    finally:
        unfinished.unlink(missing_ok=True)


def _run(command: list[str | Path], name: str, objects: Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    output = result.stdout + result.stderr
    log = objects / f"{name}.log"
    log.write_text(f"{' '.join(map(str, command))}\n{output}", encoding="utf-8")
    first = next((line for line in output.splitlines() if "error" in line), "no message")
    raise RuntimeError(f"{name} does not compile: {first.strip()}; all of it is in {log}")


def _default_jobs() -> int:
    """One per core that this process may use, if the free memory is enough."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, int(_free_memory() / _BYTES_PER_JOB)))


def _free_memory() -> float:
    """Bytes that this process may still take, by the system and by its control group."""
    free = float("inf")
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = float(line.split()[1]) * 1024
        group = Path("/sys/fs/cgroup")
        limit, used = (
            (group / name).read_text(encoding="ascii").strip()
            for name in ("memory.max", "memory.current")
        )
        if limit != "max":
            free = min(free, float(limit) - float(used))
    except OSError:
        pass
    return free


def main(arguments: Sequence[str]) -> int:
    """Run the command line; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nf_kernels.cuda.build", description="Compile the CUDA library."
    )
    parser.add_argument("--tiles", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="only these (default: all)")
    parser.add_argument("--jobs", type=int, help="kernels compiled at once (default: as fit)")
    options = parser.parse_args(arguments)
    try:
        if options.jobs is not None and options.jobs < 1:
            raise ValueError(f"--jobs is {options.jobs}; expected 1 or more")
        known = all_tiles()
        names = options.tiles or [tile.name for tile in known]
        build(
            [find_tile(name, known) for name in names],
            dtypes=options.dtypes or tuple(sources.DTYPES),
            jobs=options.jobs,
            report=lambda line: print(f"cuda-build: {line}", flush=True),
        )
    except (RuntimeError, ValueError, OSError) as error:
        print(f"cuda-build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
