"""Builds the native core with CMake and Ninja. What is declared rather than done stands in pyproject.toml.

The environment's options (FASTCNN_CUDA and the others read below) are listed in README.md under "Install".
FASTCNN_ISA is none of them: it chooses among what was built, when the package is imported.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90a"
OLDEST_CUDA = (12, 0)  # the first whose nvcc knows sm_90a
TOOLS_HINT = "pip install -r requirements/build.txt adds it (pip itself does, but for --no-build-isolation)"
PURE_HINT = "FASTCNN_NATIVE=off installs fastcnn as pure Python, with the Triton and reference backends"
NO_COMPILER = f"""\
no C++ compiler: tried {{tried}}.
  Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; conda: conda install
  cxx-compiler) or name one in CXX. Or do without: {PURE_HINT}."""
NO_NVCC = """\
FASTCNN_CUDA=on, but there is no nvcc: looked in CUDACXX or PATH, CUDA_HOME, CUDA_PATH, /usr/local/cuda.
  Install the CUDA toolkit 12.0 or newer (https://developer.nvidia.com/cuda-downloads; Debian, Ubuntu:
  apt-get install nvidia-cuda-toolkit; conda: conda install -c nvidia cuda-nvcc cuda-cudart-dev) and set
  CUDACXX to its nvcc. Or set FASTCNN_CUDA=off: GPUs are then served by the Triton backend."""


def fail(message: str) -> SystemExit:
    return SystemExit(f"fastcnn: {message}")


# --- what the environment asks for ---


@dataclass(frozen=True)
class Options:
    native: bool
    cuda: str
    archs: tuple[str, ...]
    sanitize: str
    emulate_amx: bool


def read_choice(name: str, default: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name) or default
    if value not in choices:
        raise fail(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
    return value


def read_archs() -> tuple[str, ...]:
    value = os.environ.get("FASTCNN_CUDA_ARCHS") or DEFAULT_ARCHS
    archs = tuple(part.removeprefix("sm_") for part in re.split(r"[;,\s]+", value) if part)
    wrong = [arch for arch in archs if not re.fullmatch(r"[1-9]\d{1,2}[af]?", arch)]
    if wrong or not archs:
        raise fail(
            f"FASTCNN_CUDA_ARCHS: got {value!r}, expected compute capabilities such as {DEFAULT_ARCHS!r} "
            f"(the default) or 'sm_86'"
        )
    return archs


def read_options() -> Options:
    return Options(
        native=read_choice("FASTCNN_NATIVE", "on", ("on", "off")) == "on",
        cuda=read_choice("FASTCNN_CUDA", "auto", ("auto", "on", "off")),
        archs=read_archs(),
        sanitize=os.environ.get("FASTCNN_SANITIZE", ""),
        emulate_amx=read_choice("FASTCNN_EMULATE_AMX", "off", ("on", "off")) == "on",
    )


# --- the tools ---


def find_cxx() -> str:
    """The C++ compiler's path, from CXX or under its usual names."""
    named = shlex.split(os.environ.get("CXX", ""))
    tried = named[:1] or ["c++", "g++", "clang++"]
    for name in tried:
        if path := shutil.which(name):
            return path
    raise fail(NO_COMPILER.format(tried=f"CXX={tried[0]}" if named else ", ".join(tried)))


def find_tool(name: str) -> str:
    """The path of cmake or ninja: the Python package's own program, or the one on PATH."""
    try:
        module = importlib.import_module(name)
        bin_dir = getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR
        if path := shutil.which(name, path=bin_dir):
            return path
    except (ImportError, AttributeError):
        pass
    if path := shutil.which(name):
        return path
    raise fail(f"{name} is missing; {TOOLS_HINT}.")


def find_pybind11() -> str:
    try:
        return importlib.import_module("pybind11").get_cmake_dir()
    except ImportError:
        raise fail(f"pybind11 is missing; {TOOLS_HINT}.") from None


def find_nvcc() -> str | None:
    """nvcc's path: what CUDACXX names, else on PATH, else under CUDA_HOME, CUDA_PATH or /usr/local/cuda."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home, "bin")))


def nvcc_complaint(nvcc: str, archs: tuple[str, ...]) -> str | None:
    """Why this nvcc cannot compile for these architectures (its age, its host compiler), or None."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.(\d+)", version.stdout)
    if not release or tuple(map(int, release.groups())) < OLDEST_CUDA:
        found = release.group(0) if release else "of unknown version"
        return f"{nvcc} is {found}; fastcnn needs {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} or newer"
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.cu")
        source.write_text("#include <cuda_runtime.h>\n__global__ void probe() {}\n")
        command = [nvcc, *codes, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        result = subprocess.run(command, capture_output=True, text=True)
    return None if result.returncode == 0 else f"{nvcc} cannot compile: {result.stderr.strip()[-500:]}"


def choose_nvcc(options: Options, cache: dict[str, str]) -> str | None:
    """The nvcc to build with, or None. What CMake's cache holds has passed the probe before."""
    if options.cuda == "off":
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if options.cuda == "on":
            raise fail(NO_NVCC)
        print("fastcnn: no nvcc was found: building without CUDA", file=sys.stderr)
        return None
    passed = {"CMAKE_CUDA_COMPILER": nvcc, "FASTCNN_CUDA_ARCHS": ";".join(options.archs)}
    complaint = None if passed.items() <= cache.items() else nvcc_complaint(nvcc, options.archs)
    if complaint and options.cuda == "on":
        raise fail(f"FASTCNN_CUDA=on, but {complaint}")
    if complaint:
        print(f"fastcnn: building without CUDA: {complaint}", file=sys.stderr)
    return None if complaint else nvcc


# --- the build ---


def build_folder(options: Options) -> Path:
    """One per Python and variant, kept between builds so that they are incremental (pip's is temporary)."""
    tag = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
    variants = ("emulated-amx" if options.emulate_amx else "", options.sanitize.replace(",", "-"))
    return ROOT / "build" / "-".join(filter(None, (tag, *variants)))


def read_cache(folder: Path) -> dict[str, str]:
    cache = folder / "CMakeCache.txt"
    lines = cache.read_text().splitlines() if cache.exists() else []
    return dict(re.findall(r"^(\w+):\w+=(.*)$", "\n".join(lines), re.MULTILINE))


def open_build_folder(folder: Path, cxx: str) -> dict[str, str]:
    """Makes the folder and returns CMake's cache, emptied first if another compiler's or another tree's."""
    cache = read_cache(folder)
    wanted = {"CMAKE_CXX_COMPILER": cxx, "CMAKE_HOME_DIRECTORY": str(ROOT)}
    if any(cache.get(key, value) != value for key, value in wanted.items()):
        (folder / "CMakeCache.txt").unlink()
        shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)
        cache = {}
    folder.mkdir(parents=True, exist_ok=True)
    return cache


def configure_command(folder: Path, options: Options, cxx: str, nvcc: str | None) -> list[str]:
    defines = {
        "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "CMAKE_CXX_COMPILER": cxx,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": find_pybind11(),
        "FASTCNN_SANITIZE": options.sanitize,
        "FASTCNN_EMULATE_AMX": "ON" if options.emulate_amx else "OFF",
        "FASTCNN_CUDA": "ON" if nvcc else "OFF",
    }
    if nvcc:
        defines |= {"CMAKE_CUDA_COMPILER": nvcc, "FASTCNN_CUDA_ARCHS": ";".join(options.archs)}
    flags = [f"-D{key}={value}" for key, value in defines.items()]
    extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    return [find_tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *flags, *extra]


def build_command(folder: Path) -> list[str]:
    command = [find_tool("cmake"), "--build", str(folder), "--target", "_C"]
    if "CMAKE_BUILD_PARALLEL_LEVEL" not in os.environ:
        command += ["--parallel", str(len(os.sched_getaffinity(0)))]
    return command


def build_native(options: Options) -> Path:
    """Builds the extension module and returns its path."""
    cxx = find_cxx()
    folder = build_folder(options)
    folder.parent.mkdir(exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one tree would write over each other
        cache = open_build_folder(folder, cxx)
        nvcc = choose_nvcc(options, cache)
        try:
            subprocess.run(configure_command(folder, options, cxx, nvcc), check=True)
            subprocess.run(build_command(folder), check=True)
        except subprocess.CalledProcessError as error:
            step = "compiling" if "--build" in error.cmd else "CMake's configuration"
            cpu_hint = "FASTCNN_CUDA=off builds the CPU kernels alone; " if nvcc else ""
            raise fail(f"{step} failed; its output is above. {cpu_hint}{PURE_HINT}.") from None
    return folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


class BuildNative(build_ext):
    """Has CMake build the module and puts it where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        module = build_native(OPTIONS)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that has the old module loaded keeps it
        shutil.copy2(module, target)


class BuildPython(build_py):
    """Without a native core, removes the module that an earlier build left in an editable tree."""

    def run(self) -> None:
        if not OPTIONS.native and self.editable_mode:
            for stale in (ROOT / "fastcnn").glob("_C.*.so"):
                stale.unlink()
        super().run()


OPTIONS = read_options()
setup(
    ext_modules=[Extension("fastcnn._C", sources=[])] if OPTIONS.native else [],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
