"""Examples to token ids and labels: template, masking, truncation, and the counts of each.

What is trained is, id for id, what evaluation feeds. Generation tokenises the rendered prompt alone, so a
prompt's ids are made from the prompt alone and are a prefix of the whole by construction. Labels go by
position, never by id: a pad token that is also the end token, or an end token in a prompt, changes nothing.
"""

import json
import logging
import os
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sweep.data import DataError, Example, training_split
from sweep.identity import content_id
from sweep.spec import TrialSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""Label of a position that is not learned, as torch's cross entropy defines it."""

TOKENIZATION_VERSION = 1
"""Part of every cache key; raised when the same settings give other examples, ids or labels."""

NUM_RECENT = 4
"""Tokenised splits that a process keeps in memory."""

CHUNK = 1000
"""Examples per tokenizer call: its result takes about 100 bytes a token until it is unpacked."""

logger = logging.getLogger(__name__)


class TokenizedExample(NamedTuple):
    """One example; the arrays are shared between trials and read-only."""

    ids: np.ndarray
    """[length] int32 token ids."""
    labels: np.ndarray
    """[length] the id where it is learned, else `IGNORE_INDEX`, as at position 0, which nothing predicts."""


class Counts(NamedTuple):
    """What became of the examples: requested = used + dropped."""

    requested: int
    used: int
    """Truncated ones included."""
    truncated: int
    dropped: int
    """Blank completion, or over `max_length` (under `truncate`: with no completion token left)."""


@dataclass(frozen=True)
class TokenizedSet:
    """Examples ready to train on, in the order of the data."""

    examples: list[TokenizedExample]
    counts: Counts

    @cached_property
    def trained_tokens(self) -> int:
        """Tokens with a label."""
        return sum(int(np.count_nonzero(example.labels != IGNORE_INDEX)) for example in self.examples)

    @cached_property
    def total_tokens(self) -> int:
        """All tokens."""
        return sum(len(example.ids) for example in self.examples)


class TokenizedSplit(NamedTuple):
    """The two sets of a trial."""

    train: TokenizedSet
    held_out: TokenizedSet


class Template(NamedTuple):
    """A prompt template in parts: prefix, prompt, middle | border, completion, suffix, end of text."""

    prefix: str
    middle: str
    """Ends without whitespace."""
    border: str
    """The whitespace before the completion. It is learned: byte-level BPE joins a space to the next word."""
    suffix: str

    def prompt(self, text: str) -> str:
        """The prompt as it is tokenised; its own trailing whitespace goes if nothing follows it."""
        return self.prefix + text + self.middle if self.middle else (self.prefix + text).rstrip()


def split_template(template: str) -> Template:
    r"""The parts of a template with {prompt} and {completion}.

    >>> split_template("Q: {prompt}\nA: {completion}")
    Template(prefix='Q: ', middle='\nA:', border=' ', suffix='')
    """
    prefix, rest = template.split("{prompt}")
    between, suffix = rest.split("{completion}")
    middle = between.rstrip()
    return Template(prefix, middle, between[len(middle) :], suffix)


def chat_template(template: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The template in Jinja, to be saved with the tokenizer: it renders what training saw.

    It begins with the begin-of-text token if the tokenizer adds one itself: `apply_chat_template` tokenises
    without adding it, and lm-eval adds it unless the text starts with it, so both get it once.
    """
    parts = split_template(template)
    prefix, middle, border, suffix = map(ascii, parts)  # Jinja reads escapes as Python does
    prompt = f"{prefix} + message.content + {middle}"
    if not parts.middle:
        prompt = f"({prefix} + message.content).rstrip()"
    begin, text = "", "text"
    if _bos(tokenizer):
        begin, text = "{{ bos_token }}", "text.removeprefix(bos_token) if loop.first else text"
    return (
        begin + "{% for message in messages %}"
        "{% if message.role == 'system' %}{% set text = message.content + '\\n' %}"
        "{% elif message.role == 'user' %}{% set text = " + prompt + " %}"
        "{% else %}{% set text = " + f"{border} + message.content + {suffix} + eos_token" + " %}{% endif %}"
        "{{ " + text + " }}{% endfor %}"
    )


def tokenize(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    template: str | None,
    max_length: int,
    overlong: Literal["truncate", "drop", "error"],
) -> TokenizedSet:
    """Ids and labels of examples; completions are learned, with their end-of-text token.

    An example with a blank completion is dropped. An overlong one is cut at the end (and does not teach to
    stop there), dropped, or an error.

    Args:
        examples: What to tokenise; each is used, truncated or dropped.
        tokenizer: Of the base model.
        template: Prompt template; None takes the tokenizer's own chat template.
        max_length: Limit of one example in tokens, end-of-text included.
        overlong: What happens to an example over it.

    Raises:
        DataError: an example is over `max_length` under `error`, or the chat template cannot render it.
        ValueError: the tokenizer has no end-of-text token, or no chat template where it is needed.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so no model could learn to stop; set one and save it")
    if template is None and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; give train.template, such as the default one")

    bos = _bos(tokenizer)
    used: list[TokenizedExample] = []
    truncated = 0
    learnable = [e for e in examples if all(turn.completion.strip() for turn in e.turns)]
    for start in range(0, len(learnable), CHUNK):
        chunk = learnable[start : start + CHUNK]
        rendered = [_rendered(example, tokenizer, template, bos) for example in chunk]
        for example, (ids, labels) in zip(chunk, _encoded(rendered, tokenizer), strict=True):
            is_over = len(ids) > max_length
            if is_over:
                if overlong == "error":
                    raise DataError(
                        f"{_name(example)} has {len(ids)} tokens, over max_length {max_length}; raise "
                        "max_length, or set overlong: truncate or drop"
                    )
                if overlong == "drop":
                    continue
                ids, labels = ids[:max_length], labels[:max_length]
            learned = np.flatnonzero(labels != IGNORE_INDEX)
            if learned.size == 0:
                continue
            end = learned[-1] + 1  # a cut within a later prompt leaves a tail that teaches nothing
            used.append(TokenizedExample(_frozen(ids[:end]), _frozen(labels[:end])))
            truncated += is_over
    return TokenizedSet(used, Counts(len(examples), len(used), truncated, len(examples) - len(used)))


def _name(example: Example) -> str:
    return f"the example that begins {example.turns[0].prompt[:60]!r}"


def _frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()  # a view would keep the cut tail in memory
    array.flags.writeable = False
    return array


# Text

_Piece = tuple[str, str]
"""A prompt and its completion as rendered; those of a conversation follow each other without a gap."""

_ANSWER = "the-answer-stands-here"
"""Stands for a completion, to find what a chat template writes behind it."""


def _rendered(example: Example, tokenizer: "PreTrainedTokenizerBase", template: str | None, bos: str) -> list[_Piece]:
    if template is None:
        pieces = _rendered_by_tokenizer(example, tokenizer)
    else:
        parts = split_template(template)
        end = parts.suffix + tokenizer.eos_token
        pieces = [(parts.prompt(t.prompt), parts.border + t.completion + end) for t in example.turns]
        if example.system is not None:
            pieces[0] = (f"{example.system}\n{pieces[0][0]}", pieces[0][1])
    prompt, completion = pieces[0]
    return [(bos + prompt.removeprefix(bos), completion), *pieces[1:]]


def _bos(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The begin-of-text token if the tokenizer adds it to a text, else nothing."""
    is_added = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer.bos_token if is_added else ""


def _rendered_by_tokenizer(example: Example, tokenizer: "PreTrainedTokenizerBase") -> list[_Piece]:
    """Pieces of the whole conversation as the tokenizer's chat template renders it.

    A completion runs from the generation prompt to the end-of-text token. Where the template closes a turn
    with another token, that one is learned, and the last completion gets an end-of-text token besides.
    """

    def render(messages: list[dict[str, str]], is_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)

    messages = [] if example.system is None else [{"role": "system", "content": example.system}]
    prompts: list[str] = []
    closings: list[str] = []
    for turn in example.turns:
        messages.append({"role": "user", "content": turn.prompt})
        prompts.append(render(messages, is_prompt=True))
        closings.append(render([*messages, {"role": "assistant", "content": _ANSWER}]).partition(_ANSWER)[2])
        messages.append({"role": "assistant", "content": turn.completion})
    whole = render(messages)  # a template may render earlier turns otherwise once others follow

    eos = tokenizer.eos_token
    pieces: list[_Piece] = []
    end = 0
    for turn, prompt, closing in zip(example.turns, prompts, closings, strict=True):
        endings = (turn.completion + closing, turn.completion.strip() + closing)  # many templates strip
        ending = next((text for text in endings if text in whole[len(prompt) :]), None)
        if ending is None or not whole.startswith(prompt):
            raise DataError(
                f"the tokenizer's chat template renders {_name(example)} in another way with its answer than "
                "without; give train.template"
            )
        completion = whole[len(prompt) : whole.index(ending, len(prompt)) + len(ending)]
        if eos in completion:
            completion = completion[: completion.rindex(eos) + len(eos)]
        pieces.append((prompt[end:], completion))
        end = len(prompt) + len(completion)
    prompt, completion = pieces[-1]
    return [*pieces[:-1], (prompt, completion.removesuffix(eos) + eos)]


# Ids


def _encoded(
    conversations: Sequence[Sequence[_Piece]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, labels) of each conversation, from one tokenizer call for all.

    A prompt has the ids that it has alone, as generation feeds it. A completion has those that it has behind
    its prompt, as log-likelihoods are scored; where tokens merge across the border, it is tokenised alone.
    """
    eos = tokenizer.eos_token
    texts: list[str] = []
    for pieces in conversations:
        lead = ""  # a later turn stands behind an end: some tokenizers mark the start of a whole text
        for prompt, completion in pieces:
            texts += [lead + prompt, lead + prompt + completion]
            lead = eos if completion.endswith(eos) else ""
    encoded = iter(_ids(texts, tokenizer))

    for pieces in conversations:
        ids: list[int] = []
        labels: list[int] = []
        skip = 0
        for _, completion in pieces:
            prompt_ids, whole_ids = next(encoded), next(encoded)
            if whole_ids[: len(prompt_ids)] == prompt_ids:
                completion_ids = whole_ids[len(prompt_ids) :]
            else:
                completion_ids = _ids([eos + completion], tokenizer)[0][1:]
            prompt_ids = prompt_ids[skip:]
            ids += prompt_ids + completion_ids
            labels += [IGNORE_INDEX] * len(prompt_ids) + completion_ids
            skip = int(completion.endswith(eos))
        if labels:
            labels[0] = IGNORE_INDEX
        yield np.array(ids, np.int32), np.array(labels, np.int32)


def _ids(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Ids of rendered texts, which hold their special tokens already."""
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoding["input_ids"]


# Cache

_recent: OrderedDict[str, TokenizedSplit] = OrderedDict()


def tokenized_split(
    trial: TrialSpec, tokenizer: "PreTrainedTokenizerBase", cache_dir: Path | None = None
) -> TokenizedSplit:
    """What a trial trains on and is held against, tokenised; from memory or `cache_dir` where it is known.

    Args:
        trial: Not a baseline.
        tokenizer: Of the trial's base model: its content is known by `trial.base_digest`.
        cache_dir: Folder of the cache, shared between processes; None keeps nothing on disk.

    Raises:
        DataError: as `data.training_split` and `tokenize`.
        ValueError: as `tokenize`.
    """
    train = trial.train
    assert train is not None, "a baseline has no training examples"
    key = content_id(
        {
            "version": TOKENIZATION_VERSION,
            "base": trial.base_digest,
            "data": trial.data_identity(),
            "num_examples": train.num_examples,
            "held_out_examples": train.held_out_examples,
            "data_seed": train.resolved_data_seed,
            "template": train.template,
            "max_length": train.max_length,
            "overlong": train.overlong,
        }
    )
    split = _recent.get(key)
    path = cache_dir / f"{key}.parquet" if cache_dir is not None else None
    if split is None and path is not None and path.exists():
        split = _read(path)
    if split is None:
        examples = training_split(trial)
        split = TokenizedSplit(
            *(
                tokenize(part, tokenizer, train.template, train.max_length, train.overlong)
                for part in (examples.train, examples.held_out)
            )
        )
        if path is not None:
            _write(split, path)
    _recent[key] = split
    _recent.move_to_end(key)
    while len(_recent) > NUM_RECENT:
        _recent.popitem(last=False)
    return split


def _write(split: TokenizedSplit, path: Path) -> None:
    """Both sets in one file, training examples first; written beside and renamed: whole or absent."""
    examples = split.train.examples + split.held_out.examples
    columns = {}
    for name in TokenizedExample._fields:
        arrays = [getattr(example, name) for example in examples]
        offsets = np.cumsum([0, *map(len, arrays)])
        columns[name] = pa.LargeListArray.from_arrays(offsets, np.concatenate([np.empty(0, np.int32), *arrays]))
    counts = json.dumps([split.train.counts, split.held_out.counts])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        pq.write_table(
            pa.table(columns, metadata={"counts": counts}),
            temporary,
            compression="zstd",
            write_page_checksum=True,
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> TokenizedSplit | None:
    """The sets in a cache file; None where it is damaged, which is said."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        counts = [Counts(*values) for values in json.loads(table.schema.metadata[b"counts"])]
        arrays = []
        for name in TokenizedExample._fields:
            column = table[name].combine_chunks()
            values = column.values.to_numpy()  # a view, which is read-only
            arrays.append([values[start:end] for start, end in pairwise(column.offsets.to_pylist())])
        examples = list(map(TokenizedExample, *arrays))
        train, held_out = examples[: counts[0].used], examples[counts[0].used :]
        if len(held_out) != counts[1].used:
            raise ValueError(f"{len(examples)} examples, {counts[0].used + counts[1].used} expected")
        return TokenizedSplit(TokenizedSet(train, counts[0]), TokenizedSet(held_out, counts[1]))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s); its examples are tokenised again", path, error)
        return None
