"""What becomes of placeholders, addresses and tags in the texts of an interface.

    python -m recipes.homeassistant en de > pairs.jsonl
    python -m benchmarks.placeholders outputs/demo/packed pairs.jsonl

The texts are those that have at least one, the first so many in the order of their hashes. Each is made a page as well,
every third word in tags by turns, to see that pages come back with theirs.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM

from benchmarks import tables, timing
from hf_nmsparse import Translator
from hf_nmsparse.metrics import score
from hf_nmsparse.placeholders import keeps_placeholders, placeholders

_TAGS = (("<b>", "</b>"), ("<i class='x'>", "</i>"), ('<a href="#x">', "</a>"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model, English to German")
    parser.add_argument("pairs", type=Path, help='JSON lines: {"translation": {"en": ..., "de": ...}}')
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, help="the JSON file; a table goes beside it")
    options = parser.parse_args()
    translator, rows, signature = Translator(options.model, threads=1), [], ""
    with options.pairs.open(encoding="utf-8") as file:
        read = {(row["en"], row["de"]) for row in (json.loads(line)["translation"] for line in file)}
    pairs = [pair for pair in read if placeholders(pair[0]) and keeps_placeholders(*pair)]
    pairs = sorted(pairs, key=lambda pair: (hashlib.sha256(pair[0].encode()).digest(), pair))[: options.texts]
    sources, references = map(list, zip(*pairs, strict=True))

    def translated(kept: bool) -> list[str]:
        ways = {"split": True, "break_loops": True, "keep_placeholders": kept}
        return [one.text for one in translator.translate(sources, num_beams=options.beams, **ways)]

    def as_pages() -> list[str]:
        return translator.translate_html(map(page, sources), num_beams=options.beams)

    ways: dict[str, Callable[[], list[str]]] = {
        "as they are": lambda: translated(False),
        "placeholders kept": lambda: translated(True),
        "as pages": as_pages,
    }
    for way, translate in ways.items():
        start = time.process_time()
        found = translate()
        seconds = time.process_time() - start
        row = {"way": way, "texts": len(sources)}
        if way == "as pages":
            row["tags"] = sum(len(tags(page(source))) for source in sources)
            row["tags_kept"] = sum(
                (Counter(tags(page(source))) & Counter(tags(one))).total()
                for source, one in zip(sources, found, strict=True)
            )
            row["balanced"] = sum(map(balanced, found))
            found = [html.unescape(re.sub("|".join(map(re.escape, known())), "", one)) for one in found]
        result = score(found, references)
        counts = [
            (Counter(placeholders(source)), Counter(placeholders(one)))
            for source, one in zip(sources, found, strict=True)
        ]
        row |= {
            "placeholders": sum(own.total() for own, _ in counts),
            "kept": sum((own & other).total() for own, other in counts),
            "whole": sum(own == other for own, other in counts),
            "bleu": round(result.bleu, 2),
            "chrf": round(result.chrf, 2),
            "cpu_s": round(seconds, 2),
        }
        rows.append(row)
        print(row, flush=True)
        signature = result.signature
    record = {
        "benchmark": "placeholders and tags in the texts of an interface",
        **timing.machine(),
        "model": timing.describe(AutoModelForSeq2SeqLM.from_pretrained(options.model)),
        "beams": options.beams,
        "signature": signature,
        "note": options.note,
    }
    output = options.output or timing.RESULTS / "placeholders.json"
    timing.write(output, record, rows, tables.placeholders_of(record | {"rows": rows}))
    print(output)


def known() -> list[str]:
    """All the tags that `page` writes."""
    return [tag for pair in _TAGS for tag in pair] + ["<img>", "<p>", "</p>"]


def tags(text: str) -> list[str]:
    return re.findall("|".join(map(re.escape, known())), text)


def page(text: str) -> str:
    """A text as a paragraph, every third word in tags by turns, and an image behind it."""
    words = html.escape(text, quote=False).split(" ")
    for place in range(0, len(words), 3):
        start, end = _TAGS[place // 3 % 3]
        words[place] = f"{start}{words[place]}{end}"
    return f"<p>{' '.join(words)}<img></p>"


def balanced(text: str) -> bool:
    """Whether what is opened is closed in its order."""
    opened: list[str] = []
    for tag in tags(text):
        if tag.startswith("</"):
            if not opened or opened.pop() != tag[2:-1]:
                return False
        elif tag != "<img>":
            opened.append(tag[1:-1].split(" ")[0])
    return not opened


if __name__ == "__main__":
    main()
