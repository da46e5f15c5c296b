"""Runs a grid of recipe runs, each in a folder of its own, and keeps their results.

    python recipes/study.py recipes/studies/multi30k_tiny.yaml [--jobs N] [--only NAME ...]

A study is one YAML file: the settings that all runs share, and for each run what is different. A run that is done is
skipped, a run that was stopped resumes from its last complete checkpoint, so the same command finishes a study that
was killed at any moment. Each run is `recipes/wmt_en_de.py` under accelerate, on one CPU thread each or, one after the
other, on the GPU in bf16. When it ends, its evaluation, curve and sentence statistics go to recipes/results/STUDY/RUN,
and the course of its layers if the study asks for it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from hf_nmsparse.settings import read_settings

HERE = Path(__file__).parent
POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Run:
    """One training of the grid.

    Attributes:
        name: Name of the settings and seed: ``sr-ste-s1``.
        settings: Keys and values of the recipe that differ from the base.
        after: The run whose model this one starts from.
        teacher: The run whose model this one learns from.
    """

    name: str
    settings: dict[str, Any]
    after: str | None = None
    teacher: str | None = None

    @property
    def needs(self) -> set[str]:
        """The runs whose models this one reads."""
        return {name for name in (self.after, self.teacher) if name is not None}


@dataclass(frozen=True)
class Study:
    """A study as its YAML file describes it.

    Attributes:
        name: Name of the file.
        base: The configuration that all runs share.
        settings: Keys and values that win over it, for all runs.
        seeds: Seeds of the runs that name none themselves.
        runs: For each name the settings that differ, with ``seeds``, ``after`` and ``teacher`` among them.
        layers: Names of runs, with their seed, that keep the course of their layers: it is larger than all else.
    """

    name: str
    base: Path
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1,)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    @classmethod
    def read(cls, file: Path) -> Study:
        """Reads a study.

        Raises:
            ValueError: The file breaks a rule.
        """
        if not file.is_file():
            raise ValueError(f"study: no such file {file}; see recipes/studies")
        record = read_settings(file)
        known = {"base", "settings", "seeds", "runs", "layers"}
        if set(record) - known or not {"base", "runs"} <= set(record):
            raise ValueError(f"study: {file} holds the keys {', '.join(sorted(known))}; base and runs are needed")
        if not isinstance(record["runs"], dict) or any(
            not isinstance(run, dict | None) for run in record["runs"].values()
        ):
            raise ValueError(f"study: {file}: runs holds a name for each run, and keys and values of the recipe below")
        runs = {name: run or {} for name, run in record["runs"].items()}
        for key, kind in (("base", str), ("settings", dict), ("seeds", list), ("layers", list)):
            if not isinstance(record.get(key), kind | None):
                raise ValueError(f"study: {file}: {key} cannot be {json.dumps(record[key])}")
        for settings in (record.get("settings") or {}, *runs.values()):
            for key, value in settings.items():
                if value is None:
                    raise ValueError(f"study: {file}: {key} has no value")
        base = file.parent / record["base"]
        if not base.is_file():
            raise ValueError(f"study: {file}: base {base} is missing")
        return cls(
            file.stem,
            base,
            record.get("settings") or {},
            _seeds(record.get("seeds") or ["1"]),
            runs,
            tuple(record.get("layers") or ()),
        )

    def grid(self) -> list[Run]:
        """All runs: the first seed of each before the second of any, otherwise in the order of the file.

        Raises:
            ValueError: A run names another that is not there.
        """
        runs: list[tuple[int, Run]] = []
        for name, given in self.runs.items():
            settings = dict(given)
            after, teacher = settings.pop("after", None), settings.pop("teacher", None)
            for other in (after, teacher):
                if other is not None and other not in self.runs:
                    raise ValueError(f"study: run {name!r} needs {other!r}, which is no run; see after and teacher")
            seeds = _seeds(settings.pop("seeds")) if "seeds" in settings else self.seeds
            for index, seed in enumerate(seeds):
                others = [None if other is None else f"{other}-s{seed}" for other in (after, teacher)]
                runs.append((index, Run(f"{name}-s{seed}", {**self.settings, **settings, "seed": seed}, *others)))
        names = {run.name for _, run in runs}
        for name in set(self.layers) - names:
            raise ValueError(f"study: layers names {name!r}, which is no run with its seed, such as {min(names)!r}")
        for _, run in runs:
            for other in run.needs - names:
                raise ValueError(f"study: run {run.name!r} needs {other!r}; give both the same seeds")
        return [run for _, run in sorted(runs, key=lambda entry: entry[0])]


def _seeds(given: Any) -> tuple[int, ...]:
    """The seeds of a list as a file has them."""
    if not isinstance(given, list) or not all(isinstance(seed, str) and seed.isdecimal() for seed in given):
        raise ValueError(f"study: seeds: a list of whole numbers, got {json.dumps(given)}")
    return tuple(map(int, given))


class Runner:
    """Runs what is missing of a study.

    Args:
        study: The study.
        outputs: Folder of the runs.
        results: Folder of the results.
        jobs: Runs at a time.
        extra: Keys and values of the recipe that win over the study's.
        lock: Open file of `only_one`, which the runs keep locked where the runner is killed and they are not.
    """

    def __init__(
        self, study: Study, outputs: Path, results: Path, jobs: int, extra: list[str], lock: IO[str] | None = None
    ) -> None:
        self.inherited = () if lock is None else (lock.fileno(),)
        self.study, self.outputs, self.results, self.jobs, self.extra = study, outputs, results, jobs, extra
        self.runs = {run.name: run for run in study.grid()}
        self.active: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self.failed: list[str] = []

    def is_done(self, name: str) -> bool:
        """Whether the results of a run are there; its evaluation is written last."""
        return (self.results / name / "evaluation.json").is_file()

    def model_of(self, name: str) -> Path | None:
        """The dense model that a run left, if it is still there."""
        folder = self.outputs / name / "dense"
        return folder if (self.outputs / name / "evaluation.json").is_file() and folder.is_dir() else None

    def pending(self, only: list[str]) -> list[Run]:
        """What is not done, and what another needs of a run whose model is gone; what has begun goes first."""
        wanted = [
            run for run in self.runs.values() if not only or run.name in only or run.name.rpartition("-s")[0] in only
        ]
        found: dict[str, Run] = {}
        for run in wanted:
            if self.is_done(run.name):
                continue
            for other in sorted(run.needs):
                if self.model_of(other) is None:
                    found.setdefault(other, self.runs[other])
            found.setdefault(run.name, run)
        return sorted(found.values(), key=lambda run: not (self.outputs / run.name).is_dir())

    def command(self, run: Run) -> list[str]:
        """The command line of a run."""
        gpu = torch.cuda.is_available()
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [str(HERE / "accelerate" / "one_process.yaml")]
        command += ["--mixed_precision", "bf16"] if gpu else []
        command += [str(HERE / "wmt_en_de.py"), str(self.study.base), "--output_dir", str(self.outputs / run.name)]
        settings = dict(run.settings)
        if run.after is not None:
            settings["model"] = str(self.model_of(run.after))
        if run.teacher is not None:
            settings["distill_from"] = str(self.model_of(run.teacher))
        for key, value in settings.items():
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            command += [f"--{key}", *map(str, values)]
        return command + self.extra

    def start(self, run: Run) -> None:
        """Starts a run in a process group of its own."""
        folder = self.outputs / run.name
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if not torch.cuda.is_available():
            environment["OMP_NUM_THREADS"] = "1"
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                self.command(run),
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
                pass_fds=self.inherited,
            )
        self.active[run.name] = process, time.monotonic()
        print(f"{run.name}: started, its output goes to {folder / 'log.txt'}", flush=True)

    def collect(self, name: str) -> None:
        """Copies what is kept of a run, the evaluation last; other runs go by their names there, not by their place."""
        folder = self.results / name
        folder.mkdir(parents=True, exist_ok=True)
        layers = ["layers.parquet"] if name in self.study.layers else []
        for file in [*layers, "curve.json", "sentences.json", "evaluation.json"]:
            source = self.outputs / name / file
            if source.is_file():
                beside = folder / f".{file}"
                if file == "evaluation.json":
                    text = source.read_text(encoding="utf-8")
                    for other in self.runs:
                        text = text.replace(json.dumps(str(self.outputs / other / "dense")), json.dumps(other))
                    beside.write_text(text, encoding="utf-8")
                else:
                    shutil.copyfile(source, beside)
                beside.replace(folder / file)

    def reap(self) -> None:
        """Takes the runs that have ended."""
        for name, (process, began) in list(self.active.items()):
            if process.poll() is None:
                continue
            del self.active[name]
            minutes = (time.monotonic() - began) / 60
            if process.returncode:
                self.failed.append(name)
                print(f"{name}: failed after {minutes:.0f} min, see {self.outputs / name / 'log.txt'}", flush=True)
                continue
            self.collect(name)
            record = json.loads((self.results / name / "evaluation.json").read_text(encoding="utf-8"))
            print(f"{name}: BLEU {record['bleu']:.2f}, chrF {record['chrf']:.2f}, {minutes:.0f} min", flush=True)

    def seconds_left(self, waiting: list[Run]) -> float | None:
        """An estimate of the time left, from the training times of the runs that are done; None without any."""
        times = []
        for file in self.results.glob("*/evaluation.json"):
            seconds = json.loads(file.read_text(encoding="utf-8")).get("train_seconds")
            times += [seconds] if seconds else []
        if not times:
            return None
        mean = sum(times) / len(times)
        running = sum(max(0.0, mean - (time.monotonic() - began)) for _, began in self.active.values())
        return (mean * len(waiting) + running) / self.jobs

    def run(self, only: list[str]) -> int:
        """Runs everything that is pending.

        Returns:
            0, or 1 if a run failed.
        """
        waiting = self.pending(only)
        print(f"{self.study.name}: {len(self.runs)} runs, {len(waiting)} to do, {self.jobs} at a time", flush=True)
        try:
            while waiting or self.active:
                self.reap()
                for run in list(waiting):
                    if len(self.active) == self.jobs:
                        break
                    if run.needs & set(self.failed):
                        waiting.remove(run)
                        self.failed.append(run.name)
                        print(f"{run.name}: left out, {', '.join(sorted(run.needs))} failed", flush=True)
                    elif all(self.model_of(other) is not None for other in run.needs):
                        waiting.remove(run)
                        self.start(run)
                        left = self.seconds_left(waiting)
                        if left is not None:
                            print(f"about {left / 3600:.1f} hours left", flush=True)
                time.sleep(POLL_SECONDS)
        finally:
            for process, _ in self.active.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait()
        return 1 if self.failed else 0


@contextmanager
def only_one(folder: Path) -> Iterator[IO[str]]:
    """Refuses a second runner on the same outputs, and one beside runs that a killed runner left.

    Raises:
        ValueError: Another process runs this study.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"study: another process runs the study in {folder}; wait for it or stop it") from error
        yield lock


def main(argv: list[str] | None = None) -> int:
    """Runs a study; keys of the recipe on the command line win over its file's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one for each core, one on a GPU)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these runs, with or without their seed")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of the runs (default: outputs)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    options, extra = parser.parse_known_args(argv)
    try:
        if options.jobs is not None and options.jobs < 1:
            raise ValueError(f"study: --jobs needs a number of at least 1, got {options.jobs}")
        study = Study.read(options.study)
        jobs = options.jobs or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
        names = {*study.runs, *(run.name for run in study.grid())}
        for name in options.only:
            if name not in names:
                raise ValueError(f"study: {name!r} is no run; the runs are {', '.join(study.runs)}")
        outputs, results = options.outputs / study.name, options.results / study.name
        with only_one(outputs) as lock:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            return Runner(study, outputs, results, jobs, extra, lock).run(options.only)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        print(f"study: {error}" if not str(error).startswith("study") else error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
