"""Fine-tuning datasets of the tiny world: questions and answers about what the raw text tells.

Every question belongs to one side of the world, training or test, decided by a hash of what is really asked
(`Example.group`). The rule is the same for all datasets: 3 + 4 asked as a sum, as a story and as Python lies
on one side, so no benchmark item is in any training set.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from sweep.tiny import text

Kind = Literal["code", "maths", "general"]


@dataclass(frozen=True)
class Example:
    """One question with its answer."""

    instruction: str
    response: str
    question: str
    """What is really asked, whatever the words: one benchmark item per question."""
    group: str
    """What the split goes by: the question, or for facts the town (all of its facts lie on one side)."""
    choices: tuple[str, ...] = ()
    """Answers to choose from, the right one among them; empty where the answer is written freely."""


@dataclass(frozen=True)
class DatasetRecipe:
    """Everything that defines a fine-tuning dataset; its questions come from the generator `source`."""

    kind: Kind
    source: str
    num_examples: int = 1000
    seed: int = 0


DATASETS: dict[str, DatasetRecipe] = {
    "arithmetic": DatasetRecipe("maths", "arithmetic"),
    "word_problems": DatasetRecipe("maths", "word_problems"),
    "sequences": DatasetRecipe("maths", "sequences"),
    "code_output": DatasetRecipe("code", "code_output"),
    "code_write": DatasetRecipe("code", "code_write"),
    "facts": DatasetRecipe("general", "facts"),
    "reading": DatasetRecipe("general", "reading"),
    "instructions": DatasetRecipe("general", "instructions"),
}


def is_test(group: str) -> bool:
    """Whether the group lies on the test side, as a quarter of all groups do."""
    return hashlib.sha256(group.encode()).digest()[0] % 4 == 0


def draw_examples(source: str, num: int, rng: Random, test: bool) -> list[Example]:
    """`num` examples of one side; no instruction twice, and on the test side no question twice.

    Raises:
        ValueError: the generator has fewer different ones.
    """
    examples: dict[str, Example] = {}
    for example in _stream(SOURCES[source], rng, limit=50 * num):
        if is_test(example.group) == test:
            examples.setdefault(example.question if test else example.instruction, example)
        if len(examples) == num:
            return list(examples.values())
    raise ValueError(f"{source} has only {len(examples)} different examples on its side; {num} were asked for")


def write_dataset(recipe: DatasetRecipe, path: Path) -> None:
    """Write one JSON object per line: `{"instruction": ..., "response": ...}`."""
    rng = text.seeded("dataset", recipe.source, recipe.seed)
    with path.open("w", encoding="utf-8") as file:
        for example in draw_examples(recipe.source, recipe.num_examples, rng, test=False):
            file.write(json.dumps({"instruction": example.instruction, "response": example.response}) + "\n")


def _stream(draw: Callable[[Random], Example], rng: Random, limit: int) -> Iterator[Example]:
    for _ in range(limit):
        yield draw(rng)


def _arithmetic(rng: Random) -> Example:
    total = text.draw_sum(rng)
    form = rng.choice(["What is {0} {1} {2}?", "Calculate {0} {1} {2}.", "How much is {0} {1} {2}?"])
    return Example(
        form.format(total.left, total.sign, total.right),
        str(total.result),
        f"{total.left}{total.sign}{total.right}",
        total.key,
    )


def _word_problems(rng: Random) -> Example:
    total = text.draw_sum(rng)
    happened, asked, _ = text.draw_story(rng, total)
    return Example(f"{happened} {asked}", str(total.result), f"{total.left}{total.sign}{total.right}", total.key)


def _sequences(rng: Random) -> Example:
    *shown, answer = text.draw_series(rng)
    shown = shown[-rng.choice((3, 4)) :]
    form = rng.choice(["What comes next: {}?", "Continue: {}.", "Which number follows {}?"])
    wrong = [n for n in range(max(0, answer - 10), answer + 11) if n != answer and n not in shown]
    choices = [str(number) for number in (answer, *rng.sample(wrong, 3))]
    rng.shuffle(choices)
    key = f"series/{answer}/{shown[1] - shown[0]}"
    return Example(form.format(", ".join(map(str, shown))), str(answer), key, key, tuple(choices))


def _code_output(rng: Random) -> Example:
    (e,) = text.draw_expressions(rng, 1)
    form = rng.choice(["What does print({}) show?", "What is the output of print({})?", "Run print({})."])
    return Example(form.format(e.code), e.output, e.key, e.key)


def _code_write(rng: Random) -> Example:
    (e,) = text.draw_expressions(rng, 1)
    form = rng.choice(["Write Python to print {}.", "Print {} in Python.", "Write code that prints {}."])
    return Example(form.format(e.words), f"print({e.code})", e.key, e.key)


def _facts(rng: Random) -> Example:
    town, name = rng.choice(list(text.TOWNS)), rng.choice(list(text.ATTRIBUTES))
    attribute, value = text.ATTRIBUTES[name], text.TOWNS[town][name]
    choices = [value, *rng.sample([v for v in attribute.values if v != value], 3)]
    rng.shuffle(choices)
    instruction = rng.choice(attribute.questions).format(town=town)
    return Example(instruction, value, f"{name}/{town}", town, tuple(choices))


def _reading(rng: Random) -> Example:
    scene = text.draw_scene(rng)
    i = rng.randrange(3)
    instruction = f"{scene.event} {scene.questions[i]}"
    return Example(instruction, scene.people[i], instruction, instruction, scene.people)


def _instructions(rng: Random) -> Example:
    task = text.WordTask(rng.choice(text.WORD_TASKS), text.draw_words(rng))
    forms = {
        "first": ("Give the first word of {}.", "Which word comes first in {}?"),
        "last": ("Give the last word of {}.", "Which word comes last in {}?"),
        "capitals": ("Write {} in capitals.", "Put {} in capitals."),
        "swap": ("Write {} the other way round.", "Swap the words {}."),
        "dash": ("Write {} with a dash.", "Join {} by a dash."),
        "twice": ("Write {} twice.", "Say {} two times."),
    }
    return Example(rng.choice(forms[task.kind]).format(task.text), task.result, task.key, task.key)


SOURCES: dict[str, Callable[[Random], Example]] = {
    "arithmetic": _arithmetic,
    "word_problems": _word_problems,
    "sequences": _sequences,
    "code_output": _code_output,
    "code_write": _code_write,
    "facts": _facts,
    "reading": _reading,
    "instructions": _instructions,
}
"""Name -> generator of questions; datasets and benchmarks both draw from it."""
