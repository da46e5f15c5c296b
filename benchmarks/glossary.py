"""How many terms come out as a glossary says, and what that does to BLEU.

    python -m benchmarks.glossary outputs/multi30k_2of4/packed ../shared/data/multi30k

The terms are taken from the test set itself, as is usual for such figures: words of a source that have a word of the
reference as one of their commonest translations in the training text (by the Dice coefficient of the lines that have
them). Each sentence has a glossary of its own, of at most so many of them.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from itertools import product
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM

from benchmarks import tables, timing
from hf_nmsparse import Translator
from hf_nmsparse.corpus import load_corpus
from hf_nmsparse.glossary import Glossary, missing
from hf_nmsparse.metrics import score

_WORD = re.compile(r"[^\W\d_]{4,}")
_LEAST_DICE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model, English to German")
    parser.add_argument("corpus", type=Path, help="folder of its corpus, with a training and a test set")
    parser.add_argument("--sentences", type=int, default=1000, help="the first so many of the test set")
    parser.add_argument("--terms", type=int, default=2, help="most terms of a sentence")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--note", default="", help="what the reader has to know about this run")
    parser.add_argument("--output", type=Path, help="the JSON file; a table goes beside it")
    options = parser.parse_args()
    splits = load_corpus(str(options.corpus), "en", "de", None)
    sources, references = (list(splits["test"][side])[: options.sentences] for side in ("source", "target"))
    train = list(zip(splits["train"]["source"], splits["train"]["target"], strict=True))
    given = glossaries(train, list(zip(sources, references, strict=True)), options.terms)
    translator, rows, signature = Translator(options.model, threads=1), [], ""
    for way in ("without", "with"):
        start = time.process_time()
        found = [
            translator.translate([source], num_beams=options.beams, glossary=glossary if way == "with" else None)[
                0
            ].text
            for source, glossary in zip(sources, given, strict=True)
        ]
        seconds, result = time.process_time() - start, score(found, references)
        wanted = [glossary.terms(source) for glossary, source in zip(given, sources, strict=True)]
        lost = sum(len(missing(terms, text)) for terms, text in zip(wanted, found, strict=True))
        terms = sum(map(len, wanted))
        row = {
            "glossary": way,
            "sentences": len(sources),
            "terms": terms,
            "kept": terms - lost,
            "bleu": round(result.bleu, 2),
            "chrf": round(result.chrf, 2),
            "cpu_s": round(seconds, 2),
        }
        rows.append(row)
        print(row, flush=True)
        signature = result.signature
    record = {
        "benchmark": "terms of a glossary",
        **timing.machine(),
        "model": timing.describe(AutoModelForSeq2SeqLM.from_pretrained(options.model)),
        "beams": options.beams,
        "text": f"{options.corpus.name}, test",
        "signature": signature,
        "note": options.note,
    }
    output = options.output or timing.RESULTS / "glossary.json"
    timing.write(output, record, rows, tables.glossary_of(record | {"rows": rows}))
    print(output)


def glossaries(train: list[tuple[str, str]], test: list[tuple[str, str]], most: int) -> list[Glossary]:
    """A glossary for each test sentence, of the translations of its reference that training text knows."""
    lines = [tuple(set(_WORD.findall(side)) for side in pair) for pair in train]
    of_source = Counter(word for source, _ in lines for word in source)
    of_target = Counter(word for _, target in lines for word in target)
    wanted = {word for source, _ in test for word in _WORD.findall(source)}
    together = Counter(pair for source, target in lines for pair in product(source & wanted, target))
    found = []
    for source, reference in test:
        targets, terms = Counter(_WORD.findall(reference)), dict[str, str]()
        for word, count in Counter(_WORD.findall(source)).items():
            dice = {
                target: 2 * together[word, target] / (of_source[word] + of_target[target])
                for target, times in targets.items()
                if times == count == 1 and together[word, target]
            }
            best = max(dice, key=lambda target: (dice[target], target), default=None)
            if best is not None and dice[best] >= _LEAST_DICE and best not in terms.values():
                terms[word] = best
        found.append(Glossary(dict(sorted(terms.items(), key=lambda term: of_source[term[0]])[:most])))
    return found


if __name__ == "__main__":
    main()
