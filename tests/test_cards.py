from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, RepoUrl

from hf_nmsparse import cards, saving
from hf_nmsparse.cards import model_card, write_card
from hf_nmsparse.config import NMSparseConfig
from hf_nmsparse.evaluation import Evaluation, evaluation_record
from hf_nmsparse.metrics import Comparison, Score
from hf_nmsparse.saving import save_packed
from hf_nmsparse.sparse_model import sparsify
from hf_nmsparse.srste import METHODS
from tests import tiny

SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
CHRF_SIGNATURE = "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0"


def evaluation(compared: bool = True, **changes: Any) -> Evaluation:
    """A made-up run whose numbers are found nowhere else on the card."""
    run: dict[str, Any] = {
        "corpus": "multi30k",
        "split": "test",
        "model": "Transformer, 3+3 layers",
        "method": "sr-ste",
        "seed": 41,
        "steps": 12_345,
        "dense_bytes": 1_000_000,
        "packed_bytes": 547_321,
        "pattern": "2:4",
        "decay": 2e-4,
        "values": "bf16",
        "base_model": "Helsinki-NLP/opus-mt-en-de",
        "train_seconds": 5400,
        "flip_rate": 1.25e-4,
    }
    score = Score(30.12345, 55.98765, SIGNATURE, CHRF_SIGNATURE, 1014)
    comparison = Comparison(30.12345, 30.9, (-1.61, 0.07), 0.081, 1000, 12345, SIGNATURE, 1014)
    return evaluation_record(score, comparison if compared else None, **{**run, **changes})


def card(record: Evaluation | None = None, **changes: Any) -> str:
    details: dict[str, Any] = {"source_lang": "en", "target_lang": "de", "license": "apache-2.0"}
    return model_card(record or evaluation(), "someone/tiny-en-de", **{**details, **changes})


def metadata(text: str) -> ModelCardData:
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    return data


def test_the_metadata_survives_a_round_trip() -> None:
    data = metadata(card(dataset="bentrevett/multi30k"))
    assert data.language == ["en", "de"]
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "translation"
    assert data.base_model == "Helsinki-NLP/opus-mt-en-de"
    assert data.datasets == ["bentrevett/multi30k"]
    assert data.tags == ["translation", "nmsparse", "sparse", "2:4"]
    assert data.eval_results is not None
    bleu, chrf = data.eval_results
    assert (bleu.metric_type, bleu.metric_value, bleu.metric_args) == ("bleu", 30.12, {"signature": SIGNATURE})
    assert (chrf.metric_type, chrf.metric_value, chrf.metric_args) == ("chrf", 55.99, {"signature": CHRF_SIGNATURE})
    assert (bleu.task_type, bleu.dataset_type, bleu.dataset_name) == ("translation", "bentrevett/multi30k", "multi30k")
    assert bleu.dataset_split == "test"


def test_the_metadata_is_yaml_that_the_hub_reads() -> None:
    block = card().split("---\n")[1]
    read = yaml.safe_load(block)
    [entry] = read["model-index"]
    assert entry["name"] == "tiny-en-de"
    assert [metric["type"] for metric in entry["results"][0]["metrics"]] == ["bleu", "chrf"]
    assert read["tags"][-1] == "2:4"


def test_the_body_says_what_it_is() -> None:
    text = card(settings={"learning_rate": 7e-4, "warmup_steps": 333})
    for part in (
        "# tiny-en-de",
        "A 2:4 sparse model that translates from en to de.",
        "| BLEU | 30.12 |",
        "| BLEU of the dense model | 30.90 |",
        "| chrF | 55.99 |",
        SIGNATURE,
        CHRF_SIGNATURE,
        "-0.78 BLEU, 95% interval\n-1.61 to +0.07, p = 0.081: **no difference shown**",
        "547,321 bytes packed, 54.7% of the 1,000,000 bytes that they take dense as bf16",
        "| Seed | 41 |",
        "| lambda | 0.0002 |",
        "| Optimizer steps | 12,345 |",
        "| Training time | 1.5 h |",
        "0.013%",
        "| `learning_rate` | 0.0007 |",
        "| `warmup_steps` | 333 |",
        "import hf_nmsparse",
        'from_pretrained("someone/tiny-en-de")',
        "## Limits",
    ):
        assert part in text, part
    assert not re.search(r"{[{%]|undefined|None", text)


def test_every_number_comes_from_the_record() -> None:
    changed = evaluation(seed=42, steps=54_321, dense_bytes=2_000_000, packed_bytes=1_111_111, decay=3e-4)
    text = card(changed)
    for number in ("41", "12,345", "1,000,000", "547,321", "0.0002"):
        assert f" {number} " not in text
    # The words of the template name no result.
    template = cards._template()
    assert not re.search(
        r"\d\.\d", template.replace("%.1f", "").replace("%.2f", "").replace("%+.2f", "").replace("%.3f", "")
    )


def test_a_run_without_comparison_says_so() -> None:
    text = card(evaluation(compared=False))
    assert "It was not compared with a dense model." in text
    assert "BLEU of the dense model" not in text


def test_a_dense_baseline() -> None:
    record = evaluation(
        compared=False, method="dense", pattern=None, packed_bytes=None, decay=None, base_model=None, flip_rate=None
    )
    text = card(record)
    assert metadata(text).tags == ["translation"]
    assert metadata(text).base_model is None
    assert "A dense model that translates" in text
    assert "| Trained from | random weights |" in text
    assert "1,000,000 bytes as bf16" in text
    assert "import hf_nmsparse" not in text
    assert "Sparsity saves" not in text


@pytest.mark.parametrize("method", ["dense", *METHODS])
def test_every_method_is_described(method: str) -> None:
    assert f"| Training method | {method} |" not in card(evaluation(method=method))


def test_a_local_base_model_is_no_metadata() -> None:
    text = card(evaluation(base_model="./runs/dense/checkpoint-10"))
    assert metadata(text).base_model is None
    assert "| Trained from | ./runs/dense/checkpoint-10 |" in text


def test_languages_of_multilingual_models() -> None:
    text = card(source_lang="eng_Latn", target_lang="pt-BR", multilingual=True, example='Say "hi".')
    assert metadata(text).language == ["eng", "pt"]
    assert 'src_lang="eng_Latn"' in text
    assert 'convert_tokens_to_ids("pt-BR")' in text
    assert r'tokenizer("Say \"hi\".", return_tensors="pt")' in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_lang": "English"}, "'English' is no language code"),
        ({"target_lang": ""}, "'' is no language code"),
        ({"dataset": "my data"}, "dataset 'my data' is no name on the Hub"),
    ],
)
def test_bad_details(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^model card: {message}"):
        card(**changes)


def test_a_bad_repository_name() -> None:
    with pytest.raises(ValueError, match="repo_id 'a/b/c' is no name on the Hub"):
        model_card(evaluation(), "a/b/c", source_lang="en", target_lang="de", license="mit")


def test_the_code_on_the_card_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.marian()
    sparsify(model, NMSparseConfig("2:4"))
    save_packed(model, tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    [code] = re.findall(r"```python\n(.*?)```", card(), flags=re.DOTALL)
    code = code.replace("someone/tiny-en-de", (tmp_path / "model").as_posix()).replace("=100)", "=3)")
    exec(code, {})
    assert capsys.readouterr().out.endswith("\n")


def test_the_way_without_the_package_is_on_the_card_of_files_that_have_it() -> None:
    plain, added = card(), card(standalone=True)
    call = 'AutoModelForSeq2SeqLM.from_pretrained("someone/tiny-en-de", trust_remote_code=True)'
    assert "trust_remote_code" not in plain
    [_, code] = re.findall(r"```python\n(.*?)```", added, flags=re.DOTALL)
    assert code == f"from transformers import AutoModelForSeq2SeqLM\n\nmodel = {call}\n"
    assert re.sub(r"\n\nWhere `hf_nmsparse` is not installed.*?```python\n.*?```", "", added, flags=re.DOTALL) == plain


def test_the_card_goes_to_the_hub_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.marian()
    sparsify(model, NMSparseConfig("2:4"))
    save_packed(model, tmp_path)
    path = write_card(tmp_path, evaluation(), "someone/m", source_lang="en", target_lang="de", license="mit")
    written = path.read_bytes()
    save_packed(model, tmp_path)
    sent: dict[str, bytes] = {}

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            pass

        def create_repo(self, repo_id: str, **kwargs: Any) -> RepoUrl:
            return RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, folder_path: Path, **kwargs: Any) -> Any:
            sent.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})
            return SimpleNamespace(commit_url="https://huggingface.co/someone/m/commit/1")

    monkeypatch.setattr(saving, "HfApi", Hub)
    saving.push_to_hub(tmp_path, "someone/m")
    assert sent["README.md"] == written
    assert "model.safetensors" in sent
    assert ModelCard.load(path).data.to_dict()["model-index"]


def test_a_folder_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none is no folder; save the model first"):
        write_card(tmp_path / "none", evaluation(), "a/b", source_lang="en", target_lang="de", license="mit")


def test_the_template_of_an_installed_package_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "card_template.md").write_text("---\n{{ card_data }}\n---\npackaged {{ name }}\n", encoding="utf-8")
    monkeypatch.setattr(cards, "files", lambda package: tmp_path if package == "hf_nmsparse" else None)
    assert card().endswith("packaged tiny-en-de")


def test_the_card_says_which_layers_are_sparse() -> None:
    assert "| Sparse layers | fc1, fc2; the others are dense |" in card(evaluation(targets=["fc1", "fc2"]))
    assert "Sparse layers" not in card()
