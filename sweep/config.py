"""YAML -> `SweepSpec`: strict, and every error names the file, the key, the value and the way out."""

import difflib
import glob
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sweep import tiny
from sweep.spec import GridSpec, SweepSpec, TrainSpec

AXIS_KEYS = {"base_model", "dataset", *TrainSpec.setting_names()}
"""What an axis or an exclude rule may name."""

UNIONS = ("path", "eval_epochs")
"""Settings of more than one type."""

UNION_MEMBER = re.compile(r"str|literal\[.*\]|tuple\[.*\]")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class ConfigError(ValueError):
    """The request itself is wrong; the text says where and what to do."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-5 is a number, `no` is text, 012 is text; duplicate keys are errors."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"key '{key}' is given twice (line {line}); keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9_]+|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def load(path: Path | str) -> SweepSpec:
    """Read and check a sweep's YAML. Relative paths in it are relative to the YAML's folder.

    Raises:
        ConfigError: anything wrong with it, in one sentence.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give the path of a sweep's YAML") from error
    return parse(text, path)


def parse(text: str, path: Path, *, check_files: bool = True) -> SweepSpec:
    """As `load`, from the YAML's text.

    Args:
        text: the YAML.
        path: named in errors; relative paths start at its folder.
        check_files: refuse paths that are not there.
    """
    try:
        data = yaml.load(text, _Loader)
        if not isinstance(data, dict):
            raise ConfigError("is not a mapping; start with 'name:', 'base_models:' and 'datasets:'")
        _check_axis_keys(data)
        sweep = SweepSpec.model_validate_json(json.dumps(data))
        sweep = _resolve_paths(sweep, path.parent, check_files)
        _check_names(sweep)
        sweep = _describe_tiny(sweep)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error.__cause__
    except (TypeError, ValueError, RecursionError) as error:  # an anchor inside itself, a list as a key ...
        raise ConfigError(f"{path}: has a value that no setting takes ({error})") from error
    return sweep


def matching_files(path: str) -> list[str]:
    """The files of a dataset's `path`: that very file, or those that match it as a glob, `**` included."""
    return [path] if Path(path).exists() else sorted(glob.glob(path, recursive=True))


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where a known word is close, else the known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def _explain(error: ValidationError) -> str:
    """The first finding of pydantic as one sentence: key, value, way out."""
    errors = [{**e, "loc": _plain(e["loc"])} for e in error.errors()]
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    where = ".".join(str(part) for part in first["loc"][:-1]) or "the top level"
    key, value = first["loc"][-1] if first["loc"] else "sweep", first["input"]
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}' in {where}{suggestion(str(key), _fields(first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"key '{key}' is missing in {where}"
    full = ".".join(str(part) for part in first["loc"]) or "sweep"
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    at = first["loc"]
    reasons = [e["msg"].removeprefix("Value error, ").rstrip(".") for e in errors if e["loc"][: len(at)] == at]
    return f"{full} is {shown}: {', or: '.join(dict.fromkeys(reasons))}"


def _plain(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Without pydantic's names for what a setting may be: `path.str` and `path.tuple[str, ...]` are `path`."""
    pairs = zip(("", *location), location, strict=False)
    return tuple(part for before, part in pairs if not (before in UNIONS and UNION_MEMBER.fullmatch(str(part))))


def _fields(location: tuple[int | str, ...]) -> Iterable[str]:
    """The keys that `SweepSpec` knows at a location."""
    model: Any = SweepSpec
    for part in location:
        annotation = model.model_fields[part].annotation if isinstance(part, str) and _has(model, part) else model
        found = [t for t in _types(annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        model = found[0] if found else model
    return model.model_fields


def _has(model: Any, name: str) -> bool:
    return name in getattr(model, "model_fields", {})


def _types(annotation: Any) -> Iterable[Any]:
    yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _types(inner)


def _check_axis_keys(data: dict[str, Any]) -> None:
    """Axes and rules are open mappings to pydantic, so their keys are checked here."""
    grids = [("", data), *((f"also[{i}].", grid) for i, grid in enumerate(_list(data.get("also"))))]
    for where, grid in grids:
        if not isinstance(grid, dict):
            continue
        groups = [("axes", grid.get("axes"))]
        groups += [(f"zip[{i}]", group) for i, group in enumerate(_list(grid.get("zip")))]
        groups += [(f"exclude[{i}]", rule) for i, rule in enumerate(_list(grid.get("exclude")))]
        for name, group in groups:
            if group is not None and not isinstance(group, dict):
                raise ConfigError(f"{where}{name} is {json.dumps(group, default=str)}: must be a mapping of settings")
            for key, values in (group or {}).items():
                if key not in AXIS_KEYS:
                    raise ConfigError(f"unknown key '{key}' in {where}{name}{suggestion(str(key), AXIS_KEYS)}")
                if not name.startswith("exclude") and (not isinstance(values, list) or not values):
                    raise ConfigError(f"{where}{name}.{key} is {json.dumps(values, default=str)}: must be a list")
            lengths = {len(values) for values in (group or {}).values()} if name.startswith("zip") else {0}
            if len(lengths) > 1:
                raise ConfigError(f"{where}{name} zips lists of different lengths {sorted(lengths)}; make them equal")


def _list(value: Any) -> list[Any]:
    """What is no list is left to pydantic's error."""
    return value if isinstance(value, list) else []


def _resolve_paths(sweep: SweepSpec, folder: Path, check_files: bool) -> SweepSpec:
    """Absolute paths; with `check_files` each of them is there."""

    def absolute(path: str) -> str:
        return str((folder / Path(path).expanduser()).absolute())

    models, datasets, benchmarks = dict(sweep.base_models), dict(sweep.datasets), dict(sweep.benchmarks)
    for name, model in models.items():
        if model.path is not None:
            where = Path(absolute(model.path))
            if check_files and not (where / "config.json").is_file():
                raise ConfigError(
                    f"base_models.{name}.path is '{model.path}': no model directory there (no {where}/config.json); "
                    "give a folder saved with save_pretrained"
                )
            if check_files and not any((where / file).is_file() for file in TOKENIZER_FILES):
                raise ConfigError(
                    f"base_models.{name}.path is '{model.path}': the directory has no tokenizer "
                    f"({', '.join(TOKENIZER_FILES)}); save one there with tokenizer.save_pretrained"
                )
            models[name] = model.model_copy(update={"path": str(where)})
    for name, dataset in datasets.items():
        if dataset.path is not None:
            paths = (dataset.path,) if isinstance(dataset.path, str) else dataset.path
            for path in paths:
                if check_files and not matching_files(absolute(path)):
                    raise ConfigError(f"datasets.{name}.path is '{path}': no such file ({absolute(path)})")
            paths = tuple(absolute(path) for path in paths)
            datasets[name] = dataset.model_copy(update={"path": paths if len(paths) > 1 else paths[0]})
    for name, benchmark in benchmarks.items():
        if benchmark.path is not None:
            where = Path(absolute(benchmark.path))
            if check_files and not where.is_file():
                raise ConfigError(f"benchmarks.{name}.path is '{benchmark.path}': no such task YAML ({where})")
            benchmarks[name] = benchmark.model_copy(update={"path": str(where)})
    return sweep.model_copy(update={"base_models": models, "datasets": datasets, "benchmarks": benchmarks})


def _check_names(sweep: SweepSpec) -> None:
    """Names that refer to other places exist there, and every axis value is one its setting takes."""
    for group, known in (
        ("base_models", tiny.BASE_MODELS),
        ("datasets", tiny.DATASETS),
        ("benchmarks", tiny.BENCHMARKS),
    ):
        for name, source in getattr(sweep, group).items():
            if source.tiny is not None and source.tiny not in known:
                hint = suggestion(source.tiny, known)
                raise ConfigError(f"{group}.{name}.tiny is '{source.tiny}': no such embedded one{hint}")
    for name, dataset in sweep.datasets.items():
        for part in dataset.mixture or {}:
            if part not in sweep.datasets or sweep.datasets[part].mixture is not None:
                hint = suggestion(part, [n for n, d in sweep.datasets.items() if d.mixture is None])
                raise ConfigError(f"datasets.{name}.mixture names '{part}', which is not a plain dataset here{hint}")
    for index, pair in enumerate(sweep.measure_only):
        for key, known in (("base_model", sweep.base_models), ("dataset", sweep.datasets)):
            value = getattr(pair, key)
            if value not in known:
                raise ConfigError(
                    f"measure_only[{index}].{key} is '{value}': not in this YAML{suggestion(value, known)}"
                )
    grids = [("", GridSpec(axes=sweep.axes, zip=sweep.zip, exclude=sweep.exclude))]
    grids += [(f"also[{i}].", grid) for i, grid in enumerate(sweep.also)]
    for where, grid in grids:
        named = [(f"{where}axes", grid.axes), *((f"{where}zip[{i}]", group) for i, group in enumerate(grid.zip))]
        times = Counter(key for _, axes in named for key in axes)
        for key in (key for key, count in times.items() if count > 1):
            raise ConfigError(f"{where}axes and zip vary '{key}' twice; keep one of them")
        for group, axes in named:
            for key, values in axes.items():
                for value in values:
                    _check_value(sweep, f"{group}.{key}", key, value)
        for i, rule in enumerate(grid.exclude):
            for key, values in rule.items():
                for value in values if isinstance(values, list | tuple) else [values]:
                    _check_value(sweep, f"{where}exclude[{i}].{key}", key, value)


def _describe_tiny(sweep: SweepSpec) -> SweepSpec:
    """Embedded datasets and benchmarks bring their kind, and guessing's score, where the YAML gives none."""
    datasets, benchmarks = dict(sweep.datasets), dict(sweep.benchmarks)
    for name, dataset in datasets.items():
        if dataset.tiny is not None and dataset.kind is None:
            datasets[name] = dataset.model_copy(update={"kind": tiny.DATASETS[dataset.tiny].kind})
    for name, benchmark in benchmarks.items():
        if benchmark.tiny is not None:
            recipe = tiny.BENCHMARKS[benchmark.tiny]
            chance = recipe.chance if benchmark.chance is None else benchmark.chance
            known = {"kind": benchmark.kind or recipe.kind, "chance": chance}
            benchmarks[name] = benchmark.model_copy(update=known)
    return sweep.model_copy(update={"datasets": datasets, "benchmarks": benchmarks})


def _check_value(sweep: SweepSpec, where: str, key: str, value: Any) -> None:
    if key in ("base_model", "dataset"):
        known = sweep.base_models if key == "base_model" else sweep.datasets
        if not isinstance(value, str) or value not in known:
            raise ConfigError(f"{where} has '{value}', which is not in this YAML{suggestion(str(value), known)}")
        return
    try:
        sweep.train.replace({key: value})
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from error
