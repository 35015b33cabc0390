"""requirements.lock: hashes for all, no download addresses, nothing of torch, what is declared."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = sorted(ROOT.glob("*/*/pyproject.toml"))
OURS = {"nf-kernels", "nf-kvcache", "nf-scheduler", "nf-runtime", "nanoflow-server"}
# torch requires jinja2, networkx, sympy and setuptools too, but jinja2 is also nf-runtime's own.
TORCH_ALONE = {"torch", "sympy", "mpmath", "networkx", "triton"}


def entries(text: str) -> list[str]:
    """The lock's requirements, each with its hashes on one line."""
    joined = text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


LOCK = entries((ROOT / "requirements.lock").read_text(encoding="utf-8"))
PINS = [Requirement(re.split(r"\s--hash", entry)[0]) for entry in LOCK]


def declared(project: Path) -> list[Requirement]:
    """What a project needs to run, and what it needs to be built."""
    data = tomllib.loads(project.read_text(encoding="utf-8"))
    to_build = data.get("build-system", {}).get("requires", [])
    return [Requirement(text) for text in data["project"]["dependencies"] + to_build]


def test_every_entry_is_one_version_with_hashes() -> None:
    assert len(LOCK) > 20
    for entry in LOCK:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
        assert re.fullmatch(
            r"==[^,*]+", str(Requirement(re.split(r"\s--hash", entry)[0]).specifier)
        )


def test_no_download_addresses() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert " @ " not in text
    assert "--index" not in text
    assert "--find-links" not in text


def test_torch_and_what_only_it_needs_are_left_out() -> None:
    names = {canonicalize_name(pin.name) for pin in PINS}
    assert not names & TORCH_ALONE
    assert not [name for name in names if name.startswith("nvidia-")]
    assert not names & OURS


DEVELOPED_WITH = {"plot"}  # extras that the workspace asks for, because `make setup` brings them


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.parent.name)
def test_what_only_an_extra_needs_is_left_out(project: Path) -> None:
    data = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    needed = {canonicalize_name(item.name) for path in PROJECTS for item in declared(path)}
    pinned = {canonicalize_name(pin.name) for pin in PINS}
    for extra, texts in data.get("optional-dependencies", {}).items():
        if extra in DEVELOPED_WITH:
            continue
        names = {canonicalize_name(Requirement(text).name) for text in texts} - needed
        assert not names & pinned, f"extra {extra} of {project.parent.name}"


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.parent.name)
def test_what_a_package_declares_is_pinned_within_its_range(project: Path) -> None:
    for requirement in declared(project):
        name = canonicalize_name(requirement.name)
        if name in OURS:
            assert {s.operator for s in requirement.specifier} == {">=", "<"}, requirement
            continue
        if name == "torch":
            assert requirement.specifier.contains("2.13.0")
            continue
        versions = [
            str(pin.specifier).removeprefix("==")
            for pin in PINS
            if canonicalize_name(pin.name) == name
        ]
        assert versions, f"{project.parent.name} needs {requirement}, which requirements.lock lacks"
        for version in versions:
            assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


def test_makefile_and_workspace_name_the_same_torch() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (pinned,) = re.findall(r"^TORCH \?= (\S+)$", makefile, flags=re.MULTILINE)
    assert pinned in {str(requirement) for requirement in declared(ROOT / "pyproject.toml")}
