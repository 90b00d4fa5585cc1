"""One trial's training: base model and tokenised examples in, checkpoints and step metrics out.

The loop is the library's Trainer, with our own batches and our own loss. An optimizer step is the next
`global_batch_size` examples of the epoch's order, split into micro-batches; its loss is summed over
completion tokens and divided by their number in the whole step. So neither micro-batch size nor layout shows
in the result, beyond rounding.
"""

import contextlib
import functools
import importlib.metadata
import inspect
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

from sweep import models
from sweep.data import DataError
from sweep.spec import ExecutionSpec, TrainSpec, TrialSpec
from sweep.tokenization import IGNORE_INDEX, TokenizedExample, TokenizedSet, TokenizedSplit, tokenized_split

DEFAULT_MICRO_BATCH_SIZE = 16

PACKED_TOLERANCE = 1e-3
"""Largest difference of packed and separate logits, relative to the largest logit. Right packing shows 1e-6,
attention across examples several tenths."""

WORTH_PACKING = 0.9
"""`auto` packs where that takes at most this share of the padded layout's multiply-adds."""

SMALL_MODEL = 10_000_000
"""Parameters below which garbage of the last trial may wait for Python: collecting it takes 0.1 to 0.3 s in a
process full of libraries, up to a tenth of a tiny trial."""

STATE_FILE = "progress.json"
"""What the library's training state does not hold: the frozen layout and the seconds so far."""


class TrainingError(Exception):
    """Training ended for a reason that has a name."""

    def __init__(self, kind: Literal["nan", "data", "oom"], message: str):
        """Name the failure and say it in one sentence."""
        super().__init__(kind, message)  # both, so that it survives pickling between processes
        self.kind = kind

    def __str__(self) -> str:
        """The sentence alone."""
        return self.args[1]


class Reporter(Protocol):
    """Receives what training produces, while it runs."""

    def step(self, row: dict[str, Any]) -> None:
        """A row of the table `steps` without its trial_id, in the order of the steps."""

    def checkpoint(self, epoch: int, record: dict[str, Any]) -> None:
        """The checkpoint of this epoch is written whole; the record says how it came about."""


class Layout(NamedTuple):
    """How examples become tensors; it does not change the result beyond rounding."""

    name: Literal["padded", "packed"]
    reason: str
    """Why this one, in words for the record."""
    micro_batch_size: int
    pack_length: int | None


def train(
    trial: TrialSpec,
    execution: ExecutionSpec,
    *,
    epochs_to_keep: Sequence[int],
    folder: Callable[[int], Path],
    reporter: Reporter,
    data: TokenizedSplit | None = None,
    cache_dir: Path | None = None,
    base_path: Path | None = None,
    threads: int | None = None,
    resume_from: Path | None = None,
    keep_state: bool = False,
) -> None:
    """Train one trial up to the last epoch to keep.

    Same trial, execution settings and machine give bit-equal weights, whatever this process trained before.
    Each epoch in `epochs_to_keep` leaves `<folder(epoch)>/weights/` and then calls `reporter.checkpoint`; the
    held-out loss of every epoch is in the row of its last step. Dropout that the base model's own config sets
    stays on.

    Args:
        trial: what to train; not a baseline.
        execution: how to run it.
        epochs_to_keep: whose checkpoints are written. A cosine schedule still spans all of `train.epochs`.
        folder: where the checkpoint of an epoch goes.
        reporter: receives step rows and checkpoint records.
        data: tokenised examples; None reads and tokenises the trial's datasets.
        cache_dir: where tokenised data is kept between trials, if `data` is None.
        base_path: folder of the base model, if it is already known.
        threads: CPU threads while training; None leaves them as they are.
        resume_from: training state to continue, as an earlier call with `keep_state` left it.
        keep_state: leave the training state after the last epoch in `<folder(epoch)>/state/`.

    Raises:
        TrainingError: the loss or the gradient is not finite (`nan`), there is nothing to learn from
            (`data`), or memory ran out (`oom`).
        ValueError: settings that do not fit the model, or epochs beyond the plan.
    """
    settings = trial.train
    last_epoch = max(epochs_to_keep)
    if settings.lr_schedule == "cosine" and last_epoch > settings.epochs:
        raise ValueError(f"epoch {last_epoch} is beyond the {settings.epochs} epochs of the cosine schedule")
    base_path = base_path or models.locate(trial.base_model, trial.base_digest)
    tokenizer = models.load_tokenizer(base_path, settings.template)
    try:
        data = data or tokenized_split(trial, tokenizer, cache_dir)
    except DataError as error:
        raise TrainingError("data", str(error)) from error
    if data.train.trained_tokens == 0:
        raise TrainingError("data", f"none of the {data.train.counts.requested} examples has a completion token")

    with _threads(threads), _deterministic(), _named_memory_errors(), _peak_memory() as peak_memory:
        base = models.load_base(
            base_path, trial.base_model.dtype, execution.attention, trial.base_model.trust_remote_code
        )
        state = {} if resume_from is None else json.loads((resume_from / STATE_FILE).read_text())
        layout = (
            Layout(**state["layout"])
            if resume_from is not None  # frozen: the same split of the steps goes on
            else choose_layout(execution, settings, data.train.examples, base)
        )
        set_seed(settings.resolved_train_seed)  # adapters draw their initial weights
        model = models.prepare(base, settings)
        trainer = SweepTrainer(
            model,
            settings,
            layout,
            data,
            num_epochs=settings.epochs if settings.lr_schedule == "cosine" else last_epoch,
            checkpointing=execution.gradient_checkpointing,
            eval_batch_size=execution.eval_batch_size,
            pad_id=tokenizer.pad_token_id or 0,
        )
        started = time.perf_counter() - state.get("train_seconds", 0.0)

        def end_of_epoch(epoch: int, row: dict[str, Any], train_loss_nats: float) -> None:
            row["held_out_loss_nats"] = trainer.held_out_loss()
            reporter.step(row)
            if epoch in epochs_to_keep:
                target = folder(epoch)
                name = trial.base_model.hub or trial.base_model.tiny or base_path.name
                models.save_checkpoint(model, target / "weights", tokenizer, name)
                seconds = time.perf_counter() - started
                if epoch == last_epoch and keep_state:
                    progress = {"layout": layout._asdict(), "train_seconds": seconds}
                    trainer.save_state_to(target / "state", progress)
                record = {
                    "epoch": epoch,
                    "num_steps": row["step"],
                    "train_loss_nats": train_loss_nats,
                    "held_out_loss_nats": row["held_out_loss_nats"],
                    "train_seconds": seconds,
                    **_describe_model(model),
                    **_describe_data(data.train),
                    "layout": layout.name,
                    "layout_reason": layout.reason,
                    "micro_batch_size": layout.micro_batch_size,
                    "attention": base.config._attn_implementation,
                    "device": _device_name(),
                    "threads": torch.get_num_threads(),
                    **peak_memory(),
                    "versions": _versions(),
                }
                reporter.checkpoint(epoch, record)
            if epoch == last_epoch:
                trainer.control.should_training_stop = True

        trainer.run(reporter.step, end_of_epoch, resume_from)


class StepBatches:
    """Batch sampler: the example indices of every micro-batch of an epoch, one optimizer step after another.

    Seven examples, four a step, micro-batches of two: the order 3 0 6 2 | 1 5 4 gives [6 0] [3 2] | [5 1]
    [4], sorted by length within each step. Every full step has the same number of micro-batches, which is
    what the Trainer counts on.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        """Take the order of the first epoch.

        Args:
            lengths: of all examples, in tokens.
            global_batch_size: examples of an optimizer step over all ranks.
            micro_batch_size: examples of a pass on one rank.
            seed: of the order.
            rank: which rank's micro-batches these are.
            num_ranks: ranks that share each step. Where one runs short, it gets an empty micro-batch.
        """
        self.lengths = lengths
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank, self.num_ranks = rank, num_ranks
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch, from 0: a permutation drawn from the seed and the epoch alone."""
        self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths)).tolist()

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self.lengths) / self.global_batch_size)

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of a full step on each rank."""
        return self._num_micro_batches(min(self.global_batch_size, len(self.lengths)))

    def _num_micro_batches(self, num_examples: int) -> int:
        return math.ceil(math.ceil(num_examples / self.num_ranks) / self.micro_batch_size)

    def __len__(self) -> int:
        """Micro-batches of an epoch on each rank."""
        last = len(self.lengths) - (self.num_steps - 1) * self.global_batch_size
        return (self.num_steps - 1) * self.micro_batches_per_step + self._num_micro_batches(last)

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of each micro-batch in turn."""
        for start in range(0, len(self.order), self.global_batch_size):
            step = self.order[start : start + self.global_batch_size]
            step.sort(key=self.lengths.__getitem__, reverse=True)  # the longest first: memory runs out at once or never
            mine = step[self.rank :: self.num_ranks]
            for index in range(self._num_micro_batches(len(step))):
                # an empty one, where a rank runs short, becomes a row without labels
                yield mine[index * self.micro_batch_size : (index + 1) * self.micro_batch_size]


class _Batches(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def collate(
    examples: Sequence[TokenizedExample],
    layout: Literal["padded", "packed"],
    pack_length: int | None,
    pad_id: int,
) -> dict[str, torch.Tensor]:
    """Tensors of one micro-batch: [rows, length].

    `targets` holds at each position the token to predict there, the next one of the same example, or -100.
    Rows are padded on the right, where causal attention never looks, so no attention mask is needed. Packed
    rows get `position_ids` that start again at each example; that, with no mask and no cache, is what keeps
    attention inside it:

        two examples, 5 6 7 and 8 9     padded            packed
        input_ids                       5 6 7 | 8 9 0     5 6 7 8 9
        position_ids                    -                 0 1 2 0 1

    `columns` are the positions with a target in any row: the head is computed only there.
    """
    examples = examples or [TokenizedExample(np.array([pad_id]), np.array([IGNORE_INDEX]))]
    ids = [torch.tensor(example.ids, dtype=torch.long) for example in examples]
    targets = [torch.tensor(np.append(example.labels[1:], IGNORE_INDEX), dtype=torch.long) for example in examples]
    batch = {}
    if layout == "packed":
        positions = [torch.arange(len(row)) for row in ids]
        rows = _rows([len(row) for row in ids], pack_length)
        ids, targets, positions = (
            [torch.cat([part[i] for i in row]) for row in rows] for part in (ids, targets, positions)
        )
        batch["position_ids"] = _pad(positions, 0)  # padding is one-token examples: nothing attends to them
    batch["input_ids"] = _pad(ids, pad_id)
    targets = _pad(targets, IGNORE_INDEX)
    has_target = targets != IGNORE_INDEX
    batch["columns"] = has_target.any(0).nonzero().squeeze(1)
    batch["targets"] = targets[:, batch["columns"]]
    batch["num_targets"] = has_target.sum()
    return batch


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _rows(lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Examples in order into rows of at most `limit` tokens; an example over the limit has its own row.

    >>> _rows([5, 3, 4], 8)
    [[0, 1], [2]]
    """
    rows: list[list[int]] = [[]]
    filled = 0
    for index, length in enumerate(lengths):
        if rows[-1] and limit is not None and filled + length > limit:
            rows.append([])
            filled = 0
        rows[-1].append(index)
        filled += length
    return rows


def choose_layout(
    execution: ExecutionSpec, settings: TrainSpec, examples: Sequence[TokenizedExample], model: nn.Module
) -> Layout:
    """The layout asked for, or the one with fewer multiply-adds; packing only where it keeps examples apart.

    Padding computes on the tokens it fills in. Packing computes none of those, but without a variable-length
    kernel attention runs over the square of the whole row. Counting both over an epoch gives, for 16 examples
    of 38 tokens on a model of half a million parameters, 1.9 times the work for packing; measured: 1.85 times
    the seconds (CPU, sdpa). So short examples are padded, and packing pays with flash attention, or where
    examples are long and uneven and the weights outweigh the attention.
    """
    micro_batch_size = execution.micro_batch_size or min(settings.global_batch_size, DEFAULT_MICRO_BATCH_SIZE)
    micro_batch_size = min(micro_batch_size, settings.global_batch_size)
    name, reason = execution.layout, "asked for"
    if name == "auto":
        lengths = [len(example.ids) for example in examples]
        batches = StepBatches(lengths, settings.global_batch_size, micro_batch_size, settings.resolved_data_seed)
        micro_batches = [[lengths[index] for index in batch] for batch in batches]
        ratio = _packing_cost(micro_batches, execution, model)
        name = "packed" if ratio <= WORTH_PACKING else "padded"
        reason = f"packing takes {ratio:.2f} times the multiply-adds of padding"
    if name == "packed" and not (probe := _packing_probe(model))[0]:
        name, reason = "padded", f"{type(model).__name__} does not keep packed examples apart: {probe[1]}"
    return Layout(name, reason, micro_batch_size, execution.pack_length)


def _packing_cost(micro_batches: list[list[int]], execution: ExecutionSpec, model: nn.Module) -> float:
    """Multiply-adds of the packed layout over those of the padded one, for these example lengths."""
    config = model.config.get_text_config()
    per_token = sum(p.numel() for name, p in model.named_parameters() if models.place(name, config).layer is not None)
    per_pair = 2 * config.num_hidden_layers * config.hidden_size  # scores, and the sum of values
    padded = packed = 0
    for lengths in micro_batches:
        longest = max(lengths)
        padded += len(lengths) * (longest * per_token + longest**2 * per_pair)
        packed += sum(lengths) * per_token
        if execution.attention == "flash_attention_2":
            packed += sum(length**2 for length in lengths) * per_pair
        else:
            rows = [sum(lengths[i] for i in row) for row in _rows(lengths, execution.pack_length)]
            packed += len(rows) * max(rows) ** 2 * per_pair + (len(rows) * max(rows) - sum(lengths)) * per_token
    return packed / padded


_probed: dict[tuple[str, str], tuple[bool, str]] = {}


def _packing_probe(model: nn.Module) -> tuple[bool, str]:
    """Whether two examples give the same logits packed and alone, and the finding in words.

    Run once per architecture and attention kernel in a process, on the device and in the type of the weights.
    """
    key = (type(model).__name__, str(model.config._attn_implementation))
    if key not in _probed:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.get_text_config().vocab_size, (1, 24), generator=generator)
        parts = ids.split((11, 13), dim=1)
        positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
        device = model.device
        try:
            with torch.no_grad():
                model.eval()
                packed = model(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False).logits
                alone = [model(input_ids=part.to(device), use_cache=False).logits for part in parts]
            alone = torch.cat(alone, dim=1)
            error = ((packed - alone).abs().max() / alone.abs().max()).item()
            _probed[key] = error <= PACKED_TOLERANCE, f"its logits differ by {error:.1e} from separate ones"
        except (TypeError, ValueError, RuntimeError) as error:  # no position_ids, or not with this kernel
            _probed[key] = False, f"{type(error).__name__}: {error}"
    return _probed[key]


class SweepTrainer(Trainer):
    """The library's Trainer with our batches, our loss and nothing that writes, prints or tracks."""

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSpec,
        layout: Layout,
        data: TokenizedSplit,
        *,
        num_epochs: int,
        checkpointing: bool,
        eval_batch_size: int,
        pad_id: int,
    ):
        """Get ready to train.

        Args:
            model: as `models.prepare` gave it.
            settings: what defines the weights.
            layout: how micro-batches are formed.
            data: training and held-out examples.
            num_epochs: length of the schedule.
            checkpointing: recompute activations.
            eval_batch_size: held-out examples of a pass.
            pad_id: fills rows; any id does.
        """
        self.settings = settings
        examples = data.train.examples
        self.batches = StepBatches(
            [len(example.ids) for example in examples],
            settings.global_batch_size,
            layout.micro_batch_size,
            settings.resolved_data_seed,
        )
        arguments = TrainingArguments(
            output_dir=tempfile.gettempdir(),  # required and made if absent; nothing is written there
            use_cpu=not torch.cuda.is_available(),
            num_train_epochs=num_epochs,
            per_device_train_batch_size=layout.micro_batch_size,
            gradient_accumulation_steps=self.batches.micro_batches_per_step,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine" if settings.lr_schedule == "cosine" else "constant_with_warmup",
            warmup_steps=settings.warmup_steps,
            max_grad_norm=settings.max_grad_norm or 0.0,
            bf16=settings.precision == "bf16",
            seed=settings.resolved_train_seed,
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            use_cache=model.config.use_cache,  # the Trainer would write False into the checkpoints' config
            save_strategy="no",
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # more visible GPUs would mean DataParallel
        super().__init__(model=model, args=arguments, train_dataset=examples)
        if arguments.device.type == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL_MODEL:
            self.accelerator.free_memory = lambda *objects: objects
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the step's completion tokens
        self.collate = functools.partial(collate, pad_id=pad_id)
        self.layout = layout
        self.held_out_batches = self._held_out_batches(data.held_out.examples, eval_batch_size)
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        self.keeps_columns = "logits_to_keep" in inspect.signature(inner.forward).parameters

    def run(
        self,
        on_step: Callable[[dict[str, Any]], None],
        on_epoch: Callable[[int, dict[str, Any], float], None],
        resume_from: Path | None,
    ) -> None:
        """Train to the end.

        Args:
            on_step: called with the row of each step that does not end an epoch.
            on_epoch: called at the end of each with its number from 1, the row of its last step and the
                mean of its losses per token.
            resume_from: training state to continue.
        """
        self.on_step, self.on_epoch = on_step, on_epoch
        self.epoch_loss_nats = self.epoch_tokens = 0
        self.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))

    def get_train_dataloader(self) -> DataLoader:
        """Our micro-batches as they are: the library would shard them again and repeat some to fill up."""
        collate_batch = functools.partial(self.collate, layout=self.layout.name, pack_length=self.layout.pack_length)
        examples = self.train_dataset
        return _Batches(
            examples,
            batch_sampler=self.batches,
            collate_fn=collate_batch,
            pin_memory=self.args.device.type == "cuda",
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW as torch defines it, in its fused form, with weight decay on matrices only."""
        trained = [p for p in (model or self.model).parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.settings.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.settings.learning_rate,
            betas=(self.settings.adam_beta1, self.settings.adam_beta2),
            eps=self.settings.adam_epsilon,
            fused=True,
        )
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], int]:
        """The micro-batches of one optimizer step, and the number of completion tokens in all of them."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self.step_tokens = sum(int(batch.pop("num_targets")) for batch in batches)
        if self.step_tokens == 0:
            step = self.state.global_step + 1
            raise TrainingError("data", f"no example of step {step} has a completion token, so there is no loss")
        return batches, self.step_tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor:
        """Sum of the completion tokens' losses over their number in the whole step."""
        total = self._sum_of_losses(model, inputs)
        return total / num_items_in_batch * self.accelerator.num_processes  # ranks are averaged afterwards

    def _sum_of_losses(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        columns = batch["columns"]
        kept = {"logits_to_keep": columns} if self.keeps_columns else {}
        positions = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
        # use_cache=False: with a cache, packed examples see each other, and no warning says so
        logits = model(input_ids=batch["input_ids"], use_cache=False, **positions, **kept).logits
        if not self.keeps_columns:
            logits = logits[:, columns]
        return F.cross_entropy(
            logits.flatten(0, 1).float(),
            batch["targets"].flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """Not counted: the library walks over all parameters for it at every micro-batch."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Check and hand on one step; the library calls this after every step, once more at the end."""
        if "grad_norm" not in logs:
            return
        step, loss, grad_norm = self.state.global_step, logs["loss"], logs["grad_norm"]
        for what, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise TrainingError("nan", f"the {what} is {value} at step {step} (epoch {self.state.epoch:.2f})")
        row = {
            "step": step,
            "epoch": self.state.epoch,
            "loss_nats": loss,
            "held_out_loss_nats": None,
            "learning_rate": logs["learning_rate"],
            "grad_norm": grad_norm,
            "trained_tokens": self.step_tokens,
        }
        self.epoch_loss_nats += loss * self.step_tokens
        self.epoch_tokens += self.step_tokens
        if step % self.batches.num_steps:
            self.on_step(row)
        else:
            mean = self.epoch_loss_nats / self.epoch_tokens
            self.epoch_loss_nats = self.epoch_tokens = 0
            self.on_epoch(step // self.batches.num_steps, row, mean)

    def _held_out_batches(self, examples: Sequence[TokenizedExample], batch_size: int) -> list[dict[str, torch.Tensor]]:
        ordered = sorted(examples, key=lambda example: len(example.ids))
        groups = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
        return [self.collate(group, layout="padded", pack_length=None) for group in groups]

    @torch.no_grad()
    def held_out_loss(self) -> float | None:
        """Mean loss over the held-out completion tokens, in nats; None without any.

        Raises:
            TrainingError: it is not finite (`nan`): the last step broke the weights.
        """
        num_targets = sum(int(batch["num_targets"]) for batch in self.held_out_batches)
        if num_targets == 0:
            return None
        self.model_wrapped.eval()
        batches = (self._prepare_inputs(batch) for batch in self.held_out_batches)
        total = sum(self._sum_of_losses(self.model_wrapped, batch).item() for batch in batches)
        if not math.isfinite(total):
            raise TrainingError("nan", f"the held-out loss is {total} after step {self.state.global_step}")
        return total / num_targets

    def save_state_to(self, folder: Path, progress: dict[str, Any]) -> None:
        """Weights, optimizer, schedule, position and random states, from which `run` continues bit for bit.

        The weights are written again beside the checkpoint's: those may later be cast to another type.
        """
        models.save_checkpoint(self.model, folder, None, "base")
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        (folder / STATE_FILE).write_text(json.dumps(progress))


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Reproducible kernels on a GPU; on a CPU the usual ones are."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def _named_memory_errors() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingError("oom", f"out of memory: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # what torch says when the host has no memory left
            raise
        raise TrainingError("oom", f"out of memory: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _peak_memory() -> Iterator[Callable[[], dict[str, float | None]]]:
    """Peaks since entering, in GiB: resident memory of the process, and allocated memory of the GPU."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (Linux); a warm process has older peaks
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def peak() -> dict[str, float | None]:
        gpu = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        return {"peak_memory_gib": _resident_peak_gib(), "peak_gpu_gib": gpu}

    yield peak


def _resident_peak_gib() -> float | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return None
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20  # kB


def _describe_model(model: nn.Module) -> dict[str, Any]:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    adapters = "lora_"  # PEFT's prefix of everything an adapter adds
    sizes = [(p.numel(), p.requires_grad, adapters in name) for name, p in model.named_parameters()]
    return {
        "architecture": type(inner).__name__,
        "num_layers": models.count_layers(inner.config),
        "num_parameters": sum(size for size, _, added in sizes if not added),
        "num_trained_parameters": sum(size for size, trained, _ in sizes if trained),
        "target_modules": models.target_modules(model),
    }


def _describe_data(data: TokenizedSet) -> dict[str, int]:
    counts = data.counts
    return {
        "examples_requested": counts.requested,
        "examples_used": counts.used,
        "examples_truncated": counts.truncated,
        "examples_dropped": counts.dropped,
        "trained_tokens": data.trained_tokens,
        "total_tokens": data.total_tokens,
    }


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@functools.cache
def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "accelerate", "numpy")
    return {name: importlib.metadata.version(name) for name in names}
