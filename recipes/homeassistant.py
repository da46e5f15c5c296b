"""The demo's corpus: the interface texts of Home Assistant, from its package on PyPI."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from hf_nmsparse.corpus import SPLITS

WHEEL = "homeassistant-2026.11.0-py3-none-any.whl"
WHEEL_SHA256 = "7ca5fbde9dea879ac7723949fc84347aac5182e6309c357b2e4973fd391b00f7"
HELD_OUT = 500


def homeassistant_corpus(source_lang: str, target_lang: str, cache: Path | None = None) -> dict[str, Dataset]:
    """The interface texts of Home Assistant, which its package on PyPI carries in English, German and many others.

    It is real parallel text that a machine without the Hub can have: about 20,000 distinct pairs of four words or
    more, Apache-2.0. The wheel (68 MB) is fetched by pip once, checked against its hash and kept in the cache.

    Args:
        source_lang: Language of the source, such as ``"en"``.
        target_lang: Language of the target, such as ``"de"``.
        cache: Folder for the wheel; a folder in the cache of datasets if None.

    Raises:
        ValueError: The wheel cannot be had, is not the expected one, or lacks a language.
    """
    wheel = fetch_wheel(cache or Path(datasets.config.HF_CACHE_HOME) / "nmsparse")
    pairs = sorted(set(wheel_pairs(wheel, source_lang, target_lang)))
    if not pairs:
        raise ValueError(f"corpus homeassistant: no texts in both {source_lang!r} and {target_lang!r}")
    # A source text goes to one split whole, whatever its translations, so that nothing tested was trained on.
    ordered = sorted({source for source, _ in pairs}, key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(ordered) <= 2 * HELD_OUT:
        raise ValueError(f"corpus homeassistant: only {len(ordered)} texts in {source_lang!r} and {target_lang!r}")
    held_out = {"validation": set(ordered[:HELD_OUT]), "test": set(ordered[HELD_OUT : 2 * HELD_OUT])}
    held_out["train"] = set(ordered[2 * HELD_OUT :])
    return {
        split: Dataset.from_dict(
            {
                "source": [source for source, _ in pairs if source in held_out[split]],
                "target": [target for source, target in pairs if source in held_out[split]],
            }
        )
        for split in SPLITS
    }


def fetch_wheel(cache: Path) -> Path:
    """The wheel in ``cache``, where pip puts it if it is not there yet."""
    wheel = cache / WHEEL
    if not wheel.is_file():
        version = WHEEL.split("-")[1]
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
            done = subprocess.run(
                [*command, "--dest", folder, f"homeassistant=={version}"], capture_output=True, text=True, check=False
            )
            fetched = Path(folder) / WHEEL
            if done.returncode or not fetched.is_file():
                reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
                raise ValueError(f"corpus homeassistant: pip could not download homeassistant=={version}: {reason}")
            fetched.replace(wheel)
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise ValueError(f"corpus homeassistant: {wheel} is not the expected file; delete it and run again")
    return wheel


def wheel_pairs(wheel: Path, source_lang: str, target_lang: str) -> Iterator[tuple[str, str]]:
    """The texts of four words or more that are there in both languages."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name in sorted(names):
            if not name.endswith(f"/translations/{source_lang}.json"):
                continue
            other = f"{name.rpartition('/')[0]}/{target_lang}.json"
            if other in names:
                source, target = (dict(texts_of(json.loads(archive.read(file)))) for file in (name, other))
                for key in source.keys() & target.keys():
                    text, translation = source[key].strip(), target[key].strip()
                    if (
                        len(text.split()) >= 4
                        and translation
                        and text != translation
                        and "\n" not in text + translation
                    ):
                        yield text, translation


def texts_of(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The texts in nested objects, each with the keys that lead to it."""
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from texts_of(child, (*path, key))


def main() -> None:
    """Writes all pairs of two languages as JSON lines."""
    source_lang, target_lang = sys.argv[1:]
    wheel = fetch_wheel(Path(datasets.config.HF_CACHE_HOME) / "nmsparse")
    for source, target in sorted(set(wheel_pairs(wheel, source_lang, target_lang))):
        print(json.dumps({"translation": {source_lang: source, target_lang: target}}, ensure_ascii=False))


if __name__ == "__main__":
    main()
