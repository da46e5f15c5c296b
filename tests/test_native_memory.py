"""The native library reads and writes no memory but what its interface names, and computes what plain loops do.

``native/odd_sizes.cpp`` is linked with the library's sources and run under AddressSanitizer and
UndefinedBehaviorSanitizer, then with buffers that end before pages that trap, then under valgrind.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_nmsparse.kernels.library import UNITS

KERNELS = Path(__file__).parents[1] / "hf_nmsparse" / "kernels"
DRIVER = Path(__file__).parent / "native" / "odd_sizes.cpp"
X86 = platform.machine().lower() in ("x86_64", "amd64")
COMPILER, VALGRIND = shutil.which("g++"), shutil.which("valgrind")
SANITIZERS = [
    "-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero",
    "-fno-sanitize-recover=all",
]
# An abort lets the driver name the case.
STOP = {"ASAN_OPTIONS": "abort_on_error=1", "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1"}
SECONDS = 600  # for a process, on a busy machine

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="the driver needs mmap"),
    pytest.mark.skipif(COMPILER is None, reason="g++ is not installed"),
]


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=SECONDS, env=os.environ | STOP, cwd=KERNELS
    )


def compile_(*arguments: str | Path) -> None:
    assert COMPILER is not None
    result = run([COMPILER, *arguments])
    assert result.returncode == 0, result.stderr


def sources() -> dict[str, list[str]]:
    """The sources of the library on this machine and the flags of each, as CMake has them but for warnings."""
    text = (KERNELS / "CMakeLists.txt").read_text()
    for name, value in re.findall(r"set\((\w+)\s([^)]*)\)", text):
        text = text.replace(f"${{{name}}}", value)
    match = re.search(r"target_compile_options\(nmsparse PRIVATE ([^)]*)\)", text)
    assert match is not None
    flags = re.findall(r"-f[\w=-]+", match[1])
    used = text if X86 else text.split("if(CMAKE_SYSTEM_PROCESSOR", maxsplit=1)[0]
    files = dict.fromkeys(sorted(re.findall(r"csrc/([\w/]+\.cpp)", used)), flags)
    for name, value in re.findall(r"set_source_files_properties\(csrc/(\w+\.cpp)([^)]*)\)", used):
        files[name] = flags + re.findall(r"(?<!\w)-m\w+", value)
    vector_units = {name for name in files if name.startswith("unit_avx")}
    assert all(("-mavx2" in files[name]) or ("-mavx512f" in files[name]) for name in vector_units), files
    return files


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver and the library in one program."""
    return build(tmp_path_factory.mktemp("plain"), "-O3")


def build(folder: Path, *options: str) -> Path:
    """Makes the program with these options of the compiler."""
    common = ["-g1", "-std=c++17", *options]
    files = sources()
    files[DRIVER.name] = files["nmsparse.cpp"]
    jobs: list[tuple[str | Path, ...]] = []
    # The scalar unit first, whose file takes longest: at -O3 half a minute more than at -O1.
    for name in sorted(files, reverse=True):
        source = DRIVER if name == DRIVER.name else KERNELS / "csrc" / name
        special = {"unit_scalar.cpp": ["-O1"], "runtime.cpp": ["-Dscratch=library_scratch"]}.get(name, [])
        jobs.append((*files[name], *common, *special, "-c", source, "-o", folder / f"{source.stem}.o"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda arguments: compile_(*arguments), jobs))
    compile_(*common, *sorted(folder.glob("*.o")), "-pthread", "-o", folder / "program")
    return folder / "program"


def check(command: Sequence[str | Path], units: Sequence[str]) -> None:
    """Runs the command once for each unit; units that this machine lacks say so."""
    known = [unit for unit in units[::-1] if X86 or unit == "scalar"]  # the scalar unit first, which takes longest
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda unit: run([*command, unit]), known))
    for unit, result in zip(known, results, strict=True):
        assert result.returncode == 0, f"{unit}: {result.stdout}{result.stderr}"
        assert result.stderr == "", unit
        assert re.fullmatch(rf"{unit}: (\d+ products are right|not on this machine)\n", result.stdout)
        assert unit != "scalar" or "right" in result.stdout


@pytest.mark.long
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    assert COMPILER is not None
    if run([COMPILER, *SANITIZERS, tmp_path / "empty.cpp", "-o", tmp_path / "empty"]).returncode:
        pytest.skip("g++ has no AddressSanitizer or UndefinedBehaviorSanitizer here")
    check([build(tmp_path, "-O1", *SANITIZERS)], UNITS)


def test_nothing_behind_a_buffer_is_touched(plain: Path) -> None:
    check([plain, "--guard"], UNITS)


@pytest.mark.long
@pytest.mark.skipif(VALGRIND is None, reason="valgrind is not installed")
def test_valgrind_finds_nothing(plain: Path) -> None:
    assert VALGRIND is not None
    valgrind = [VALGRIND, "-q", "--error-exitcode=9", "--leak-check=full"]
    check([*valgrind, plain, "--thin"], ["avx2", "scalar"])  # valgrind 3.19 has no AVX-512
