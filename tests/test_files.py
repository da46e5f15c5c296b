"""Files are there whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hf_nmsparse import NMSparseConfig, export_dense, save_packed, sparsify
from hf_nmsparse.files import check_writable, model_folder, named_path, naming, replaced
from hf_nmsparse.packed_files import check_folder
from tests.tiny import marian


class Killed(BaseException):
    """Instead of a signal: what comes after does not happen."""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_empty_name_is_no_path() -> None:
    assert named_path("a/b", "f: path") == named_path(Path("a/b"), "f: path") == Path("a/b")
    assert named_path(".", "f: path") == Path()
    with pytest.raises(ValueError, match=r"^f: path is empty; name a path, as \. for the current folder$"):
        named_path("", "f: path")


def test_a_full_disk_is_named() -> None:
    with (
        pytest.raises(OSError, match=r"out\.txt could not be written: No space left on device") as raised,
        naming("out.txt"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"No space left on device: 'other'$"), naming("out.txt"):
        raise OSError(errno.ENOSPC, "No space left on device", "other")
    with pytest.raises(BrokenPipeError, match=r"^\[Errno 32\] Broken pipe$"), naming("out.txt"):
        raise OSError(errno.EPIPE, "Broken pipe")


def test_a_file_is_replaced_in_one_move(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text("old")
    with replaced(file) as beside:
        beside.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert names(tmp_path) == {"record.json"}


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text("old")
    with suppress(Killed), replaced(file) as beside:
        beside.write_text("ne")
        raise Killed
    assert file.read_text() == "old"
    assert names(tmp_path) == {"record.json"}


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with replaced(tmp_path / "tokenizer") as beside:
        beside.mkdir()
        (beside / "a").write_text("1")
        assert not (tmp_path / "tokenizer").exists()
    assert names(tmp_path / "tokenizer") == {"a"}
    with suppress(Killed), replaced(tmp_path / "other") as beside:
        beside.mkdir()
        raise Killed
    assert names(tmp_path) == {"tokenizer"}


def test_a_model_takes_the_place_of_another(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "README.md"):
        (tmp_path / name).write_text("old")
    with model_folder(tmp_path) as folder:
        (folder / "config.json").write_text("new")
        (folder / "model-00001-of-00001.safetensors").write_text("new")
        assert (tmp_path / "config.json").read_text() == "old"
    assert names(tmp_path) == {"config.json", "model-00001-of-00001.safetensors", "README.md"}
    assert (tmp_path / "config.json").read_text() == "new"
    assert (tmp_path / "README.md").read_text() == "old"


def test_a_failed_save_leaves_the_old_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("old")
    with suppress(Killed), model_folder(tmp_path) as folder:
        (folder / "config.json").write_text("new")
        raise Killed
    assert names(tmp_path) == {"config.json"}
    assert (tmp_path / "config.json").read_text() == "old"


def test_a_process_that_writes_nothing_leaves_everything(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("old")
    with model_folder(tmp_path):
        pass
    assert names(tmp_path) == {"config.json"}


def test_killed_at_any_move_no_mixture_has_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 0

    def counted(act: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return act(*args, **kwargs)

        return counting

    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    found = []
    for moves in range(7):  # the configuration and two old files go, three new ones come
        folder = tmp_path / str(moves)
        folder.mkdir()
        for name in ("config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"):
            (folder / name).write_text("old")
        left = moves
        with suppress(Killed), model_folder(folder) as beside:
            for name in ("config.json", "generation_config.json", "model.safetensors"):
                (beside / name).write_text("new")
        texts = {file.read_text() for file in folder.iterdir()}
        found.append("/".join(sorted(texts)) if (folder / "config.json").exists() else "none")
    assert found == ["old", *["none"] * 5, "new"]


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".nmsparse-saving-1"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    with model_folder(tmp_path) as folder:
        (folder / "config.json").write_text("new")
    assert names(tmp_path) == {"config.json"}


MINE = (
    "model_backup.safetensors",
    "model-ema.safetensors",
    "model.fp16.safetensors",
    "model-1-of-2.safetensors",
    "my-model.safetensors",
    "model.safetensors.bak",
    ".saving-notes",
    "adapter_model.safetensors",
    "pytorch_model.bin",
)
THEIRS = ("model.safetensors", "model-00001-of-00012.safetensors", "model.safetensors.index.json")


def test_only_weights_under_their_exact_names_are_replaced(tmp_path: Path) -> None:
    for name in (*MINE, *THEIRS):
        (tmp_path / name).write_text("old")
    with model_folder(tmp_path) as folder:
        (folder / "config.json").write_text("new")
    assert names(tmp_path) == {*MINE, "config.json"}


def test_save_packed_and_export_dense_leave_the_users_own_weights(tmp_path: Path) -> None:
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    for name in MINE:
        (tmp_path / name).write_text("mine")
    for save in (save_packed, export_dense):
        save(model, tmp_path, max_shard_size="50KB")
        save(model, tmp_path)
        assert {name for name in names(tmp_path) if (tmp_path / name).read_bytes() == b"mine"} == set(MINE)
        assert names(tmp_path) == {*MINE, "config.json", "generation_config.json", "model.safetensors"}


def test_processes_that_save_into_one_folder_at_a_time_leave_one_whole_model(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from hf_nmsparse.files import model_folder
names = ("config.json", "model-0000" + sys.argv[1] + "-of-00003.safetensors", "generation_config.json")
print("ready", flush=True)
sys.stdin.readline()
for save in range(100):
    with model_folder({str(tmp_path)!r}) as folder:
        for name in names:
            (folder / name).write_text(sys.argv[1])
"""
    command = [sys.executable, "-c", script]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen([*command, str(number)], text=True, **pipes) for number in (1, 2, 3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[1] for process in processes] == [""] * 3
    [weights] = names(tmp_path) - {"config.json", "generation_config.json"}
    assert {(tmp_path / name).read_text() for name in names(tmp_path)} == {weights.removeprefix("model-0000")[0]}


def test_unfinished_work_of_a_running_save_stays(tmp_path: Path) -> None:
    with model_folder(tmp_path) as first:
        (first / "config.json").write_text("first")
        with model_folder(tmp_path) as second:
            (second / "config.json").write_text("second")
        assert (tmp_path / "config.json").read_text() == "second"
        assert first.is_dir()
    assert (tmp_path / "config.json").read_text() == "first"
    assert names(tmp_path) == {"config.json"}


def test_threads_write_one_file_at_a_time_whole(tmp_path: Path) -> None:
    def write(text: str) -> None:
        for _ in range(50):
            with replaced(tmp_path / "record.json") as beside:
                beside.write_text(text * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert (tmp_path / "record.json").read_text() in [letter * 1000 for letter in "abcd"]
    assert names(tmp_path) == {"record.json"}


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_made_in_advance_is_not_followed(tmp_path: Path) -> None:
    target, folder = tmp_path / "elsewhere", tmp_path / "folder"
    target.mkdir()
    folder.mkdir()
    (target / "precious").write_text("old")
    for name in (f".record.json.{os.getpid()}", ".saving-1", ".nmsparse-saving-1", ".record.json."):
        (folder / name).symlink_to(target)
    with replaced(folder / "record.json") as beside:
        beside.write_text("new")
    with model_folder(folder) as saved:
        (saved / "config.json").write_text("new")
    assert names(target) == {"precious"}
    assert all(file.read_text() == "new" for file in (folder / "record.json", folder / "config.json"))


def test_a_failed_save_leaves_no_new_folder(tmp_path: Path) -> None:
    with suppress(Killed), model_folder(tmp_path / "new"):
        raise Killed
    assert names(tmp_path) == set()
    (tmp_path / "old").mkdir()
    with suppress(Killed), model_folder(tmp_path / "old"):
        raise Killed
    assert names(tmp_path) == {"old"}


def test_a_killed_save_is_whole_or_refused(tmp_path: Path) -> None:
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    save_packed(model, tmp_path)
    before = check_folder(tmp_path)
    script = f"""
import sys
from hf_nmsparse import NMSparseConfig, save_packed, sparsify
from tests.tiny import marian
model = marian(seed=1)
sparsify(model, NMSparseConfig("2:4"))
print("ready", flush=True)
for _ in range(1000):
    save_packed(model, {str(tmp_path)!r})
"""
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.5)
        process.kill()
    if (tmp_path / "config.json").exists():
        assert check_folder(tmp_path) == before
    else:
        with pytest.raises(ValueError, match=r"config.json"):
            check_folder(tmp_path)


def test_a_folder_that_cannot_be_written_is_told_of_at_once(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"output_dir: nothing can be written to .*/file/below: Not a directory; choose"
    ):
        check_writable(tmp_path / "file" / "below")


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="the superuser writes anywhere")
def test_a_read_only_folder_is_told_of_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"Permission denied; choose another folder"):
        check_writable(tmp_path)
