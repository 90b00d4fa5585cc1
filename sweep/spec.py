"""Frozen settings: the words of a sweep's YAML, and what one trial and one evaluation are.

Which settings are identity (they define the trained weights) and which are execution (how and where it ran) is
decided here, by the block a field lives in: everything in `TrainSpec` is identity, everything in
`ExecutionSpec` and `Resources` is recorded and never hashed.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sweep.identity import content_id

RECIPE_VERSION = 1
"""Part of every trial id; raised only when the code changes the trained weights on purpose."""


def _integral(value: Any) -> Any:
    """2e4 is written for 20000 in many a YAML; 2.5 and true are not counts."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_integral), Field(ge=0, lt=2**63)]
Positive = Annotated[int, BeforeValidator(_integral), Field(ge=1, lt=2**63)]
Seed = Annotated[int, BeforeValidator(_integral), Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Spec(BaseModel):
    """Base of all settings: frozen, strict about types, and no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, without the ids that this one remembers: they may be others now."""
        copy = super().model_copy(update=update, deep=deep)
        for name in copy.__dict__.keys() - type(copy).model_fields.keys():
            del copy.__dict__[name]
        return copy


def _exactly_one(spec: Spec, *names: str) -> None:
    given = [name for name in names if getattr(spec, name) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(names)} (given: {', '.join(given) or 'none'})")


class BaseModelSpec(Spec):
    """Pretrained weights at a revision, from exactly one of `path`, `hub` and `tiny`."""

    path: str | None = None
    """A local model directory in the Hugging Face format, with its tokenizer."""
    hub: str | None = None
    """A model id on the Hugging Face hub."""
    revision: str = "main"
    """Branch, tag or commit on the hub; the commit found is pinned in `sweep.lock`."""
    tiny: str | None = None
    """Name of an embedded model (see sweep/tiny)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type the weights are loaded in before training."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _exactly_one(self, "path", "hub", "tiny")
        return self


class DatasetSpec(Spec):
    """Where examples come from: exactly one of `path`, `hub`, `tiny` and `mixture`."""

    path: str | tuple[str, ...] | None = None
    """Local JSONL, JSON or Parquet: a file, a glob or a list of them."""
    hub: str | None = None
    """A dataset id on the Hugging Face hub."""
    subset: str | None = None
    """Configuration name of the hub dataset."""
    split: str = "train"
    """Split of the hub dataset."""
    revision: str = "main"
    """Branch, tag or commit on the hub; the commit found is pinned in `sweep.lock`."""
    tiny: str | None = None
    """Name of an embedded dataset (see sweep/tiny)."""
    mixture: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
    """Other datasets of this YAML with their weights: shares of the examples."""
    format: Literal["prompt_completion", "instruction", "messages"] | None = None
    """`prompt` + `completion`; `instruction` (+ `input`) + `output` or `response`; or `messages` with role
    and content. Null finds it from the columns."""
    columns: dict[str, str] = {}
    """The format's column -> the column of the data that holds it."""
    kind: str | None = None
    """Group in tables and figures (code, maths, general ...)."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _exactly_one(self, "path", "hub", "tiny", "mixture")
        return self


class LoraSpec(Spec):
    """Low-rank adapters, as PEFT defines them."""

    rank: Positive = 16
    """Rank of the update."""
    alpha: float = 32.0
    """Scaling numerator: the update is multiplied by alpha / rank."""
    dropout: Share = 0.0
    """Dropout on the adapter's input."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dora: bool = False
    """Decompose into magnitude and direction (DoRA)."""
    target_modules: tuple[str, ...] | None = None
    """Module names that get an adapter; null takes every linear layer but the head."""


class TrainSpec(Spec):
    """Everything that defines the trained weights, besides base model and data."""

    method: Literal["full", "lora"] = "full"
    """Train the weights themselves, or a LoRA adapter."""
    lora: LoraSpec = LoraSpec()
    """Adapter settings; not part of the id under `method: full`."""
    trained_layers: str | None = Field(default=None, pattern=r"^\d+-\d+$")
    """Blocks to train, `first-last` from 0, both included; null trains everything."""
    num_examples: Positive | None = None
    """Training examples: the first n of one seeded permutation, so that 1k lies inside 20k; null: all."""
    held_out_examples: Count = 50
    """Examples set apart for the held-out loss: the same ones for every seed, never trained on."""
    template: str | None = "###Question: {prompt}\n###Answer: {completion}"
    """Prompt template with {prompt} and {completion}; null uses the tokenizer's own chat template."""
    max_length: Positive = 1024
    """Limit of one example in tokens, end-of-text included."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """An example over max_length: cut its completion's end, leave it out, or stop the trial."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """After warmup: constant, or cosine to zero at the last step."""
    warmup_steps: Count = 0
    """Whole steps of linear warmup (a share of the total would tie a constant schedule to its length)."""
    optimizer: Literal["adamw"] = "adamw"
    """AdamW as torch defines it."""
    adam_beta1: Share = 0.9
    """Decay of the first moment."""
    adam_beta2: Share = 0.999
    """Decay of the second moment."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the second moment's root."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm here; null does not clip."""
    global_batch_size: Positive = 32
    """Examples per optimizer step over all ranks and accumulation."""
    epochs: Positive = 3
    """Planned passes over the data; not part of the id under a constant schedule."""
    precision: Literal["float32", "bf16"] = "float32"
    """float32, or bf16 autocast over float32 weights. Never chosen by the device."""
    seed: Seed = 0
    """Sets the two seeds below where they are not given."""
    data_seed: Seed | None = None
    """Chooses the examples and their order."""
    train_seed: Seed | None = None
    """Initialises adapters and dropout."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.template is not None:
            for field in ("{prompt}", "{completion}"):
                if self.template.count(field) != 1:
                    raise ValueError(f"template must contain {field} exactly once: {self.template!r}")
            if self.template.index("{prompt}") > self.template.index("{completion}"):
                raise ValueError("template must have {prompt} before {completion}")
        if self.trained_layers is not None:
            first, last = self.layer_range
            if first > last:
                raise ValueError(f"trained_layers {self.trained_layers!r}: the first block is after the last")
        return self

    @property
    def layer_range(self) -> tuple[int, int] | None:
        """First and last trained block, both included; None trains everything."""
        if self.trained_layers is None:
            return None
        first, last = self.trained_layers.split("-")
        return int(first), int(last)

    @property
    def resolved_data_seed(self) -> int:
        """`data_seed`, or `seed` where it is not given."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def resolved_train_seed(self) -> int:
        """`train_seed`, or `seed` where it is not given."""
        return self.seed if self.train_seed is None else self.train_seed

    @classmethod
    def setting_names(cls) -> set[str]:
        """Every setting an axis may vary; nested ones as `lora.rank`."""
        nested = {f"lora.{name}" for name in LoraSpec.model_fields}
        return (set(cls.model_fields) - {"lora"}) | nested

    def replace(self, settings: Mapping[str, Any]) -> "TrainSpec":
        """The same with some settings replaced, each checked and brought to its declared type.

        Raises:
            ValidationError: a setting does not take the value.
        """
        values = self.model_dump(mode="json")
        for key, value in settings.items():
            group, _, nested = key.partition(".")
            if nested:
                values[group][nested] = value
            else:
                values[key] = value
        return TrainSpec.model_validate_json(json.dumps(values))

    def value(self, setting: str) -> Any:
        """One setting by its name; nested ones as `lora.rank`."""
        group, _, nested = setting.partition(".")
        return getattr(getattr(self, group), nested) if nested else getattr(self, group)

    def identity(self) -> dict[str, Any]:
        """The settings as they enter the trial id."""
        values = self.model_dump(exclude={"seed", "data_seed", "train_seed"})
        values |= {"data_seed": self.resolved_data_seed, "train_seed": self.resolved_train_seed}
        if self.method == "full":
            del values["lora"]
        if self.lr_schedule == "constant":  # one trajectory passes through every epoch
            del values["epochs"]
        return values


class BenchmarkSpec(Spec):
    """A downstream test: exactly one of `task`, `path` and `tiny`."""

    task: str | None = None
    """Name of a task that comes with lm-evaluation-harness."""
    path: str | None = None
    """A local lm-eval task YAML."""
    tiny: str | None = None
    """Name of an embedded benchmark (see sweep/tiny)."""
    num_fewshot: Count = 0
    """Examples shown in the prompt."""
    fewshot_seed: Count = 1234
    """Chooses those examples."""
    limit: Positive | None = None
    """Score only the first items; null scores all."""
    metric: str | None = None
    """The primary metric; null takes the task's first."""
    max_new_tokens: Positive | None = None
    """Limit of a generated answer; null keeps the task's."""
    apply_template: bool = True
    """Put prompts into the trial's prompt template; false uses the task's bare text."""
    kind: str | None = None
    """Group in tables and figures."""
    chance: Share | None = None
    """Score of guessing, where it is known."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _exactly_one(self, "task", "path", "tiny")
        return self


class ExecutionSpec(Spec):
    """How trials run. Recorded, never hashed: none of this may show in the numbers beyond rounding."""

    layout: Literal["auto", "padded", "packed"] = "auto"
    """Rows of a micro-batch: padded to the longest, or concatenated with no attention across examples.
    `auto` takes the faster one for device and lengths."""
    pack_length: Positive | None = None
    """Limit of a packed row in tokens; null means one row per micro-batch."""
    micro_batch_size: Positive | None = None
    """Examples per pass; null takes the global batch up to 16."""
    gradient_checkpointing: bool = False
    """Recompute activations: less memory, about a fifth slower."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel."""
    eval_batch_size: Positive = 32
    """Items per pass in evaluation and measuring."""
    max_retries: Count = 2
    """Further tries of a work item whose worker was lost."""


class StageResources(Spec):
    """What one work item of a stage holds."""

    cpus: Annotated[float, Field(gt=0)] = 1
    """CPU cores; also the number of threads."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs, or a share of one."""


class Resources(Spec):
    """Resources per stage. One shape for all stages keeps the workers warm between them."""

    train: StageResources = StageResources()
    """Training."""
    layer_delta: StageResources = StageResources()
    """Weight changes."""
    evaluate: StageResources = StageResources()
    """Benchmarks."""
    measure: StageResources = StageResources()
    """Data measures."""


Axes = dict[str, tuple[Any, ...]]


class GridSpec(Spec):
    """A product of axes, minus exclusions."""

    axes: Axes = {}
    """Setting -> its values. Keys: `base_model`, `dataset`, or a key of `train` (`lora.rank` for nested)."""
    zip: tuple[Axes, ...] = ()
    """Groups of axes of equal length that vary together."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Rules; a trial that matches every key of one is left out. A list means any of its values."""


class MeasurePair(Spec):
    """A (base model, dataset) pair to measure without training it."""

    base_model: str
    """Name in this YAML."""
    dataset: str
    """Name in this YAML."""


class SweepSpec(Spec):
    """One YAML: base models x datasets x settings, their evaluations, and how to run them."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the sweep; results go to runs/<name> unless --out says otherwise."""
    base_models: dict[str, BaseModelSpec] = Field(min_length=1)
    """Short name -> where it comes from."""
    datasets: dict[str, DatasetSpec] = Field(min_length=1)
    """Short name -> where it comes from."""
    benchmarks: dict[str, BenchmarkSpec] = {}
    """Short name -> the test; every checkpoint wanted is scored on all of them."""
    train: TrainSpec = TrainSpec()
    """Settings of every trial, unless an axis varies them."""
    axes: Axes = {}
    """As in `GridSpec`; `base_model` and `dataset` vary over all of the YAML's unless given."""
    zip: tuple[Axes, ...] = ()
    """As in `GridSpec`."""
    exclude: tuple[dict[str, Any], ...] = ()
    """As in `GridSpec`."""
    also: tuple[GridSpec, ...] = ()
    """Further grids; a trial that two grids name runs once."""
    eval_epochs: Literal["last", "all"] | Annotated[tuple[Positive, ...], Field(min_length=1)] = "last"
    """The epochs whose checkpoints are kept and evaluated."""
    baselines: bool = True
    """Evaluate every base model without training too."""
    layer_delta: Literal["full", "norms", "off"] = "full"
    """Weight changes: all measures, all but spectral norm and stable rank, or none."""
    measure: bool = True
    """Measure every (base model, dataset) pair of the sweep."""
    measure_only: tuple[MeasurePair, ...] = ()
    """Pairs to measure that are not trained."""
    measure_examples: Positive = 500
    """Examples per measured pair at most."""
    keep: Literal["all", "last", "none"] = "all"
    """Weights kept once a checkpoint's evaluations are done."""
    keep_state: Literal["last", "none"] = "none"
    """Keep optimizer state at the last epoch, so that more epochs can continue from it."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of kept weights, cast once, after the layer deltas are taken in float32."""
    execution: ExecutionSpec = ExecutionSpec()
    """How trials run."""
    resources: Resources = Resources()
    """What work items hold."""


class TrialSpec(Spec):
    """One model trained once, or a baseline (`dataset` and `train` null). Its id is its content."""

    base_model: BaseModelSpec
    """Pretrained weights."""
    base_digest: str
    """Content of the base model: digest of its files, hub commit or recipe id."""
    datasets: dict[str, DatasetSpec] = {}
    """The data: one source, or those of a mixture, by name."""
    data_digests: dict[str, str] = {}
    """Content of each source."""
    weights: dict[str, float] | None = None
    """Mixture weights by source; null for a single source."""
    train: TrainSpec | None = None
    """Settings; null for a baseline."""
    recipe_version: int = RECIPE_VERSION
    """Version of the training code's numerics; kept with the trial, so that an older one keeps its id."""

    @property
    def is_baseline(self) -> bool:
        """A base model without training."""
        return self.train is None

    def data_identity(self) -> list[list[Any]]:
        """The sources by content: [digest, how to read it, weight], independent of their names."""
        sources = []
        for name, dataset in self.datasets.items():
            reading = [dataset.format, sorted(dataset.columns.items()), dataset.subset, dataset.split]
            sources.append([self.data_digests[name], reading, (self.weights or {}).get(name)])
        return sorted(sources, key=str)

    @cached_property
    def trial_id(self) -> str:
        """12 hex digits over the identity settings."""
        identity: dict[str, Any] = {"base": [self.base_digest, self.base_model.dtype]}
        if self.train is not None:
            identity |= {"recipe": self.recipe_version, "data": self.data_identity(), "train": self.train.identity()}
        return content_id(identity)


class EvalSpec(Spec):
    """One evaluation of a checkpoint: a benchmark at its content, with all that shapes the number."""

    name: str
    """The benchmark's name in the YAML."""
    benchmark: BenchmarkSpec
    """The benchmark's settings."""
    digest: str
    """Content of the task's definition and items: digest, or lm-eval version and hub commit."""
    template: str | None = None
    """The trial's prompt template; null: the tokenizer's own, or none if `apply_template` is false."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights evaluated."""
    backend: str
    """Backend and version, such as `lm_eval 0.4.13 hf`."""

    @cached_property
    def eval_id(self) -> str:
        """12 hex digits over everything that defines the score, and not the name."""
        benchmark = self.benchmark.model_dump(exclude={"path", "tiny", "kind", "chance"})
        identity = {"benchmark": benchmark, "digest": self.digest, "dtype": self.dtype, "backend": self.backend}
        if self.benchmark.apply_template:
            identity["template"] = self.template
        return content_id(identity)


class Pins(Spec):
    """What exact content each name of the YAML stands for, by name."""

    base_models: dict[str, str]
    """Digest of the files, hub commit, or recipe id."""
    datasets: dict[str, str]
    """Digest of the files, hub commit, or recipe id; mixtures have none of their own."""
    benchmarks: dict[str, str]
    """Digest of the task's definition and items."""
    backend: str
    """Evaluation backend and its version."""


class PlannedTrial(Spec):
    """A trial with its place in a sweep: names, checkpoints wanted, evaluations, how to run."""

    trial: TrialSpec
    """What is trained."""
    base_model: str
    """Name of the base model in the YAML."""
    dataset: str | None
    """Name of the dataset in the YAML; null for a baseline."""
    dataset_kind: str | None
    """Kind of the dataset in the YAML."""
    epochs: tuple[Count, ...]
    """Epochs whose checkpoints are wanted, ascending; (0,) for a baseline."""
    evaluations: tuple[EvalSpec, ...]
    """Evaluations of each of those checkpoints."""
    layer_delta: Literal["full", "norms", "off"]
    """Weight changes wanted."""
    keep: Literal["all", "last", "none"]
    """Weights kept once a checkpoint's other work is done."""
    keep_state: Literal["last", "none"]
    """Keep the optimizer state of the last epoch."""
    export_dtype: Literal["float32", "bfloat16"]
    """Type of the kept weights."""
    execution: ExecutionSpec
    """How it runs."""

    @property
    def trial_id(self) -> str:
        """Id of the trial."""
        return self.trial.trial_id


class PlannedMeasure(Spec):
    """Data measures of one (base model, dataset) pair. Its key is its content."""

    base_model: str
    """Name of the base model in the YAML."""
    dataset: str
    """Name of the dataset in the YAML."""
    dataset_kind: str | None
    """Kind of the dataset in the YAML."""
    pair: TrialSpec
    """The pair, with the training settings that shape text: template, max_length."""
    max_examples: Positive
    """Examples measured at most."""
    version: int
    """Version of the measuring code."""
    execution: ExecutionSpec
    """How it runs."""

    @cached_property
    def key(self) -> str:
        """12 hex digits over everything that defines the measures."""
        assert self.pair.train is not None
        base = [self.pair.base_digest, self.pair.base_model.dtype]
        text = [self.pair.train.template, self.pair.train.max_length, self.max_examples]
        return content_id({"base": base, "data": self.pair.data_identity(), "text": text, "version": self.version})
