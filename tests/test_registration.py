"""What an import brings along, and that transformers knows loader and pipeline however it is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_nmsparse
from hf_nmsparse import NMSparseConfig, save_packed, sparsify
from tests.tiny import marian, tokenizer

HEAVY = (
    "datasets",
    "evaluate",
    "accelerate",
    "sacrebleu",
    "pyarrow",
    "matplotlib",
    "transformers.pipelines",
    "transformers.trainer",
)


def run(code: str, *arguments: str) -> str:
    """What ``code`` prints in a fresh process."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model with its tokenizer."""
    folder = tmp_path_factory.mktemp("packed")
    model = marian(decoder_start_token_id=tokenizer().pad_token_id, pad_token_id=tokenizer().pad_token_id)
    sparsify(model, NMSparseConfig("2:4"))
    save_packed(model, folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_the_import_alone_brings_neither_torch_nor_transformers() -> None:
    assert run("import sys, hf_nmsparse; print(*{'torch', 'transformers'} & sys.modules.keys())") == ""


def test_the_import_brings_nothing_heavy_even_where_transformers_is_ready_for_it() -> None:
    code = f"print(*sorted(set({HEAVY}) & sys.modules.keys()))"
    stock = run(f"import sys, torch, transformers.quantizers.auto; {code}")
    for order in ("hf_nmsparse, torch, transformers.quantizers.auto", "transformers.quantizers.auto, hf_nmsparse"):
        assert run(f"import sys, {order}; {code}") == stock


@pytest.mark.parametrize(
    ("command", "says"),
    [("--help", "inspect"), ("inspect --help", "PATH"), ("inspect", "every one valid"), ("doctor", "vector unit")],
)
def test_commands_that_look_and_compute_nothing_answer_without_torch(command: str, says: str, packed: Path) -> None:
    arguments = [command, "--layers", str(packed)] if command == "inspect" else command.split()
    code = (
        "import sys\nfrom hf_nmsparse.cli import main\n"
        "try: status = main(sys.argv[1:])\nexcept SystemExit as end: status = end.code\n"
        "print(status, '|', *{'torch', 'transformers'} & sys.modules.keys())"
    )
    answer, _, imported = run(code, *arguments).rpartition("|")
    assert says in answer
    assert answer.endswith("0 ")
    assert imported == ""


IMPORTS = (
    "import hf_nmsparse",
    "import transformers, hf_nmsparse",
    "import transformers.pipelines, hf_nmsparse",
    "import transformers.quantizers.auto, hf_nmsparse",
    "import hf_nmsparse.pipeline",
    "import hf_nmsparse.trainer, hf_nmsparse.saving",
    "from hf_nmsparse import *",
    "import hf_nmsparse, importlib; importlib.reload(hf_nmsparse)",
)


@pytest.mark.parametrize("imports", IMPORTS)
def test_loader_and_pipeline_are_known_in_whatever_order_things_are_imported(imports: str, packed: Path) -> None:
    code = (
        f"import sys\n{imports}\n"
        "from transformers import AutoModelForSeq2SeqLM, pipeline\n"
        "model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])\n"
        "translator = pipeline('nmt-translation', model=sys.argv[1])\n"
        "print(model.quantization_method, list(translator('A man.', max_new_tokens=2)[0]))\n"
    )
    assert run(code, str(packed)) == "nmsparse ['translation_text']"


@pytest.mark.parametrize("module", ["masks", "packing", "srste", "kernels.native", "kernels.cpu", "kernels.rounded"])
def test_a_module_may_be_what_brings_torch(module: str) -> None:
    code = f"import hf_nmsparse.{module}, torch, hf_nmsparse.packed_layers"
    assert run(f"{code}; print(torch.ops.nmsparse.rounded_linear.default)") == "nmsparse.rounded_linear.default"


def test_operators_are_known_after_the_bare_import() -> None:
    for imports in ("hf_nmsparse, torch", "torch, hf_nmsparse", "hf_nmsparse.cli, torch"):
        code = f"import {imports}; print(torch.ops.nmsparse.rounded_linear.default, torch.ops.nmsparse.linear.default)"
        assert run(code) == "nmsparse.rounded_linear.default nmsparse.linear.default"


def test_every_public_name_has_its_home() -> None:
    assert hf_nmsparse._HOMES.keys() == set(hf_nmsparse.__all__)
    tree = ast.parse(Path(hf_nmsparse.__file__).read_text(encoding="utf-8"))
    written = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hf_nmsparse.")
        for alias in node.names
    }
    assert written.pop("__version__") == "hf_nmsparse.version"
    assert written == {name: f"hf_nmsparse.{home}" for name, home in hf_nmsparse._HOMES.items()}
    for name in hf_nmsparse.__all__:
        value = getattr(hf_nmsparse, name)
        assert value.__module__ == written[name]
        assert name in dir(hf_nmsparse)
    with pytest.raises(AttributeError, match="module 'hf_nmsparse' has no attribute 'sparsity'"):
        _ = hf_nmsparse.sparsity


def test_no_module_has_the_name_of_a_function() -> None:
    modules = {path.stem for path in Path(hf_nmsparse.__file__).parent.glob("*.py")}
    assert not modules & set(hf_nmsparse.__all__)  # or the import of one would take the place of the other


def test_a_module_that_was_watched_is_as_without(packed: Path) -> None:
    code = (
        "import sys, hf_nmsparse, transformers.pipelines as module\n"
        "print(type(module.__spec__.loader).__name__, type(module.__loader__).__name__)\n"
        "print([type(finder).__module__ for finder in sys.meta_path].count('hf_nmsparse.registration'))"
    )
    assert run(code).splitlines()[0] == "SourceFileLoader SourceFileLoader"


def test_training_needs_neither_datasets_nor_evaluate(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["datasets"] = sys.modules["evaluate"] = None  # an import of either fails
import torch
from hf_nmsparse import NMSparseConfig, SparseTrainer, SparseTrainingArguments, save_packed, sparsify
from transformers import MarianConfig, MarianMTModel

sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 1), ("ffn_dim", 64))}
model = MarianMTModel(
    MarianConfig(vocab_size=30, d_model=32, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **sizes)
)
sparsify(model, NMSparseConfig("2:4"))
rows = [{"input_ids": [5, 6, 1], "labels": [7, 1]}] * 8


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(rows)

    def __getitem__(self, index):
        return rows[index]


for data in (rows, Rows()):
    for budget in (None, 32):
        args = SparseTrainingArguments(sys.argv[1], max_steps=2, use_cpu=True, tokens_per_batch=budget)
        SparseTrainer(model=model, args=args, train_dataset=data).train()
save_packed(model, sys.argv[1] + "/packed")
"""
    run(code, str(tmp_path))
    assert (tmp_path / "packed" / "config.json").is_file()
