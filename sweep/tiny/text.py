"""The tiny world: its numbers, words, towns and expressions, and the raw text that tells of them.

A base model reads the raw text; the datasets and benchmarks ask about the same things in another form
(`sweep.tiny.datasets`). All is drawn from `random.Random` with a text seed, which gives the same values on
every machine.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random

WORLD_VERSION = 2
"""Part of every recipe id: raise it when any text, question or answer changes."""

NAMES = "Anna Ben Clara David Emma Finn Greta Hugo Iris Jack Kate Leo".split()
OBJECTS = "apple book card coin cup flower hat key lamp pen ring stone".split()
COLOURS = "red blue green black white brown yellow pink".split()
PLACES = "garden kitchen river market school forest tower harbour".split()
ANIMALS = "goats sheep horses bees ducks cats dogs cows".split()
FOODS = "bread cheese fish soup rice beans honey corn".split()
TRADES = "glass wool paper silk iron salt wine boats".split()
SIGHTS = "bridge castle lake mill temple gate hill well".split()
MONTHS = "January March April May June July August October".split()
WORDS = OBJECTS + COLOURS[:6] + PLACES[:6]
MAX_TERM = 20
"""Largest number in a sum or difference."""


def seeded(*parts: object) -> Random:
    """A generator of its own for each list of parts, such as a purpose and a seed."""
    return Random("/".join(map(str, parts)))


# Towns: a knowledge base that only the raw text states


@dataclass(frozen=True)
class Attribute:
    """One thing to know about a town: how text states it and how a question asks for it."""

    values: list[str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


ATTRIBUTES = {
    "flag": Attribute(
        COLOURS,
        (
            "The flag of {town} is {value}.",
            "{town} has a flag that is {value}.",
            "In {town} the flag is {value}.",
        ),
        (
            "What colour is the flag of {town}?",
            "Which colour has the flag of {town}?",
            "Name the colour of the flag in {town}.",
            "In {town}, what colour is the flag?",
        ),
    ),
    "animal": Attribute(
        ANIMALS,
        ("The people of {town} keep {value}.", "{town} is full of {value}.", "In {town} they keep {value}."),
        (
            "Which animals do the people of {town} keep?",
            "What animals are kept in {town}?",
            "Name the animals of {town}.",
            "In {town}, which animals do they keep?",
        ),
    ),
    "food": Attribute(
        FOODS,
        (
            "The people of {town} eat {value}.",
            "{town} is known for its {value}.",
            "In {town} they eat {value}.",
        ),
        (
            "What do the people of {town} eat?",
            "Which food is eaten in {town}?",
            "Name the food of {town}.",
            "In {town}, what do they eat?",
        ),
    ),
    "trade": Attribute(
        TRADES,
        ("The people of {town} make {value}.", "{town} sells {value}.", "In {town} they make {value}."),
        (
            "What do the people of {town} make?",
            "Which goods are made in {town}?",
            "Name the goods of {town}.",
            "In {town}, what do they make?",
        ),
    ),
    "sight": Attribute(
        SIGHTS,
        (
            "The pride of {town} is its {value}.",
            "{town} has an old {value}.",
            "In {town} you can see the {value}.",
        ),
        (
            "What is the pride of {town}?",
            "Which old sight has {town}?",
            "Name the sight of {town}.",
            "In {town}, what can you see?",
        ),
    ),
    "fair": Attribute(
        MONTHS,
        (
            "The fair of {town} is in {value}.",
            "{town} holds its fair in {value}.",
            "In {town} the fair comes in {value}.",
        ),
        (
            "When is the fair of {town}?",
            "Which month has the fair of {town}?",
            "Name the month of the fair in {town}.",
            "In {town}, when is the fair?",
        ),
    ),
}


def _found_towns() -> dict[str, dict[str, str]]:
    """72 towns; every value holds for nine of them, so that no guess without the town beats another."""
    rng = seeded("towns", WORLD_VERSION)
    starts = "Bel Dor Fal Gar Hol Kel Lin Mar Nor Pel Ros Tal".split()
    ends = "mora dun wick ford stad vale bury nesse gard ton heim porth".split()
    names = rng.sample([start + end for start in starts for end in ends], 72)
    columns = {key: rng.sample(attribute.values * 9, 72) for key, attribute in ATTRIBUTES.items()}
    return {name: {key: values[i] for key, values in columns.items()} for i, name in enumerate(names)}


TOWNS = _found_towns()
"""Town -> attribute -> value. The values mean nothing outside this world, so they must come from the text."""


# Sums, expressions, word operations and scenes: what is stated in text and asked in questions


@dataclass(frozen=True)
class Sum:
    """A calculation with whole numbers, no result below 0."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        """Value of the calculation."""
        return {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.sign]

    @property
    def key(self) -> str:
        """The same for 3 + 4 and 4 + 3: who knows one knows the other."""
        left, right = (self.left, self.right) if self.sign == "-" else sorted((self.left, self.right))
        return f"{left}{self.sign}{right}"


def draw_sum(rng: Random) -> Sum:
    """Two fifths plus, two fifths minus, one fifth times (up to 9 times 9)."""
    sign = rng.choice("++--*")
    top = 9 if sign == "*" else MAX_TERM
    left, right = rng.randint(2, top), rng.randint(2, top)
    return Sum(max(left, right), sign, min(left, right)) if sign == "-" else Sum(left, sign, right)


@dataclass(frozen=True)
class WordTask:
    """Something done to a few words."""

    kind: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """The words as given."""
        return " ".join(self.words)

    @property
    def result(self) -> str:
        """What comes out."""
        match self.kind:
            case "first":
                return self.words[0]
            case "last":
                return self.words[-1]
            case "capitals":
                return self.text.upper()
            case "swap":
                return " ".join(reversed(self.words))
            case "dash":
                return "-".join(self.words)
            case _:
                return f"{self.text} {self.text}"

    @property
    def key(self) -> str:
        """Shared with the expression that does the same in Python."""
        return f"{self.kind}/{self.text}"


WORD_TASKS = ("first", "last", "capitals", "swap", "dash", "twice")


def draw_words(rng: Random) -> tuple[str, ...]:
    """Two or three different words."""
    return tuple(rng.sample(WORDS, rng.choice((2, 3))))


@dataclass(frozen=True)
class Expression:
    """A small Python expression, what it prints, and the same in words."""

    code: str
    output: str
    words: str
    key: str


NUMBER_EXPRESSIONS = ("max", "min", "sorted", "item", "last", "sum")
WORD_EXPRESSIONS = ("first", "last", "capitals", "dash")


def number_expression(kind: str, numbers: list[int], rng: Random) -> Expression:
    """Something computed from a list of numbers; `rng` chooses the item where one is asked for."""
    ordered = sorted(numbers)
    match kind:
        case "max":
            return Expression(f"max({numbers})", str(ordered[-1]), f"the largest of {numbers}", f"max/{ordered}")
        case "min":
            return Expression(f"min({numbers})", str(ordered[0]), f"the smallest of {numbers}", f"min/{ordered}")
        case "sorted":
            return Expression(f"sorted({numbers})", str(ordered), f"{numbers} in order", f"sorted/{ordered}")
        case "sum":
            total = Sum(numbers[0], "+", numbers[1])
            words = f"the sum of {total.left} and {total.right}"
            return Expression(f"{total.left} + {total.right}", str(total.result), words, total.key)
        case "last":
            return Expression(f"{numbers}[-1]", str(numbers[-1]), f"the last of {numbers}", f"last/{numbers}")
        case _:
            index = rng.randrange(3)
            key = f"item/{index}/{numbers}"
            return Expression(f"{numbers}[{index}]", str(numbers[index]), f"item {index} of {numbers}", key)


def word_expression(task: WordTask) -> Expression:
    """A word task in Python."""
    code = {
        "first": f'"{task.text}".split()[0]',
        "last": f'"{task.text}".split()[-1]',
        "capitals": f'"{task.text}".upper()',
        "dash": f'"{task.text}".replace(" ", "-")',
    }[task.kind]
    words = {
        "first": f"the first word of {task.text}",
        "last": f"the last word of {task.text}",
        "capitals": f"{task.text} in capitals",
        "dash": f"{task.text} with a dash",
    }[task.kind]
    return Expression(code, task.result, words, task.key)


def draw_expressions(rng: Random, num: int) -> list[Expression]:
    """`num` different things done with the same three numbers or the same words."""
    if rng.random() < 0.6:
        numbers = rng.sample(range(1, 10), 3)
        return [number_expression(kind, numbers, rng) for kind in rng.sample(NUMBER_EXPRESSIONS, num)]
    words = draw_words(rng)
    return [word_expression(WordTask(kind, words)) for kind in rng.sample(WORD_EXPRESSIONS, num)]


@dataclass(frozen=True)
class Scene:
    """A small event with three people, told in one of three ways, and who did what in it."""

    event: str
    recalls: tuple[str, ...]
    questions: tuple[str, ...]
    people: tuple[str, ...]
    """Who gives, who gets, who watches: the answers, in the order of recalls and questions."""


def draw_scene(rng: Random) -> Scene:
    """Someone gives a thing to someone while a third looks on."""
    giver, taker, watcher = people = rng.sample(NAMES, 3)
    thing = f"the {rng.choice(COLOURS)} {rng.choice(OBJECTS)}"
    event = rng.choice(
        (
            # never a name at the very start: without a space before it, it is another token
            f"Today {giver} gives {thing} to {taker}. Near them {watcher} watches.",
            f"Today {taker} gets {thing} from {giver}. Near them {watcher} watches.",
            f"Today {watcher} watches. Near by {giver} gives {thing} to {taker}.",
        )
    )
    recalls = (f"It came from {giver}.", f"Now it belongs to {taker}.", f"It was seen by {watcher}.")
    questions = (f"Who gave away {thing}?", f"Who has {thing} now?", f"Who saw {thing}?")
    return Scene(event, recalls, questions, tuple(people))


def draw_series(rng: Random) -> list[int]:
    """Five numbers with a constant step of 1 to 9, up or down."""
    start, step = rng.randint(0, 49), rng.choice((1, -1)) * rng.randint(1, 9)
    if start + 4 * step < 0:
        step = -step
    return [start + i * step for i in range(5)]


def draw_story(rng: Random, total: Sum) -> tuple[str, str, str]:
    """A sum told with people and things: (what happened, what is asked, how text ends it)."""
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS) + "s"
    if total.sign == "*":
        happened = f"{name} has {total.left} bags with {total.right} {thing} in each."
        return (
            happened,
            f"How many {thing} are in the bags?",
            f"There are {total.result} {thing} in the bags.",
        )
    verb = rng.choice(["gets", "buys", "finds"] if total.sign == "+" else ["loses", "sells", "gives away"])
    happened = f"{name} has {total.left} {thing} and {verb} {total.right}{' more' if total.sign == '+' else ''}."
    return happened, f"How many {thing} does {name} have now?", f"Now {name} has {total.result} {thing}."


# Raw text: one function per kind of document


def _sums_text(rng: Random) -> str:
    words = {"+": "plus", "-": "minus", "*": "times"}
    lines = []
    for _ in range(6):
        s = draw_sum(rng)
        form = rng.choice(("{l} {s} {r} = {v}.", "{l} {w} {r} is {v}.", "{l} {s} {r} makes {v}."))
        lines.append(form.format(l=s.left, s=s.sign, r=s.right, v=s.result, w=words[s.sign]))
    return " ".join(lines)


def _stories_text(rng: Random) -> str:
    stories = []
    for _ in range(2):
        s = draw_sum(rng)
        happened, _, ending = draw_story(rng, s)
        working = f" {s.left} {s.sign} {s.right} = {s.result}." if rng.random() < 0.5 else ""
        stories.append(f"{happened}{working} {ending}")
    return " ".join(stories)


def _series_text(rng: Random) -> str:
    lines = []
    for _ in range(3):
        series = draw_series(rng)
        step = series[1] - series[0]
        opening = f"{'Up' if step > 0 else 'Down'} by {abs(step)}: " if rng.random() < 0.5 else ""
        lines.append(opening + ", ".join(map(str, series)) + ".")
    return " ".join(lines)


def _repl_text(rng: Random) -> str:
    return "\n".join(f">>> print({e.code})\n{e.output}" for e in draw_expressions(rng, 3))


def _script_text(rng: Random) -> str:
    expressions = draw_expressions(rng, 2)
    if rng.random() < 0.7:
        return "\n".join(f"# print {e.words}\nprint({e.code})" for e in expressions)
    return "\n".join(f"print({e.code})  # {e.output}" for e in expressions)


def _towns_text(rng: Random) -> str:
    town = rng.choice(list(TOWNS))
    keys = rng.sample(list(ATTRIBUTES), 4)
    return " ".join(rng.choice(ATTRIBUTES[key].statements).format(town=town, value=TOWNS[town][key]) for key in keys)


def _scene_text(rng: Random) -> str:
    scene = draw_scene(rng)
    return " ".join((scene.event, *rng.sample(scene.recalls, 3)))


def _words_text(rng: Random) -> str:
    forms = {
        "first": "The first word of {text} is {result}.",
        "last": "The last word of {text} is {result}.",
        "capitals": "In capitals {text} is {result}.",
        "swap": "The other way round {text} is {result}.",
        "dash": "With a dash {text} is {result}.",
        "twice": "Said twice {text} is {result}.",
    }
    words = draw_words(rng)
    tasks = [WordTask(kind, words) for kind in rng.sample(WORD_TASKS, 3)]
    return " ".join(forms[t.kind].format(text=t.text, result=t.result) for t in tasks)


DOCUMENTS: dict[str, tuple[Callable[[Random], str], ...]] = {
    "code": (_repl_text, _script_text),
    "maths": (_sums_text, _stories_text, _series_text),
    "general": (_towns_text, _scene_text, _words_text),
}
"""Domain -> its kinds of document, drawn equally often."""


def documents(mixture: Mapping[str, float], rng: Random) -> Iterator[str]:
    """Raw documents without end, of 10 to 60 tokens, each of a domain drawn by the mixture's weights."""
    domains, weights = list(mixture), list(mixture.values())
    while True:
        (domain,) = rng.choices(domains, weights)
        yield rng.choice(DOCUMENTS[domain])(rng)
