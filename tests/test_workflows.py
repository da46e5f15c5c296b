"""What people do with packed models beside loading them: adapters, other loops, exports, threads and processes.

Scripts as their users write them; those that need processes or another torch state run in a process of their own.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_nmsparse import (
    NMSparseConfig,
    NMSparseQuantizationConfig,
    SparseStep,
    prepare_for_training,
    save_packed,
    set_compute,
    sparsify,
)
from hf_nmsparse.kernels import library
from hf_nmsparse.layers import sparse_layers
from hf_nmsparse.packed_layers import Int8Head, KernelLinear, PackedLinear
from tests.packed_models import BUILDERS, output, sparse
from tests.processes import in_a_child, in_a_fresh_one
from tests.tiny import collator, marian, token_pairs

needs_library = pytest.mark.skipif(library.status().library is None, reason=library.status().reason)
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A packed Marian model by the number type of its values."""
    found = {values: tmp_path_factory.mktemp(values) for values in ("fp32", "bf16", "int8")}
    for values, folder in found.items():
        save_packed(sparse(), folder, values=values)
    return found


def load(folder: Path, compute: str = "auto", head: str | None = None, **options: Any) -> Any:
    config = NMSparseQuantizationConfig(compute=compute, head=head)
    return AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=config, **options)


def script(code: str, *arguments: object) -> None:
    """Runs a script in a process of its own."""
    in_a_fresh_one("-W", "ignore", "-c", code, *arguments, environment={**os.environ, "HF_HUB_OFFLINE": "1"})


# ---- PEFT ----

PREPARE = r"^kernels: the numbers of a weight that lies packed are asked for; .*prepare_for_training\(model\).*$"


def with_lora(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    rules: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "fc1"], "r": 4} | options
    return get_peft_model(model, LoraConfig(**rules))


def losses(model: Any, folder: Path, **options: Any) -> list[float]:
    """Of three steps of transformers' Trainer."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    arguments = Seq2SeqTrainingArguments(
        str(folder), max_steps=3, logging_steps=1, report_to=[], use_cpu=True, **settings, **options
    )
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=token_pairs(16), data_collator=collator(marian()))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@needs_peft
@needs_library
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
class TestPeft:
    @pytest.mark.parametrize(
        ("values", "compute", "dtype"),
        [
            ("fp32", "auto", torch.float32),
            ("bf16", "auto", torch.float32),
            ("bf16", "auto", torch.bfloat16),
            ("int8", "auto", torch.float32),
            ("fp32", "dense", torch.float32),
            ("fp32", "int8", torch.float32),
        ],
    )
    def test_lora_trains_over_a_packed_model(
        self, folders: dict[str, Path], tmp_path: Path, values: str, compute: str, dtype: torch.dtype
    ) -> None:
        from peft import PeftModel

        model = with_lora(load(folders[values], compute, dtype=dtype))
        base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
        found = losses(model, tmp_path / "run")
        expected = losses(with_lora(load(folders[values], "dense", "dense", dtype=dtype)), tmp_path / "dense")
        # Products in int8 are off by a hundredth, those in bf16 are rounded to 8 bits.
        assert found == pytest.approx(expected, rel=1e-2 if dtype == torch.bfloat16 or compute == "int8" else 3e-3)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
        adapters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        assert all("lora" in name for name in adapters)
        assert all(tensor.any() for tensor in adapters.values())  # B starts at zero
        model.eval().save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(folders[values], compute, dtype=dtype), tmp_path / "adapter")
        assert torch.equal(output(again.eval()), output(model))

    def test_without_adapters_a_packed_model_does_not_train(self, folders: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="You cannot perform fine-tuning on purely quantized models"):
            losses(load(folders["fp32"]), tmp_path)

    def test_gradients_pass_checkpointed_layers(self, folders: dict[str, Path]) -> None:
        grads = []
        for checkpointed in (False, True):
            model = load(folders["fp32"])
            model.enable_input_require_grads()
            model.config.use_cache = False
            if checkpointed:
                model.activation_checkpointing_enable()
            adapted = with_lora(model, init_lora_weights=False).train()
            tokens = torch.tensor([[5, 6, 7, 2]])
            adapted(input_ids=tokens, decoder_input_ids=tokens).logits.square().sum().backward()
            grads.append([parameter.grad for parameter in adapted.parameters() if parameter.requires_grad])
        for plain, checkpointed_ in zip(*grads, strict=True):
            assert plain.any()
            assert torch.equal(plain, checkpointed_)

    @pytest.mark.parametrize(
        "read",
        [
            lambda model: with_lora(model).merge_and_unload(),
            lambda model: with_lora(model).merge_and_unload(safe_merge=True),
            lambda model: with_lora(model).merge_adapter(),
            lambda model: with_lora(model, use_dora=True),
            lambda model: with_lora(model, init_lora_weights="pissa"),
            lambda model: with_lora(model, init_lora_weights="olora"),
            lambda model: model.get_submodule(next(iter(sparse_layers(model)))).weight.data,
            lambda model: model.get_submodule(next(iter(sparse_layers(model)))).weight + 1,
            lambda model: model.get_submodule(next(iter(sparse_layers(model)))).weight.sum(),
            lambda model: nn.init.zeros_(model.get_submodule(next(iter(sparse_layers(model)))).weight),
        ],
        ids=["merge", "safe merge", "merge_adapter", "DoRA", "PiSSA", "OLoRA", "data", "sum", "reduction", "init"],
    )
    def test_what_needs_the_weight_names_prepare_for_training(
        self, folders: dict[str, Path], read: Callable[[Any], Any]
    ) -> None:
        with pytest.raises(ValueError, match=PREPARE):
            read(load(folders["fp32"]))

    def test_other_adapters_train_and_do_not_merge(self, folders: dict[str, Path]) -> None:
        from peft import IA3Config, LoHaConfig, get_peft_model

        ia3 = IA3Config(target_modules=["k_proj", "fc1"], feedforward_modules=["fc1"])
        for config in (ia3, LoHaConfig(target_modules=["q_proj"], r=2)):
            model = get_peft_model(load(folders["fp32"]), config)
            tokens = torch.tensor([[5, 6, 7, 2]])
            model(input_ids=tokens, decoder_input_ids=tokens).logits.square().sum().backward()
            assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
            with pytest.raises(ValueError, match=PREPARE):
                model.merge_and_unload()

    @pytest.mark.parametrize("family", ["marian", "t5"])
    @pytest.mark.parametrize("values", ["fp32", "int8"])
    @pytest.mark.parametrize("compute", ["auto", "dense"])
    def test_under_adapters_the_weights_stay_frozen_however_they_are_held(
        self, family: str, values: str, compute: str, tmp_path: Path
    ) -> None:
        save_packed(sparse(family), tmp_path, values=values)
        targets = ["q", "wi"] if family == "t5" else ["q_proj", "fc1"]
        model = with_lora(load(tmp_path, compute, "dense"), target_modules=targets)
        expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all("lora" in name for name in expected)
        for form in ("reference", "dense", "auto", "dense"):
            set_compute(model, form)
            assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected, form

    def test_adapters_are_merged_before_the_weights_are_trained(self, folders: dict[str, Path], tmp_path: Path) -> None:
        model = with_lora(load(folders["fp32"], head="dense"), init_lora_weights=False).eval()
        before, layers = output(model), sparse_layers(model)
        with pytest.raises(ValueError, match=r"^prepare_for_training: the model holds PEFT adapters; merge [^\n]+$"):
            prepare_for_training(model)
        assert torch.equal(output(model), before)
        assert sparse_layers(model) == layers
        set_compute(model, "dense")  # as the message says
        merged = model.merge_and_unload()
        prepare_for_training(merged)
        assert all(merged.get_submodule(name).weight.requires_grad for name in sparse_layers(merged))
        save_packed(merged, tmp_path)

    @pytest.mark.parametrize("values", ["fp32", "int8"])
    def test_a_merged_model_is_masked_again_when_it_is_packed(
        self, folders: dict[str, Path], tmp_path: Path, values: str
    ) -> None:
        model = load(folders[values], dtype=torch.float32)
        before = output(model)
        prepare_for_training(model)
        merged = with_lora(model, init_lora_weights=False).merge_and_unload().eval()
        expected = output(merged)
        assert (expected - before).abs().max() > 0.01
        save_packed(merged, tmp_path)
        packed = load(tmp_path)
        assert {type(packed.get_submodule(name)) for name in sparse_layers(packed)} == {KernelLinear}
        torch.testing.assert_close(output(packed), expected, rtol=1e-4, atol=1e-5)


# ---- a loop of one's own ----


def test_a_loop_with_accelerate(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = marian()
    sparsify(model, NMSparseConfig("2:4"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = SparseStep(model, optimizer, "sr-ste", 2e-4)
    loader: Any = DataLoader(token_pairs(16), batch_size=8, collate_fn=collator(model))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found = []
    for _ in range(5):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    assert found[-1] < found[0]
    step.remove()
    save_packed(accelerator.unwrap_model(model).eval(), tmp_path)
    torch.testing.assert_close(output(load(tmp_path)), output(model), rtol=1e-4, atol=1e-5)


# ---- embeddings under an int8 head ----


def copy_in(model: Any) -> None:
    weight = model.get_input_embeddings().weight
    weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))


def replace_head(model: Any) -> Any:
    torch.manual_seed(3)
    head = model.get_output_embeddings()
    model.set_output_embeddings(nn.Linear(head.in_features, head.weight.shape[0], bias=False))
    return model


def load_others(model: Any) -> None:
    state = model.state_dict()
    generator = torch.Generator().manual_seed(3)
    for name in ("model.shared.weight", "shared.weight", "lm_head.weight"):
        if name in state:
            state[name] = torch.randn(state[name].shape, generator=generator)
    model.load_state_dict(state)


EDITS: dict[str, Callable[[Any], Any]] = {
    "more tokens": lambda model: model.resize_token_embeddings(66, mean_resizing=False),
    "fewer tokens": lambda model: model.resize_token_embeddings(50, mean_resizing=False),
    "copied in": copy_in,
    "another head": replace_head,
    "tied anew": lambda model: replace_head(model).tie_weights(),
    "load_state_dict": load_others,
    "cast": lambda model: model.to(torch.bfloat16).to(torch.float32),
}


@needs_library
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", BUILDERS)
def test_the_int8_head_computes_with_the_embeddings_as_they_are(family: str, edit: str, tmp_path: Path) -> None:
    save_packed(sparse(family), tmp_path)
    rounded, dense = load(tmp_path, "dense", "int8"), load(tmp_path, "dense", "dense")
    assert isinstance(rounded.get_output_embeddings(), Int8Head)
    output(rounded)
    for model in (rounded, dense):
        torch.manual_seed(0)
        EDITS[edit](model)
    found, expected = output(rounded), output(dense)
    assert found.shape == expected.shape
    assert (found - expected).norm() < 2e-2 * expected.norm()


# ---- exports ----


class Logits(nn.Module):
    """A model whose inputs and output are tensors, as exports want them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, decoder_input_ids=decoder_input_ids, use_cache=False).logits
        return logits


EXAMPLE = torch.tensor([[5, 6, 7, 2]]), torch.tensor([[2, 8, 9]])

RUN_EXPORT = """
import sys, torch
import hf_nmsparse  # which knows the operators
for values in ("fp32", "int8"):
    program = torch.export.load(f"{sys.argv[1]}/{values}.pt2").module()
    inputs, expected = torch.load(f"{sys.argv[1]}/{values}.pt")
    torch.testing.assert_close(program(*inputs), expected, rtol=1e-4, atol=1e-5)
"""

TO_ONNX = """
import sys, torch, onnxruntime
from pathlib import Path
from hf_nmsparse import set_compute
from tests.test_workflows import EXAMPLE, Logits, load
folder = Path(sys.argv[1])
LINE = "kernels: ONNX has no products with packed weights; call set_compute(model, 'dense', head='dense') before"
model = load(folder)
for compute, head in (("auto", "dense"), ("dense", "int8"), ("dense", "dense")):
    set_compute(model, compute, head)
    try:
        torch.onnx.export(Logits(model).eval(), EXAMPLE, sys.argv[2], dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        assert (compute, head) != ("dense", "dense"), error
        assert LINE in str(error), error
    else:
        assert (compute, head) == ("dense", "dense")
session = onnxruntime.InferenceSession(sys.argv[2])
names = [given.name for given in session.get_inputs()]
[found] = session.run(None, dict(zip(names, (tokens.numpy() for tokens in EXAMPLE), strict=True)))
torch.testing.assert_close(torch.from_numpy(found), Logits(model)(*EXAMPLE).detach(), rtol=1e-4, atol=1e-5)
"""


@needs_library
def test_torch_export(folders: dict[str, Path], tmp_path: Path) -> None:
    with torch.no_grad():
        for values in ("fp32", "int8"):
            model = Logits(load(folders[values])).eval()
            torch.export.save(torch.export.export(model, EXAMPLE), tmp_path / f"{values}.pt2")
            torch.save((EXAMPLE, model(*EXAMPLE)), tmp_path / f"{values}.pt")
    script(RUN_EXPORT, tmp_path)


@needs_library
@pytest.mark.skipif(find_spec("onnxscript") is None, reason="onnxscript is not installed")
@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_onnx_takes_what_computes_dense_and_kernels_say_so(folders: dict[str, Path], tmp_path: Path) -> None:
    script(TO_ONNX, folders["int8"], tmp_path / "model.onnx")


# ---- threads and processes ----

KINDS = [("fp32", "dense"), ("fp32", "reference"), ("fp32", "auto"), ("bf16", "auto"), ("int8", "auto")]


@needs_library
@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_threads_that_share_a_model_generate_what_one_does(folders: dict[str, Path], values: str) -> None:
    model = load(folders[values])
    batches = [torch.randint(3, 300, (2, length)) for length in range(3, 9)]

    def generate(tokens: Tensor) -> Tensor:
        found: Tensor = model.generate(input_ids=tokens, max_new_tokens=8, num_beams=2)
        return found

    expected = [generate(tokens) for tokens in batches]
    copy_in(model)
    model.load_state_dict(load(folders[values]).state_dict())  # the threads meet a head whose weight has changed
    with ThreadPoolExecutor(4) as pool:
        for found, single in zip(pool.map(generate, batches * 4), expected * 4, strict=True):
            assert torch.equal(found, single)


PROCESSES = """
import sys, torch
import torch.multiprocessing as multiprocessing
from pathlib import Path
from tests.packed_models import output
from tests.test_workflows import KINDS, child, load

if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    models = [load(root / values, compute) for values, compute in KINDS]
    expected = [output(model) for model in models]
    # A fork server takes 256 tensors at most.
    for method, last in (("spawn", 5), ("forkserver", 1), ("fork", 5)):
        given = models[-last:], expected[-last:], method
        process = multiprocessing.get_context(method).Process(target=child, args=given)
        process.start()
        process.join()
        assert process.exitcode == 0, (method, process.exitcode)
        assert all(torch.equal(output(model), result) for model, result in zip(models, expected))
        for model in models:
            model.share_memory()
    torch.save(models, root / "models.pt")
"""


def child(models: list[Any], expected: list[Tensor], method: str) -> None:
    """What another process does with the models that it is given, the last of `KINDS`."""
    torch.set_num_threads(1)
    for model, result, (values, compute) in zip(models, expected, KINDS[-len(models) :], strict=True):
        assert torch.equal(output(model), result), (values, compute)
        kind: Any = {"dense": nn.Linear, "reference": PackedLinear, "auto": KernelLinear}[compute]
        for layer in (model.get_submodule(name) for name in sparse_layers(model)):
            assert type(layer) is kind
            # One copy in memory for both processes.
            assert method == "file" or kind is not KernelLinear or layer.kernel_weight.is_shared()


def child_with_a_file(root: Path) -> None:
    models = torch.load(root / "models.pt", weights_only=False)
    child(models, [output(load(root / values, compute)) for values, compute in KINDS], "file")


@needs_library
@pytest.mark.skipif(os.name != "posix", reason="fork is POSIX")
def test_models_go_to_other_processes(folders: dict[str, Path], tmp_path: Path) -> None:
    for values, folder in folders.items():
        (tmp_path / values).symlink_to(folder)
    (tmp_path / "main.py").write_text(PROCESSES)  # what is spawned reads its parent's file
    code = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    script(code, tmp_path / "main.py", tmp_path)
    done = in_a_child(child_with_a_file, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_library
def test_copies_of_a_model_are_independent(folders: dict[str, Path]) -> None:
    for values, compute in KINDS:
        model = load(folders[values], compute)
        expected = output(model)
        twin = copy.deepcopy(model)
        assert torch.equal(output(twin), expected)
        set_compute(twin, "dense", head="dense")
        copy_in(twin)
        assert torch.equal(output(model), expected)
