"""The recipe's arguments: its configurations, values of files and command lines, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_nmsparse import SparseTrainingArguments
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.sparse_model import select_layers
from recipes.arguments import DEFAULT, parse
from recipes.wmt_en_de import load_model
from tests.recipe_runs import tiny
from tests.tiny import tokenizer

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


def test_without_a_configuration_it_runs_wmt14(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`accelerate launch recipes/wmt_en_de.py` ended in a page of usage; from any folder, keys go on top."""
    monkeypatch.chdir(tmp_path)
    named, _ = parse([str(DEFAULT), "--use_cpu", "true"])
    assert "wmt_en_de: runs" not in capsys.readouterr().out
    alone, args = parse(["--use_cpu", "true"])
    assert alone == named
    assert (alone.corpus, alone.corpus_config, args.max_steps) == ("wmt/wmt14", "de-en", 100_000)
    line, *_ = capsys.readouterr().out.splitlines()
    assert line.startswith(f"wmt_en_de: runs {ROOT / 'recipes/configs/wmt14_transformer_base_2of4.yaml'}; name another")
    for config in CONFIGS:
        assert config.stem in line
    small, args = parse(["--use_cpu", "true", "--layers", "2", "--max_steps", "3"])
    assert (small.layers, small.d_model, args.max_steps) == (2, 512, 3)


@pytest.mark.parametrize(
    ("devices", "batches", "tokens"), [(1, 8, 6250), (2, 4, 6250), (3, 3, 5555), (8, 1, 6250), (16, 1, 3125)]
)
def test_a_step_holds_as_many_tokens_on_any_number_of_devices(
    devices: int, batches: int, tokens: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SparseTrainingArguments, "world_size", devices)
    _, args = parse([str(DEFAULT), "--use_cpu", "true"])
    assert (args.gradient_accumulation_steps, args.tokens_per_batch) == (batches, tokens)
    assert 50_000 - devices * batches < devices * batches * tokens <= 50_000
    assert capsys.readouterr().out == (
        f"wmt_en_de: a step of 50,000 tokens: {devices} device(s) x {batches} batch(es) of {tokens:,} tokens\n"
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configurations_parse_and_fit_their_model(config: Path, tmp_path: Path) -> None:
    recipe, args = parse([str(config), "--output_dir", str(tmp_path), "--use_cpu", "true", "--report_to", "none"])
    if "2of4" in config.stem or config.stem == "demo":
        assert (args.sparse_method, args.sparse_decay, recipe.pattern) == ("sr-ste", 2e-4, "2:4")
    else:
        assert args.sparse_method == "dense"
    assert recipe.average <= (args.save_total_limit or recipe.average)
    if recipe.model is None:
        model = load_model(recipe, tokenizer())
        chosen, dense = select_layers(model, NMSparseConfig(recipe.pattern, recipe.targets))
        # Of a layer: 4 products of each attention, one of them in the encoder and two in the decoder, and 2 more.
        each: dict[Any, tuple[int, int]] = {
            None: (6, 10),
            ("fc1", "fc2"): (2, 2),
            ("self_attn", "encoder_attn"): (4, 8),
        }
        of_encoder, of_decoder = each[tuple(recipe.targets) if recipe.targets else None]
        depths = model.config.encoder_layers, model.config.decoder_layers
        assert len(chosen) == depths[0] * of_encoder + depths[1] * of_decoder
        assert dense["lm_head"] in ("the output head", "no target rule matches")
        assert len(chosen) + len(dense) == depths[0] * 6 + depths[1] * 10 + 1


@pytest.mark.parametrize("sparse", ["multi30k_2of4", "wmt14_transformer_base_2of4"])
def test_the_dense_configuration_differs_in_sparsity_alone(sparse: str) -> None:
    both = [
        yaml.safe_load((ROOT / "recipes" / "configs" / f"{name}.yaml").read_text())
        for name in (sparse, sparse.replace("2of4", "dense"))
    ]
    changed = {key for key in both[0].keys() | both[1].keys() if both[0].get(key) != both[1].get(key)}
    assert changed == {"output_dir", "pattern", "sparse_method", "sparse_decay"}


@pytest.mark.parametrize(
    ("given", "encoder", "decoder"),
    [([], 6, 6), (["--layers", "4"], 4, 4), (["--decoder_layers", "1"], 6, 1), (["--encoder_layers", "12"], 12, 6)],
)
def test_encoder_and_decoder_have_depths_of_their_own(given: list[str], encoder: int, decoder: int) -> None:
    recipe, _ = parse([str(DEFAULT), "--use_cpu", "true", *given])
    assert recipe.depths == {"encoder_layers": encoder, "decoder_layers": decoder}


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("corpus: a\noutput_dir: b\nlearning_rate: 0.5\nuse_cpu: true\ntargets: [fc1, fc2]\n")
    recipe, args = parse([str(file), "--learning_rate", "0.25", "--corpus", "c"])
    assert (recipe.corpus, args.output_dir, args.learning_rate, recipe.targets) == ("c", "b", 0.25, ["fc1", "fc2"])


def test_values_of_a_file_are_what_they_look_like(tmp_path: Path) -> None:
    """YAML has 2:4 for 124, 1e-3 for a text and the language no for a falsehood."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "\ufeffcorpus: 007\noutput_dir: '2026'\nuse_cpu: yes\nsource_lang: no\npattern: 2:4\nlearning_rate: 1e-3\n"
        "max_steps: 1_000\ntargets: fc1\nmore_train: [a b, 'true']\nbaseline: null\nmodel: ~\nsource_prefix: ''\n"
        "streaming: true\nlr_scheduler_kwargs: {timescale: 20}\nreport_to: [none]\nsparse_decay:\ndropout: .2\n",
        encoding="utf-8",
    )
    recipe, args = parse([str(file)])
    assert (recipe.corpus, args.output_dir, recipe.source_lang, recipe.pattern) == ("007", "2026", "no", "2:4")
    assert (args.learning_rate, args.max_steps, recipe.dropout) == (1e-3, 1000, 0.2)
    assert (recipe.targets, recipe.more_train, recipe.source_prefix) == (["fc1"], ["a b", "true"], "")
    assert (recipe.baseline, recipe.model, recipe.streaming) == (None, None, True)
    assert (args.lr_scheduler_kwargs, args.report_to, args.sparse_decay) == ({"timescale": 20}, [], 2e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpus: a\nlearning_rat: 1", "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("corpus: a\npattern: 2:4\nfoo: 1", "unknown key 'foo'"),
        ("- corpus", "holds list, not keys and values"),
        ("2:4", "holds str, not keys and values"),
        ("", "is empty"),
        ("# corpus: a\n", "is empty"),
        ("corpus: a\nseed: 1\ncorpus: b", "the key 'corpus' is there 2 times"),
        ("corpus: a\n\tseed: 1", "found character '\\t' that cannot start any token"),
        ("corpus: !!python/name:os.system x", "could not determine a constructor"),
        ("corpus: caf\udce9", "can't decode byte 0xe9"),
        ("corpus: [a, b]", 'corpus: cannot be ["a", "b"]'),
        ("corpus: {a: b}", 'corpus: cannot be {"a": "b"}'),
        ("corpus:\nseed: 1", "corpus: cannot be null"),
        ("corpus: a\nmore_train: [[b]]", 'more_train: cannot be [["b"]]'),
        ("corpus: a\nmax_steps: 3.5", "argument --max_steps/--max-steps: invalid int value: '3.5'"),
        ("corpus: a\nmax_steps: 1e5", "argument --max_steps/--max-steps: invalid int value: '1e5'"),
        ("corpus: a\nlearning_rate: fast", "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        ("corpus: a\nstreaming: 2", "argument --streaming: Truthy value expected"),
        (
            "corpus: a\neval_strategy: sometimes",
            "--eval_strategy/--eval-strategy: invalid choice: 'sometimes'",
        ),
        ("seed: 1", "the following arguments are required: --corpus"),
        ("corpus: a\nuse_cpu: true\ntokens_per_step: 9", "tokens_per_step: needs tokens_per_batch, the most tokens"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"recipe: |tokens_per_step: |run\.yaml") as refused:
        parse([str(file)])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"no such file .*missing.yaml; see recipes/configs"):
        parse([str(tmp_path / "missing.yaml")])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (["--learning_rat", "1"], "recipe: command line: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["--max_s", "1"], "recipe: command line: unknown key 'max_s'; did you mean 'max_steps'?"),
        (["--max_steps", "x"], "recipe: argument --max_steps/--max-steps: invalid int value: 'x'"),
        (["stray"], "recipe: command line: unknown key 'stray'"),
    ],
)
def test_arguments_that_are_refused(argument: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse([str(DEFAULT), "--use_cpu", "true", *argument])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (("--pattern", "4:2"), "N:M needs 1 <= N < M <= 32, got 4:2"),
        (("--values", "bf8"), "values: is one of fp32, fp16, bf16, int8, got 'bf8'"),
        (("--values", "int8", "--sparse_method", "dense"), "values: 'int8' is for packed models"),
        (("--values", "int8", "--sparse_dense_tail", "0.1"), "a dense tail leaves a dense one; choose fp32, fp16"),
        (("--standalone", "true", "--sparse_method", "dense"), "standalone: is for packed models and this run ends"),
        (("--standalone", "true", "--sparse_dense_tail", "0.1"), "standalone: is for packed models and this run ends"),
        (("--streaming", "true", "--max_steps", "-1"), "streaming: a stream has no length; give max_steps"),
        (("--streaming", "true", "--token_processes", "2"), "token_processes: a stream becomes tokens where it is"),
        (("--tokens_per_step", "0"), "tokens_per_step: needs at least 1, got 0"),
        (
            ("--tokens_per_step", "9", "--gradient_accumulation_steps", "1"),
            "tokens_per_step: gradient_accumulation_steps follows from it",
        ),
        (("--tokens_per_step", "9", "--gradient-accumulation-steps=2"), "tokens_per_step: gradient_accumulation_steps"),
        (("--average", "4"), "average: 4 checkpoints, and save_total_limit keeps 3; raise it"),
        (("--average", "2", "--save_strategy", "no"), "average: 2 checkpoints, and save_strategy 'no' writes none"),
        (("--heads", "3"), "heads: has to divide d_model, got 3 for 32"),
        (("--seed", "-1"), "seed: needs a number from 0 to 4294967295, got -1"),
        (("--seed", "4294967296"), "seed: needs a number from 0 to 4294967295, got 4294967296"),
        (("--learning_rate", "inf"), "learning_rate: needs a finite number of at least 0, got inf"),
        (("--learning_rate", "nan"), "learning_rate: needs a finite number of at least 0, got nan"),
        (("--learning_rate", "-1"), "learning_rate: needs a finite number of at least 0, got -1.0"),
        (("--beams", "0"), "beams: needs at least 1, got 0"),
        (("--decoder_layers", "0"), "decoder_layers: needs at least 1, got 0"),
        (("--model", "a/b", "--encoder_layers", "6"), "encoder_layers: is for a model from scratch, and model a/b has"),
        (("--model", "a/b", "--tokenizer", "c/d"), "tokenizer: is for a model from scratch, and model a/b has its own"),
        (("--push_to", "a/b", "--sparse_method", "dense"), "push_to: sends packed models and this run ends in a dense"),
        (("--start", "random"), "start: is one of magnitude, wanda, sparsegpt, got 'random'"),
        (("--start", "wanda"), "start, permute: prune a trained model, and this one is from scratch; give model"),
        (("--permute", "true"), "start, permute: prune a trained model, and this one is from scratch; give model"),
        (
            ("--start", "wanda", "--model", "m", "--sparse_method", "dense"),
            "start, permute: choose masks, and sparse_method 'dense' has none of them",
        ),
        (("--permute", "true", "--model", "m", "--sparse_method", "random"), "sparse_method 'random' has none of them"),
        (("--calibration_pairs", "0"), "calibration_pairs: needs at least 1, got 0"),
        (("--baseline", "nowhere"), "baseline: nowhere/test.hypotheses.txt is missing; run the dense"),
    ],
)
def test_what_would_end_a_run_late_is_refused_first(argument: tuple[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "none.yaml").write_text("seed: 1")
    with pytest.raises(ValueError, match=re.escape(message)):
        parse([str(tmp_path / "none.yaml"), *tiny(tmp_path, tmp_path / "run"), *argument])
