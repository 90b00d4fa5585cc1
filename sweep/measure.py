"""Measures of a (base model, dataset) pair: how likely, how long and how diverse the texts are.

Tokens and labels are those of training: `perplexity_completion` is exp of the loss that training would have
on the same examples before its first step.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from sweep import tokenization
from sweep.data import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sweep.tokenization import TokenizedExample

MEASURE_VERSION = 1
"""Part of a measure's key; raised whenever a number here changes its meaning."""

MAX_LOGITS = 2**28
"""Entries of one pass's logits (1 GiB in float32): with 150,000 words 32 long rows would not fit a GPU."""


def measure(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    template: str | None,
    max_length: int,
    batch_size: int,
) -> dict[str, float | None]:
    """All measures by name; None where there is nothing to measure.

    - `perplexity_completion`: exp of the mean nats per completion token, end-of-text included.
    - `perplexity_text`: the same over prompt and completion.
    - `bits_per_byte_completion`, `bits_per_byte_text`: nats / ln 2 per UTF-8 byte of the same texts. Special
      tokens (end-of-text, turn marks) have no bytes, and their nats are left out. Across tokenizers compare
      only these.
    - `prompt_tokens_mean`, `completion_tokens_mean`, `completion_tokens_p50`, `completion_tokens_p90`.
    - `distinct_1`, `distinct_2`: different word n-grams over all word n-grams of the completions.
    - `num_examples`: examples measured.

    A text's first token has no probability: it is in neither the nats, nor the tokens, nor the bytes. With a
    begin-of-text token that is this token, and nothing of the text is lost.

    Args:
        model: weights on their device; left in the mode it came in.
        tokenizer: the model's.
        examples: what to measure.
        template: prompt template, as in training.
        max_length: limit of one example in tokens; what is longer is cut as in training.
        batch_size: rows per pass at most; shows in the numbers by no more than rounding.
    """
    rows = tokenization.tokenize(examples, tokenizer, template, max_length, "truncate").examples
    special = np.array(tokenizer.all_special_ids)
    totals = {"completion": _Total(), "text": _Total()}
    for row, nats in _token_nats(model, rows, batch_size):
        learned = row.labels[1:] != tokenization.IGNORE_INDEX
        has_bytes = ~np.isin(row.ids[1:], special)
        for total, scored in ((totals["completion"], learned), (totals["text"], np.ones_like(learned))):
            total.nats += nats[scored].sum()
            total.tokens += int(scored.sum())
            total.text_nats += nats[scored & has_bytes].sum()
            total.bytes += _num_bytes(tokenizer, row.ids, scored)

    values: dict[str, float | None] = {}
    for name, total in totals.items():
        values[f"perplexity_{name}"] = math.exp(total.nats / total.tokens) if total.tokens else None
        bits = float(total.text_nats) / math.log(2)
        values[f"bits_per_byte_{name}"] = bits / total.bytes if total.bytes else None
    completion_lengths = np.array([np.count_nonzero(row.labels != tokenization.IGNORE_INDEX) for row in rows])
    prompt_lengths = np.array([len(row.ids) for row in rows]) - completion_lengths
    completions = [turn.completion.split() for example in examples for turn in example.turns]
    return values | {
        "prompt_tokens_mean": float(prompt_lengths.mean()) if rows else None,
        "completion_tokens_mean": float(completion_lengths.mean()) if rows else None,
        "completion_tokens_p50": float(np.quantile(completion_lengths, 0.5)) if rows else None,
        "completion_tokens_p90": float(np.quantile(completion_lengths, 0.9)) if rows else None,
        "distinct_1": _distinct([word for words in completions for word in words]),
        "distinct_2": _distinct([pair for words in completions for pair in pairwise(words)]),
        "num_examples": len(rows),
    }


@dataclass
class _Total:
    """Sums over the scored tokens of all examples, in float64."""

    nats: float = 0.0
    tokens: int = 0
    text_nats: float = 0.0
    """Nats of the tokens that have bytes."""
    bytes: int = 0


def _token_nats(
    model: "PreTrainedModel", rows: Sequence["TokenizedExample"], batch_size: int
) -> Iterator[tuple["TokenizedExample", np.ndarray]]:
    """Each row with -log p of its second to last token, in nats; rows come by length."""
    import torch

    # longest first: what does not fit memory fails at once
    waiting = sorted(rows, key=lambda row: len(row.ids), reverse=True)
    training = model.training
    model.eval()
    try:
        while waiting:
            length = len(waiting[0].ids)
            size = max(1, min(batch_size, MAX_LOGITS // (length * model.config.get_text_config().vocab_size)))
            batch, waiting = waiting[:size], waiting[size:]
            ids = torch.zeros(len(batch), length, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for index, row in enumerate(batch):
                ids[index, : len(row.ids)] = torch.from_numpy(row.ids.astype(np.int64))
                mask[index, : len(row.ids)] = 1
            ids, mask = ids.to(model.device), mask.to(model.device)
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
                nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            for row, row_nats in zip(batch, nats.double().cpu().numpy(), strict=True):
                yield row, row_nats[: len(row.ids) - 1]
    finally:
        model.train(training)


def _num_bytes(tokenizer: "PreTrainedTokenizerBase", ids: np.ndarray, scored: np.ndarray) -> int:
    """UTF-8 bytes of the text that the scored tokens add to what stands before them.

    Args:
        tokenizer: the model's.
        ids: a whole example.
        scored: for its second to last token, whether it counts.
    """

    def before(end: int) -> int:
        settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return len(tokenizer.decode(ids[:end].tolist(), **settings).encode())

    # +1 where a run of scored tokens starts, -1 behind its end; token k of `scored` is token k + 1 of `ids`
    edges = np.diff(np.concatenate([[0], scored.astype(int), [0]]))
    return sum(-int(edge) * before(int(index) + 1) for index, edge in enumerate(edges) if edge)


def _distinct(ngrams: Sequence[Hashable]) -> float | None:
    return len(set(ngrams)) / len(ngrams) if ngrams else None
