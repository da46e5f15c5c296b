"""What the archive and the wheels hold, and that an installed package finds its own library, or does without one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import hf_nmsparse
import hf_nmsparse.kernels
from hf_nmsparse.kernels import __main__ as doctor
from hf_nmsparse.kernels import library

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_nmsparse"
LIBRARY = {"darwin": "libnmsparse.dylib", "win32": "nmsparse.dll"}.get(sys.platform, "libnmsparse.so")
NAME = f"hf_nmsparse-{hf_nmsparse.__version__}"
# The tests ask what lies where, not how fast it is, and optimising takes a minute of one core.
QUICKLY = "--config-settings=cmake.build-type=Debug"
FRESH = """
import json, runpy
import torch
import hf_nmsparse
from hf_nmsparse import cards
from hf_nmsparse.kernels import library
from hf_nmsparse.masks import magnitude_mask
from hf_nmsparse.pattern import NMPattern

mask = magnitude_mask(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), NMPattern(2, 4))
found = library.status().library
print(json.dumps([hf_nmsparse.__file__, found and str(found), cards._template(), mask.tolist()]))
runpy.run_module("hf_nmsparse.kernels", run_name="__main__", alter_sys=True)
"""


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the checkout, without the variables that steer the library."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_NMSPARSE")}
    return subprocess.run(
        command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=300, check=False
    )


def wheel_of(source: Path, folder: Path, *options: str, **environment: str) -> Path:
    """Builds a wheel with the backend of this environment: nothing is fetched."""
    pip = (sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-index")
    done = run(*pip, "--wheel-dir", folder, *options, source, **environment)
    print(done.stdout, done.stderr)  # pytest shows it if a test fails: a failed compilation is only here
    assert done.returncode == 0
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    build = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    done = run(sys.executable, "-c", build, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "WARNING" not in done.stdout
    return folder / f"{NAME}.tar.gz"


@pytest.fixture(scope="module")
def native_wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the archive, which so proves to be complete."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    return wheel_of(archive, tmp_path_factory.mktemp("native"), QUICKLY)


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with a compiler that is not there."""
    folder = tmp_path_factory.mktemp("pure")
    return wheel_of(ROOT, folder, CXX=str(folder / "no-compiler"))


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if not name.startswith(f"{NAME}.dist-info/")}


def python_part() -> set[str]:
    """What every wheel holds."""
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    others = ("py.typed", "card_template.md", "report_page.css", "serve/page.html")
    return modules | {f"hf_nmsparse/{name}" for name in others}


class Installed(NamedTuple):
    package: Path
    library: Path | None
    template: str
    mask: list[int]
    doctor: list[str]
    exit_code: int


def install(wheel: Path, folder: Path) -> Installed:
    """Installs into an empty folder and asks a fresh process, which takes all but this package from our environment."""
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder)
    done = run(*pip, wheel)
    assert done.returncode == 0, done.stderr
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # -S runs no .pth file, so that an editable installation in our environment does not come in between.
    path = os.pathsep.join([str(folder), *packages])
    done = run(sys.executable, "-S", "-c", f"import os; os.chdir({str(folder.parent)!r})\n{FRESH}", PYTHONPATH=path)
    assert done.stderr == ""
    facts, *lines = done.stdout.splitlines()
    package, library, template, mask = json.loads(facts)
    return Installed(Path(package), library and Path(library), template, mask, lines, done.returncode)


def test_archive_holds_what_a_build_and_the_tests_need(archive: Path) -> None:
    with tarfile.open(archive) as file:
        names = {name.removeprefix(f"{NAME}/") for name in file.getnames()}
    assert {name.partition("/")[0] for name in names} == {
        *("hf_nmsparse", "recipes", "tests", "model_cards", "benchmarks"),
        *("pyproject.toml", "Makefile", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO"),
    }
    sources = {path.relative_to(ROOT).as_posix() for path in (PACKAGE / "kernels" / "csrc").rglob("*.*")}
    assert sources | {"hf_nmsparse/kernels/CMakeLists.txt", "tests/constraints.txt", "model_cards/template.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_with_the_library(native_wheel: Path) -> None:
    assert re.fullmatch(re.escape(NAME) + r"-py3-none-(?!any)\w+\.whl", native_wheel.name)
    assert files_in(native_wheel) == python_part() | {f"hf_nmsparse/kernels/{LIBRARY}"}


def test_wheel_without_a_compiler(pure_wheel: Path) -> None:
    assert pure_wheel.name == f"{NAME}-py3-none-any.whl"
    assert files_in(pure_wheel) == python_part()


def test_installed_package_uses_its_library(native_wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "installed"
    installed = install(native_wheel, folder)
    assert installed.package == folder / "hf_nmsparse" / "__init__.py"
    assert installed.library == folder / "hf_nmsparse" / "kernels" / LIBRARY
    assert installed.template == (ROOT / "model_cards" / "template.md").read_text(encoding="utf-8")
    assert installed.mask == [0b0110]
    assert installed.doctor[0] == f"native library  {installed.library}"
    assert installed.exit_code == 0


def test_package_without_library_works(pure_wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "installed"
    installed = install(pure_wheel, folder)
    assert installed.package == folder / "hf_nmsparse" / "__init__.py"
    assert installed.library is None
    assert installed.template == (ROOT / "model_cards" / "template.md").read_text(encoding="utf-8")
    assert installed.mask == [0b0110]
    assert installed.doctor[:2] == [
        "native library  not used",
        f"reason          {LIBRARY} is not installed: no C++ compiler was found at installation",
    ]
    assert installed.exit_code == 1


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has not looked for the library yet; what it finds then holds for one test."""
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)
    monkeypatch.delenv("HF_NMSPARSE_UNIT", raising=False)
    return monkeypatch


def told(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    code = doctor.main()
    return code, dict(re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_doctor_on_a_library_that_is_turned_off(
    unloaded: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unloaded.setenv("HF_NMSPARSE_NATIVE", "0")
    code, facts = told(capsys)
    assert code == 1
    assert list(facts) == ["native library", "reason", "vector unit", "engine", "threads", "torch", "CPU"]
    assert facts["engine"] == "the native library is not used: HF_NMSPARSE_NATIVE=0 turns it off"
    assert facts["native library"] == "not used"
    assert facts["reason"] == "HF_NMSPARSE_NATIVE=0 turns it off"


def test_doctor_on_a_library_that_does_not_load(
    unloaded: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / LIBRARY).write_bytes(b"no library")
    unloaded.delenv("HF_NMSPARSE_NATIVE", raising=False)
    unloaded.setattr(hf_nmsparse.kernels, "__path__", [str(tmp_path)])
    code, facts = told(capsys)
    assert code == 1
    assert facts["native library"] == "not used"
    assert facts["reason"].startswith(f"{tmp_path / LIBRARY} does not load: ")


def test_doctor_on_an_unknown_unit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> library.Status:
        raise ValueError("HF_NMSPARSE_UNIT: 'mmx' is none of avx512, avx2, scalar")

    monkeypatch.setattr(doctor, "status", refuse)
    code, facts = told(capsys)
    assert code == 1
    assert facts["reason"] == "HF_NMSPARSE_UNIT: 'mmx' is none of avx512, avx2, scalar"


@pytest.mark.parametrize(
    ("torch", "variables", "threads"),
    [
        ("2.13.0+cpu", {}, r"torch's own, up to \d+"),
        ("2.10.0", {"OMP_NUM_THREADS": "3"}, "torch's own, OMP_NUM_THREADS=3"),
        ("2.9.1", {}, r"1, as torch lends its threads from 2\.10 on"),
        ("not installed", {}, r"1, as torch lends its threads from 2\.10 on"),
    ],
)
def test_doctor_on_a_library_that_is_used(
    torch: str,
    variables: dict[str, str],
    threads: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    used = library.Status(Path("/lib/libnmsparse.so"), "avx2", "the fastest unit of this machine")
    monkeypatch.setattr(doctor, "status", lambda: used)
    monkeypatch.setattr(doctor, "_torch_version", lambda: torch)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, facts = told(capsys)
    assert code == 0
    assert facts["native library"] == str(used.library)
    assert facts["vector unit"] == "avx2"
    assert re.fullmatch(threads, facts["threads"])
    assert facts["torch"] == torch
    assert facts["CPU"]
