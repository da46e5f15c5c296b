"""The recipe: whole runs on a corpus of a few sentences, alone, on several processes and with a Hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import safe_open
from transformers import AutoTokenizer, NllbTokenizer

from hf_nmsparse import Calibration, NMSparseConfig, save_packed, sparsify
from hf_nmsparse.evaluation import Evaluation
from hf_nmsparse.metrics import SentenceStatistics, score
from hf_nmsparse.packed_files import check_folder
from hf_nmsparse.run_files import read_lines
from hf_nmsparse.run_logs import read_curve, read_layers
from recipes.arguments import DEFAULT, parse
from recipes.sources import without_known_targets
from recipes.wmt_en_de import card_name, describe, keep_settings, load_model, load_tokenizer, run
from tests.hub import LocalHub, local_hub
from tests.originals import opus_mt, wmt14
from tests.processes import in_a_fresh_one
from tests.recipe_runs import PAIRS, launch, run_recipe, tiny, write_corpus
from tests.tiny import bart, hf, marian, t5, tokenizer

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_its_configurations(file: Path) -> None:
    """Unknown keys it refuses itself, but for those of an engine, which it takes for options that nothing reads."""
    parser = launch_command_parser()
    options = vars(parser.parse_args(["script.py"]))
    args, *_ = _validate_launch_command(parser.parse_args(["--config_file", str(file), "script.py"]))
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    for key, value in settings.pop("fsdp_config", {}).items():
        assert key in options
        assert getattr(args, key) == value
    assert (args.multi_gpu, args.use_fsdp) == (
        settings["distributed_type"] == "MULTI_GPU",
        settings["distributed_type"] == "FSDP",
    )
    assert (args.num_processes, args.mixed_precision) == (settings["num_processes"], settings["mixed_precision"])


@pytest.mark.parametrize("name", ["a run", "größe", "-x-", "a..b", "a--b", "x.git", "...", "é", "x" * 200, "ok.2-4_a"])
def test_any_folder_has_a_name_for_its_card(name: str) -> None:
    validate_repo_id(card_name(Path(name)))
    if name.startswith("ok"):
        assert card_name(Path(name)) == name


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            ("--vocab_size", "290"),
            "vocab_size: the run in {} began with 300, got 290; give the same, or another output",
        ),
        (("--d_model", "16"), "d_model: the run in {} began with 32, got 16; give the same"),
        (("--pattern", "1:4"), "pattern: the run in {} began with '2:4', got '1:4'; give the same"),
        (("--model", "else"), "model: the run in {} began with None, got 'else'; give the same"),
    ],
)
def test_a_run_goes_on_with_the_model_that_it_began_with(
    argument: tuple[str, str], message: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    (tmp_path / "none.yaml").write_text("pattern: 2:4\n")
    output.mkdir()
    command = [str(tmp_path / "none.yaml"), *tiny(tmp_path, output)]
    keep_settings(parse([*command, *argument])[0], output)
    keep_settings(parse(command)[0], output)  # nothing had been made of the others yet
    (output / "checkpoint-1").mkdir()
    (output / "checkpoint-1/model.safetensors").touch()
    (output / "checkpoint-1/trainer_state.json").touch()
    keep_settings(parse([*command, "--learning_rate", "1"])[0], output)
    with pytest.raises(ValueError, match=re.escape(message.format(output))):
        keep_settings(parse([*command, *argument])[0], output)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_run_from_before_depths_were_two_goes_on(depth: int, tmp_path: Path) -> None:
    """Its settings have ``layers``, of both."""
    (tmp_path / "none.yaml").write_text("pattern: 2:4\n")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "model_settings.json").write_text('{"vocab_size": 300, "layers": 1, "d_model": 32}')
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/model.safetensors").touch()
    (tmp_path / "checkpoint-1/trainer_state.json").touch()
    recipe, _ = parse([str(tmp_path / "none.yaml"), *tiny(tmp_path, tmp_path), "--decoder_layers", str(depth)])
    if depth == 1:
        keep_settings(recipe, tmp_path)
        assert json.loads((tmp_path / "model_settings.json").read_text())["decoder_layers"] == 1
    else:
        with pytest.raises(ValueError, match=r"decoder_layers: the run in .* began with 1, got 2; give the same"):
            keep_settings(recipe, tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b""])
def test_damaged_settings_of_the_model_are_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "none.yaml").write_text("pattern: 2:4\n")
    (tmp_path / "model_settings.json").write_bytes(content)
    recipe, _ = parse([str(tmp_path / "none.yaml"), *tiny(tmp_path, tmp_path)])
    with pytest.raises(ValueError, match=r"model_settings\.json: the file is no JSON( object)?; delete it if"):
        keep_settings(recipe, tmp_path)


def test_models_are_described_by_any_names_of_their_layers() -> None:
    marian = hf.MarianMTModel(hf.MarianConfig(**bart(40, d_model=16, layers=1) | {"decoder_layers": 2}))
    small = hf.T5ForConditionalGeneration(hf.T5Config(**t5(40, d_model=16, layers=1), num_decoder_layers=3))
    for model, words in (
        (marian, "MarianMTModel, {} parameters, 1+2"),
        (small, "T5ForConditionalGeneration, {} parameters, 1+3"),
    ):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert describe(model) == f"{words.format(f'{parameters:,}')} layers, d 16"


def test_whole_runs(tmp_path: Path) -> None:
    """Dense, then 2:4 against it, then the 2:4 run again after its checkpoints were there."""
    corpus = write_corpus(tmp_path / "corpus")
    config = str(ROOT / "recipes" / "configs" / "demo.yaml")
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    run_recipe(config, *tiny(corpus, dense, sparse_method="dense", sparse_decay=0, max_steps=100))
    arguments = [config, *tiny(corpus, sparse, standalone=True), "--baseline", str(dense)]
    printed = run_recipe(*arguments)

    evaluation = Evaluation.read(sparse / "evaluation.json")
    references = [json.loads(line)["translation"]["de"] for line in (corpus / "test.jsonl").read_text().splitlines()]
    hypotheses = read_lines(sparse / "test.hypotheses.txt")
    assert score(hypotheses, references).bleu == evaluation.bleu
    assert (evaluation.corpus, evaluation.split, evaluation.method, evaluation.pattern, evaluation.decay) == (
        "corpus",
        "test",
        "sr-ste",
        "2:4",
        2e-4,
    )
    assert evaluation.against_dense is not None
    assert evaluation.against_dense["bleu_dense"] == Evaluation.read(dense / "evaluation.json").bleu
    assert f"BLEU {evaluation.bleu:.2f} ({evaluation.signature})" in printed

    # 6 layers of the encoder and 10 of the decoder, each at 35/64 of its bf16 bytes, to the byte.
    def stored(folder: Path) -> dict[str, int]:
        with safe_open(folder / "model.safetensors", "pt") as file:
            return {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118

    before, after = stored(dense / "dense"), stored(sparse / "packed")
    packed = {key.removesuffix("_indices") for key in after if key.endswith("_indices")}
    assert len(packed) == 16
    for key in packed:
        assert after[key] + after[f"{key}_indices"] == before[key] * 35 // 64
    assert {key: size for key, size in after.items() if key in before and key not in packed} == {
        key: size for key, size in before.items() if key not in packed
    }
    assert evaluation.dense_bytes - (evaluation.packed_bytes or 0) == sum(before[key] * 29 // 64 for key in packed)

    card = ModelCard.load(sparse / "packed" / "README.md")
    [bleu] = [result for result in card.data.eval_results or [] if result.metric_type == "bleu"]
    assert bleu.metric_value == pytest.approx(evaluation.bleu, abs=0.005)
    assert check_folder(sparse / "packed").standalone
    assert "trust_remote_code=True" in card.text
    curve = json.loads((sparse / "curve.json").read_text())
    assert [row["step"] for row in curve if "loss" in row] == list(range(1, evaluation.steps + 1))
    assert all(row["sad"] >= 0 for row in curve if "loss" in row)
    layers = read_layers(sparse / "layers.parquet")
    assert {row["layer"] for row in layers} == {key.removesuffix(".weight") for key in packed}
    assert len(layers) == 16 * evaluation.steps
    assert SentenceStatistics.read(sparse / "sentences.json").bleu == pytest.approx(evaluation.bleu)
    assert not (dense / "layers.parquet").exists()
    # It learns: 120 sentences of a fixed frame.
    assert evaluation.bleu > 20

    weights = (sparse / "packed" / "model.safetensors").read_bytes()
    run_recipe(*arguments)
    assert (sparse / "packed" / "model.safetensors").read_bytes() == weights
    assert Evaluation.read(sparse / "evaluation.json").bleu == evaluation.bleu
    # The time of the training is what its last step logged; the second run adds none.
    [*_, last] = (row for row in curve if "loss" in row)
    seconds = Evaluation.read(sparse / "evaluation.json").train_seconds
    assert seconds == pytest.approx(last["train_seconds"], rel=1e-5)  # six digits in the curve


def test_a_checkpoint_is_pruned_by_the_first_pairs(tmp_path: Path) -> None:
    """Once, before the training: with a learning rate of 0 the packed model is the pruned one, resumed or not."""
    corpus, model = write_corpus(tmp_path / "corpus"), marian(init_std=0.3)
    model.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    config = str(ROOT / "recipes" / "configs" / "demo.yaml")
    settings = {"model": tmp_path / "dense", "start": "wanda", "permute": "true", "calibration_pairs": 20}
    training = {"learning_rate": 0, "max_steps": 2, "save_steps": 1, "average": 1, "values": "fp32"}
    arguments = [config, *tiny(corpus, tmp_path / "run", **settings, **training)]
    run_recipe(*arguments)
    pairs = [dict(zip(("input_ids", "labels"), tokenizer()(list(pair))["input_ids"], strict=True)) for pair in PAIRS]
    calibration = Calibration.of_pairs(model, pairs, 20, method="wanda")
    sparsify(model, NMSparseConfig("2:4"), calibration=calibration, permute=True)
    save_packed(model, tmp_path / "packed")
    weights = (tmp_path / "packed" / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "packed" / "model.safetensors").read_bytes() == weights
    evaluation = Evaluation.read(tmp_path / "run" / "evaluation.json")
    assert evaluation.options == {"permute": True, "start": "wanda", "calibration_pairs": 20}
    run_recipe(*arguments, "--max_steps", "3")
    assert (tmp_path / "run" / "packed" / "model.safetensors").read_bytes() == weights
    [line] = run_recipe(*arguments, "--start", "sparsegpt", fails=True).strip().splitlines()[-1:]
    assert "start: the run in" in line


def test_a_dense_tail_ends_in_a_dense_model(tmp_path: Path) -> None:
    """On two corpora together."""
    corpus, more = write_corpus(tmp_path / "corpus"), write_corpus(tmp_path / "more")
    config = str(ROOT / "recipes" / "configs" / "demo.yaml")
    settings = {"max_steps": 4, "save_steps": 2, "average": 2, "sparse_dense_tail": 0.5}
    printed = run_recipe(config, *tiny(corpus, tmp_path / "run", **settings), "--more_train", str(more))
    evaluation = Evaluation.read(tmp_path / "run" / "evaluation.json")
    assert evaluation.corpus == "corpus + more"
    one = run_recipe(config, *tiny(corpus, tmp_path / "one", **settings))
    batches = [int(re.findall(r"(\d+) batches an epoch", text)[0]) for text in (one, printed)]
    assert 1.5 * batches[0] < batches[1] <= 2 * batches[0]  # sentences of like length fill batches better
    assert (evaluation.pattern, evaluation.packed_bytes) == (None, None)
    assert evaluation.options == {"sparse_dense_tail": 0.5}
    assert "quantization_config" not in json.loads((tmp_path / "run" / "dense" / "config.json").read_text())


def test_a_streamed_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """On two corpora together, their first 200 pairs."""
    corpus, more = write_corpus(tmp_path / "corpus"), write_corpus(tmp_path / "more")
    settings = {"streaming": "true", "max_train_pairs": 200, "more_train": more, "save_steps": 2, "average": 2}

    def run(name: str, steps: int) -> dict[int, float]:
        config = str(ROOT / "recipes" / "configs" / "demo.yaml")
        schedule = {"max_steps": steps, "lr_scheduler_type": "constant"}
        run_recipe(config, *tiny(corpus, tmp_path / name, **settings, **schedule))
        return {row["step"]: row["loss"] for row in read_curve(tmp_path / name / "curve.json") if "loss" in row}

    through = run("through", 6)
    assert sorted(through) == [1, 2, 3, 4, 5, 6]
    run("stopped", 4)
    assert run("stopped", 6) == through
    evaluation = Evaluation.read(tmp_path / "stopped" / "evaluation.json")
    assert (evaluation.corpus, evaluation.steps, evaluation.sentences) == ("corpus + more", 6, 12)


def test_a_multilingual_checkpoint(tmp_path: Path) -> None:
    """A tiny NLLB: its codes reach training, translation and card; without them nothing is trained."""
    checkpoint = tmp_path / "nllb"
    codes = NllbTokenizer(
        vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "▁": 4, "e": 5, "n": 6},
        merges=[],
        extra_special_tokens=["eng_Latn", "deu_Latn"],
    )
    codes.save_pretrained(checkpoint)
    settings = bart(len(codes), d_model=16, layers=1) | {"pad_token_id": 1, "bos_token_id": 0}
    hf.M2M100ForConditionalGeneration(hf.M2M100Config(**settings)).save_pretrained(checkpoint)
    arguments = [
        str(ROOT / "recipes" / "configs" / "demo.yaml"),
        *tiny(write_corpus(tmp_path / "corpus"), tmp_path / "run", model=checkpoint, max_steps=2, average=1),
    ]
    refused = run_recipe(*arguments, fails=True)
    assert "wmt_en_de: translate: this model translates into several languages; name one with tgt_lang" in refused
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    run_recipe(*arguments, "--source_code", "eng_Latn", "--target_code", "deu_Latn")
    assert len(read_lines(tmp_path / "run" / "test.hypotheses.txt")) == 12
    assert 'src_lang="eng_Latn"' in (tmp_path / "run" / "packed" / "README.md").read_text(encoding="utf-8")


def test_many_to_one(tmp_path: Path) -> None:
    """Two sources into one target: tags are tokens, no target of a test is learnt from, and each source is scored."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, rows in {"train": PAIRS, "validation": PAIRS[::12], "test": PAIRS[::10]}.items():
        lines = [json.dumps({"en": en, "nl": en.upper(), "de": de}) for en, de in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    marks = ["--source_prefix", ">>en<< ", "--more_sources", "nl=>>nl<<"]
    config = str(ROOT / "recipes" / "configs" / "demo.yaml")
    output = tmp_path / "run"
    printed = run_recipe(config, *tiny(folder, output, max_steps=4, save_steps=2, average=1), *marks)
    assert "from nl BLEU" in printed
    trained = AutoTokenizer.from_pretrained(output / "packed")
    assert trained.tokenize(">>nl<< THE")[0] == ">>nl<<"
    assert read_lines(output / "test.source.txt")[0] == f">>en<< {PAIRS[0][0]}"
    assert read_lines(output / "test.nl.source.txt")[0] == f">>nl<< {PAIRS[0][0].upper()}"
    assert len(read_lines(output / "test.nl.hypotheses.txt")) == 12
    scores = json.loads((output / "more_sources.json").read_text(encoding="utf-8"))
    assert scores["nl"].keys() >= {"bleu", "chrf", "signature"}
    refused = run_recipe(config, *tiny(folder, output, max_steps=4, average=1), fails=True)
    assert "more_sources: the run in" in refused


def test_no_target_of_a_test_is_learnt_from_another_source() -> None:
    def pairs(*rows: tuple[str, str]) -> Dataset:
        return Dataset.from_dict({"source": [row[0] for row in rows], "target": [row[1] for row in rows]})

    corpora = {
        "en": {"train": pairs(("a", "A"), ("b", "B")), "test": pairs(("c", "C"))},
        "nl": {"train": pairs(("aa", "A"), ("cc", "C")), "test": pairs(("bb", "B"))},
    }
    kept = without_known_targets(corpora)
    assert [kept[lang]["train"]["source"][:] for lang in kept] == [["a"], ["aa"]]
    assert kept["nl"]["test"] is corpora["nl"]["test"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--more_sources", "fr"], "an entry is a language and what marks its texts, fr=>>fr<<, got 'fr'"),
        (["--more_sources", "fr=>>fr<<"], "source_lang needs a mark too; give source_prefix, or source_code"),
        (["--more_sources", "fr=x", "nl=x", "--source_prefix", "y"], "each mark is there once, got y, x, x"),
        (["--more_sources", "en=x", "--source_prefix", "y"], "each language is there once, got en, en"),
        (["--more_sources", "de=x", "--source_prefix", "y"], "'de' is the target"),
    ],
)
def test_sources_that_are_none(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"more_sources: {message}")):
        parse([str(ROOT / "recipes" / "configs" / "demo.yaml"), "--use_cpu", "true", *settings])


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    """20 steps; two processes with one batch each, under DDP and FSDP2, against one that accumulates two."""
    corpus = write_corpus(tmp_path / "corpus")
    config = str(ROOT / "recipes" / "configs" / "demo.yaml")
    # An epoch has more than the 40 batches that 20 steps take, so that no step is short of one.
    common = {"max_steps": 20, "average": 2, "tokens_per_batch": 80, "save_steps": 10}
    run_recipe(config, *tiny(corpus, tmp_path / "one", gradient_accumulation_steps=2, **common))
    launch("two_cpu_processes.yaml", config, *tiny(corpus, tmp_path / "two", **common))
    launch("fsdp2.yaml", config, *tiny(corpus, tmp_path / "sharded", **common))
    one, *others = (
        [row["loss"] for row in json.loads((tmp_path / run / "curve.json").read_text()) if "loss" in row]
        for run in ("one", "two", "sharded")
    )
    assert len(one) == 20
    for losses in others:
        assert one == pytest.approx(losses, abs=1e-5)
    records = [Evaluation.read(tmp_path / run / "evaluation.json") for run in ("one", "two", "sharded")]
    assert {(record.model, record.packed_bytes) for record in records} == {(records[0].model, records[0].packed_bytes)}


def test_a_users_mistake_is_one_line(tmp_path: Path) -> None:
    config = str(ROOT / "recipes" / "configs" / "demo.yaml")
    (tmp_path / "empty").mkdir()
    printed = launch("one_process.yaml", config, *tiny(tmp_path / "empty", tmp_path / "run"), fails=True)
    assert f"wmt_en_de: corpus {tmp_path / 'empty'}: no file named train.*" in printed
    assert 'recipes/wmt_en_de.py", line' not in printed


def test_deepspeed_through_accelerate_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment that accelerate makes for its processes; its launcher itself asks for the package."""
    file = tmp_path / "deepspeed.yaml"
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "num_machines": 1,
        "num_processes": 2,
        "main_process_port": 0,  # any: the default may be that of a training on this machine
        "mixed_precision": "bf16",
        "use_cpu": False,
        "deepspeed_config": {"zero_stage": 2},
    }
    file.write_text(yaml.safe_dump(settings))
    given = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    args, *_ = _validate_launch_command(given)
    args.deepspeed_fields_from_accelerate_config = "zero_stage"  # as `accelerate launch` adds
    _, environment = prepare_deepspeed_cmd_env(args)
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])
    output = tmp_path / "run"
    config = str(ROOT / "recipes" / "configs" / "demo.yaml")
    monkeypatch.setattr(sys, "argv", ["wmt_en_de.py", config, *tiny(tmp_path, output)])
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == (
        "wmt_en_de: deepspeed: its engine steps inside of backward, where the rule of 'sr-ste' does not see the "
        "gradients; train under DDP or FSDP2"
    )
    assert not output.exists()


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    """Has what the configurations ask the Hub for, in small; one training pair lacks its source."""
    with local_hub() as server:
        server.repos["datasets/wmt/wmt14"] = wmt14([*PAIRS, (" ", "Nichts.")], PAIRS[::12], PAIRS[::10])
        server.repos["Helsinki-NLP/opus-mt-en-de"] = opus_mt(PAIRS)
        yield server


def on_the_hub(hub: LocalHub, folder: Path, *command: str, fails: bool = False) -> str:
    """Runs a command of Python in ``folder`` with this Hub alone; what it printed on both streams."""
    environment = hub.environment(folder / "home") | {"PYTHONPATH": str(ROOT)}
    environment["PYTHONWARNINGS"] += ",ignore:Recommended"  # sacremoses, for texts with unusual punctuation
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return in_a_fresh_one(*command, fails=fails, environment=environment, cwd=folder, **both)


# Three steps of a model that a test has time for, and what is written is pushed.
SMALL = ["--max_steps", "3", "--use_cpu", "true", "--tokens_per_step", "400", "--tokens_per_batch", "250"]
SMALL += ["--beams", "2", "--push_to", "user/pushed"]
SCRATCH = ["--d_model", "32", "--layers", "1", "--heads", "2", "--ffn", "64", "--vocab_size", "300"]
SCRIPT = str(ROOT / "recipes" / "wmt_en_de.py")


def test_the_first_command_from_the_hub_and_back(hub: LocalHub, tmp_path: Path) -> None:
    """The configuration of WMT14, as it is run alone, but for its size; its folder has a name that is no pattern."""
    folder = tmp_path / "run[1]"
    folder.mkdir()
    printed = on_the_hub(hub, folder, "-m", "accelerate.commands.launch", SCRIPT, *SMALL, *SCRATCH)
    assert f"wmt_en_de: runs {DEFAULT}; name another" in printed
    assert "wmt_en_de: a step of 400 tokens: 1 device(s) x 2 batch(es) of 200 tokens" in printed
    assert "corpus wmt/wmt14, split train: 1 of 121 rows lack a text: left out" in printed
    assert "averages 1 checkpoint(s), all that the run has; average is 5" in printed
    output = folder / "outputs" / "wmt14_transformer_base_2of4"
    evaluation = Evaluation.read(output / "evaluation.json")
    assert (evaluation.corpus, evaluation.steps, evaluation.sentences) == ("wmt/wmt14", 3, 12)
    pushed = hub.repos["user/pushed"]
    assert pushed == {file.name: file.read_bytes() for file in (output / "packed").iterdir()}
    assert ModelCard(pushed["README.md"].decode()).data.to_dict()["datasets"] == ["wmt/wmt14"]
    config = json.loads(pushed["config.json"])
    assert (config["pad_token_id"], config["decoder_start_token_id"], config["vocab_size"]) == (299, 299, 300)


def test_opus_mt_from_the_hub_and_back(hub: LocalHub, tmp_path: Path) -> None:
    """What is pushed keeps the original's settings and tokenizer, and translates as what was scored; no launcher."""
    config = str(ROOT / "recipes" / "configs" / "opus_mt_en_de_2of4.yaml")
    on_the_hub(hub, tmp_path, SCRIPT, config, *SMALL)
    original, pushed = hub.repos["Helsinki-NLP/opus-mt-en-de"], hub.repos["user/pushed"]
    for name in ("source.spm", "target.spm"):
        assert pushed[name] == original[name]
    for name in ("vocab.json", "generation_config.json"):
        before, after = (json.loads(files[name]) for files in (original, pushed))
        assert {**after, "transformers_version": ""} == {**before, "transformers_version": ""}
    assert ModelCard(pushed["README.md"].decode()).data.to_dict()["base_model"] == "Helsinki-NLP/opus-mt-en-de"
    output = tmp_path / "outputs" / "opus_mt_en_de_2of4"
    translate = ["-m", "hf_nmsparse", "translate", "--model", "user/pushed", "--beams", "2"]
    translate += ["--input", str(output / "test.source.txt"), "--output", str(tmp_path / "again.txt")]
    on_the_hub(hub, tmp_path, *translate)
    assert read_lines(tmp_path / "again.txt") == read_lines(output / "test.hypotheses.txt")


CHECK_HUB = """
from recipes.wmt_en_de import check_hub
for repo in ("user/new", "other/closed", "no name"):
    try:
        check_hub(repo)
    except ValueError as error:
        print(error)
"""


def test_a_repository_that_takes_nothing_is_found_before_the_training(hub: LocalHub, tmp_path: Path) -> None:
    hub.repos["other/closed"] = {}
    hub.read_only.add("other/closed")
    closed, invalid = on_the_hub(hub, tmp_path, "-c", CHECK_HUB).splitlines()
    assert hub.repos["user/new"] == {}
    assert closed.startswith("push_to: nothing can be pushed to 'other/closed': ")
    assert "403" in closed
    assert invalid.startswith("push_to: nothing can be pushed to 'no name': ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "dev"}, "corpus {}: no split 'dev'; it has train, test"),
        (
            {"eval_strategy": "epoch"},
            "corpus {}: no split 'validation', which eval_strategy 'epoch' needs; give",
        ),
        ({"model": "none/here"}, "model: none/here: "),
        ({"more_train": "none/here"}, "corpus 'none/here': no local folder, and "),
        ({"corpus": "{}/train.jsonl"}, "corpus {}/train.jsonl: a file; name its folder"),
    ],
)
def test_what_is_missing_is_one_line(
    settings: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "validation.jsonl").unlink()
    (tmp_path / "none.yaml").write_text("seed: 1")
    formatted = {key: value.format(corpus) for key, value in settings.items()}
    given = tiny(**{"corpus": corpus, "output": tmp_path / "run", **formatted})  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["wmt_en_de.py", str(tmp_path / "none.yaml"), *given])
    monkeypatch.setattr("recipes.wmt_en_de.keep_freed_memory", lambda: None)  # which is for the whole process,
    monkeypatch.setattr("recipes.wmt_en_de.multiply_with_onednn", lambda *_: None)  # and so is this
    with pytest.raises(SystemExit) as stopped:
        run()
    assert str(stopped.value.code).startswith(f"wmt_en_de: {message.format(corpus)}")
    assert "\n" not in str(stopped.value.code)


@pytest.mark.parametrize("old", [False, True])
def test_the_padding_is_where_the_tokenizer_has_it(tmp_path: Path, old: bool) -> None:
    """Last, and its embedding zero; first in a run that was begun when it was first."""
    recipe, _ = parse([str(CONFIGS[0]), *tiny(tmp_path, tmp_path)])
    if old:
        tokenizer().save_pretrained(tmp_path / "tokenizer")
    texts = Dataset.from_list([{"source": source, "target": target} for source, target in PAIRS])
    trained = load_tokenizer(recipe, [texts], tmp_path)
    model = load_model(recipe, trained)
    place = 0 if old else len(trained) - 1
    assert {trained.pad_token_id, model.config.pad_token_id, model.config.decoder_start_token_id} == {place}
    assert model.generation_config.bad_words_ids == [[place]]
    embeddings: Any = model.get_input_embeddings()
    assert not embeddings.weight[place].any()
    assert embeddings.weight[1].any()
    assert embeddings.weight is model.get_output_embeddings().weight
