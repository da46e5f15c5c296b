"""SparseTrainerMixin: what a Trainer of transformers needs to train N:M layers."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput
from transformers.utils.hub import PushInProgress, hf_api

from hf_nmsparse.console import show_totals
from hf_nmsparse.layers import NMLayer
from hf_nmsparse.optimizer import Flips, SparseStep, torch_optimizer
from hf_nmsparse.padding import ZeroPadding
from hf_nmsparse.quantizer import prepare_for_training
from hf_nmsparse.resuming import ResumableTrainer, is_of_training
from hf_nmsparse.saving import retied, save_packed
from hf_nmsparse.sharding import tied_together
from hf_nmsparse.training_arguments import DENSE, SparseTrainingArguments
from hf_nmsparse.wrappers import has_adapters, unwrapped

__all__ = ["SparseTrainerMixin"]

SPARSE_STEP_NAME = "sparse_step.safetensors"

# What lies in an output folder beside what a push of the packed model takes along: as Trainer leaves it out, and dense
# masters with what belongs to them.
_NO_PART_OF_A_PUSH = (
    "_*",
    f"{PREFIX_CHECKPOINT_DIR}-*",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "training_args.bin",
)


class SparseTrainerMixin(ResumableTrainer):
    """Makes any Trainer of transformers train the N:M layers of a model after `sparsify`.

    It adds the method's rule to every optimizer step (`SparseStep`) and logs SAD and flip rate. Checkpoints hold the
    dense masters under their stock names. It goes before the class that it adds to; of itself it is a plain Trainer::

        class SparseRegressionTrainer(SparseTrainerMixin, RegressionTrainer): ...

    Args:
        model: A model after `sparsify`, or with ``sparse_method="dense"`` a dense one, or one whose adapters of PEFT
            alone train. A model that was loaded packed is made ready to train.
        args: The arguments. ``tokens_per_batch`` and ``distill_from`` are for `SparseTrainer`, which translates.
        **kwargs: As the other class takes them.

    Attributes:
        translates: Whether the class does what the arguments say of translation.

    Raises:
        ValueError: The method and the model do not fit each other, or the model is wrapped, which Trainer does itself,
            or an argument is of translation.
    """

    args: SparseTrainingArguments
    translates: ClassVar[bool] = False

    def __init__(
        self, model: nn.Module | None = None, args: SparseTrainingArguments | None = None, **kwargs: Any
    ) -> None:
        where = type(self).__name__
        if not isinstance(args, SparseTrainingArguments):
            raise ValueError(f"{where}: args must be SparseTrainingArguments, got {type(args).__name__}")
        for name in () if self.translates else ("tokens_per_batch", "distill_from"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name}: is of translation, which {where} does not train; leave it out")
        if model is not None:
            _make_ready(model)
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns of it
        super().__init__(model=model, args=args, **kwargs)
        assert self.model is not None
        layers = [layer for layer in self.model.modules() if isinstance(layer, NMLayer)]
        sparse = sum(layer.weight.requires_grad for layer in layers)
        if args.sparse_method == DENSE and sparse:
            raise ValueError(f"{where}: sparse_method 'dense' cannot train a model with {sparse} N:M layers")
        if args.sparse_method != DENSE and not sparse and has_adapters(self.model):
            raise ValueError(
                f"{where}: sparse_method {args.sparse_method!r} trains N:M layers, and of this model adapters "
                "alone train; set sparse_method='dense'"
            )
        self.sparse_step: SparseStep | None = None
        self._padding: ZeroPadding | None = None  # of a dense training; SparseStep has its own
        self._stepped: torch.optim.Optimizer | None = None
        self._pushing = False
        self.add_callback(_Start(self))
        show_totals(self)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """The model of ``model_init``, ready to train as one that is given is made."""
        model: nn.Module = super().call_model_init(trial)
        _make_ready(model)
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Builds the optimizer as Trainer does and hooks the method's rule into its step."""
        optimizer = super().create_optimizer(model)
        stepped = torch_optimizer(optimizer)  # accelerate has wrapped it on a second call of train
        if stepped is self._stepped:
            return optimizer
        self._stepped = stepped
        for earlier in (self.sparse_step, self._padding):
            if earlier is not None:
                earlier.remove()
        trained = model or self.model
        assert trained is not None
        if self.args.sparse_method == DENSE:
            self._padding = ZeroPadding(trained, stepped)
        else:
            assert self.args.sparse_decay is not None
            self.sparse_step = SparseStep(
                trained,
                stepped,
                self.args.sparse_method,
                self.args.sparse_decay,
                self.args.sparse_schedule(),
                track_groups=self.args.sparse_log_groups,
            )
        return optimizer

    def check_hooked(self) -> None:
        """Refuses to train with an optimizer that the method's rule is not hooked into: nothing would show it.

        Raises:
            ValueError: A subclass has made the optimizer without this class.
        """
        inner: Any = self.optimizer
        while inner is not self._stepped and hasattr(inner, "optimizer"):  # what accelerate or others wrap around it
            inner = inner.optimizer
        if inner is not self._stepped:
            raise ValueError(
                f"{type(self).__name__}: sparse_method {self.args.sparse_method!r} is not in the optimizer, a "
                f"{type(inner).__name__}; in a create_optimizer of your own set self.optimizer and return "
                "super().create_optimizer(model)"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Makes Trainer's accelerator; under FSDP2 the weights stay fp32 from shard to forward.

        accelerate would have them gathered in the 16-bit type of mixed precision, where a mask is not the master's. It
        is autocast that computes in that type.
        """
        super().create_accelerator_and_postprocess()
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version == 1:
            raise ValueError("fsdp: version 1 cuts weights through their groups; set fsdp_version: 2")
        if plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "fsdp: with cpu_ram_efficient_loading one process alone has weights, and accelerate shards no model "
                "with buffers; set fsdp_cpu_ram_efficient_loading: false"
            )
        if "FULL" not in str(plugin.state_dict_type):
            raise ValueError(
                "fsdp: a checkpoint in shards does not hold the dense masters under their stock names; set "
                "fsdp_state_dict_type: FULL_STATE_DICT"
            )
        plugin.mixed_precision_policy = None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Prepares as Trainer does; under FSDP2 embeddings that are tied to each other are sharded together."""
        with tied_together(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains as `ResumableTrainer` does; masks that nobody renews any more are not left in the layers."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.sparse_step is not None:
                self.sparse_step.release_masks()  # for a loop that trains the model on

    def _load_best_model(self) -> None:
        """Loads the weights as Trainer does, and the masks that they were scored with."""
        super()._load_best_model()
        file = Path(self.state.best_model_checkpoint or "") / SPARSE_STEP_NAME
        if self.sparse_step is not None and file.is_file():
            self.sparse_step.load_masks(load_file(file))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer does; a model with pruned weights in its forward is not the best, whatever it scores."""
        layers = self.sparse_step.layers.values() if self.sparse_step is not None else ()
        if any(layer.pruned_scale for layer in layers):
            return False
        return super()._determine_best_metric(metrics, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the dense masters as Trainer does; for a push, the packed model."""
        if not self._pushing:
            super().save_model(output_dir, _internal_call)
            return
        weights = self.gathered()
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            assert self.model is not None
            model: Any = unwrapped(self.model)
            values, standalone = self.args.sparse_values, self.args.sparse_standalone
            save_packed(model, folder, values=values, standalone=standalone, state_dict=weights)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)  # as Trainer saves it
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Saves as Trainer does; of tied weights that were gathered from shards one is written."""
        if state_dict is not None:
            assert self.model is not None
            state_dict = retied(self.model, state_dict)
        super()._save(output_dir, state_dict)

    def gathered(self) -> dict[str, Tensor] | None:
        """The dense masters, whole on the first process and on no other, where FSDP2 shards them; None elsewhere.

        All processes call it together.
        """
        return self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Pushes the packed model and what else lies in the output folder; a dense model goes as Trainer pushes it.

        The output folder keeps the dense masters that it may hold: what is pushed is put together elsewhere.

        Raises:
            ValueError: The model cannot be packed, as `save_packed` says.
        """
        if self.args.sparse_method == DENSE:
            return super().push_to_hub(*args, **kwargs)
        output_dir = str(self.args.output_dir)
        with ExitStack() as until_pushed:
            # Trainer names repository and card after the last part of the path.
            folder = until_pushed.enter_context(TemporaryDirectory()) / Path(Path(output_dir).absolute().name)
            if self.args.should_save and Path(output_dir).is_dir():
                shutil.copytree(output_dir, folder, ignore=shutil.ignore_patterns(*_NO_PART_OF_A_PUSH))
            self._pushing, self.args.output_dir = True, str(folder)
            try:
                pushed = super().push_to_hub(*args, **kwargs)
            finally:
                self._pushing, self.args.output_dir = False, output_dir
            if isinstance(pushed, Future):
                later = until_pushed.pop_all()
                pushed.add_done_callback(lambda _: later.close())
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes in the background while the training goes on: the packed model, and beside it the checkpoint as it is.

        Trainer would push the dense masters as the model. While pruned weights are in the forward there is none to
        pack: then a line says so, and the model follows with a later checkpoint.
        """
        if self.args.sparse_method == DENSE or self.args.hub_strategy == HubStrategy.END:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        before: PushInProgress | None = self.push_in_progress
        busy = [before is not None and not before.is_done() and not self.args.hub_always_push]
        if broadcast_object_list(busy)[0]:  # the first process knows
            return
        message = f"Training in progress, step {self.state.global_step}"
        jobs: Any = []
        try:
            jobs.append(self.push_to_hub(message, blocking=False))
        except ValueError as error:
            print(f"step {self.state.global_step}: the checkpoint is saved and the model is not pushed: {error}")
        if not self.is_world_process_zero():
            return
        if self.args.hub_strategy != HubStrategy.EVERY_SAVE:
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            upload = hf_api().upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=checkpoint_folder,
                path_in_repo="last-checkpoint" if last else Path(checkpoint_folder).name,
                commit_message=f"{message}, checkpoint",
                token=self.args.hub_token,
                run_as_future=True,
                revision=self.args.hub_revision,
            )
            jobs.append(upload)
        self.push_in_progress = PushInProgress(jobs)  # type: ignore[assignment]  # Trainer declares it as None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves what Trainer does, and what `SparseStep` needs to go on."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.sparse_step is not None and self.args.should_save:
            save_file(self.sparse_step.state_dict(), Path(output_dir) / SPARSE_STEP_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads what Trainer does, and the state of `SparseStep`."""
        super()._load_optimizer_and_scheduler(checkpoint)
        file = Path(checkpoint or "") / SPARSE_STEP_NAME
        if self.sparse_step is not None and checkpoint is not None and file.is_file():
            self.sparse_step.load_state_dict(load_file(file))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes Trainer's card, unless the output folder has one with scores, which Trainer's would lose."""
        card = Path(str(self.args.output_dir)) / "README.md"
        if not (card.is_file() and ModelCard.load(card).data.eval_results):
            super().create_model_card(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as Trainer does, with the seconds trained, and SAD and flip rate since the last training log."""
        if is_of_training(logs) and self.sparse_step is not None:
            flips = self.sparse_step.take_flips()
            if flips:
                total = Flips(sum(f.sad for f in flips.values()), sum(f.weights for f in flips.values()))
                logs["sad"], logs["flip_rate"] = total.sad, total.rate
                if self.args.sparse_log_layers:
                    logs.update({f"sad/{name}": layer.sad for name, layer in flips.items()})
                    logs.update({f"flip_rate/{name}": layer.rate for name, layer in flips.items()})
                    for name, state in self.sparse_step.layer_states().items():
                        logs.update({f"kept/{name}": state.kept, f"pruned/{name}": state.pruned})
                        if state.changed is not None:
                            logs[f"changed/{name}"] = state.changed
        super().log(logs, start_time)


def _make_ready(model: nn.Module) -> None:
    """Turns the layers of a model that was loaded packed into those that train; below adapters they stay as they are.

    Raises:
        ValueError: The model is wrapped.
    """
    if unwrapped(model) is not model:
        raise ValueError(
            f"SparseTrainer: wraps the model itself, got a {type(model).__name__}; give the model that is inside, and "
            "torch_compile=True where it is to be compiled"
        )
    if (
        isinstance(model, PreTrainedModel)
        and getattr(model, "quantization_method", None) == "nmsparse"
        and not has_adapters(model)
    ):
        prepare_for_training(model)


class _Start(TrainerCallback):
    """Tells what hooks into the optimizer that the weights are in place, where the run is and how long it will be."""

    def __init__(self, trainer: SparseTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.trainer.check_hooked()
        sparse_step = self.trainer.sparse_step
        if sparse_step is not None:
            # A checkpoint's own count leaves out the steps that a loss scaler skipped.
            resumed = bool(state.global_step and sparse_step.step)
            sparse_step.start(sparse_step.step if resumed else state.global_step, state.max_steps)
        if self.trainer._padding is not None:
            self.trainer._padding.attach()
