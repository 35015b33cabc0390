"""Each wheel, installed alone into an empty environment, runs its README's example there.

The environment holds what the wheel declares and nothing else: packages of this repository come
from the wheels built here, all others in the versions of requirements.lock, torch in the build that
runs this test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PROJECTS = {
    "nf-kernels": ROOT / "packages/nf-kernels",
    "nf-kvcache": ROOT / "packages/nf-kvcache",
    "nf-scheduler": ROOT / "packages/nf-scheduler",
    "nf-runtime": ROOT / "packages/nf-runtime",
    "nanoflow-server": ROOT / "apps/server",
}
MODULES = {name: name.replace("-", "_") for name in PROJECTS} | {"nanoflow-server": "nf_server"}
each_package = pytest.mark.parametrize("package", PROJECTS)


def run(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    return subprocess.run(
        command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, timeout=240
    )


def uv(*arguments: str | Path, **environment: str) -> None:
    program = shutil.which("uv", path=BIN) or shutil.which("uv")
    assert program, "no uv on the PATH nor beside this Python; `make setup` fetches one"
    result = run([program, *arguments], **environment)
    assert result.returncode == 0, result.stderr


def build(project: Path, folder: Path, path: str) -> Path:
    """The wheel of a project, built with the tools of this environment and the programs in path."""
    options = ["--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder]
    uv("build", *options, project, PATH=f"{BIN}{os.pathsep}{path}")
    (wheel,) = folder.glob("*.whl")
    return wheel


@dataclass
class Environment:
    """An empty virtual environment, and how to install wheels into it."""

    folder: Path
    constraints: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def create(self) -> None:
        uv("venv", "--quiet", "--python", sys.executable, self.folder)

    def install(self, wheel: Path) -> None:
        options: list[str | Path] = ["--python", self.python, "--constraints", self.constraints]
        options += ["--constraints", ROOT / "requirements.lock"]
        find_links = os.environ.get("PIP_FIND_LINKS", "").split()
        find_links = os.environ.get("UV_FIND_LINKS", ",".join(find_links)).split(",")
        if any(find_links):
            options += [f"--find-links={link}" for link in find_links]
        elif build_of_torch := metadata.version("torch").partition("+")[2]:
            options += ["--torch-backend", build_of_torch]
        try:  # everything is in the cache if `make setup` has run on this machine
            uv("pip", "install", "--offline", *options, wheel)
        except AssertionError:
            uv("pip", "install", *options, wheel)

    def run_example(self, package: str) -> subprocess.CompletedProcess[str]:
        readme = (PROJECTS[package] / "README.md").read_text(encoding="utf-8")
        example = re.search(r"^```python\n(.*?)^```$", readme, flags=re.DOTALL | re.MULTILINE)
        assert example, f"the README of {package} has no python example"
        script = self.folder / "example.py"
        script.write_text(example[1], encoding="utf-8")
        result = run([self.python, script])
        assert result.returncode == 0, result.stderr
        return result


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        package: build(project, tmp_path_factory.mktemp(package), os.environ["PATH"])
        for package, project in PROJECTS.items()
    }


@pytest.fixture(scope="module")
def new_environment(
    wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Environment]:
    constraints = tmp_path_factory.mktemp("constraints") / "constraints.txt"
    lines = [f"{package} @ {wheel.as_uri()}" for package, wheel in wheels.items()]
    lines.append(f"torch=={metadata.version('torch')}")
    constraints.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def create() -> Environment:
        environment = Environment(tmp_path_factory.mktemp("alone") / "venv", constraints)
        environment.create()
        return environment

    return create


@each_package
def test_wheel_installed_alone_runs_its_readme_example(
    package: str, wheels: dict[str, Path], new_environment: Callable[[], Environment]
) -> None:
    environment = new_environment()
    environment.install(wheels[package])
    environment.run_example(package)
    if package == "nanoflow-server":
        result = run([environment.folder / "bin" / "nanoflow", "env"])
        assert result.returncode == 0, result.stderr
        assert "nf-kernels" in result.stdout


@each_package
def test_wheel_carries_license_types_and_bounded_ranges(
    package: str, wheels: dict[str, Path]
) -> None:
    with zipfile.ZipFile(wheels[package]) as wheel:
        names = wheel.namelist()
        (metadata_file,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        text = wheel.read(metadata_file).decode()
    assert f"{MODULES[package]}/py.typed" in names
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert not [name for name in names if "tests/" in name]
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    for requirement in re.findall(r"^Requires-Dist: (nf-.*)$", text, flags=re.MULTILINE):
        assert re.search(r">=0\.1\b", requirement), requirement
        assert "<0.2" in requirement


def test_the_kernels_wheel_can_build_the_cuda_library_and_has_none(wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels["nf-kernels"]) as wheel:
        names = set(wheel.namelist())
    sources = PROJECTS["nf-kernels"] / "csrc/cuda"
    assert {f"nf_kernels/cuda/csrc/{path.name}" for path in sources.iterdir()} <= names
    assert "nf_kernels/cuda/tiles.toml" in names
    assert not [name for name in names if "libnf_cuda" in name]


@each_package
def test_changelog_has_the_version(package: str) -> None:
    project = tomllib.loads((PROJECTS[package] / "pyproject.toml").read_text(encoding="utf-8"))
    changelog = (PROJECTS[package] / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(project['project']['version'])}\b", changelog, re.MULTILINE)


def build_without_a_compiler(package: str, folder: Path) -> Path:
    """The wheel of a package, built where only the tools of this environment are found."""
    source = folder / package
    shutil.copytree(PROJECTS[package], source, ignore=shutil.ignore_patterns("build", "*.so"))
    empty = folder / "empty"
    empty.mkdir()
    compilers = {name: os.environ.pop(name) for name in ("CC", "CXX") if name in os.environ}
    try:
        return build(source, folder / "dist", path=str(empty))
    finally:
        os.environ.update(compilers)


def test_without_a_compiler_the_kernels_install_say_so_once_and_work(
    new_environment: Callable[[], Environment], tmp_path: Path
) -> None:
    wheel = build_without_a_compiler("nf-kernels", tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "_cpu." in name and ".pyi" not in name]

    environment = new_environment()
    environment.constraints = tmp_path / "constraints.txt"
    environment.constraints.write_text(f"torch=={metadata.version('torch')}\n", encoding="utf-8")
    environment.install(wheel)
    result = environment.run_example("nf-kernels")
    assert result.stderr.count("C++ compiler") == 1, result.stderr


INDEX = """
from nf_kvcache.index import make_index
print(*(type(make_index(page_size)).__name__ for page_size in (16, 32)))
"""


def test_without_a_compiler_the_kvcache_installs_says_so_once_and_works(
    wheels: dict[str, Path], new_environment: Callable[[], Environment], tmp_path: Path
) -> None:
    wheel = build_without_a_compiler("nf-kvcache", tmp_path)
    outputs = {}
    for path in (wheels["nf-kvcache"], wheel):
        environment = new_environment()
        environment.constraints = tmp_path / "constraints.txt"
        environment.constraints.write_text(f"torch=={metadata.version('torch')}\n")
        environment.install(path)
        outputs[path] = run([environment.python, "-c", INDEX])
    native, plain = outputs.values()
    assert (native.stdout.split(), native.stderr) == (["PrefixIndex"] * 2, "")
    assert plain.stdout.split() == ["PythonPrefixIndex"] * 2, plain.stderr
    assert plain.stderr.count("C++ compiler") == 1, plain.stderr
