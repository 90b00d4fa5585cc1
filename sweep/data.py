"""Examples: where they come from, which are held out, which are trained on.

Every choice among examples sorts them by a hash of the seed and their content, never by position or by a
library's random generator: the order of rows and files, the file format and the versions of Python and numpy
cannot change which examples a trial sees.
"""

import difflib
import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sweep.config import matching_files
from sweep.spec import DatasetSpec, TrialSpec

FORMATS = {
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output", "response"),
    "messages": ("messages",),
}
"""The columns that each format may have."""


class DataError(ValueError):
    """Bad data; the text names the file, the line or row, and the way out."""


class Turn(NamedTuple):
    """A prompt and the completion to learn."""

    prompt: str
    completion: str


class Example(NamedTuple):
    """A conversation; a plain prompt-completion pair is one turn."""

    turns: tuple[Turn, ...]
    system: str | None = None


class Split(NamedTuple):
    """The examples of one trial."""

    train: list[Example]
    held_out: list[Example]
    requested: int
    """Training examples asked for: `num_examples`, or all there are."""


_Keyed = tuple[tuple[str, Example], ...]
"""Examples, each with a key that no other example of its source has."""


# Reading


def load(name: str, dataset: DatasetSpec, digest: str | None = None) -> list[Example]:
    """All examples of one source, in the order of its files and rows.

    Args:
        name: The dataset's name in the YAML, for error texts.
        dataset: One source; a mixture is several of them.
        digest: Content of the source (of a hub dataset its commit); with it, a process reads the source once.

    Raises:
        DataError: nothing to read, an unreadable file, a missing column, or a value that is not text.
    """
    if digest is None:
        return _read(name, dataset, None)
    return [example for _, example in _keyed(name, dataset.model_dump_json(), digest)]


@lru_cache(maxsize=8)
def _keyed(name: str, settings: str, digest: str) -> _Keyed:
    """The examples, each with the hash of its content and the number of the copy as its key."""
    copies: Counter[str] = Counter()
    keyed = []
    for example in _read(name, DatasetSpec.model_validate_json(settings), digest):
        content = hashlib.sha256(json.dumps(example).encode()).hexdigest()
        keyed.append((f"{content} {copies[content]}", example))
        copies[content] += 1
    return tuple(keyed)


def _read(name: str, dataset: DatasetSpec, digest: str | None) -> list[Example]:
    assert dataset.mixture is None, f"{name!r} is a mixture: its sources are loaded one by one"
    if dataset.hub is not None:
        examples = _read_hub(name, dataset, digest or dataset.revision)
        source = f"hub dataset {dataset.hub}, split {dataset.split}"
    else:
        files = _files(name, dataset)
        examples = [example for file in files for example in _read_file(file, dataset)]
        source = ", ".join(files)
    if not examples:
        raise DataError(f"dataset {name!r} has no examples ({source}); give other data, or leave it out")
    return examples


def _files(name: str, dataset: DatasetSpec) -> list[str]:
    if dataset.tiny is not None:
        from sweep import tiny  # only this source needs the generators

        return [str(tiny.build_dataset(dataset.tiny, tiny.default_cache_dir()))]
    patterns = (dataset.path,) if isinstance(dataset.path, str) else dataset.path
    files: list[str] = []
    for pattern in patterns:
        found = matching_files(pattern)
        if not found:
            raise DataError(f"dataset {name!r}: no file matches {pattern!r} (from {Path.cwd()}); correct its `path`")
        files += found
    return list(dict.fromkeys(files))


def _read_file(file: str, dataset: DatasetSpec) -> list[Example]:
    match Path(file).suffix:
        case ".parquet":
            return _read_parquet(file, dataset)
        case ".jsonl" | ".json":
            rows = _json_rows(file)
        case suffix:
            raise DataError(
                f"{file} has {f'the ending {suffix}' if suffix else 'no ending'}; give .jsonl, .json or "
                f".parquet files (for a folder a glob, such as {file.rstrip('/')}/*.jsonl)"
            )
    return _parse(file, rows, dataset)


def _json_rows(file: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of a JSON list, or of one JSON object per line, as many a .json holds too."""
    content = Path(file).read_bytes()
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        for number, row in enumerate(_json(content, file), start=1):
            yield f"entry {number}", row
        return
    for number, line in enumerate(content.split(b"\n"), start=1):  # splitlines() also splits at other bytes
        if line.strip():
            yield f"line {number}", _json(line, f"{file}, line {number}")


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON ({error}); repair it or write the file again") from None


def _read_parquet(file: str, dataset: DatasetSpec) -> list[Example]:
    def rows() -> Iterator[tuple[str, Any]]:
        number = 0
        for batch in parquet.iter_batches(columns=[c for c in _wanted(dataset) if c in available]):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row

    try:
        with pq.ParquetFile(file) as parquet:
            available = parquet.schema_arrow.names
            return _parse(file, rows(), dataset, available)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet ({error}); copy or write it again") from error


def _read_hub(name: str, dataset: DatasetSpec, revision: str) -> list[Example]:
    import datasets  # 1 s, and only this source needs it

    try:
        table = datasets.load_dataset(dataset.hub, dataset.subset, split=dataset.split, revision=revision)
    except (ValueError, FileNotFoundError) as error:  # a lost connection is no fault of the data
        raise DataError(
            f"dataset {name!r}: {dataset.hub} (subset {dataset.subset}, split {dataset.split}, revision "
            f"{revision}) cannot be loaded ({error}); correct its settings, or give local files by `path`"
        ) from error
    available = table.column_names
    table = table.select_columns([column for column in _wanted(dataset) if column in available])
    rows = ((f"row {number}", row) for number, row in enumerate(table.to_list(), start=1))
    return _parse(f"{dataset.hub} ({dataset.split})", rows, dataset, available)


# Rows to examples


def _parse(
    source: str, rows: Iterable[tuple[str, Any]], dataset: DatasetSpec, columns: Collection[str] = ()
) -> list[Example]:
    """Examples of one file; `columns` are those of its schema, or none where the first row tells them."""
    parse = None
    examples = []
    for place, row in rows:
        try:
            if not isinstance(row, dict):
                raise _BadRow(f"is of type {type(row).__name__}, not an object with columns; write it as one")
            parse = parse or _parser(dataset, columns or row)
            examples.append(parse(row))
        except _BadRow as error:
            raise DataError(f"{source}, {place}: {error}") from None
    return examples


class _BadRow(Exception):
    """What is wrong with a row, and the way out; `_parse` says where."""


def _wanted(dataset: DatasetSpec) -> list[str]:
    """The data columns that some format could use."""
    return list(dict.fromkeys(_names(dataset).values()))


def _names(dataset: DatasetSpec) -> dict[str, str]:
    """Format column -> data column, over all formats."""
    return {c: dataset.columns.get(c, c) for columns in FORMATS.values() for c in columns}


def _parser(dataset: DatasetSpec, available: Collection[str]) -> Callable[[dict], Example]:
    """A function row -> example for the data's format."""
    names = _names(dataset)
    form = dataset.format or _found_format(names, available)
    for column in dataset.columns:
        if column not in FORMATS[form]:
            hint = _did_you_mean(column, FORMATS[form])
            raise _BadRow(f"format {form} has no column {column!r}; {hint} Correct the dataset's `columns`")

    prompt, answer = names["prompt"], names["completion"]
    if form == "instruction":
        prompt = names["instruction"]
        answers = [c for c in ("output", "response") if names[c] in available] or ["output"]
        answer = names[next((c for c in answers if c in dataset.columns), answers[0])]
    for column in [names["messages"]] if form == "messages" else [prompt, answer]:
        _require(column, available)

    def pair(row: dict) -> Example:
        return Example((Turn(_text(row, prompt), _text(row, answer)),))

    def instruction(row: dict) -> Example:
        question = _text(row, prompt)
        if row.get(names["input"]) not in (None, ""):
            question += "\n" + _text(row, names["input"])
        return Example((Turn(question, _text(row, answer)),))

    def conversation(row: dict) -> Example:
        _require(names["messages"], row)
        return _conversation(row[names["messages"]])

    return {"prompt_completion": pair, "instruction": instruction, "messages": conversation}[form]


def _found_format(names: Mapping[str, str], available: Collection[str]) -> str:
    has = {column for column, name in names.items() if name in available}
    found = [form for form in ("prompt_completion", "messages") if has.issuperset(FORMATS[form])]
    if "instruction" in has and has & {"output", "response"}:
        found.append("instruction")
    if len(found) == 1:
        return found[0]
    if found:
        raise _BadRow(f"the columns fit {' and '.join(found)}; give the dataset's `format`")
    raise _BadRow(
        f"no known format in the columns {', '.join(available) or 'none'}; needed are prompt + completion, "
        "instruction + output or response, or messages: rename them, or map them with `columns`"
    )


def _did_you_mean(word: str, words: Collection[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(words) or 'none'}."


def _require(column: str, columns: Collection[str]) -> None:
    if column not in columns:
        hint = _did_you_mean(column, columns)
        raise _BadRow(f"no column {column!r}; {hint} Name the right one under the dataset's `columns`")


def _text(row: dict, column: str) -> str:
    _require(column, row)
    return _checked(row[column], f"column {column!r}")


def _checked(value: Any, what: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else f"of type {type(value).__name__}"
        raise _BadRow(f"{what} is {kind}, not text; write it as text, or leave the row out")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair; no tokenizer takes it
            raise _BadRow(f"{what} is not valid Unicode; repair the text, or leave the row out") from None
    return value


def _conversation(messages: Any) -> Example:
    """Turns of a list of {role, content}: an optional system message, then user and assistant in turn."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _BadRow("the messages are no list of {role, content}; write them so, or give another `format`")
    roles = [message.get("role") for message in messages]
    texts = [_checked(m.get("content"), f"the content of message {i}") for i, m in enumerate(messages, 1)]
    system = texts.pop(0) if roles[:1] == ["system"] else None
    spoken = roles[len(roles) - len(texts) :]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise _BadRow(
            f"the roles are {', '.join(map(str, roles)) or 'none'}; needed are user and assistant in turn, "
            "ending with assistant (a system message may lead): correct them, or leave the row out"
        )
    return Example(tuple(map(Turn, texts[::2], texts[1::2])), system)


# Choosing


def training_split(trial: TrialSpec) -> Split:
    """What a trial trains on, and what it is held against.

    The held-out examples depend on the data alone: they are the same for every seed and size. All copies of
    a held-out example, in any source, are kept out of training. Training examples are the first
    `num_examples` of one order that `data_seed` gives, so that 1k lies inside 20k, also in a mixture.

    Raises:
        DataError: as `load`, or there are fewer examples than asked for.
    """
    train = trial.train
    assert train is not None, "a baseline has no training examples"
    sources = _sources(trial.datasets, trial.data_digests, trial.weights)

    wanted = train.held_out_examples
    shuffled = [(weight, list(dict.fromkeys(_permuted(keyed, "held out")))) for weight, keyed in sources]
    held_out = list(islice(dict.fromkeys(_mixed(shuffled)), wanted))
    label = " + ".join(trial.datasets)
    if len(held_out) < wanted:
        raise DataError(
            f"held_out_examples is {wanted}, but dataset {label} can give only {len(held_out)} different "
            "examples; lower held_out_examples"
        )

    apart = set(held_out)
    seed = f"train {train.resolved_data_seed}"
    rest = [(weight, [e for e in _permuted(keyed, seed) if e not in apart]) for weight, keyed in sources]
    examples = list(islice(_mixed(rest), train.num_examples))
    requested = train.num_examples or len(examples)
    if not examples or len(examples) < requested:
        shares = "" if len(rest) == 1 else " in these shares"
        raise DataError(
            f"num_examples is {train.num_examples or 'all'}, but dataset {label} can give only "
            f"{len(examples)}{shares} besides {len(held_out)} held-out ones; lower num_examples or "
            "held_out_examples"
        )
    return Split(examples, held_out, requested)


def measured_examples(
    datasets: Mapping[str, DatasetSpec],
    digests: Mapping[str, str],
    weights: Mapping[str, float] | None,
    limit: int,
) -> list[Example]:
    """At most `limit` examples that stand for the data in every trial; held-out ones may be among them.

    Raises:
        DataError: as `load`.
    """
    sources = _sources(datasets, digests, weights)
    return list(islice(_mixed([(weight, _permuted(keyed, "train 0")) for weight, keyed in sources]), limit))


def _sources(
    datasets: Mapping[str, DatasetSpec], digests: Mapping[str, str], weights: Mapping[str, float] | None
) -> list[tuple[float, _Keyed]]:
    """(weight, examples) of each source, ordered by content: names are not part of a trial's id."""

    def content(name: str) -> str:
        reading = datasets[name].model_dump_json(include={"format", "columns", "subset", "split"})
        return f"{digests[name]} {reading} {weights and weights[name]}"

    return [
        (weights[name] if weights else 1.0, _keyed(name, datasets[name].model_dump_json(), digests[name]))
        for name in sorted(datasets, key=content)
    ]


def _permuted(keyed: _Keyed, seed: str) -> list[Example]:
    ranked = sorted(keyed, key=lambda pair: hashlib.sha256(f"{seed} {pair[0]}".encode()).digest())
    return [example for _, example in ranked]


def _mixed(sources: Sequence[tuple[float, Sequence[Example]]]) -> Iterator[Example]:
    """Examples of all sources in shares by weight, until the first source runs out.

    The n-th example of a source is due at (n - 1/2) / weight (Webster's method), so every prefix has the
    right shares to rounding, and shorter mixtures lie inside longer ones. Largest remainders would not keep
    that: with three sources a share can shrink as the total grows.

    >>> "".join(_mixed([(2, "aaaa"), (1, "bb")]))
    'abaaba'
    """
    due = [(0.5 / weight, source, 0) for source, (weight, _) in enumerate(sources)]
    heapq.heapify(due)
    while due:
        _, source, position = due[0]
        weight, examples = sources[source]
        if position == len(examples):
            return
        yield examples[position]
        heapq.heapreplace(due, ((position + 1.5) / weight, source, position + 1))
