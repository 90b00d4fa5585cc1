"""Benchmarks of the tiny world: ordinary lm-eval tasks over questions that no training set holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sweep.tiny import text
from sweep.tiny.datasets import Kind, draw_examples


@dataclass(frozen=True)
class BenchmarkRecipe:
    """Everything that defines a benchmark; its questions come from the generator `source`."""

    kind: Kind
    source: str
    metric: str
    """Primary metric: `exact_match` of a written answer or `acc` of a choice."""
    answer_pattern: str | None = None
    """Takes the answer out of the generated line; None compares the stripped line."""
    max_new_tokens: int = 16
    num_choices: int | None = None
    """Answers to choose from; None where the answer is written."""
    num_items: int = 120
    seed: int = 0

    @property
    def chance(self) -> float | None:
        """Score of guessing; None where the answer is written, since that depends on what guesses."""
        return None if self.num_choices is None else 1 / self.num_choices

    @property
    def metric_key(self) -> str:
        """Name of the primary metric in lm-eval's results."""
        return f"{self.metric},{'answer' if self.metric == 'exact_match' else 'none'}"


NUMBER = r"^\s*(-?\d+)"
"""A line that begins with a number."""

BENCHMARKS: dict[str, BenchmarkRecipe] = {
    "arithmetic_test": BenchmarkRecipe("maths", "arithmetic", "exact_match", NUMBER, 8),
    "word_problems_test": BenchmarkRecipe("maths", "word_problems", "exact_match", NUMBER, 8),
    "sequences_test": BenchmarkRecipe("maths", "sequences", "acc", num_choices=4),
    "code_output_test": BenchmarkRecipe("code", "code_output", "exact_match", None, 20),
    "code_write_test": BenchmarkRecipe("code", "code_write", "exact_match", None, 32),
    "facts_test": BenchmarkRecipe("general", "facts", "exact_match", None, 8),
    "reading_test": BenchmarkRecipe("general", "reading", "acc", num_choices=3),
    "instructions_test": BenchmarkRecipe("general", "instructions", "exact_match", None, 20),
}


def write_benchmark(recipe: BenchmarkRecipe, folder: Path, name: str, home: Path | None = None) -> None:
    """Write `<name>.yaml`, an lm-eval task of that name, and its items `<name>.jsonl` beside it.

    Args:
        recipe: what to ask.
        folder: where the files are written.
        name: of the task and of both files.
        home: where the files will lie when the task runs, if not in `folder`; the YAML names it.
    """
    rng = text.seeded("benchmark", recipe.source, recipe.seed)
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for example in draw_examples(recipe.source, recipe.num_items, rng, test=True):
            item: dict[str, Any] = {"instruction": example.instruction, "response": example.response}
            if recipe.metric == "acc":
                # lm-eval joins nothing between chat prompt and choice, so the space of the template is here
                item["choices"] = [" " + choice for choice in example.choices]
                item["label"] = example.choices.index(example.response)
            file.write(json.dumps(item) + "\n")
    data_file = (home or folder).absolute() / f"{name}.jsonl"
    task = _task(recipe, name, data_file)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def _task(recipe: BenchmarkRecipe, name: str, data_file: Path) -> dict[str, Any]:
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data_file)}},
        "test_split": "test",
        "doc_to_text": "{{instruction}}",
        "target_delimiter": "",
        "metadata": {"version": text.WORLD_VERSION},
    }
    if recipe.metric == "acc":
        task |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
        return task | {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    strip: dict[str, Any] = {"function": "remove_whitespace"}
    if recipe.answer_pattern is not None:
        strip = {"function": "regex", "regex_pattern": recipe.answer_pattern}
    generation = {"until": ["\n"], "do_sample": False, "max_gen_toks": recipe.max_new_tokens}
    return task | {
        "output_type": "generate_until",
        "doc_to_target": "{{response}}",
        "generation_kwargs": generation,
        "filter_list": [{"name": "answer", "filter": [strip, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
