"""Imports go down through the bands without a loop, and some things stay out of the package or in one file of it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_nmsparse"
CSRC = PACKAGE / "kernels" / "csrc"
# From the ground up: a module imports modules of its own band and of those before it. A folder counts as one module.
BANDS = {
    "ground": {"version", "pattern", "number_types", "packed_format", "rounding"},
    "kernels": {"kernels"},
    "idea": {"masks", "srste", "schedule", "packing", "one_shot"},
    "model": {
        *("config", "sharding", "layers", "conv1d", "packed_layers", "sparse_model", "optimizer", "padding", "losses"),
        *("wrappers", "positions", "calibration", "permutation"),
    },
    "files": {
        *("files", "sparsity_record", "quantization_config", "packed_files", "checkpoint_fit", "saving", "standalone"),
        "shards",
        *("compressed_tensors", "engine_weights"),
    },
    "loading": {
        *("engine_spec", "engine_files", "generation_settings"),  # on the native engine, from files alone
        *("compute", "module_fit", "generation", "quantizer", "loading"),
    },
    "trainer": {
        *("settings", "pairs", "corpus", "tokenizer", "batching"),  # what a training reads
        *("allocator", "products"),  # and how a process trains on CPUs
        *("checkpoints", "averaging", "faults", "preemption", "resuming", "console", "training_arguments"),
        *("trainer_mixin", "trainer"),
    },
    "translation": {
        *("shortlist", "texts", "paragraphs", "loops", "text_tokenizer", "streaming"),
        *(
            "placeholders",
            "alignment",
            "masking",
            "markup",
            "marked_texts",
            "glossary",
            "forced_terms",
            "html_text",
        ),  # what is more than a sentence
        *("translations", "translator", "pipeline", "bulk", "documents"),
    },
    "tools": {
        *("metrics", "chrf", "evaluate_metric", "evaluation", "cards"),
        *("export_check", "ctranslate2_export", "onnx_export"),  # for other tools
        *("run_files", "run_logs", "plots", "comet_metric", "run_report", "report_page"),  # on finished runs
    },
    "commands": {"terminal", "line_files", "devices", "translate_corpus", "serve", "commands", "cli", "__main__"},
    "package": {"registration", "__init__"},  # which no module imports
}
TORCH_ALONE = ("ground", "kernels", "idea", "model")
"""The bands that import torch and the standard library alone."""

# And what some of these import beside them. Triton comes with torch's builds for GPUs.
ALLOWED = {"kernels": {"triton", "numpy"}, "packed_format": {"numpy"}, "conv1d": {"transformers"}}
FILES = sorted(PACKAGE.rglob("*.py"))

# Of the native library likewise: what a file includes stands in its own band or in one before it.
CSRC_BANDS = {
    "common": ("common.h",),
    "units": ("unit.h", "simd_*.h"),
    # Once for all units.
    "kernels": ("layout.h", "masks.h", "transposable.h", "rows.h", "attend.h", "linear*.h", "pairs.h"),
    "library": ("unit_*.h", "unit_*.cpp", "runtime.*"),
    "engine": ("engine/*",),
    "interface": ("nmsparse.cpp",),
}
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp"))


def module_of(path: Path) -> str:
    """The name in the package that a file belongs to; a folder below counts as one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def band_of(module: str) -> int:
    (band,) = [number for number, modules in enumerate(BANDS.values()) if module in modules]
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
    torch_alone = list(BANDS)[band] in TORCH_ALONE
    for name in imports(ast.parse(source)):
        root, *rest = name.split(".")
        if root == "hf_nmsparse":
            # `from hf_nmsparse import x` may name a module or something that __init__ defines.
            imported = rest[0] if rest and any(rest[0] in modules for modules in BANDS.values()) else "__init__"
            if band_of(imported) > band:
                broken.append(name)
        elif torch_alone and root not in sys.stdlib_module_names | {"torch"} | ALLOWED.get(module, set()):
            broken.append(name)
    return broken


def loop_in(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Names that lead back to the first of them; empty where there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_every_file_is_in_a_band() -> None:
    modules = {module_of(path) for path in FILES}
    assert modules == set().union(*BANDS.values())
    assert sum(map(len, BANDS.values())) == len(modules)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    assert broken_rules(module_of(path), path.read_text(encoding="utf-8")) == []


def test_no_import_leads_back() -> None:
    """Within a band neither, nor inside of kernels/."""
    names = {".".join(("hf_nmsparse", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    graph = {}
    for name, path in names.items():
        found = imports(ast.parse(path.read_text(encoding="utf-8")))
        graph[name] = {known for one in found for known in (one, one.rpartition(".")[0]) if known in names}
    assert graph["hf_nmsparse.masks"] == {
        "hf_nmsparse.kernels.choice",
        "hf_nmsparse.kernels.native",
        "hf_nmsparse.pattern",
    }
    assert loop_in(graph) == []


def csrc_band_of(name: str) -> int:
    (band,) = [
        number for number, patterns in enumerate(CSRC_BANDS.values()) if any(fnmatch(name, one) for one in patterns)
    ]
    return band


def included(path: Path, source: str) -> list[str]:
    """The files of csrc that a file of it includes, by their paths there."""
    names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', source, re.MULTILINE)
    return [(path.parent / name).resolve().relative_to(CSRC.resolve()).as_posix() for name in names]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_includes_point_down(path: Path) -> None:
    band = csrc_band_of(path.relative_to(CSRC).as_posix())
    names = included(path, path.read_text(encoding="utf-8"))
    assert [name for name in names if csrc_band_of(name) > band or not name.endswith(".h")] == []


def test_no_include_leads_back() -> None:
    graph = {path.relative_to(CSRC).as_posix(): included(path, path.read_text(encoding="utf-8")) for path in SOURCES}
    assert "common.h" in graph["layout.h"]
    assert loop_in(graph) == []


def test_the_walk_finds_includes_and_loops() -> None:
    source = '#include <cmath>\n#include "../common.h"\n  # include "api.h"\n// #include "search.h"\n'
    assert included(CSRC / "engine" / "model.h", source) == ["common.h", "engine/api.h"]
    assert csrc_band_of("linear_int8.h") < csrc_band_of("unit_avx2.cpp") < csrc_band_of("engine/model.h")
    assert set(loop_in({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]})) == {"a", "b", "c"}
    assert loop_in({"a": ["b", "c"], "b": ["c"]}) == []


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
        ("trainer", "import transformers\nfrom hf_nmsparse.masks import apply_mask", []),
        ("trainer", "import hf_nmsparse", ["hf_nmsparse"]),
        ("saving", "from hf_nmsparse.loading import load_seq2seq", ["hf_nmsparse.loading.load_seq2seq"]),
        ("loading", "from hf_nmsparse.quantizer import NMSparseQuantizer", []),
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


def includes(pattern: str) -> set[tuple[str, str]]:
    """Files of the native library and what they include, without folders and marks."""
    return {
        (path.name, name.split("/")[-1])
        for path in CSRC.glob(pattern)
        for name in re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)
    }


def test_the_engine_knows_units_by_their_table() -> None:
    """Its files run on every machine, and hold no copy of what a wider unit compiles."""
    own = {path.name for path in (CSRC / "engine").iterdir()}
    shared = {name for _, name in includes("engine/*") if (CSRC / name).is_file()} - own
    assert shared == {"common.h", "runtime.h", "unit.h"}


def test_units_include_no_templates_of_others() -> None:
    """A copy of `std::vector` that is compiled for AVX-512 may be the one that the linker keeps for all."""
    found = includes("*.h") | includes("unit_*.cpp")
    outside = {name for _, name in found if not (CSRC / name).is_file()}
    assert outside <= {"cstdint", "cstring", "math.h", "immintrin.h", "arm_neon.h"}
