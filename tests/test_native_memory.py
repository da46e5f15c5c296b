"""The native library reads and writes no memory but what its interface names, and computes what plain loops do.

The drivers in ``native`` are linked with the library's sources and run with buffers that end before pages that trap,
then under AddressSanitizer and UndefinedBehaviorSanitizer, ThreadSanitizer and valgrind. ``odd_sizes`` is for products
and masks, ``translations`` for what the engine computes, ``hostile_calls`` for what it refuses. Where
there is a cross compiler, qemu runs them for AArch64 too.
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
DRIVERS = Path(__file__).parent / "native"
COMPILER, VALGRIND = shutil.which("g++"), shutil.which("valgrind")
CROSS_COMPILER, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
SANITIZERS = [
    "-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero",
    "-fno-sanitize-recover=all",
]
# An abort lets the driver name the case.
STOP = {"ASAN_OPTIONS": "abort_on_error=1", "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1"}
SECONDS = 600  # for a process, on a busy machine

# What a driver says at its end.
PRODUCTS = r"\d+ products are right, bits [0-9a-f]{16}"
MODELS = r"translations of \d+ models are right"
CALLS = r"\d+ calls with \d+ mutations end well"

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="the driver needs mmap"),
    pytest.mark.skipif(COMPILER is None, reason="g++ is not installed"),
]


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=SECONDS, env=os.environ | STOP, cwd=KERNELS
    )


def compile_(compiler: str | None, *arguments: str | Path) -> None:
    assert compiler is not None
    result = run([compiler, *arguments])
    assert result.returncode == 0, result.stderr


def sources(machine: str) -> dict[str, list[str]]:
    """The sources of the library on a kind of machine and the flags of each, as CMake has them but for warnings."""
    text = (KERNELS / "CMakeLists.txt").read_text()
    for name, value in re.findall(r"set\((\w+)\s([^)]*)\)", text):
        text = text.replace(f"${{{name}}}", value)
    match = re.search(r"target_compile_options\(nmsparse PRIVATE ([^)]*)\)", text)
    assert match is not None
    flags = re.findall(r"-f[\w=-]+", match[1])
    used, *choices = re.split(r'if\(CMAKE_SYSTEM_PROCESSOR MATCHES "([^"]+)"\)', text)
    for pattern, choice in zip(choices[::2], choices[1::2], strict=True):
        used += choice if re.search(pattern, machine) else ""
    files = dict.fromkeys(sorted(re.findall(r"csrc/([\w/]+\.cpp)", used)), flags)
    for name, value in re.findall(r"set_source_files_properties\(csrc/(\w+\.cpp)([^)]*)\)", used):
        files[name] = flags + re.findall(r"(?<!\w)-[mf][\w=.+-]+", value)
    for_all = {name for name in files if name.startswith("unit_") and not any(f.startswith("-m") for f in files[name])}
    assert for_all <= {"unit_scalar.cpp", "unit_neon.cpp"}, files
    return files


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the drivers, each with the library in one program: the vector units optimised as shipped."""
    return build(tmp_path_factory.mktemp("plain"), "-O1", units="-O3")


def build(
    folder: Path,
    *options: str,
    units: str | None = None,
    scalar: str = "-O1",
    compiler: str | None = COMPILER,
    machine: str = platform.machine(),
) -> Path:
    """Makes a program of each driver with these options of the compiler, which compiles for this kind of machine.

    ``units`` is an option for the vector units, ``scalar`` one for the scalar unit, whose file takes half a minute
    more at -O3 than at -O1.
    """
    common: list[str | Path] = ["-g1", "-std=c++17", "-I", KERNELS / "csrc", *options]
    files = sources(machine)
    drivers = sorted(DRIVERS.glob("*.cpp"))
    paths = {name: KERNELS / "csrc" / name for name in files} | {path.name: path for path in drivers}
    jobs: list[tuple[str | Path, ...]] = []
    for name, path in sorted(paths.items(), reverse=True):  # the units first, whose files take longest
        flags = files.get(name, files["nmsparse.cpp"])
        unit = scalar if name == "unit_scalar.cpp" else units
        special = [unit] if unit is not None and name.startswith("unit_") else []
        jobs.append((*flags, *common, *special, "-c", path, "-o", folder / f"{path.stem}.o"))
    # The driver of products brings scratch memory of its own.
    own = folder / "own_scratch"
    renamed = (*files["runtime.cpp"], *common, "-Dscratch=library_scratch", "-c", paths["runtime.cpp"], "-o", own)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda arguments: compile_(compiler, *arguments), [*jobs, renamed]))
    objects = {path.stem: path for path in folder.glob("*.o")}
    library = [path for stem, path in objects.items() if stem not in {driver.stem for driver in drivers}]
    for driver in drivers:
        parts = [own if driver.stem == "odd_sizes" and path.stem == "runtime" else path for path in library]
        compile_(compiler, *common, objects[driver.stem], *parts, "-pthread", "-o", folder / driver.stem)
    return folder


def check(command: Sequence[str | Path], units: Sequence[str], says: str) -> list[str]:
    """Runs the command once for each unit; units that this machine lacks say so. Returns those that it has."""
    ordered = units[::-1]  # the scalar unit first, which takes longest
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda unit: run([*command, unit]), ordered))
    for unit, result in zip(ordered, results, strict=True):
        assert result.returncode == 0, f"{unit}: {result.stdout}{result.stderr}"
        assert result.stderr == "", unit
        expected = says if unit == "scalar" else f"({says}|not on this machine)"
        assert re.fullmatch(rf"{unit}: {expected}\n", result.stdout)
    return [unit for unit, result in zip(ordered, results, strict=True) if "not on this machine" not in result.stdout]


def sanitized(folder: Path, *options: str) -> Path:
    """The folder of the drivers with these sanitizers."""
    (folder / "empty.cc").write_text("int main() {}\n")
    assert COMPILER is not None
    if run([COMPILER, *options, folder / "empty.cc", "-o", folder / "empty"]).returncode:
        pytest.skip(f"g++ has no {' '.join(options)} here")
    return build(folder, "-O1", *options)


@pytest.mark.long
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    folder = sanitized(tmp_path, *SANITIZERS)
    check([folder / "odd_sizes"], UNITS, PRODUCTS)
    check([folder / "translations", "12"], UNITS, MODELS)
    check([folder / "hostile_calls", "10000"], UNITS, CALLS)


@pytest.mark.long
def test_callers_share_no_memory_without_order(tmp_path: Path) -> None:
    check([sanitized(tmp_path, "-fsanitize=thread") / "translations", "3"], UNITS, MODELS)


def test_nothing_behind_a_buffer_is_touched(plain: Path) -> None:
    check([plain / "odd_sizes", "--guard"], UNITS, PRODUCTS)


def test_translations_are_right(plain: Path) -> None:
    check([plain / "translations", "--guard", "24"], [unit for unit in UNITS if unit != "scalar"], MODELS)
    check([plain / "translations", "--guard", "3"], ["scalar"], MODELS)  # 30 times as slow


def test_hostile_calls_end_well(plain: Path) -> None:
    check([plain / "hostile_calls", "--guard", "300"], UNITS, CALLS)


@pytest.mark.long
def test_what_is_shipped_touches_nothing_behind_a_buffer(tmp_path: Path) -> None:
    """All of it at -O3, as CMake builds it, where the engine and the scalar unit above are at -O1."""
    shipped = build(tmp_path, "-O3", scalar="-O3")
    check([shipped / "odd_sizes", "--guard"], UNITS, PRODUCTS)
    check([shipped / "translations", "--guard", "24"], UNITS, MODELS)
    check([shipped / "hostile_calls", "--guard", "300"], UNITS, CALLS)


@pytest.mark.long
@pytest.mark.skipif(VALGRIND is None, reason="valgrind is not installed")
def test_valgrind_finds_nothing(plain: Path) -> None:
    assert VALGRIND is not None
    valgrind = [VALGRIND, "-q", "--error-exitcode=9", "--leak-check=full"]
    units = ["avx2", "scalar"]  # valgrind 3.19 has no AVX-512
    check([*valgrind, plain / "odd_sizes", "--thin"], units, PRODUCTS)
    check([*valgrind, plain / "hostile_calls", "100"], units, CALLS)
    check([*valgrind, plain / "translations", "3"], ["avx2"], MODELS)  # a minute a model


# ---- the units of AArch64 on a machine of another kind ----

SYSROOT = Path("/usr/aarch64-linux-gnu")  # where Debian's cross compiler has the libraries of its programs
# What qemu plays, and the units that such a machine has; an instruction beyond it ends the program.
EMULATED = {"cortex-a72": ["scalar", "neon"], "neoverse-n1": ["scalar", "neon", "neon_dotprod"]}

emulates = pytest.mark.skipif(
    CROSS_COMPILER is None or QEMU is None or not SYSROOT.is_dir(),
    reason="aarch64-linux-gnu-g++ or qemu-aarch64 is not installed",
)


def emulator(cpu: str) -> list[str | Path]:
    assert QEMU is not None
    return [QEMU, "-cpu", cpu, "-L", SYSROOT]


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the drivers, as programs of AArch64."""
    return build(tmp_path_factory.mktemp("crossed"), "-O3", compiler=CROSS_COMPILER, machine="aarch64")


@pytest.mark.long
@emulates
@pytest.mark.parametrize("cpu", EMULATED)
def test_the_units_of_aarch64(cpu: str, crossed: Path) -> None:
    here = emulator(cpu)
    assert check([*here, crossed / "odd_sizes", "--guard"], UNITS, PRODUCTS) == EMULATED[cpu]
    check([*here, crossed / "translations", "--guard", "6"], ["neon_dotprod", "neon"], MODELS)
    check([*here, crossed / "translations", "--guard", "1"], ["scalar"], MODELS)
    check([*here, crossed / "hostile_calls", "--guard", "1000"], UNITS, CALLS)


@pytest.mark.long
@emulates
def test_the_units_of_aarch64_compute_the_same_bits(crossed: Path) -> None:
    ran = run([*emulator("neoverse-n1"), crossed / "odd_sizes", "--thin", "neon", "neon_dotprod"])
    assert ran.returncode == 0, ran.stdout
    without, with_dot_products = ran.stdout.splitlines()
    assert with_dot_products.replace("neon_dotprod", "neon") == without


@pytest.mark.long
@emulates
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cmake_builds_the_library_of_aarch64(tmp_path: Path) -> None:
    """Which picks the fastest unit of the machine that it runs on."""
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}"]
    steps: list[list[str | Path]] = [["-S", KERNELS, "-B", tmp_path, *target], ["--build", tmp_path, "--parallel", "2"]]
    for step in steps:
        built = run(["cmake", *step])
        assert built.returncode == 0, built.stdout + built.stderr
        assert "warning" not in built.stdout + built.stderr
    asks = tmp_path / "asks.cpp"
    asks.write_text(
        '#include <cstdio>\nextern "C" const char* nms_unit();\nint main() { std::puts(nms_unit()); }\n', "utf-8"
    )
    compile_(CROSS_COMPILER, asks, tmp_path / "libnmsparse.so", f"-Wl,-rpath,{tmp_path}", "-o", tmp_path / "asks")
    for cpu, units in EMULATED.items():
        assert run([*emulator(cpu), tmp_path / "asks"]).stdout == f"{units[-1]}\n"
