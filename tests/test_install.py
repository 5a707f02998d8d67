"""setup.py: what it says when it cannot build, and installs of a copy of the tree by pip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE", "MANIFEST.in")
FOLDERS = ("cmake", "requirements", "csrc", "fastcnn")
# One instruction set is enough to see whether an install works.
QUICK = {"FASTCNN_CUDA": "off", "CMAKE_ARGS": "-DFASTCNN_ISAS=portable"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree with nothing built in it."""
    target = tmp_path / "tree"
    target.mkdir()
    for name in FILES:
        shutil.copy2(ROOT / name, target)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


def run(cwd: Path, *args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTCNN_") and k != "PYTHONPATH"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True)


def path_with(folder: Path, *programs: str) -> str:
    """A PATH on which there is nothing but these programs."""
    folder.mkdir()
    for name in programs:
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


# --- errors ---


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("FASTCNN_NATIVE", "yes", "on, off"),
        ("FASTCNN_CUDA", "maybe", "auto, on, off"),
        ("FASTCNN_CUDA_ARCHS", "hopper", "'80;90a'"),
        ("FASTCNN_CUDA_ARCHS", ";", "'80;90a'"),
    ],
)
def test_bad_option_is_named(tree: Path, name: str, value: str, expected: str) -> None:
    result = run(tree, "setup.py", "build_ext", **{name: value})
    assert result.returncode != 0
    for part in (f"{name}: got {value!r}", expected):
        assert part in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("missing", [{"CXX": "/nowhere/g++"}, {"CXX": "", "PATH": "/nowhere"}])
def test_no_compiler(tree: Path, missing: dict[str, str]) -> None:
    result = run(tree, "setup.py", "build_ext", **missing)
    assert result.returncode != 0
    assert "no C++ compiler" in result.stderr
    assert "FASTCNN_NATIVE=off" in result.stderr
    assert "apt-get install g++" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_cuda_on_without_nvcc(tree: Path, tmp_path: Path) -> None:
    no_nvcc = {"PATH": path_with(tmp_path / "bin", "c++"), "CUDA_HOME": "/nowhere", "CUDACXX": "", "CXX": ""}
    result = run(tree, "setup.py", "build_ext", FASTCNN_CUDA="on", **no_nvcc)
    assert result.returncode != 0
    assert "FASTCNN_CUDA=on, but there is no nvcc" in result.stderr
    assert "Install the CUDA toolkit" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_cuda_on_with_an_nvcc_that_is_too_old(tree: Path, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.4, V11.4.48'\n")
    nvcc.chmod(0o755)
    result = run(tree, "setup.py", "build_ext", FASTCNN_CUDA="on", CUDACXX=str(nvcc))
    assert result.returncode != 0
    assert "release 11.4; fastcnn needs 12.0" in result.stderr


def test_build_requirements_are_listed_alike() -> None:
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    lines = (ROOT / "requirements" / "build.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == declared


# --- installs ---


def test_source_distribution_holds_what_the_build_reads(tree: Path) -> None:
    assert run(tree, "setup.py", "--quiet", "sdist").returncode == 0
    with tarfile.open(next(tree.glob("dist/*.tar.gz"))) as archive:
        packed = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    read = [path for folder in FOLDERS for path in (tree / folder).rglob("*") if path.is_file()]
    assert {path.relative_to(tree) for path in read} | {Path(name) for name in FILES} <= packed


def pip_install(tree: Path, *args: str | Path, **environment: str) -> None:
    result = run(tree, "-m", "pip", "install", "--no-deps", *args, ".", **environment)
    assert result.returncode == 0, result.stdout + result.stderr


def import_from(site: Path, code: str) -> str:
    result = run(site, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}")
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
def test_pure_python_install_needs_no_compiler(tree: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip_install(tree, "--no-build-isolation", "--target", site, FASTCNN_NATIVE="off", CXX="/nowhere/g++")
    assert list(site.glob("fastcnn/_C*")) == []
    assert "Root-Is-Purelib: true" in next(site.glob("fastcnn-*/WHEEL")).read_text()
    code = "import fastcnn, fastcnn.native; print(fastcnn.__file__, fastcnn.native.module())"
    assert import_from(site, code) == f"{site / 'fastcnn' / '__init__.py'} None"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("isolation", [(), ("--no-build-isolation",)], ids=["isolated", "not_isolated"])
def test_native_install(tree: Path, tmp_path: Path, isolation: tuple[str, ...]) -> None:
    """In pip's isolated environment there is no torch, only what pyproject.toml names."""
    site = tmp_path / "site"
    pip_install(tree, *isolation, "--target", site, **QUICK)
    code = "from fastcnn import native; print(native.module().__file__, native.module().isa_active())"
    path, isa = import_from(site, code).split()
    assert Path(path).parent == site / "fastcnn"
    assert isa == "portable"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_editable_install_then_pure(tree: Path, tmp_path: Path) -> None:
    """The module lands in the tree; a later install with FASTCNN_NATIVE=off takes it away again."""
    options = ("--no-build-isolation", "--target", tmp_path / "site", "--upgrade", "-e")
    pip_install(tree, *options, **QUICK)
    assert len(list(tree.glob("fastcnn/_C.*.so"))) == 1
    pip_install(tree, *options, FASTCNN_NATIVE="off")
    assert list(tree.glob("fastcnn/_C*")) == []
