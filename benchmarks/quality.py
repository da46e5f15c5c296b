"""What each way to compute costs in BLEU: one packed model, one test set, every mode, paired with the dense one.

    python -m benchmarks.quality outputs/multi30k_2of4/packed ../shared/data/multi30k

Each mode loads the model anew and translates the test set; BLEU is compared with that of the dense layers in fp32 by
paired bootstrap. "int8 file" is the same model written by ``save_packed(values="int8")``, embeddings included. The
records go to benchmarks/results/quality.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_nmsparse import NMSparseQuantizationConfig, save_packed
from hf_nmsparse.corpus import load_corpus
from hf_nmsparse.evaluation import versions
from hf_nmsparse.metrics import compare, score
from hf_nmsparse.pipeline import translate

RESULTS = Path(__file__).parent / "results" / "quality.json"

# compute, head, and the number type of activations; None is the file's own
MODES: dict[str, tuple[str, str | None, torch.dtype | None]] = {
    "dense, fp32 activations": ("dense", None, torch.float32),
    "dense": ("dense", None, None),
    "auto": ("auto", None, None),
    "auto, fp32 activations": ("auto", None, torch.float32),
    "fp32": ("fp32", None, torch.float32),
    "int8 layers, dense head": ("int8", "dense", torch.float32),
    "int8": ("int8", "int8", torch.float32),
    "int8 file": ("auto", None, torch.float32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a packed model with float values")
    parser.add_argument("corpus", help="folder with the test set, as the recipe takes it")
    parser.add_argument("--split", default="test")
    parser.add_argument("--sentences", type=int, help="score the first so many only")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()

    test = load_corpus(args.corpus, "en", "de", None)[args.split][: args.sentences]
    sources, references = list(test["source"]), list(test["target"])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows: list[dict[str, Any]] = []
    baseline: list[str] = []
    with TemporaryDirectory() as folder:
        for mode, (compute, head, dtype) in MODES.items():
            path = args.model
            if mode == "int8 file":
                path = Path(folder)
                save_packed(load(args.model, "dense", None, torch.float32), path, values="int8")
            model = load(path, compute, head, dtype)
            start = time.perf_counter()
            hypotheses = translate(model, tokenizer, sources, num_beams=args.beams)
            seconds = time.perf_counter() - start
            baseline = baseline or hypotheses
            result, against = score(hypotheses, references), compare(hypotheses, baseline, references)
            rows.append(
                {
                    "mode": mode,
                    "activations": str(model.dtype).removeprefix("torch."),
                    "bleu": result.bleu,
                    "chrf": result.chrf,
                    "difference": against.difference,
                    "interval": list(against.interval),
                    "p": against.p,
                    "same_translations": sum(map(str.__eq__, hypotheses, baseline)),
                    "seconds": round(seconds, 1),
                    "bytes": (path / "model.safetensors").stat().st_size,
                }
            )
            print(f"{mode:<26} BLEU {result.bleu:.2f} {against}")
    record = {
        "model": args.model.parent.name,
        "corpus": f"{Path(args.corpus).name}, {args.split}",
        "sentences": len(sources),
        "beams": args.beams,
        "threads": torch.get_num_threads(),
        "signature": result.signature,
        "versions": versions(),
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load(path: Path, compute: str, head: str | None, dtype: torch.dtype | None) -> Any:
    config = NMSparseQuantizationConfig(compute=compute, head=head)
    return AutoModelForSeq2SeqLM.from_pretrained(path, quantization_config=config, dtype=dtype or "auto")


if __name__ == "__main__":
    main()
