"""A training that has the machine for itself takes all of its cores, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from recipes.threads import take_all_cores

ROOT = Path(__file__).parents[1]
CORES = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
Launcher = Callable[..., None]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    """Starts a process with these words and settings, from which this one seems to come, as accelerate starts it."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str, **environment: str) -> None:
        command = [sys.executable, "-S", "-c", "input()", "launch", *words]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, env={"PATH": "", **environment}))
        monkeypatch.setattr(os, "getppid", lambda: started[0].pid)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setenv("OMP_NUM_THREADS", environment.get("OMP_NUM_THREADS", "1"))

    before = torch.get_num_threads()
    yield start
    torch.set_num_threads(before)
    for process in started:
        process.communicate(b"\n")


def test_all_cores_where_nobody_chose(launcher: Launcher) -> None:
    launcher("recipe.py", "--learning_rate", "1")
    assert take_all_cores() == torch.get_num_threads() == CORES
    assert os.environ["OMP_NUM_THREADS"] == str(CORES)


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        ((), {"OMP_NUM_THREADS": "1"}),
        ((), {"OMP_NUM_THREADS": "7"}),
        ((), {"MKL_NUM_THREADS": "1"}),
        (("--num_cpu_threads_per_process", "1"), {}),
        (("--num-cpu-threads-per-process=1",), {}),
    ],
)
def test_what_the_user_chose_stays(launcher: Launcher, words: tuple[str, ...], environment: dict[str, str]) -> None:
    launcher(*words, "recipe.py", **environment)
    before = torch.get_num_threads()
    assert take_all_cores() is None
    assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (before, environment.get("OMP_NUM_THREADS", "1"))


def test_without_the_launcher_it_is_as_it_is(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher("recipe.py")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert take_all_cores() is None


def test_a_launcher_that_is_gone_or_closed(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: psutil.Process) -> dict[str, str]:
        raise psutil.AccessDenied(process.pid)

    launcher("recipe.py")
    monkeypatch.setattr(psutil.Process, "environ", refuse)
    assert take_all_cores() is None


def test_accelerates_launcher(tmp_path: Path) -> None:
    """It chooses one thread, which this undoes."""
    script = tmp_path / "script.py"
    script.write_text("import torch\nfrom recipes.threads import take_all_cores\n")
    with script.open("a") as file:
        file.write("print(torch.get_num_threads(), take_all_cores(), torch.get_num_threads())\n")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    config = ROOT / "recipes" / "accelerate" / "one_process.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1", str(CORES), str(CORES)]
