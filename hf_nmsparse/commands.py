"""What the commands of ``nmsparse`` do. Each takes the arguments that `hf_nmsparse.cli` has read."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_nmsparse.devices import device_of, on_cpu
from hf_nmsparse.line_files import (
    check_input,
    check_output,
    is_one_file,
    read_lines,
    reading,
    writing,
    writing_whole,
)
from hf_nmsparse.markup import Marked, Tag
from hf_nmsparse.terminal import make_record_plain, named, one_line, row, say

if TYPE_CHECKING:
    from hf_nmsparse.glossary import Glossary
    from hf_nmsparse.translator import Translator

__all__ = [
    "convert",
    "doctor",
    "evaluate",
    "export",
    "inspect",
    "learn_shortlist",
    "pack",
    "plot",
    "prune",
    "report",
    "serve",
    "translate",
]

# torch and transformers take seconds to import: each command imports what it needs.

# What a folder holds beside the model: the tokenizer, whose class names more, the settings of generation, the card.
_TOKENIZER_FILES = (
    "chat_template*",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*",
    "merges.txt",
    "*.spm",
    "*.model",
)
_FILES_BESIDE = ("README.md", "generation_config.json", *_TOKENIZER_FILES, "shortlist.safetensors")

# So many lines of a file are sorted by length together; longer chunks save little and delay the output.
_CHUNK = 4096


def inspect(args: argparse.Namespace) -> None:
    """Checks a packed model and prints what is sparse in it."""
    from hf_nmsparse.packed_files import check_folder
    from hf_nmsparse.packed_format import FORMAT_VERSION, packed_bytes

    found = check_folder(args.path)
    pattern = found.pattern
    row(f"pattern        {pattern}, {pattern.n} of every {pattern.m} weights are kept")
    row(f"values         {found.values}{', embeddings and output projection too' if found.embeddings else ''}")
    row(f"sparse layers  {len(found.layers)}, every one valid")
    every = "every linear layer" if found.format_version == FORMAT_VERSION else "every linear layer and convolution"
    row(f"targets        {', '.join(found.targets) if found.targets is not None else every}")
    row(f"ignored        {', '.join(found.ignored) if found.ignored is not None else 'output heads and routers'}")
    row(f"packed bytes   {found.packed_bytes:,}, {found.packed_bytes / found.dense_bytes:.1%} of dense")
    row(f"dense bytes    {found.dense_bytes:,}")
    row(f"written by     {found.producer or 'unknown'}, format version {found.format_version}")
    row(f"standalone     {'yes, with trust_remote_code=True' if found.standalone else 'no, this package reads it'}")
    if args.layers:
        for name, (rows, columns) in found.layers.items():
            row(f"{name}  {rows}x{columns}  {packed_bytes(rows, columns, pattern, found.values):,} bytes")


def prune(args: argparse.Namespace) -> None:
    """Prunes a dense model by a text, and writes it as packed files."""
    from hf_nmsparse.config import NMSparseConfig
    from hf_nmsparse.layers import sparse_layers
    from hf_nmsparse.saving import save_packed, values_name
    from hf_nmsparse.sparse_model import sparsify

    config = NMSparseConfig(args.pattern)
    if (args.calibration is None) != (args.method == "magnitude"):
        needs = "reads no text; leave out --calibration" if args.calibration else "needs a text; give --calibration"
        raise ValueError(f"prune: --method {args.method} {needs}")
    with _new_folder(args.target) as target:
        model, _ = _load(args.source, tokenizer=False)
        if sparse_layers(model):
            raise ValueError(f"prune: {args.source} is sparse already; give the dense model")
        values = args.values or values_name(model.dtype)
        model.float()
        calibration = None if args.calibration is None else _calibration(model, args)
        sparsify(model, config, calibration=calibration, permute=args.permute)
        save_packed(model, target, values=values, embeddings=args.embeddings, standalone=args.standalone)
        _copy_files_beside(args.source, target)
    inspect(argparse.Namespace(path=os.path.realpath(args.target), layers=False))


def _calibration(model: Any, args: argparse.Namespace) -> Any:
    """The batch of ``--calibration``, its targets from the second file or translated by the model itself."""
    from hf_nmsparse.calibration import Calibration
    from hf_nmsparse.texts import direction_of, encode

    if len(args.calibration) > 2:
        raise ValueError(f"--calibration takes a source, or a source and its target, got {len(args.calibration)} files")
    tokenizer = _load_tokenizer(args.source)
    direction = direction_of(model, tokenizer, args.src_lang, args.tgt_lang)
    if len(args.calibration) == 2:
        pairs = list(islice(_pairs(args.calibration, "--calibration"), args.lines))
        sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
    else:
        with reading(args.calibration[0]) as lines:
            sources = list(islice((line for line in lines if line.strip()), args.lines))
        settings = ("beams", "max_length", "compute", "head", "threads", "device")
        how = {**vars(args), "model": args.source, "batch_size": 64, **dict.fromkeys(settings)}
        targets = [text for chunk in _translations(argparse.Namespace(**how), iter(sources), _CHUNK) for text in chunk]
    if args.tgt_lang is not None and hasattr(tokenizer, "tgt_lang"):  # which marks the targets
        tokenizer.tgt_lang = args.tgt_lang
    rows = zip(
        encode(tokenizer, [direction.prompt + text for text in sources], math.inf, direction.frame),
        encode(tokenizer, targets, math.inf, target=True),
        strict=True,
    )
    pairs_of_tokens = [{"input_ids": source, "labels": target} for source, target in rows]
    found = Calibration.of_pairs(model, pairs_of_tokens, args.lines, method=args.method)
    say(f"calibrated on {len(found.inputs['input_ids'])} of {len(sources)} sentences")
    return found


def pack(args: argparse.Namespace) -> None:
    """Writes a trained model as packed files."""
    from hf_nmsparse.layers import sparse_layers
    from hf_nmsparse.saving import save_packed

    with _new_folder(args.target) as target:
        model, _ = _load(args.source, tokenizer=False)
        if sparse_layers(model):
            if args.pattern is not None:
                raise ValueError(f"{args.source} knows its own pattern; leave out --pattern")
        elif args.pattern is None:
            raise ValueError(f"{args.source} says nothing of sparsity; if its weights are masked, give --pattern 2:4")
        else:
            _mark_masked_layers(model, args.pattern)
        save_packed(model, target, values=args.values, embeddings=args.embeddings, standalone=args.standalone)
        _copy_files_beside(args.source, target)
    inspect(argparse.Namespace(path=os.path.realpath(args.target), layers=False))


def _mark_masked_layers(model: Any, text: str) -> None:
    """Makes N:M layers of the linear layers whose weights keep to the pattern already."""
    from hf_nmsparse.config import NMSparseConfig
    from hf_nmsparse.masks import count_violations
    from hf_nmsparse.pattern import NMPattern
    from hf_nmsparse.sparse_model import select_layers, sparsify

    pattern = NMPattern.parse(text)
    chosen, _ = select_layers(model, NMSparseConfig(pattern))
    masked = [name for name, layer in chosen.items() if not count_violations(layer.weight, pattern)]
    if not masked:
        raise ValueError(f"no linear layer of the model is {pattern} sparse; train it before it is packed")
    for name in chosen:
        if name not in masked:
            say(f"nmsparse: {name} is not {pattern} sparse and stays dense", error=True)
    sparsify(model, NMSparseConfig(pattern, masked if len(masked) < len(chosen) else None))


def export(args: argparse.Namespace) -> None:
    """Writes a sparse model as dense files, or a Marian model in the format of another tool."""
    if args.tool is not None:
        _export_for(args)
        return
    if args.quantization is not None or args.sentences is not None:
        raise ValueError("export: --quantization and --sentences go with --for; `nmsparse pack` writes int8 files")
    from hf_nmsparse.saving import export_dense

    with _new_folder(args.target) as target:
        model, _ = _load(args.source, tokenizer=False)
        export_dense(model, target)
        _copy_files_beside(args.source, target)
    say(f"{args.target}: dense")


# What each tool needs, as Python knows it.
_NEEDED = {"ctranslate2": ("ctranslate2",), "onnx": ("onnx", "onnxruntime", "onnxscript")}


def _export_for(args: argparse.Namespace) -> None:
    """Writes a model for the tool that ``--for`` names, once its translations are those of transformers."""
    missing = [name for name in _NEEDED[args.tool] if find_spec(name) is None]
    if missing:
        raise ValueError(f"export: --for {args.tool} needs {', '.join(missing)}: pip install 'hf-nmsparse[export]'")
    import torch

    from hf_nmsparse.ctranslate2_export import export_ctranslate2
    from hf_nmsparse.export_check import SENTENCES, as_dense, check_marian
    from hf_nmsparse.onnx_export import export_onnx
    from hf_nmsparse.texts import encode

    texts = list(SENTENCES) if args.sentences is None else [line for line in read_lines(args.sentences) if line.strip()]
    if not texts:
        raise ValueError(f"export: {args.sentences} holds no sentence; give some that the model is made for")
    with _new_folder(args.target) as target:
        model, tokenizer = _load(args.source, dtype=torch.float32)
        check_marian(model, args.tool)
        model = as_dense(model)
        sources = encode(tokenizer, texts, model.config.max_position_embeddings)
        if args.tool == "ctranslate2":
            same = export_ctranslate2(model, tokenizer, target, sources, args.quantization)
        else:
            same = {1: export_onnx(model, target, sources, args.quantization)}
        _copy_files_beside(args.source, target, _TOKENIZER_FILES)
    searches = {1: "greedily", **{beams: f"with {beams} beams" for beams in same if beams > 1}}
    all_of = f"{len(texts)} of {len(texts)} sentences {' and '.join(searches[beams] for beams in same)}"
    say(f"{args.target}: for {args.tool}; in fp32 it translates {all_of} as transformers does")
    if args.quantization is not None:
        counts = ", ".join(f"{count} {searches[beams]}" for beams, count in same.items())
        say(f"what is written is in {args.quantization}, and translates so: {counts}")


def convert(args: argparse.Namespace) -> None:
    """Writes a sparse-24-bitmask checkpoint as dense files."""
    from hf_nmsparse.compressed_tensors import convert_bitmask

    with _new_folder(args.target) as target:
        count = convert_bitmask(args.source, target)
    say(f"{args.target}: dense, {count} weights are 2:4 sparse")


def translate(args: argparse.Namespace) -> None:
    """Translates lines of text, or a document."""
    from hf_nmsparse.documents import Options, check_options, format_of, translate_document

    form = args.format or format_of(args.input) or "txt"
    options = Options(args.column, args.to_column, args.overwrite)
    check_options(form, options)
    if form == "txt":
        _translate_lines(args)
        return
    if args.split is False:
        raise ValueError(f"--no-split is for lines of text, and not for {form}; leave it out")
    check_input(args.input)
    check_output(args.output, args.input)
    load = cache(lambda: _translate_marked(args))  # once there is a text to translate
    with writing_whole(args.output) as target:
        translate_document(args.input, target, form, lambda texts: load()(texts), options)


def _translate_marked(args: argparse.Namespace) -> Callable[[list[Marked]], list[Marked]]:
    """Loads the model, and translates texts with markup, which only the native engine does."""
    settings, glossary = _settings(args), _glossary(args)
    translator = _on_engine(args, settings)
    languages = {"src_lang": args.src_lang, "tgt_lang": args.tgt_lang}
    given = {"batch_size": args.batch_size, "glossary": glossary, **languages, **settings}
    language = args.split if isinstance(args.split, str) else None
    translate = None
    if translator is None:
        _check_no_glossary(args, glossary)
        translate = _on_torch(args, {**settings, **_ways(args.split)})

    def translated(texts: list[Marked]) -> list[Marked]:
        plain = ["".join(map(str, text)) for text in texts if not _has_tags(text)]
        marked = [text for text in texts if _has_tags(text)]
        if translate is not None:
            if marked:
                raise ValueError(
                    f"{args.model}: the engine does not run it, by whose attention markup goes with its words, and "
                    f"{len(marked)} texts have some; translate a document without"
                )
            return [(text,) for text in translate(plain)]
        assert translator is not None
        of_plain = iter(translator.translate(plain, **_ways(args.split), **given))
        of_marked = iter(translator.translate_marked(marked, split=language, **given))
        return [next(of_marked) if _has_tags(text) else (next(of_plain).text,) for text in texts]

    return translated


def _has_tags(text: Marked) -> bool:
    return any(isinstance(part, Tag) for part in text)


def _translate_lines(args: argparse.Namespace) -> None:
    with reading(args.input) as source:
        check_output(args.output, args.input)
        chunks = _translations(args, source, _CHUNK if Path(args.input).is_file() else args.batch_size, args.split)
        first = next(chunks, [])  # whatever fails fails before the output is touched
        with writing(args.output) as target:
            for chunk in chain([first], chunks):
                target.writelines(f"{text}\n" for text in chunk)
                target.flush()


def evaluate(args: argparse.Namespace) -> None:
    """Translates a test set and scores it."""
    from hf_nmsparse.evaluation import versions
    from hf_nmsparse.metrics import compare, score

    # Whatever can be wrong is found before the translation rather than after it.
    sources, references = read_lines(args.source), read_lines(args.reference)
    baseline = None if args.baseline is None else read_lines(args.baseline)
    for name, lines in ((args.reference, references), (args.baseline, baseline)):
        if lines is not None and len(lines) != len(sources):
            raise ValueError(
                f"{args.source} has {len(sources)} lines and {name} has {len(lines)}; they must be aligned"
            )
    if not sources:
        raise ValueError(f"{args.source} is empty")
    score(references, references, args.tokenize)
    for output, other in ((args.output, None), (args.json, args.output)):
        check_output(output, args.source, args.reference, args.baseline)
        if output is not None and other is not None and is_one_file(output, other):
            raise ValueError(f"{output} is given as --output and as --json; name two files")

    hypotheses = [text for chunk in _translations(args, iter(sources), _CHUNK) for text in chunk]
    if args.output is not None:
        with writing(args.output) as file:
            file.writelines(f"{text}\n" for text in hypotheses)
    result = score(hypotheses, references, args.tokenize)
    say(result)
    asked = (
        "model",
        "source",
        "reference",
        "baseline",
        "beams",
        "max_length",
        "compute",
        "head",
        "src_lang",
        "tgt_lang",
    )
    record = {
        **asdict(result),
        "against_baseline": None,
        "arguments": {key: getattr(args, key) for key in asked},
        "versions": versions(),
    }
    if baseline is not None:
        comparison = compare(hypotheses, baseline, references, tokenize=args.tokenize)
        say(comparison)
        record["against_baseline"] = {
            **asdict(comparison),
            "difference": comparison.difference,
            "verdict": comparison.verdict,
        }
    if args.json is not None:
        with writing(args.json) as file:
            file.write(json.dumps(record, indent=2, sort_keys=True) + "\n")


def serve(args: argparse.Namespace) -> None:
    """Translates over HTTP until a signal says to stop."""
    missing = [name for name in ("fastapi", "httptools", "prometheus_client", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install 'hf-nmsparse[serve]'")
    from hf_nmsparse.serve.limits import Limits
    from hf_nmsparse.serve.server import Served, serve
    from hf_nmsparse.translator import cpus

    keys = args.api_key or [key for key in (os.environ.get("NMSPARSE_API_KEY"),) if key is not None]
    limits = Limits(characters=args.max_characters, waiting=args.max_waiting, seconds=args.timeout)
    threads = args.threads or max(1, cpus() // args.workers)
    served = Served(
        tuple(args.models), threads, args.max_tokens, args.compute, limits, tuple(keys), tuple(args.allow_origin)
    )
    serve(served, args.host, args.port, args.workers)


def learn_shortlist(args: argparse.Namespace) -> None:
    """Learns a model's shortlist from a corpus."""
    from transformers import AutoConfig, GenerationConfig

    from hf_nmsparse.engine_spec import read
    from hf_nmsparse.shortlist import coverage, learn, save
    from hf_nmsparse.texts import languages_of

    if not Path(args.model).is_dir():
        raise ValueError(f"no folder {args.model}")
    config = AutoConfig.from_pretrained(args.model)
    spec = read(config.to_dict())
    tokenizer = _load_tokenizer(args.model)
    if languages_of(tokenizer):
        raise ValueError(f"{args.model} has several languages, and a shortlist is of one pair")
    has_settings = (Path(args.model) / "generation_config.json").is_file()
    settings: Any = GenerationConfig.from_pretrained(args.model) if has_settings else config
    forced = ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id")
    given = [getattr(settings, name, None) for name in forced]
    keep = {token for one in given if one is not None for token in (one if isinstance(one, list) else [one])}
    texts = list(
        _translated_pairs(args)
        if args.translate
        else _pairs(args.corpus, "--corpus", args.source_lang, args.target_lang)
    )
    sources = tokenizer([source for source, _ in texts])["input_ids"]
    targets = tokenizer(text_target=[target for _, target in texts])["input_ids"]
    source_vocabulary, target_vocabulary = spec.config.encoder.vocabulary, spec.config.target_vocabulary
    shortlist = learn(
        zip(sources, targets, strict=True),
        source_vocabulary,
        target_vocabulary,
        keep=keep,
        per_token=args.per_token,
        always=args.always,
        copies=source_vocabulary == target_vocabulary and not getattr(tokenizer, "separate_vocabs", False),
    )
    kept, found = coverage(shortlist, list(zip(sources, targets, strict=True)))
    file = save(shortlist, args.model)
    say(f"{file}: {kept:,.0f} of {target_vocabulary:,} tokens a sentence, with {found:.1%} of the targets' tokens")


def _pairs(
    names: list[str], option: str, source_lang: str = "source", target_lang: str = "target"
) -> Iterator[tuple[str, str]]:
    """The sentence pairs of the files that an option names."""
    from hf_nmsparse.pairs import read_pairs

    files = tuple(map(Path, names))
    if len(files) > 2:
        raise ValueError(f"{option} takes a file of pairs, or a source and its target, got {len(files)} files")
    for file in files:
        if not file.is_file():
            raise ValueError(f"no file {file}")
    for pair in read_pairs(files, source_lang, target_lang):
        yield pair["source"], pair["target"]


def _translated_pairs(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The lines of ``--corpus`` with the model's own translations."""
    from hf_nmsparse.pipeline import translate

    if len(args.corpus) != 1:
        raise ValueError(f"--translate takes one file of source text, got {len(args.corpus)}")
    lines = [line for line in read_lines(args.corpus[0]) if line.strip()]
    model, tokenizer = _load(args.model)
    _mask_for_good(model)
    return zip(lines, translate(model, tokenizer, lines, 64), strict=True)


def plot(args: argparse.Namespace) -> None:
    """Draws finished runs."""
    from hf_nmsparse.plots import plot_runs, read_runs

    for file in plot_runs(read_runs(args.runs), args.output, args.format):
        say(file)


def report(args: argparse.Namespace) -> None:
    """Writes a page on finished runs."""
    from hf_nmsparse.comet_metric import comet_judge
    from hf_nmsparse.report_page import page
    from hf_nmsparse.run_report import read_report

    check_output(args.output)
    named = None if args.comet is None else f"COMET {args.comet.name}"
    found = page(read_report(args.runs, named, None if args.comet is None else comet_judge(args.comet)))
    with writing(args.output) as file:
        file.write(found)
    if args.output != "-":
        say(args.output)


def doctor(args: argparse.Namespace) -> None:
    """Prints which kernels this machine runs, and what translates the models that are named."""
    from hf_nmsparse.kernels.__main__ import main as doctor

    for model in args.models:
        if not (model / "config.json").is_file():
            raise ValueError(f"doctor: {model} holds no config.json; name the folder of a model")
    doctor()
    for model in args.models:
        row(f"{model}: {_who_translates(model)}")


def _who_translates(model: Path) -> str:
    """Whether the engine or transformers translates a model, and what computes dense in it."""
    from hf_nmsparse.engine_files import read_record
    from hf_nmsparse.engine_spec import read
    from hf_nmsparse.kernels import engine
    from hf_nmsparse.kernels.order import format_of
    from hf_nmsparse.packed_files import read_object

    config = read_object(model / "config.json")
    try:
        record = read_record(config)
    except ValueError as error:
        return f"nothing translates: {error}"
    reason = engine.why_not()
    if record is not None and record.format == "dense":
        reason = reason or "it is a training checkpoint; write it with nmsparse pack"
    try:
        spec = read(config)
    except ValueError as error:
        kind = str(config.get("model_type"))
        if _is_of_another_kind(kind):
            return f"nothing translates: model_type {kind!r} is no encoder-decoder"
        reason = reason or str(error).removeprefix("engine: ")
    if reason:
        return f"transformers translates: {reason}"
    if record is not None:
        numbers = record.values if record.values in ("bf16", "int8") else "fp32"
        # What is too wide for sums of int8 takes a kernel of other numbers.
        tried = (numbers, "fp32") if numbers == "int8" else (numbers,)
        if not all(any(format_of(record.pattern, one.in_features, each) for each in tried) for one in spec.weights):
            return f"the engine translates; {record.pattern} in {record.values} has no kernel and computes dense"
    return "the engine translates"


def _translations(
    args: argparse.Namespace, lines: Iterator[str], chunk: int, split: bool | str = False
) -> Iterator[list[str]]:
    """Loads the model, then translates lines as they are asked for, so many at a time; a translation is one line."""
    translate = _translate_texts(args, split)

    def translated(texts: list[str]) -> list[str]:
        return [" ".join(text.splitlines()) for text in translate(texts)]

    return map(translated, iter(lambda: list(islice(lines, chunk)), []))


def _translate_texts(args: argparse.Namespace, split: bool | str) -> Callable[[list[str]], list[str]]:
    """Loads the model, on the native engine where that runs it."""
    settings, ways, glossary = _settings(args), _ways(split), _glossary(args)
    translator = _on_engine(args, settings)
    if translator is None:
        _check_no_glossary(args, glossary)
        return _on_torch(args, {**settings, **ways})

    def translate(texts: list[str]) -> list[str]:
        given = {"src_lang": args.src_lang, "tgt_lang": args.tgt_lang, "glossary": glossary, **settings}
        found = translator.translate(texts, batch_size=args.batch_size, **ways, **given)
        return [translation.text for translation in found]

    return translate


def _glossary(args: argparse.Namespace) -> Glossary | None:
    """The terms of ``--glossary``, where the command has it and it was given."""
    from hf_nmsparse.glossary import Glossary

    file = vars(args).get("glossary")
    return None if file is None else Glossary.read(file)


def _check_no_glossary(args: argparse.Namespace, glossary: Glossary | None) -> None:
    if glossary is not None:
        raise ValueError(f"{args.model}: the engine does not run it, which --glossary needs; leave that out")


def _ways(split: bool | str) -> dict[str, Any]:
    """What is done beside the translation, for texts that are cut into sentences."""
    return {"split": split, "break_loops": split is not False, "keep_placeholders": split is not False}


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of ``generate`` that were given."""
    given = {"num_beams": args.beams, "max_length": args.max_length}
    return {key: value for key, value in given.items() if value is not None}


def _on_engine(args: argparse.Namespace, settings: dict[str, Any]) -> Translator | None:
    """The model on the native engine; None for what that does not run, which transformers may know or refuse."""
    chosen = args.head is not None or args.compute in ("dense", "reference")
    if os.environ.get("HF_NMSPARSE_ENGINE") == "0" or chosen or not on_cpu(args.device):
        return None
    from hf_nmsparse.translator import Translator

    try:
        translator = Translator(args.model, compute=args.compute or "auto", threads=args.threads)
        translator.check(**settings)
    except ValueError:
        return None
    return translator


def _on_torch(args: argparse.Namespace, settings: dict[str, Any]) -> Callable[[list[str]], list[str]]:
    """Translates with the model of transformers."""
    import torch

    from hf_nmsparse.compute import set_compute
    from hf_nmsparse.pipeline import translate

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = device_of(args.device)
    model, tokenizer = _load(args.model)
    _mask_for_good(model)
    if args.compute is not None or args.head is not None:
        set_compute(model, args.compute or "auto", args.head)
    model.to(device)

    def translated(texts: list[str]) -> list[str]:
        languages = {"src_lang": args.src_lang, "tgt_lang": args.tgt_lang}
        try:
            return translate(model, tokenizer, texts, args.batch_size, **languages, **settings)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"--device {device}: {error}; give a smaller --batch-size") from error
        except (ValueError, OSError):
            raise
        except Exception as error:  # what is raised for settings that do not fit the model is up to each model
            raise ValueError(f"{args.model} cannot translate: {named(error)}") from error

    return translated


def _load(source: str, tokenizer: bool = True, **settings: Any) -> tuple[Any, Any]:
    """The model in a folder or on the Hub, as ``from_pretrained`` loads it with ``settings``, and its tokenizer.

    Nobody is asked whether to run code that comes with them: the terminal may be where the sentences come from.
    """
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    from hf_nmsparse.loading import load_seq2seq
    from hf_nmsparse.packed_format import PackedFormatError

    disable_progress_bar()
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(make_record_plain)
    if not Path(source).is_dir() and (Path(source).exists() or source.count("/") != 1):
        raise ValueError(f"no folder {source}, and no 'user/name' on the Hub either")
    try:
        model = load_seq2seq(source, trust_remote_code=False, **settings)
        if (Path(source) / "generation_config.json").exists():  # the model passes over a damaged one in silence
            GenerationConfig.from_pretrained(source)
    except (PackedFormatError, OSError):
        raise
    except Exception as error:  # what is raised for damaged files is up to each reader
        _refuse_other_kinds(source)
        kind = "" if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: "
        raise ValueError(f"{source} cannot be loaded: {kind}{str(error).strip()}") from error
    return model, _load_tokenizer(source) if tokenizer else None


def _is_of_another_kind(model_type: str) -> bool:
    """Whether transformers knows a type of model, and not as an encoder-decoder."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING


def _refuse_other_kinds(source: str) -> None:
    """Refuses a model that is no encoder-decoder, where transformers knows what it is."""
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
    except Exception:  # what is wrong with it is said of the model
        return
    if _is_of_another_kind(kind):
        raise ValueError(
            f"{source} is a model of {kind!r}, which does not translate; name an encoder-decoder, and see "
            "save_packed and export_dense in Python for other models"
        )


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # up to each tokenizer: TypeError among others, and no Exception where Rust panics
        raise ValueError(f"{source}: no tokenizer could be loaded: {str(error).strip()}") from error


def _mask_for_good(model: Any) -> None:
    """Lets the layers of a training checkpoint run as stock layers, without a new mask in every forward."""
    from hf_nmsparse.layers import NMLayer

    for module in [module for module in model.modules() if isinstance(module, NMLayer)]:
        module.finalize()
        module.to_stock()


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder whose files move to ``path`` together, which was not there, or was empty.

    Where the block fails nothing of it stays, and what another process has put there does.
    """
    from safetensors import SafetensorError

    from hf_nmsparse.files import model_folder

    place = Path(os.path.realpath(path))
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{path} is there already; give a new folder")
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    written = str(path)
    try:
        with model_folder(place) as beside:
            # A folder of its own, for who saves a model locks where it goes, and the one beside is locked.
            folder = Path(written := tempfile.mkdtemp(dir=beside))
            yield folder
            for file in folder.iterdir():
                file.replace(beside / file.name)
            folder.rmdir()
    except BaseException as error:
        for left in made:
            with suppress(OSError):  # another process has put something there
                left.rmdir()
        if isinstance(error, SafetensorError):  # of a full disk, where others raise OSError
            raise ValueError(f"{path} could not be written: {error}") from error
        if isinstance(error, ValueError) and written in str(error):
            raise ValueError(str(error).replace(written, str(path))) from error
        raise


def _copy_files_beside(source: str, target: Path, patterns: tuple[str, ...] = _FILES_BESIDE) -> None:
    """Copies tokenizer, generation settings and card as they are; of a Hub model the tokenizer is loaded and saved."""
    if not Path(source).is_dir():
        _load_tokenizer(source).save_pretrained(target)
        return
    for pattern in (*patterns, *_tokenizer_files(source)):
        for file in Path(source).glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _tokenizer_files(folder: str) -> set[str]:
    """What the class of the tokenizer in a folder calls its files; nothing where there is none that loads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it would be used with
            return set(_load_tokenizer(folder).vocab_files_names.values())
    except ValueError as error:
        if (Path(folder) / "tokenizer_config.json").exists():
            say(f"nmsparse: {one_line(error)}; its files of unusual names stay behind", error=True)
        return set()
