"""What becomes of paragraphs: given to a model whole, cut into sentences, and sentence by sentence as they were.

    python -m benchmarks.paragraphs outputs/multi30k_2of4/packed ../shared/data/multi30k:test

A paragraph is so many lines of a test set one after the other, so that its true sentences are known; lines without a
mark at their end are left out, since nothing tells where they end. BLEU is that of
whole paragraphs. Sentences are counted in a translation by the rules that cut paragraphs, and those that it has fewer
than the reference by the same rules are lost.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM

from benchmarks import tables, timing
from hf_nmsparse import Translator
from hf_nmsparse.corpus import load_corpus
from hf_nmsparse.metrics import score
from hf_nmsparse.paragraphs import Paragraphs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model, English to German")
    parser.add_argument("texts", nargs="+", help="folders of corpora, each with a split: FOLDER:SPLIT")
    parser.add_argument("--lines", type=int, default=5, help="lines of a paragraph")
    parser.add_argument("--sentences", type=int, default=1000, help="the first so many of each split that end")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, help="the JSON file; a table goes beside it")
    options = parser.parse_args()
    translator, rows, signature = Translator(options.model, threads=1), [], ""

    def whole(paragraphs: list[list[str]]) -> list[str]:
        return [one.text for one in translator.translate(map(" ".join, paragraphs), num_beams=options.beams)]

    def split(paragraphs: list[list[str]]) -> list[str]:
        texts = map(" ".join, paragraphs)
        return [one.text for one in translator.translate(texts, split=True, break_loops=True, num_beams=options.beams)]

    def by_line(paragraphs: list[list[str]]) -> list[str]:
        lines = [line for paragraph in paragraphs for line in paragraph]
        found = iter(translator.translate(lines, num_beams=options.beams))
        return [" ".join(next(found).text for _ in paragraph) for paragraph in paragraphs]

    ways: dict[str, Callable[[list[list[str]]], list[str]]] = {
        "whole": whole,
        "split": split,
        "line by line": by_line,
    }
    for text in options.texts:
        corpus, part = text.rsplit(":", 1)
        test = load_corpus(corpus, "en", "de", None)[part]
        pairs = zip(map(str.strip, test["source"]), map(str.strip, test["target"]), strict=True)
        ended = [pair for pair in pairs if pair[0].endswith((".", "!", "?"))][: options.sentences]
        sources, targets = (
            [list(lines[start : start + options.lines]) for start in range(0, len(lines), options.lines)]
            for lines in zip(*ended, strict=True)
        )
        references = list(map(" ".join, targets))
        for way, translate in ways.items():
            start = time.process_time()
            hypotheses = translate(sources)
            seconds, result = time.process_time() - start, score(hypotheses, references)
            counts = zip(sentences(hypotheses), expected := sentences(references), strict=True)
            row = {
                "text": f"{Path(corpus).name}, {part}",
                "way": way,
                "paragraphs": len(sources),
                "bleu": round(result.bleu, 2),
                "sentences": sum(expected),
                "lost": sum(max(0, due - found) for found, due in counts),
                "cpu_s": round(seconds, 2),
            }
            rows.append(row)
            print(row, flush=True)
            signature = result.signature
    record = {
        "benchmark": "paragraphs, whole and cut into sentences",
        **timing.machine(),
        "model": timing.describe(AutoModelForSeq2SeqLM.from_pretrained(options.model)),
        "lines": options.lines,
        "beams": options.beams,
        "signature": signature,
        "note": options.note,
    }
    output = options.output or timing.RESULTS / "paragraphs.json"
    timing.write(output, record, rows, tables.paragraphs_of(record | {"rows": rows}))
    print(output)


def sentences(texts: list[str]) -> list[int]:
    """How many each has."""
    return [len(Paragraphs([text], "de").sentences) for text in texts]


if __name__ == "__main__":
    main()
