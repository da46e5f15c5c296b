"""Damaged copies of tiny packed checkpoints: each is refused with one PackedFormatError, or it loads.

They are a thousand of each checkpoint, and ten thousand in ``make test-long``.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import logging

from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.layers import sparse_layers
from hf_nmsparse.packed_files import check_folder
from hf_nmsparse.packed_format import PackedFormatError
from hf_nmsparse.quantization_config import NMSparseQuantizationConfig
from hf_nmsparse.saving import save_packed
from hf_nmsparse.sparse_model import sparsify
from tests.tiny import bart, hf, resnet

COPIES, MANY = 1_000, 10_000  # of each checkpoint
LOADED = 100  # of those that pass the checker
REFUSED = 120  # of those that do not

Header = dict[str, Any]


@dataclass(frozen=True)
class Files:
    """A checkpoint in memory: config.json and model.safetensors."""

    config: bytes
    weights: bytes

    def write(self, folder: Path) -> None:
        (folder / "config.json").write_bytes(self.config)
        (folder / "model.safetensors").write_bytes(self.weights)

    def parts(self) -> tuple[Header, bytes]:
        """The header of model.safetensors, parsed, and the data behind it."""
        length = int.from_bytes(self.weights[:8], "little")
        return json.loads(self.weights[8 : 8 + length]), self.weights[8 + length :]

    def with_header(self, header: bytes) -> Files:
        return replace(self, weights=len(header).to_bytes(8, "little") + header + self.parts()[1])

    def with_tensors(self, tensors: dict[str, Tensor]) -> Files:
        header: Header = {"__metadata__": {"format": "pt"}}
        data = b""
        for name, (dtype, shape, content) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
            data += content
        text = json.dumps(header).encode()
        return replace(self, weights=len(text).to_bytes(8, "little") + text + data)

    def tensors(self) -> dict[str, Tensor]:
        header, data = self.parts()
        return {
            name: (entry["dtype"], list(entry["shape"]), data[slice(*entry["data_offsets"])])
            for name, entry in header.items()
            if name != "__metadata__"
        }


Tensor = tuple[str, list[int], bytes]
Change = Callable[[Files, random.Random], Files]
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2,
    "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, 10**30, "", "2:4", "4:2", "1:4", "4:8", "3:5", "16:32", "0:0", "fp32", "fp16",
    "bf16", "int8", "float", "packed", "dense", "nmsparse", "os.system", "\u0000", [], ["fc1"], [""], [3], [[]], {},
    {"a": 1}, {"fc1": 2}, [None],
]  # fmt: skip
KEYS = ("quant_method", "format", "format_version", "pattern", "values", "embeddings", "targets", "ignored", "producer")


def flip(content: bytes, start: int, stop: int, count: int, rng: random.Random) -> bytes:
    """``content`` with ``count`` bits between two places turned over."""
    changed = bytearray(content)
    for _ in range(count):
        changed[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def header_bits(files: Files, rng: random.Random) -> Files:
    stop = 8 + int.from_bytes(files.weights[:8], "little")
    start = 0 if rng.random() < 0.1 else 8
    return replace(files, weights=flip(files.weights, start, stop, rng.choice((1, 1, 2, 4)), rng))


def data_bits(files: Files, rng: random.Random) -> Files:
    start = 8 + int.from_bytes(files.weights[:8], "little")
    header, _ = files.parts()
    first, last = header[rng.choice([name for name in header if name != "__metadata__"])]["data_offsets"]
    return replace(files, weights=flip(files.weights, start + first, start + last, rng.choice((1, 2, 8)), rng))


def length(files: Files, rng: random.Random) -> Files:
    content = files.weights
    if rng.random() < 0.3:
        return replace(files, weights=content + rng.randbytes(rng.choice((1, 8, 100))))
    return replace(files, weights=content[: rng.randrange(len(content))])


def header_entry(files: Files, rng: random.Random) -> Files:
    header, _ = files.parts()
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    kind = rng.choice(("dtype", "shape", "offsets", "missing", "junk", "twice", "metadata"))
    if kind == "dtype":
        entry["dtype"] = rng.choice([*SIZES, "F4", "X", "f32", "", 3, None])
    elif kind == "shape" and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(
            [0, 1, 2, -1, 2**31, 2**63, 2**64, 1.5, "8", None]
        )
    elif kind == "offsets":
        entry["data_offsets"][rng.randrange(2)] = rng.choice([0, -1, 4, 2**40, 2**64, None, 0.5])
    elif kind == "missing":
        del entry[rng.choice(list(entry))]
    elif kind == "junk":
        header[name] = rng.choice(JUNK)
    elif kind == "metadata":
        header["__metadata__"] = rng.choice([{}, {"format": "tf"}, {"format": "pt", "x": "y"}, *JUNK])
    text = json.dumps(header)
    if kind == "twice":  # one key twice in the JSON, with the entry of another
        other = header[rng.choice([other for other in header if other != "__metadata__"])]
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(other)}}}"
    return files.with_header(text.encode())


def tensors(files: Files, rng: random.Random) -> Files:
    found = files.tensors()
    packed = [name for name in found if name.endswith(("_indices", "_scale", "_shape"))]
    names = list(found) if rng.random() < 0.4 else packed + [name.rpartition("_")[0] for name in packed]
    name, other = rng.choice(names), rng.choice(names)
    dtype, shape, content = found[name]
    kind = rng.choice(("drop", "rename", "copy", "swap", "cut", "grow", "retype", "cast", "reshape", "fill"))
    if kind == "drop":
        for key in rng.sample(list(found), rng.choice((1, 1, 2, 5))) if rng.random() < 0.3 else [name]:
            found.pop(key)
    elif kind in ("rename", "copy"):
        stem, _, leaf = name.rpartition(".")
        new = rng.choice(
            [
                f"{stem}.{end}"
                for end in ("weight", "weight_indices", "weight_scale", "weight_shape", "bias", "x", "", ".weight")
            ]
            + [f"model.shared.{leaf}", f"lm_head.{leaf}", f"x.{leaf}", leaf, "", other, name + " ", name.upper()]
        )
        found[new] = found.pop(name) if kind == "rename" else found[name]
    elif kind == "swap":
        found[name], found[other] = found[other], found[name]
    elif kind == "cut" and shape and shape[0] > 0:
        size = len(content) // shape[0]
        keep = rng.randrange(shape[0])
        found[name] = dtype, [keep, *shape[1:]], content[: keep * size]
    elif kind == "grow" and shape:
        found[name] = dtype, [2 * shape[0], *shape[1:]], content * 2
    elif kind == "retype":
        new = rng.choice([new for new, size in SIZES.items() if size == SIZES[dtype]])
        found[name] = new, shape, content
    elif kind == "cast":
        new = rng.choice(list(SIZES))
        found[name] = new, shape, bytes(len(content) // SIZES[dtype] * SIZES[new])
    elif kind == "reshape":
        count = len(content) // SIZES[dtype]
        shapes = [[count], shape[::-1], [1, *shape], [*shape, 1], [1, count], [count, 1]]
        found[name] = dtype, rng.choice([*shapes, *([[]] if count == 1 else [])]), content
    elif kind == "fill":
        found[name] = dtype, shape, bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * len(content)
    return files.with_tensors(found)


def record(files: Files, rng: random.Random) -> Files:
    config = json.loads(files.config)
    entries = config["quantization_config"]
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.random()
        if kind < 0.7:
            entries[rng.choice(KEYS)] = rng.choice(JUNK)
        elif kind < 0.85:
            entries.pop(rng.choice(KEYS), None)
        else:
            entries[rng.choice(["compute", "head", "ignore", "reader", "", "Pattern"])] = rng.choice(JUNK)
    if rng.random() < 0.05:
        config["quantization_config"] = rng.choice(JUNK)
    return replace(files, config=json.dumps(config).encode())


def record_bits(files: Files, rng: random.Random) -> Files:
    start = files.config.index(b'"quantization_config"')
    stop = files.config.index(b"}", start) + 1
    return replace(files, config=flip(files.config, start, stop, rng.choice((1, 1, 2)), rng))


CHANGES: tuple[Change, ...] = (
    header_bits, data_bits, length, header_entry, tensors, tensors, tensors, record, record_bits,
)  # fmt: skip


def parsed(config: bytes) -> Any:
    """What config.json holds; None if it is no JSON."""
    try:
        return json.loads(config.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def is_ours(config: Any) -> bool:
    """Whether the configuration still says that this package wrote the files; else transformers has the word."""
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(found, dict) and found.get("quant_method") == "nmsparse" and found.get("format") != "dense"


def shapes(files: Files) -> dict[str, list[int]]:
    return {name: shape for name, (_, shape, _) in files.tensors().items()}


@dataclass
class Damaged:
    """What became of the copies of one checkpoint: each with the number of its seed and the kind of its damage."""

    folder: Path
    kind: Any
    copies: int
    whole: Files
    passed: list[tuple[int, Change, Files]]
    refused: list[tuple[int, Change, Files]]
    wrong: list[str]


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' reports of missing keys, which cost more than the loading."""
    before = logging.get_verbosity()
    logging.set_verbosity(50)  # critical
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


EACH = [
    pytest.param((values, copies), id=f"{values}-{copies}", marks=[pytest.mark.long] if copies == MANY else [])
    for values in ("fp32", "int8", "convolutions")
    for copies in (COPIES, MANY)
]


@pytest.fixture(scope="module", params=EACH)
def damaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Damaged]:
    values, copies = request.param
    folder = tmp_path_factory.mktemp(values)
    torch.manual_seed(0)
    if values == "convolutions":
        model = resnet(hidden_sizes=[4], depths=[1])
        sparsify(model, NMSparseConfig("2:4", convolutions=True))
        save_packed(model, folder)
    else:
        settings = bart(12, d_model=8, layers=1) | {"max_position_embeddings": 4, "forced_eos_token_id": None}
        model = hf.MarianMTModel(hf.MarianConfig(**settings))
        sparsify(model, NMSparseConfig("2:4", ["fc1"]))
        save_packed(model, folder, values=values)
    whole = Files((folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes())
    found = Damaged(folder, type(model), copies, whole, [], [], [])
    for number in range(copies):
        rng = random.Random(f"{values} {number}")
        change = rng.choice(CHANGES)
        files = change(whole, rng)
        files.write(folder)
        config = parsed(files.config)
        try:
            check_folder(folder)
        except PackedFormatError as error:
            found.refused.append((number, change, files))
            if "\n" in str(error):
                found.wrong.append(f"{number} {change.__name__}: {error}")
        except Exception as error:
            # A folder that is no longer ours is told apart from one that is damaged.
            if type(error) is not ValueError or config is None or is_ours(config):
                found.wrong.append(f"{number} {change.__name__}: {type(error).__name__}: {error}")
        else:
            found.passed.append((number, change, files))
    with quiet():
        yield found


def test_the_checker_passes_or_refuses_with_its_own_error(damaged: Damaged) -> None:
    assert damaged.wrong == []
    # Every kind of damage was seen, and the copies are neither all refused nor all whole.
    refused = Counter(change for _, change, _ in damaged.refused)
    assert refused.keys() == set(CHANGES)
    assert len(damaged.passed) > damaged.copies / 5
    assert len(damaged.refused) > damaged.copies / 5


def load(damaged: Damaged, number: int) -> Any:
    compute = ("auto", "dense", "reference")[number % 3]
    return damaged.kind.from_pretrained(damaged.folder, quantization_config=NMSparseQuantizationConfig(compute))


def test_what_passes_the_checker_loads(damaged: Damaged) -> None:
    wrong, loaded = [], 0
    for number, change, files in random.Random(0).sample(damaged.passed, LOADED):
        files.write(damaged.folder)
        try:
            model = load(damaged, number)
            with torch.no_grad():
                if damaged.kind is hf.MarianMTModel:
                    result = model(input_ids=torch.tensor([[3, 4]]), decoder_input_ids=torch.tensor([[2, 5]])).logits
                    assert result.shape == (1, 2, 12)
                else:
                    assert model(pixel_values=torch.ones(1, 1, 8, 8)).logits.shape == (1, 10)
            assert sparse_layers(model)
            loaded += 1
        except PackedFormatError:
            continue  # what only the model can tell
        except Exception as error:
            # Other shapes of tensors that are not packed are for transformers to refuse, as in any checkpoint.
            stock = "ignore_mismatched_sizes" in str(error) and shapes(files) != shapes(damaged.whole)
            if not stock:
                wrong.append(f"{number} {change.__name__}: {type(error).__name__}: {error}")
    assert wrong == []
    assert loaded > LOADED / 3


def test_what_the_checker_refuses_does_not_load(damaged: Damaged) -> None:
    wrong = []
    for number, change, files in random.Random(0).sample(damaged.refused, REFUSED):
        files.write(damaged.folder)
        try:
            load(damaged, number)
        except PackedFormatError:
            continue
        except OSError as error:
            if parsed(files.config) is not None or "not a valid JSON file" not in str(error):
                wrong.append(f"{number} {change.__name__}: {error}")
        except Exception as error:
            wrong.append(f"{number} {change.__name__}: {type(error).__name__}: {error}")
        else:
            wrong.append(f"{number} {change.__name__}: it loaded")
    assert wrong == []
