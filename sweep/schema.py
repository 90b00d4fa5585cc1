"""The tables a sweep leaves behind: columns, types, units, keys and their version.

`sweep/` writes these tables and `analysis/` reads them; nothing else crosses that border. Tables are long, not
wide. A missing value is null: never 0, -1 or infinity. Whole tables are derived from the result files, so
they can be rebuilt at any time (`python -m sweep collect DIR`).
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 1
"""Raised whenever a column is added, removed or changes its meaning."""

_VERSION_KEY = b"sweep_schema_version"
_TABLE_KEY = b"sweep_table"

TEXT, INT, FLOAT, BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()


class SchemaError(ValueError):
    """A table or a row is not what the schema says; the text names table, column and way out."""


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    type: pa.DataType
    meaning: str
    """What the value is, in one line."""
    unit: str | None = None
    """Unit of a plain number; None for counts, shares, names and flags."""
    key: bool = False
    """Part of the table's key: never null unless `optional`, and no two rows share all key values."""
    optional: bool = False
    """A key column that may be null (a layer index outside the blocks)."""


@dataclass(frozen=True)
class TableSchema:
    """Name, row meaning and columns of one table."""

    name: str
    row: str
    columns: tuple[Column, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Column names in order."""
        return tuple(column.name for column in self.columns)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the key columns."""
        return tuple(column.name for column in self.columns if column.key)

    def arrow(self) -> pa.Schema:
        """The Arrow schema: units and meanings as field metadata, the version as the file's."""
        fields = [
            pa.field(
                c.name,
                c.type,
                nullable=not c.key or c.optional,
                metadata={"meaning": c.meaning, "unit": c.unit or "", "key": str(c.key).lower()},
            )
            for c in self.columns
        ]
        return pa.schema(fields, metadata={_VERSION_KEY: str(SCHEMA_VERSION), _TABLE_KEY: self.name})


def _key(name: str, type_: pa.DataType, meaning: str, optional: bool = False) -> Column:
    return Column(name, type_, meaning, key=True, optional=optional)


_TRIAL = _key("trial_id", TEXT, "id of the trial: 12 hex digits over what defines its weights")
_EPOCH = _key("epoch", INT, "passes over the data before this checkpoint; 0 is the base model")

TABLES: dict[str, TableSchema] = {
    table.name: table
    for table in (
        TableSchema(
            "trials",
            "a trial: one model trained once, or a baseline",
            (
                _TRIAL,
                Column("status", TEXT, "pending, running, succeeded or failed, over all its work items"),
                Column("in_plan", BOOL, "the YAML still asks for it"),
                Column("is_baseline", BOOL, "a base model without training"),
                Column("base_model", TEXT, "its name in the YAML"),
                Column(
                    "base_digest",
                    TEXT,
                    "content of the base model as loaded: digest, commit or recipe id, and any other dtype",
                ),
                Column("architecture", TEXT, "model class, as in the model's config"),
                Column("num_layers", INT, "transformer blocks"),
                Column("num_parameters", INT, "parameters of the base model"),
                Column("num_trained_parameters", INT, "parameters that were trained; null for a baseline"),
                Column("dataset", TEXT, "its name in the YAML; null for a baseline"),
                Column("dataset_kind", TEXT, "its kind in the YAML (code, maths, general ...)"),
                Column("data_digest", TEXT, "content of the data: digest, hub commit or recipe id"),
                Column("num_examples", INT, "examples asked for by the YAML; null asked for all"),
                Column("method", TEXT, "full, lora; null for a baseline"),
                Column("trained_layers", TEXT, "range of trained blocks, first-last; null trains all"),
                Column("lora_rank", INT, "rank of the adapter; null for full tuning"),
                Column("lora_alpha", FLOAT, "scaling numerator of the adapter"),
                Column("learning_rate", FLOAT, "peak learning rate"),
                Column("lr_schedule", TEXT, "constant or cosine"),
                Column("warmup_steps", INT, "steps of linear warmup"),
                Column("weight_decay", FLOAT, "decoupled weight decay of AdamW"),
                Column("max_grad_norm", FLOAT, "clipping threshold of the global gradient norm; null: none"),
                Column("global_batch_size", INT, "examples per optimizer step over all ranks"),
                Column("epochs", INT, "planned passes over the data"),
                Column("seed", INT, "the trial's seed"),
                Column("data_seed", INT, "chooses examples and their order"),
                Column("train_seed", INT, "initialises adapters and dropout"),
                Column("precision", TEXT, "float32 or bf16"),
                Column("max_length", INT, "limit of one example", unit="tokens"),
                Column("template", TEXT, "prompt template; null where the tokenizer's own is used"),
                Column("recipe_version", INT, "version of the training code's numerics"),
                Column("examples_requested", INT, "examples drawn for training: used + dropped"),
                Column("examples_used", INT, "examples trained on, whole or truncated"),
                Column("examples_truncated", INT, "of the used ones, those cut at max_length"),
                Column("examples_dropped", INT, "examples left out: no completion token fits or exists"),
                Column("trained_tokens", INT, "completion tokens per epoch", unit="tokens"),
                Column("total_tokens", INT, "prompt and completion tokens per epoch", unit="tokens"),
                Column("layout", TEXT, "padded or packed"),
                Column("micro_batch_size", INT, "examples per rank per pass"),
                Column("num_steps", INT, "optimizer steps taken"),
                Column("train_loss_nats", FLOAT, "mean loss of the last epoch", unit="nats per token"),
                Column("train_seconds", FLOAT, "wall time of training, committed attempts", unit="seconds"),
                Column("device", TEXT, "device it trained on"),
                Column("commit", TEXT, "commit of the code that made it, with -dirty if files were changed"),
                Column("versions", TEXT, "libraries it was made with: name version, comma-separated"),
                Column("failure_kind", TEXT, "kind of the last failure of a failed trial"),
                Column("failure_message", TEXT, "one line of the last failure of a failed trial"),
            ),
        ),
        TableSchema(
            "attempts",
            "one try of a work item",
            (
                _key("item", TEXT, "work item: trial or measure, stage and epoch"),
                _key("attempt", INT, "number of the try, from 1"),
                Column("trial_id", TEXT, "the trial; null for measures"),
                Column("stage", TEXT, "train, layer_delta, evaluate or measure"),
                Column("epoch", INT, "checkpoint it worked on; null for training and measures"),
                Column("host", TEXT, "name of the machine"),
                Column("device", TEXT, "device it ran on"),
                Column("started_at", TEXT, "when it started, ISO 8601 in UTC"),
                Column("seconds", FLOAT, "wall time; null while running or lost", unit="seconds"),
                Column("peak_memory_gib", FLOAT, "peak resident memory of its process", unit="GiB"),
                Column("outcome", TEXT, "running, succeeded, failed or lost"),
                Column("failure_kind", TEXT, "oom, nan, data, disk, lost_worker, stopped or bug"),
                Column("message", TEXT, "one line of the failure"),
            ),
        ),
        TableSchema(
            "steps",
            "a logged optimizer step",
            (
                _TRIAL,
                _key("step", INT, "optimizer steps taken, from 1"),
                Column("epoch", FLOAT, "passes over the data, with fraction"),
                Column("loss_nats", FLOAT, "mean over the step's completion tokens", unit="nats per token"),
                Column("held_out_loss_nats", FLOAT, "loss on the held-out split", unit="nats per token"),
                Column("learning_rate", FLOAT, "rate used in this step"),
                Column("grad_norm", FLOAT, "global gradient norm before clipping"),
                Column("trained_tokens", INT, "completion tokens of the step", unit="tokens"),
            ),
        ),
        TableSchema(
            "scores",
            "checkpoint x evaluation x metric",
            (
                _TRIAL,
                _EPOCH,
                _key("eval_id", TEXT, "id of everything that defines the evaluation"),
                _key("metric", TEXT, "name of the metric, with lm-eval's filter if it is not 'none'"),
                Column("benchmark", TEXT, "its name in the YAML"),
                Column("benchmark_kind", TEXT, "its kind in the YAML (code, maths, general ...)"),
                Column("is_primary", BOOL, "the benchmark's main metric"),
                Column("value", FLOAT, "the score"),
                Column("stderr", FLOAT, "standard error over items; null where it has no meaning"),
                Column("num_items", INT, "items scored"),
                Column("num_fewshot", INT, "examples shown in the prompt"),
                Column("higher_is_better", BOOL, "direction of the metric"),
                Column("chance", FLOAT, "score of guessing; null where it is not known"),
            ),
        ),
        TableSchema(
            "items",
            "checkpoint x evaluation x benchmark item, with its primary metric",
            (
                _TRIAL,
                _EPOCH,
                _key("eval_id", TEXT, "id of everything that defines the evaluation"),
                _key("item", INT, "index of the item in the benchmark"),
                Column("benchmark", TEXT, "its name in the YAML"),
                Column("item_digest", TEXT, "content of the item, the same in every evaluation"),
                Column("value", FLOAT, "the primary metric of this item"),
                Column("extracted", BOOL, "an answer could be extracted; null for multiple choice"),
                Column("response", TEXT, "the text generated, or the choice made"),
                Column("target", TEXT, "the right answer"),
            ),
        ),
        TableSchema(
            "layer_deltas",
            "checkpoint x weight tensor: trained minus base",
            (
                _TRIAL,
                _EPOCH,
                _key("parameter", TEXT, "name of the tensor in the base model"),
                Column("layer", INT, "index of the block from 0; null outside the blocks"),
                Column("depth", FLOAT, "relative depth (layer + 0.5) / num_layers; null outside the blocks"),
                Column("module", TEXT, "module within the block (self_attn.q_proj), or its name outside"),
                Column("kind", TEXT, "matrix, vector, fused, tied or other"),
                Column("num_parameters", INT, "entries of the tensor"),
                Column("delta_norm", FLOAT, "Frobenius norm of the change"),
                Column("base_norm", FLOAT, "Frobenius norm of the base tensor"),
                Column("relative_norm", FLOAT, "delta_norm / base_norm; null if the base is all zero"),
                Column("cosine", FLOAT, "cosine of base and trained tensor"),
                Column("max_abs", FLOAT, "largest absolute change of one entry"),
                Column("frac_changed", FLOAT, "share of entries that changed"),
                Column("spectral_norm", FLOAT, "largest singular value of the change; null unless a matrix"),
                Column("stable_rank", FLOAT, "(delta_norm / spectral_norm)^2; null unless a changed matrix"),
                Column("source", TEXT, "float32_checkpoint, lora or dora_merge"),
            ),
        ),
        TableSchema(
            "checkpoint_measures",
            "checkpoint x layer or text x measure",
            (
                _TRIAL,
                _EPOCH,
                _key("measure", TEXT, "name, with its unit"),
                _key("layer", INT, "index of the block; null where it has none", optional=True),
                _key("text", TEXT, "the text; null where it has none", optional=True),
                Column("value", FLOAT, "the measure"),
            ),
        ),
        TableSchema(
            "data_measures",
            "base model x dataset x measure",
            (
                _key("base_model", TEXT, "its name in the YAML"),
                _key("dataset", TEXT, "its name in the YAML"),
                _key("measure", TEXT, "name, with its unit"),
                Column("base_digest", TEXT, "content of the base model"),
                Column("data_digest", TEXT, "content of the data"),
                Column("dataset_kind", TEXT, "the dataset's kind in the YAML"),
                Column("value", FLOAT, "the measure"),
                Column("num_examples", INT, "examples measured"),
            ),
        ),
        TableSchema(
            "pair_measures",
            "dataset x benchmark x measure",
            (
                _key("dataset", TEXT, "its name in the YAML"),
                _key("benchmark", TEXT, "its name in the YAML"),
                _key("base_model", TEXT, "where the measure depends on one", optional=True),
                _key("measure", TEXT, "name, with its unit"),
                Column("value", FLOAT, "the measure"),
            ),
        ),
    )
}


def build(name: str, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows to an Arrow table of the schema; every row must have exactly the table's columns.

    Raises:
        SchemaError: a row has an unknown or a missing column, a wrong type, a null key or a key twice.
    """
    schema = TABLES[name]
    rows = list(rows)
    names = set(schema.names)
    for row in rows:  # pyarrow would drop unknown keys and fill missing ones in silence
        if row.keys() != names:
            unknown, missing = sorted(row.keys() - names), sorted(names - row.keys())
            raise SchemaError(f"a row of table '{name}' has unknown columns {unknown}, lacks {missing}")
    for column in schema.columns:  # pyarrow would cut 1.5 down to 1 in silence
        if column.type == INT and any(isinstance(v := row[column.name], float) and v % 1 for row in rows):
            raise SchemaError(f"table '{name}' has a value of the wrong type: '{column.name}' holds whole numbers")
    try:
        columns = [pa.array([row[c.name] for row in rows], type=c.type) for c in schema.columns]
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SchemaError(f"table '{name}' has a value of the wrong type: {error}") from error
    return check(name, pa.Table.from_arrays(columns, schema=schema.arrow()))


def check(name: str, table: pa.Table) -> pa.Table:
    """The same table if its columns, types and keys are the schema's.

    Raises:
        SchemaError: naming the table and the column.
    """
    schema = TABLES[name]
    if not table.schema.equals(schema.arrow()):
        raise SchemaError(f"table '{name}' has the columns {table.schema.names}, not the schema's")
    for column in schema.columns:
        if column.key and not column.optional and table[column.name].null_count:
            raise SchemaError(f"table '{name}' has an empty key column '{column.name}'")
    distinct = table.group_by(list(schema.keys)).aggregate([]).num_rows if table.num_rows else 0
    if distinct != table.num_rows:
        raise SchemaError(f"table '{name}' repeats a key: {table.num_rows - distinct} rows over {schema.keys}")
    return table


def write(name: str, table: pa.Table, folder: Path) -> Path:
    """Write `<folder>/<name>.parquet` beside and rename, so that a reader always finds a whole file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.parquet"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(check(name, table), beside)
    beside.replace(path)
    return path


def read(name: str, folder: Path) -> pa.Table:
    """The table `<folder>/<name>.parquet`.

    Raises:
        SchemaError: the file is not there, not readable, or of another schema version; the text says
            how to rebuild it.
    """
    path = folder / f"{name}.parquet"
    rebuild = f"rebuild the tables with: python -m sweep collect {folder.parent}"
    if not path.exists():
        raise SchemaError(f"no table '{name}' in {folder}; {rebuild}")
    try:
        with pq.ParquetFile(path) as file:  # opened once: it may be replaced between two looks
            version = (file.schema_arrow.metadata or {}).get(_VERSION_KEY, b"?").decode()
            if version != str(SCHEMA_VERSION):
                raise SchemaError(f"{path} has schema version {version}, this code reads {SCHEMA_VERSION}; {rebuild}")
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(f"{path} is not a readable Parquet file ({error}); {rebuild}") from error
    return check(name, table)
