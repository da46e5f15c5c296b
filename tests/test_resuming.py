"""How a training ends, whatever ends it, and that the same command goes on from its last complete checkpoint."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_nmsparse.checkpoints import last_complete_checkpoint
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.preemption import Preempted
from hf_nmsparse.sparse_model import sparsify
from hf_nmsparse.trainer import SparseTrainer
from tests.processes import in_two
from tests.test_trainer import largest_difference, losses, train, weights
from tests.tiny import marian


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens_per_batch": 80},
        {"train_sampling_strategy": "random"},
        {"sparse_interval": 4, "sparse_ramp": 0.5, "sparse_dense_head": 0.3, "sparse_log_groups": True},
        {"sparse_method": "decaying-mask", "sparse_decay": None},
        {"sparse_method": "masked-decay"},
        {"sparse_method": "s-ste", "sparse_decay": None},
        {"sparse_method": "random", "sparse_decay": None},
        {"distill_from": "teacher"},
    ],
)
def test_resume_is_exact(tmp_path: Path, settings: dict[str, Any]) -> None:
    common = {
        "optim": "adamw_torch_fused",
        "learning_rate": 0.01,
        "max_steps": 12,  # more than an epoch
        "save_strategy": "steps",
        "save_steps": 5,
        "lr_scheduler_type": "inverse_sqrt",
        "warmup_steps": 3,
        **settings,
    }

    def model() -> Any:
        with_dropout = marian(dropout=0.1)
        sparsify(with_dropout, NMSparseConfig("2:4", soft=settings.get("sparse_method") == "s-ste"))
        return with_dropout

    if "distill_from" in settings:
        marian(seed=1).save_pretrained(tmp_path / "teacher")
        common["distill_from"] = str(tmp_path / "teacher")

    through = train(tmp_path / "through", model=model(), **common)
    first = train(tmp_path / "stopped", model=model(), **common)
    last = first.state.global_step
    for step in range(6, last + 1):  # what a kill after the checkpoint of step 5 leaves
        folder = tmp_path / "stopped" / f"checkpoint-{step}"
        if folder.is_dir():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    resumed = train(tmp_path / "stopped", resume=True, model=model(), **common)
    assert largest_difference(weights(through), weights(resumed)) == 0
    logs = [{k: v for k, v in e.items() if k != "train_seconds"} for e in through.state.log_history if "loss" in e]
    again = [{k: v for k, v in e.items() if k != "train_seconds"} for e in resumed.state.log_history if "loss" in e]
    assert logs == again
    seconds = [entry["train_seconds"] for entry in resumed.state.log_history if "loss" in entry]
    assert seconds == sorted(seconds)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    common: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 5}

    def model() -> Any:
        with_dropout = marian(dropout=0.1)
        sparsify(with_dropout, NMSparseConfig("2:4"))
        return with_dropout

    through = train(tmp_path / "through", model=model(), **common)
    handler = signal.getsignal(signal.SIGTERM)

    class Terminated(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:  # in the third step
                os.kill(os.getpid(), signal.SIGTERM)

    stopped = tmp_path / "stopped"
    with pytest.raises(Preempted, match=r"stopped by SIGTERM, saved at step 3; the same command goes on") as raised:
        train(stopped, model=model(), callbacks=[Terminated()], **common)
    assert raised.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert last_complete_checkpoint(stopped) == str(stopped / "checkpoint-3")
    resumed = train(stopped, resume=True, model=model(), **common)
    assert resumed.state.global_step == 6
    assert largest_difference(weights(through), weights(resumed)) == 0


def test_sigterm_in_the_last_step_ends_nothing(tmp_path: Path) -> None:
    class Terminated(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    assert train(tmp_path, max_steps=2, callbacks=[Terminated()]).state.global_step == 2


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(tmp_path: Path) -> None:
    class Spoiled(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                model.final_logits_bias.fill_(math.nan)

    last = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match=rf"training: the loss of step 4 is nan; the last checkpoint is {last}; lower"):
        train(tmp_path, callbacks=[Spoiled()], save_strategy="steps", save_steps=2)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are a matter of Unix")
@pytest.mark.parametrize("bytes_left", [1_000, 60_000, 300_000])
def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(tmp_path: Path, bytes_left: int) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))

    try:
        with pytest.raises(
            ValueError, match=r"checkpoint-4 could not be written: .*; the last checkpoint is .*-2; free"
        ):
            train(
                tmp_path,
                callbacks=[Full()],
                optim="adamw_torch_fused",
                save_strategy="steps",
                save_steps=2,
                max_steps=4,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()


def test_a_failure_after_the_writing_leaves_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**kwargs: Any) -> None:
        raise OSError("an old checkpoint is busy")

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", fail)
    with pytest.raises(OSError, match="an old checkpoint is busy"):
        train(tmp_path, save_strategy="steps", save_steps=2)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="holds no complete checkpoint to resume from"):
        train(tmp_path, resume=True)
    common: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    through = train(tmp_path, **common)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = train(tmp_path, resume=True, **common)
    assert largest_difference(weights(through), weights(resumed)) == 0
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_a_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    common: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 6, "pairs": 80}
    finished = train(tmp_path, **common)
    again = train(tmp_path, resume=True, **common)
    assert largest_difference(weights(finished), weights(again)) == 0
    assert again.state.global_step == 6
    assert losses(again) == losses(finished)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a matter of Unix")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # with threads, which Python 3.12 tells of
@pytest.mark.parametrize("settings", [{}, {"tokens_per_batch": 80}])
def test_a_killed_reader_of_the_data_is_one_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    class Killed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                [reader] = multiprocessing.active_children()
                assert reader.pid is not None
                os.kill(reader.pid, signal.SIGKILL)

    # Batches that were read ahead are still trained on, so that the end comes some steps later.
    common: dict[str, Any] = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2, "pairs": 400, **settings}
    last = rf"{tmp_path / 'stopped'}/checkpoint-[2468]"
    with pytest.raises(
        ValueError,
        match=rf"^training: after step \d a process that reads the data is gone \(DataLoader worker \(pid.*\); "
        rf"the last checkpoint is {last}; see what ended it, .*, and run again$",
    ):
        train(tmp_path / "stopped", callbacks=[Killed()], dataloader_num_workers=1, **common)
    resumed = train(tmp_path / "stopped", resume=True, dataloader_num_workers=1, **common)
    assert largest_difference(weights(train(tmp_path / "through", **common)), weights(resumed)) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals of timers are a matter of Unix")
def test_a_reader_may_reset_its_pipe_before_torch_hears_of_its_end(tmp_path: Path) -> None:
    class Reset(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise ConnectionResetError(104, "Connection reset by peer")

    def handler(*args: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(ConnectionResetError):  # of something else
            train(tmp_path / "else", callbacks=[Reset()])

        class ResetAndSignal(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                raise ConnectionResetError(104, "Connection reset by peer")

        with pytest.raises(ValueError, match=r"a process that reads the data is gone \(DataLoader worker \(pid 7\) is"):
            train(tmp_path / "reader", callbacks=[ResetAndSignal()])
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            torch.distributed.DistBackendError("NCCL error in: watchdog, remote process gone\nLast error: ..."),
            ValueError,
            r"^training: after step 1 another training process does not answer \(NCCL error in: watchdog, remote "
            r"process gone\); there is no checkpoint yet; see what ended it",
        ),
        (RuntimeError("not enough memory"), RuntimeError, "^not enough memory$"),
    ],
)
def test_an_error_between_processes_is_told_from_others(
    tmp_path: Path, error: RuntimeError, kind: type[Exception], message: str
) -> None:
    class Raised(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise error

    with pytest.raises(kind, match=message):
        train(tmp_path, callbacks=[Raised()])


def train_and_be_killed(moment: str, folder: Path) -> None:
    """What each of two processes does in the test below; the second kills itself at this moment."""
    save = SparseTrainer._save_optimizer_and_scheduler

    def kill(now: str, args: Any) -> None:
        if now == moment and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    class Killed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                kill("in a step", args)

    def killed_save(self: SparseTrainer, output_dir: str) -> None:
        save(self, output_dir)
        if self.state.global_step == 8:
            kill("in a checkpoint", self.args)  # before this process has written its share

    SparseTrainer._save_optimizer_and_scheduler = killed_save  # type: ignore[assignment, method-assign]

    def run(folder: Path) -> Any:
        model = marian(dropout=0.1)  # drawn apart by the two processes
        sparsify(model, NMSparseConfig("2:4"))
        settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 4}
        resume = last_complete_checkpoint(folder) is not None
        return weights(train(folder, resume, model, callbacks=[Killed()], pairs=96, **settings))

    found = run(folder)
    assert largest_difference(run(folder.with_name("undisturbed")), found) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a matter of Unix")
def test_a_killed_process_ends_the_other_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Two kills one after the other, the second while a checkpoint has one process's share alone."""
    folder = tmp_path / "run"
    for moment, after in (("in a step", 6), ("in a checkpoint", 8)):
        # Their limit of five minutes is what tells this from the thirty that gloo waits for a process that hangs.
        left, killed = in_two(train_and_be_killed, moment, folder)
        assert killed.returncode == -signal.SIGKILL
        assert left.returncode == 1
        line = f"training: after step {after} another training process does not answer (["
        assert line in left.stderr, left.stderr[-3000:]
        assert f"; the last checkpoint is {folder / 'checkpoint-4'}; see what ended it" in left.stderr
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    for done in in_two(train_and_be_killed, "never", folder):
        assert done.returncode == 0, done.stderr[-3000:]
