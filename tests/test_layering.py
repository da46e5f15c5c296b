"""Imports go down through three bands, and some things are kept out of the package or in one file of it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_nmsparse"
BANDS = (
    {
        "pattern",
        "masks",
        "srste",
        "schedule",
        "packed_format",
        "packing",
        "rounding",
        "number_types",
        "version",
        "kernels",
    },
    {"config", "layers", "packed_layers", "sharding", "losses", "padding", "sparse_model", "optimizer", "wrappers"},
    {
        "quantizer",
        "compute",
        "quantization_config",
        "registration",
        "sparsity_record",
        "packed_files",
        "checkpoint_fit",
        "saving",
        "trainer",
        "training_arguments",
        "resuming",
        "checkpoints",
        "faults",
        "preemption",
        "console",
        "allocator",
        "batching",
        "compressed_tensors",
        "averaging",
        "corpus",
        "pairs",
        "settings",
        "files",
        "loading",
        "standalone",
        "tokenizer",
        "metrics",
        "evaluation",
        "evaluate_metric",
        "pipeline",
        "engine_spec",
        "generation",
        "cards",
        "texts",
        "run_logs",
        "plots",
        "cli",
        "__init__",
        "__main__",
    },
)
# What the lower bands import beside the standard library; Triton comes with torch's builds for GPUs.
ALLOWED = {"kernels": {"torch", "triton", "numpy"}, "packed_format": {"numpy"}}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """The name in the package that a file belongs to; a folder below counts as one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def band_of(module: str) -> int:
    (band,) = [number for number, modules in enumerate(BANDS) if module in modules]
    return band


def imports(tree: ast.AST) -> list[str]:
    """Dotted names of what is imported anywhere in a file, inside of functions too."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def broken_rules(module: str, source: str) -> list[str]:
    """The imports of ``source`` that a file of ``module`` may not have."""
    band, broken = band_of(module), []
    for name in imports(ast.parse(source)):
        root, *rest = name.split(".")
        if root == "hf_nmsparse":
            # `from hf_nmsparse import x` may name a module or something that __init__ defines.
            imported = rest[0] if rest and any(rest[0] in modules for modules in BANDS) else "__init__"
            if band_of(imported) > band:
                broken.append(name)
        elif band < 2 and root not in sys.stdlib_module_names | ALLOWED.get(module, {"torch"}):
            broken.append(name)
    return broken


def test_every_file_is_in_a_band() -> None:
    modules = {module_of(path) for path in FILES}
    assert modules - set().union(*BANDS) == set()
    assert {"pattern", "layers", "trainer", "kernels", "__init__"} <= modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    assert broken_rules(module_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("masks", "from hf_nmsparse.pattern import NMPattern\nimport torch, math", []),
        ("masks", "import numpy", ["numpy"]),
        ("masks", "from hf_nmsparse.layers import NMLinear", ["hf_nmsparse.layers.NMLinear"]),
        ("kernels", "def f():\n    from hf_nmsparse import cli", ["hf_nmsparse.cli"]),
        ("kernels", "import hf_nmsparse", ["hf_nmsparse"]),
        ("layers", "from hf_nmsparse.masks import magnitude_mask", []),
        ("layers", "import torch_scatter", ["torch_scatter"]),
        ("sparse_model", "from transformers import PreTrainedModel", ["transformers.PreTrainedModel"]),
        ("trainer", "import transformers\nimport hf_nmsparse\nfrom hf_nmsparse.masks import apply_mask", []),
    ],
)
def test_the_walk_finds_what_points_up(module: str, source: str, broken: list[str]) -> None:
    assert broken_rules(module, source) == broken


def test_one_file_touches_hf_quantizer() -> None:
    touching = [path.name for path in FILES if re.search(r"\bHfQuantizer\b", path.read_text(encoding="utf-8"))]
    assert touching == ["quantizer.py"]


def code_from_data(source: str) -> list[str]:
    """What in ``source`` runs code that comes from strings or files."""
    tree, found = ast.parse(source), []
    for name in imports(tree):
        if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}:
            found.append(name)
        if name in {"importlib.import_module", "torch.load"}:
            found.append(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"eval", "exec", "__import__", "torch.load"} or called.endswith("import_module"):
                found.append(called)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_code_is_made_from_data(path: Path) -> None:
    by_name = ["importlib.import_module", "import_module"] if path == PACKAGE / "__init__.py" else []
    assert code_from_data(path.read_text(encoding="utf-8")) == by_name


def test_the_package_imports_what_a_table_in_it_names() -> None:
    """Its public names are loaded when they are used: by modules that are written there as literals."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    [table] = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "_HOMES"
    ]
    assert {f"{module}.py" for module in ast.literal_eval(table).values()} <= {path.name for path in FILES}
    [call] = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "import_module" in ast.dump(node.func)]
    assert ast.unparse(call.args[0]) == "f'{__name__}.{_HOMES[name]}'"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from importlib import import_module", ["importlib.import_module"]),
        ("import importlib\nimportlib.import_module('os')", ["importlib.import_module"]),
        ("torch.load('model.bin')", ["torch.load"]),
        ("eval('1')", ["eval"]),
        ("exec('1')", ["exec"]),
        ("model.eval()", []),
        ("evaluate.load('sacrebleu')\nfrom importlib.resources import files", []),
    ],
)
def test_the_walk_finds_code_from_data(source: str, found: list[str]) -> None:
    assert code_from_data(source) == found
