"""A checkpoint -> scores and per-item results, by lm-evaluation-harness in this process.

Base and tuned models pass through the same code with the same prompts; what a checkpoint was trained on is
not known here. `command` gives the `lm_eval` command line that repeats an evaluation from outside.
"""

import contextlib
import difflib
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import random
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sweep import tiny
from sweep.identity import content_id
from sweep.spec import BenchmarkSpec, EvalSpec

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LM_EVAL_VERSION = importlib.metadata.version("lm_eval")
BACKEND = f"lm_eval {LM_EVAL_VERSION} hf"
"""What computes the scores; part of every eval id."""

SEEDS = (0, 1234, 1234)
"""For random, numpy and torch before each benchmark: lm-eval's own defaults."""

BOOTSTRAP_DRAWS = 100
"""For the standard error of metrics without a closed form. A mean's is analytic and draws nothing."""

LOCAL_SOURCES = ("json", "csv", "parquet", "text", "arrow", "xml", "pandas")
"""Values of a task's `dataset_path` that read the files in `data_files`; others are folders or on the hub."""

NO_ANSWER = "[invalid]"
"""What lm-eval's extraction filters return where their pattern finds nothing."""

Row = dict[str, Any]


# --- identity of a benchmark --------------------------------------------------------------------------------


def digest(name: str, benchmark: BenchmarkSpec, cache_dir: Path | None = None) -> str:
    """Content of a benchmark: its task definition and its items, wherever the files lie.

    A local task counts with its merged YAML, the Python files its `!function` entries name and the bytes of
    its data files. Data on the hub count with the name and the revision that the definition gives.

    Args:
        name: the benchmark's name in the sweep's YAML, for error texts.
        benchmark: its settings.
        cache_dir: where the list of lm-eval's own tasks is kept, which takes 13 s to build.

    Raises:
        ValueError: the benchmark, or a file it names, does not exist; the text says what to do.
    """
    if benchmark.tiny is not None:
        if benchmark.tiny not in tiny.BENCHMARKS:
            known = sorted(tiny.BENCHMARKS)
            raise ValueError(_unknown(name, "tiny", benchmark.tiny, known, f"known: {', '.join(known)}"))
        return tiny.recipe_id("benchmark", benchmark.tiny)
    if benchmark.path is not None:
        path = Path(benchmark.path).expanduser()
        if not path.is_file():
            raise ValueError(f"benchmark '{name}': no file {benchmark.path}; `path` is an lm-eval task YAML")
        return content_id(_local_definitions(name, path))
    assert benchmark.task is not None
    index = known_tasks(cache_dir)
    if benchmark.task not in index:
        way_out = "list them with: lm_eval ls tasks; for your own task give `path`"
        raise ValueError(_unknown(name, "task", benchmark.task, sorted(index), way_out))
    parts = [_definition(name, _lm_eval_folder() / file) for file in _files_of(benchmark.task, index)]
    return content_id([LM_EVAL_VERSION, benchmark.task, parts])


def known_tasks(cache_dir: Path | None = None) -> dict[str, Row]:
    """The tasks, groups and tags that lm-eval brings: name -> its YAML (relative) and its members."""
    saved = cache_dir and cache_dir / f"lm_eval-{LM_EVAL_VERSION}-tasks.json"
    if saved and saved.is_file():
        return json.loads(saved.read_text(encoding="utf-8"))
    folder, index = _lm_eval_folder(), {}
    for name, entry in _task_manager().task_index.items():
        file = entry.yaml_path and str(entry.yaml_path.relative_to(folder))
        members = sorted(entry.tags) if file is None else list(_members(entry.cfg or {}))
        index[name] = {"file": file, "members": members}
    if saved:
        saved.parent.mkdir(parents=True, exist_ok=True)
        beside = saved.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(index), encoding="utf-8")
        beside.replace(saved)
    return index


def _unknown(name: str, key: str, value: str, known: Sequence[str], way_out: str) -> str:
    close = difflib.get_close_matches(value, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"benchmark '{name}': {key} '{value}' does not exist; {hint}({way_out})"


def _lm_eval_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")  # does not import it: that takes 2-4 s
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _members(config: Any) -> Iterator[str]:
    """Names of tasks and groups that a group's config lists, inline groups included."""
    listed = config.get("task") if isinstance(config, Mapping) else None
    for item in listed if isinstance(listed, list) else []:
        if isinstance(item, str):
            yield item
        elif isinstance(item.get("task"), str):
            yield item["task"]
        else:
            yield from [item["group"]] if "group" in item else []
            yield from _members(item)


def _files_of(name: str, index: Mapping[str, Row]) -> list[str]:
    """YAML files of a task, group or tag and of all its members, each once."""
    files, open_names, seen = [], [name], set()
    while open_names:
        entry = index.get(current := open_names.pop())
        if entry is None or current in seen:
            continue
        seen.add(current)
        files += [entry["file"]] if entry["file"] else []
        open_names += entry["members"]
    return sorted(set(files))


def _local_definitions(name: str, path: Path) -> list[Row]:
    """The definition of a local task; of a group also those of its members, which lie below its folder."""
    config = _read_task(path)
    if "group" not in config:
        if not isinstance(config.get("task"), str):
            raise ValueError(f"benchmark '{name}': {path} has no `task` with a name; it is no lm-eval task")
        return [_definition(name, path)]
    index: dict[str, Row] = {}
    for file in sorted(path.parent.rglob("*.yaml")):
        with contextlib.suppress(ValueError):  # not a task: a group's folder may hold other YAML
            found = _read_task(file)
            index[found.get("group") or str(found.get("task"))] = {
                "file": str(file.relative_to(path.parent)),
                "members": list(_members(found)),
            }
    return [_definition(name, path.parent / file) for file in _files_of(config["group"], index)]


def _definition(name: str, path: Path) -> Row:
    """A task's merged YAML with every file it names replaced by that file's sha256."""
    config = _read_task(path)
    kwargs, source = config.get("dataset_kwargs"), config.get("dataset_path")
    if source in LOCAL_SOURCES:
        if isinstance(kwargs, dict) and "data_files" in kwargs:
            config["dataset_kwargs"] = kwargs | {"data_files": _hashed_files(name, kwargs["data_files"])}
    elif isinstance(source, str) and Path(source).expanduser().is_dir():
        folder = Path(source).expanduser()
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        config["dataset_path"] = {str(file.relative_to(folder)): _sha256(file) for file in files}
    return _plain(config)


def _read_task(path: Path) -> Row:
    """A task YAML merged with what it includes, as lm-eval does; functions as [name, file's digest]."""

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> list[str | None]:
        reference = loader.construct_scalar(node)
        module = path.parent / f"{reference.rpartition('.')[0].replace('.', '/')}.py"
        return [reference, _sha256(module) if module.is_file() else None]

    Loader.add_constructor("!function", function)
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a readable lm-eval task YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not an lm-eval task YAML: it holds no keys")
    merged: Row = {}
    includes = config.pop("include", [])
    for included in includes if isinstance(includes, list) else [includes]:
        merged |= _read_task(path.parent / included)
    return merged | config


def _hashed_files(name: str, files: Any) -> Any:
    if isinstance(files, Mapping):
        return {split: _hashed_files(name, value) for split, value in files.items()}
    if isinstance(files, list):
        return [_hashed_files(name, value) for value in files]
    if "://" in str(files):
        return files
    found = sorted(glob.glob(os.path.expanduser(str(files)), recursive=True))
    if not found:
        raise ValueError(f"benchmark '{name}': its task names the data file {files}, which does not exist")
    return [_sha256(Path(file)) for file in found]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """YAML values that JSON lacks (dates, number keys) as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


# --- evaluation ---------------------------------------------------------------------------------------------


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    evaluations: Sequence[EvalSpec],
    *,
    batch_size: int,
    on_result: Callable[[EvalSpec, list[Row], list[Row], Row], None],
    cache_dir: Path | None = None,
) -> None:
    """Score a loaded model on each benchmark and hand over each result as soon as it is there.

    Args:
        model: with its weights on the device, in the evaluations' dtype.
        tokenizer: with the trial's prompt template as its `chat_template`.
        evaluations: what to score, all for this model.
        batch_size: items per pass; shows in the numbers by no more than rounding.
        on_result: gets the evaluation, its rows of table `scores` and of table `items` (without trial and
            epoch), and a record: seconds, first prompt, warnings.
        cache_dir: where embedded benchmarks are built; None is their own default.

    Raises:
        ValueError: a benchmark cannot be scored as its settings ask; the text says what to change.
    """
    for evaluation in evaluations:
        started = time.perf_counter()
        with _warnings() as warnings:
            tasks = _load(evaluation, cache_dir)
            prompting = _prompting(evaluation, tokenizer, tasks)
            warnings += prompting.pop("warnings")
            results = _run(model, tokenizer, evaluation, tasks, prompting, batch_size)
        scores, items = _rows(evaluation, tasks, results)
        record = {
            "benchmark": evaluation.name,
            "eval_id": evaluation.eval_id,
            "backend": evaluation.backend,
            "num_items": len(items),
            "batch_size": batch_size,
            "seconds": time.perf_counter() - started,
            "first_request": _first_request(results),
            "warnings": list(dict.fromkeys(warnings)),
        }
        on_result(evaluation, scores, items, record)


def command(
    evaluation: EvalSpec,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    base_path: str,
    checkpoint_path: str | None = None,
    adapter: bool = False,
    tokenizer_path: str | None = None,
    batch_size: int = 1,
    device: str = "cpu",
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
) -> str:
    """The `lm_eval` command line that repeats an evaluation; float32 answers are the same item by item.

    Args:
        evaluation: what was scored.
        tokenizer: as it was given to `evaluate`.
        base_path: model directory or hub id of the base model.
        checkpoint_path: directory of the trained weights or adapter; None for the base model itself.
        adapter: the checkpoint is a PEFT adapter over the base model.
        tokenizer_path: directory of a saved tokenizer that has the trial's template; None takes the base
            model's and passes the template on the command line.
        batch_size: items per pass.
        device: such as cpu or cuda:0.
        trust_remote_code: run code that comes with the model.
        cache_dir: as in `evaluate`.
    """
    tasks = _load(evaluation, cache_dir)
    prompting = _prompting(evaluation, tokenizer, tasks)
    model_args: Row = {"pretrained": base_path, "dtype": evaluation.dtype}
    if checkpoint_path is not None:
        model_args |= {"peft": checkpoint_path} if adapter else {"pretrained": checkpoint_path}
    if tokenizer_path is not None:
        model_args["tokenizer"] = tokenizer_path
    elif evaluation.benchmark.apply_template:
        prompting["model_args"].setdefault("chat_template_args", {"chat_template": tokenizer.chat_template})
    model_args |= prompting["model_args"]
    if trust_remote_code:
        model_args["trust_remote_code"] = True

    benchmark = evaluation.benchmark
    words = ["lm_eval", "--model", "hf", "--model_args", json.dumps(model_args, ensure_ascii=False)]
    words += ["--tasks", tasks["source"]]
    if tasks["include_path"] is not None:
        words += ["--include_path", tasks["include_path"]]
    words += ["--num_fewshot", str(benchmark.num_fewshot)]
    if benchmark.limit is not None:
        words += ["--limit", str(benchmark.limit)]
    if benchmark.apply_template:
        words += ["--apply_chat_template", "--fewshot_as_multiturn", "true"]
    if benchmark.max_new_tokens is not None:
        words += ["--gen_kwargs", f"max_gen_toks={benchmark.max_new_tokens}"]
    words += ["--seed", ",".join(map(str, (*SEEDS, benchmark.fewshot_seed)))]
    words += ["--batch_size", str(batch_size), "--device", device]
    words += ["--log_samples", "--output_path", "lm_eval_results"]
    return shlex.join(words)


# --- lm-eval ------------------------------------------------------------------------------------------------


@functools.cache
def _lm_eval() -> Any:
    """The library, imported at first use (2-4 s) and without its noise."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no process pool inside a worker for bootstrapped errors
    import datasets
    import lm_eval
    import lm_eval.api.task
    import lm_eval.utils
    from tqdm import tqdm

    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)  # this bar has no switch
    # the same few templates are compiled anew for every item: a third of a small benchmark's time
    lm_eval.utils.env.from_string = functools.lru_cache(maxsize=256)(lm_eval.utils.env.from_string)
    return lm_eval


@functools.cache
def _task_manager(include_path: str | None = None, defaults: bool = True) -> Any:
    """lm-eval's index of tasks, built once per process: 13 s with its own tasks, nothing without."""
    _lm_eval()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=defaults)


def _load(evaluation: EvalSpec, cache_dir: Path | None) -> Row:
    """Tasks of an evaluation with its settings applied, built once per process and content.

    Returns:
        tasks, groups: as lm-eval's TaskManager gives them; name: of the task or group that has the score;
        source, include_path: what the command line calls them.

    Raises:
        ValueError: the task cannot be scored as asked.
    """
    benchmark = evaluation.benchmark
    if benchmark.tiny is not None:
        path = tiny.build_benchmark(benchmark.tiny, cache_dir or tiny.default_cache_dir())
        source = str(Path(path).absolute())
    else:
        source = benchmark.task or str(Path(benchmark.path or "").expanduser().absolute())
    settings = (benchmark.num_fewshot, benchmark.max_new_tokens)
    return _build(evaluation.name, source, benchmark.task is None, evaluation.digest, *settings)


@functools.lru_cache(maxsize=256)
def _build(name: str, source: str, local: bool, digest: str, num_fewshot: int, max_new_tokens: int | None) -> Row:
    """As `_load`; the digest is there so that a changed file is read again."""
    include_path = None
    if local and "group" in (config := _read_task(Path(source))):  # its members are found by name
        source, include_path = config["group"], str(Path(source).parent)
    loaded = _task_manager(include_path, defaults=not local).load([source])
    tasks, groups = loaded["tasks"], loaded.get("groups", {})
    if source in groups and groups[source].has_aggregation:
        scored = source
    elif not groups and len(tasks) == 1:
        [scored] = tasks
    else:
        raise ValueError(
            f"benchmark '{name}': '{source}' has no common score; "
            f"make each of its tasks a benchmark: {', '.join(tasks)}"
        )
    for task in tasks.values():
        if task.get_config("num_fewshot") == 0 and num_fewshot > 0:  # lm-eval would keep 0 and go on
            raise ValueError(
                f"benchmark '{name}': task '{task.task_name}' is defined with num_fewshot: 0; "
                f"ask for 0 instead of {num_fewshot}"
            )
        task.set_config("num_fewshot", num_fewshot)
        if task.get_config("output_type") == "generate_until" and max_new_tokens is not None:
            task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
    return {"tasks": tasks, "groups": groups, "name": scored, "source": source, "include_path": include_path}


def _prompting(evaluation: EvalSpec, tokenizer: "PreTrainedTokenizerBase", tasks: Row) -> Row:
    """How prompts are put to the model: arguments of lm-eval's `hf` model, and warnings.

    Training puts the whitespace between prompt and completion on the completion's side. lm-eval drops a
    task's `target_delimiter` under a chat template, so that a choice would be scored without it. A template
    that ends with that whitespace mends it: lm-eval moves trailing whitespace of a prompt to the choice.

    Special tokens are in the rendered text, as in training; lm-eval adds none (`add_bos_token`). Under a
    model's own chat template, which may leave the begin token to the tokenizer, it adds one where the text
    has none.
    """
    model_args: Row = {}
    warnings: list[str] = []
    if not evaluation.benchmark.apply_template:
        return {"model_args": model_args, "warnings": warnings}
    if not tokenizer.chat_template:
        raise ValueError(
            f"benchmark '{evaluation.name}': the tokenizer has no chat template; give train.template or set "
            "apply_template: false"
        )
    if evaluation.template is not None:
        model_args["add_bos_token"] = False
    borders = {_border(evaluation.template, task) for task in tasks["tasks"].values()}
    if len(borders) > 1:
        warnings.append("the tasks differ in the whitespace that their choices need; none was added to any")
    elif border := borders.pop():
        ending = "{% if add_generation_prompt %}{{ " + json.dumps(border) + " }}{% endif %}"
        model_args["chat_template_args"] = {"chat_template": tokenizer.chat_template + ending}
    return {"model_args": model_args, "warnings": warnings}


def _border(template: str | None, task: "Task") -> str:
    """Whitespace that the template has before a completion and the task's choices lack."""
    if template is None or task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return ""  # a model generates the whitespace itself; lm-eval moves that of a model's own template
    before = template[: template.index("{completion}")]
    doc = task.eval_docs[0]
    if task.OUTPUT_TYPE == "multiple_choice" and not getattr(task, "multiple_input", 0):
        scored = task.doc_to_choice(doc)[0]
    else:
        scored = str(task.doc_to_target(doc))
    return "" if scored[:1].isspace() else before[len(before.rstrip()) :]


def _run(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    evaluation: EvalSpec,
    tasks: Row,
    prompting: Row,
    batch_size: int,
) -> Row:
    import numpy as np
    import torch

    for seed, set_seed in zip(SEEDS, (random.seed, np.random.seed, torch.manual_seed), strict=True):
        set_seed(seed)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(evaluation.benchmark.fewshot_seed)
    training = model.training
    try:
        model_args = {"pretrained": model, "tokenizer": tokenizer, "batch_size": batch_size}
        lm = _model_class()(**model_args, **prompting["model_args"])
        return _lm_eval().evaluate(
            lm,
            {"tasks": tasks["tasks"], "groups": tasks["groups"]},
            limit=evaluation.benchmark.limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            apply_chat_template=evaluation.benchmark.apply_template,
            fewshot_as_multiturn=evaluation.benchmark.apply_template,
        )
    finally:
        model.train(training)


@functools.cache
def _model_class() -> Any:
    """lm-eval's `hf` model, with the same answers in less time."""
    _lm_eval()
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import StoppingCriteria, StoppingCriteriaList

    class StopOnText(StoppingCriteria):
        """Stop once every row holds a stop text.

        lm-eval decodes the last tokens of all rows at every step. A stop text can only become complete with
        a token that holds its last character, so only rows with such a new token are decoded here. Should one
        be missed, the row runs on and is cut at the stop text afterwards, as every row is.
        """

        def __init__(self, tokenizer: Any, stops: list[str], prompt_length: int, batch_size: int) -> None:
            self.tokenizer, self.stops, self.prompt_length = tokenizer, stops, prompt_length
            self.window = 2 + max(len(tokenizer.encode(stop, add_special_tokens=False)) for stop in stops)
            self.last = {stop[-1] for stop in stops} | {"\ufffd"}  # part of a character may end one
            self.may_end: dict[int, bool] = {}
            self.done = [False] * batch_size

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> bool:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                if self.done[row]:
                    continue
                if token not in self.may_end:
                    self.may_end[token] = not self.last.isdisjoint(self.tokenizer.decode([token]))
                if self.may_end[token]:
                    tail = input_ids[row, self.prompt_length :][-self.window :]
                    text = self.tokenizer.decode(tail)
                    self.done[row] = any(stop in text for stop in self.stops)
            return all(self.done)

    class Model(HFLM):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.encode_once = functools.lru_cache(maxsize=None)(super().tok_encode)

        def tok_encode(self, string: str, *args: Any, **settings: Any) -> list[int]:
            """A prompt is asked for once per choice and once more for sorting."""
            return list(self.encode_once(string, *args, **settings))

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
            if settings.get("do_sample") or settings.get("temperature"):
                return super()._model_generate(context, max_length, stop, **settings)
            settings.pop("temperature", None)
            stopping = StopOnText(self.tokenizer, [s for s in stop if s], context.shape[1], context.shape[0])
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([stopping]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **settings,
            )

    return Model


# --- rows ---------------------------------------------------------------------------------------------------


def _rows(evaluation: EvalSpec, tasks: Row, results: Row) -> tuple[list[Row], list[Row]]:
    """Rows of tables `scores` and `items` from lm-eval's results."""
    benchmark = evaluation.benchmark
    found = results["results"][tasks["name"]]
    metrics = {key: tuple(key.split(",", 1)) for key in found if "," in key and "_stderr," not in key}
    primary = _primary(evaluation, tasks, metrics)
    metric, filter_name = metrics[primary]
    items = list(_items(evaluation, tasks, results, metric, filter_name))

    common = {"eval_id": evaluation.eval_id, "benchmark": evaluation.name, "benchmark_kind": benchmark.kind}
    common["num_fewshot"] = benchmark.num_fewshot
    directions: Row = {}
    for task in tasks["tasks"].values():
        directions |= task.higher_is_better()
    scores = [
        {
            **common,
            "metric": _metric_name(name, filter_of),
            "is_primary": key == primary,
            "value": _number(found[key]),
            "stderr": _number(found.get(f"{name}_stderr,{filter_of}")),
            "num_items": int(found["sample_len"]),
            "higher_is_better": directions.get(name),
            "chance": benchmark.chance if key == primary else None,
        }
        for key, (name, filter_of) in metrics.items()
    ]
    extracted = [item["extracted"] for item in items if item["extracted"] is not None]
    if extracted:
        share = sum(extracted) / len(extracted)
        spread = math.sqrt(share * (1 - share) / (len(extracted) - 1)) if len(extracted) > 1 else None
        row = {"metric": "extracted", "is_primary": False, "value": share, "stderr": spread}
        row |= {"num_items": len(extracted), "higher_is_better": True, "chance": None}
        scores.append(common | row)
    return scores, items


def _primary(evaluation: EvalSpec, tasks: Row, metrics: Mapping[str, tuple[str, str]]) -> str:
    """lm-eval's key (`metric,filter`) of the primary metric."""
    wanted = evaluation.benchmark.metric
    for key, (name, filter_of) in metrics.items():
        if wanted in (key, name, _metric_name(name, filter_of)):
            return key
    if wanted is not None:
        names = ", ".join(_metric_name(*parts) for parts in metrics.values())
        raise ValueError(f"benchmark '{evaluation.name}': no metric '{wanted}'; it has: {names}")
    listed = next(iter(tasks["tasks"].values())).get_config("metric_list") or [{}]
    first = [key for key, (name, _) in metrics.items() if name == listed[0].get("metric")]
    return [*first, *metrics][0]


def _items(evaluation: EvalSpec, tasks: Row, results: Row, metric: str, filter_name: str) -> Iterator[Row]:
    """One row per item; those of a group's tasks are numbered through."""
    number = 0
    for name, task in tasks["tasks"].items():
        for sample in results["samples"][name]:
            if sample["filter"] != filter_name:
                continue
            response, target = _answer(task, sample, metric)
            yield {
                "eval_id": evaluation.eval_id,
                "item": number,
                "benchmark": evaluation.name,
                "item_digest": sample["doc_hash"][:16],
                "value": _number(sample.get(metric)),
                "extracted": _extracted(sample) if task.OUTPUT_TYPE == "generate_until" else None,
                "response": response,
                "target": target,
            }
            number += 1


def _answer(task: "Task", sample: Row, metric: str) -> tuple[str | None, str]:
    """What the model answered, None where it only judged a text, and the right answer."""
    doc, target = sample["doc"], sample["target"]
    if task.OUTPUT_TYPE == "generate_until":
        choices = task.doc_to_choice(doc) if task.get_config("doc_to_choice") else None
        return str(sample["resps"][0][0]), _text(choices[target] if choices else target)
    if task.OUTPUT_TYPE != "multiple_choice":
        return None, _text(target)
    choices = task.doc_to_choice(doc)
    right = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else target
    right = [right] if isinstance(right, (int, str)) else list(right)
    weights = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}
    weight = weights.get(metric, lambda choice: 1)  # as lm-eval chooses under this metric
    likelihoods = [response[0][0] for response in sample["resps"][: len(choices)]]
    best = max(range(len(choices)), key=lambda k: likelihoods[k] / weight(choices[k]))
    names = [choices[k] if isinstance(k, int) and 0 <= k < len(choices) else k for k in right]
    return choices[best].strip(), _text([str(name).strip() for name in names])


def _text(target: Any) -> str:
    return " | ".join(map(str, target)) if isinstance(target, (list, tuple)) else str(target)


def _extracted(sample: Row) -> bool:
    """The filter found an answer in the generated text."""
    answer = sample["filtered_resps"][0]
    while isinstance(answer, (list, tuple)):
        answer = answer[0] if answer else ""
    return str(answer).strip() not in ("", NO_ANSWER)


def _metric_name(name: str, filter_name: str) -> str:
    return name if filter_name == "none" else f"{name},{filter_name}"


def _number(value: Any) -> float | None:
    """A finite number, or None: lm-eval's 'N/A', NaN and values that only mean something together."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _first_request(results: Row) -> list[str]:
    """Prompt and, where one is scored, continuation of the first item as the model saw them."""
    sample = next(iter(results["samples"].values()))[0]
    return [part for part in sample["arguments"][0] if isinstance(part, str)]


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect lm-eval's warnings instead of printing them."""
    collected: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not re.search("already-initialized model|model kwarg is not of type", record.getMessage()):
                collected.append(record.getMessage())

    logger, handler = logging.getLogger("lm_eval"), Collect(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield collected
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
