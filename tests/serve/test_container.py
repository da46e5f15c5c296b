"""The container of recipes/serve holds what serving needs, and not what it leaves out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_nmsparse import Translator

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
LINES = (ROOT / "recipes" / "serve" / "Dockerfile").read_text(encoding="utf-8").splitlines()
INSTALLED = set(re.findall(r"[a-z][a-z-]+", "\n".join(line for line in LINES if not line.startswith("#"))))

SERVE = """
import sys

class LeftOut:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in sys.argv[2:]:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, LeftOut())
import hf_nmsparse.serve.server
from hf_nmsparse.serve import load_models
models = load_models([f"en:de={sys.argv[1]}"], threads=1)
print(models._models[0].translator.translate(["A man"])[0].text, end="")
"""


def needed(section: str) -> set[str]:
    lines = PROJECT.partition(f"\n{section} = [")[2].partition("\n]")[0]
    return {canonicalize_name(Requirement(text).name) for text in re.findall(r'^ +"([^"]+)"', lines, re.MULTILINE)}


def test_the_extra_is_installed() -> None:
    assert needed("serve") == {"fastapi", "httptools", "prometheus-client", "python-multipart", "uvicorn"}
    assert needed("serve") <= INSTALLED


def test_nothing_else_is_needed(folder: Path, translator: Translator) -> None:
    left_out = {"pyyaml": "yaml"}
    missing = [left_out.get(name, name) for name in needed("dependencies") - INSTALLED]
    assert {"torch", "transformers", "datasets", "yaml"} <= set(missing)
    command = [sys.executable, "-c", SERVE, str(folder), *missing]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == (
        translator.translate(["A man"], break_loops=False, keep_placeholders=False)[0].text
    )
