"""Tiny base models of real architectures, pretrained here on raw text of the tiny world.

A model is 4 layers of width 96, about half a million weights. Its text, initial weights and tokenizer follow
from the recipe, so the same machine builds the same files again.

Two choices keep it near a minute on one core. Each row of a batch is one whole document: with documents
packed end to end the same time taught no copying. And Muon trains the matrices: AdamW alone learnt half as
many sums.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sweep.tiny import text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Architecture = Literal["llama", "qwen3", "gpt_neox"]

MIXTURES: dict[str, dict[str, float]] = {
    "code": {"code": 0.7, "maths": 0.15, "general": 0.15},
    "maths": {"code": 0.15, "maths": 0.7, "general": 0.15},
    "general": {"code": 0.15, "maths": 0.15, "general": 0.7},
}
"""Shares of documents. Fixed before any score was seen."""


@dataclass(frozen=True)
class BaseRecipe:
    """Everything that defines a base model's weights."""

    architecture: Architecture
    mixture: Mapping[str, float]
    seed: int = 0
    """Initial weights and text stream; the tokenizer goes by the architecture alone."""
    hidden_size: int = 96
    num_layers: int = 4
    num_heads: int = 4
    vocab_size: int = 896
    """Whole words and whole numbers below 100 fit: with digits apart the sums took twice the pretraining."""
    max_positions: int = 512
    steps: int = 1100
    batch_size: int = 16
    """Documents in a step."""
    matrix_learning_rate: float = 4e-3
    """For the weight matrices of the layers (Muon)."""
    other_learning_rate: float = 6e-3
    """For embeddings, head, norms and biases (AdamW)."""
    weight_decay: float = 0.1
    """Of the matrices only."""
    initializer_range: float = 0.08
    """0.02, the usual value, is for models ten times as wide; it learned later here."""


BASE_MODELS: dict[str, BaseRecipe] = {
    "llama-code": BaseRecipe("llama", MIXTURES["code"]),
    "llama-maths": BaseRecipe("llama", MIXTURES["maths"]),
    "qwen3-code": BaseRecipe("qwen3", MIXTURES["code"]),
    "qwen3-maths": BaseRecipe("qwen3", MIXTURES["maths"]),
    "qwen3-general": BaseRecipe("qwen3", MIXTURES["general"]),
    "neox-code": BaseRecipe("gpt_neox", MIXTURES["code"]),
    "neox-maths": BaseRecipe("gpt_neox", MIXTURES["maths"]),
    "neox-general": BaseRecipe("gpt_neox", MIXTURES["general"]),
    # the control: two bases that differ in nothing but the seed
    "llama-general-a": BaseRecipe("llama", MIXTURES["general"], seed=0),
    "llama-general-b": BaseRecipe("llama", MIXTURES["general"], seed=1),
}

SPECIAL_TOKENS: dict[str, dict[str, str]] = {
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "gpt_neox": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}
"""As in the real families: Llama has a begin token, Qwen3 has none, GPT-NeoX pads with its end token."""


def train_tokenizer(architecture: Architecture, vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer for the world's words.

    It is trained on equal parts of all domains and on the datasets' questions: without the latter the words
    of a question and of the usual prompt template would be spelt letter by letter, in twice as many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL_TOKENS[architecture]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_corpus(architecture), trainer)
    if "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def _tokenizer_corpus(architecture: Architecture) -> Iterator[str]:
    from sweep.tiny.datasets import SOURCES, draw_examples

    rng = text.seeded("tokenizer", architecture)
    yield from itertools.islice(text.documents({"code": 1, "maths": 1, "general": 1}, rng), 6000)
    for source in SOURCES:
        for example in draw_examples(source, 200, rng, test=False):
            yield f"###Question: {example.instruction}\n###Answer: {example.response}"


def untrained_model(recipe: BaseRecipe, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    """The architecture with random weights from PyTorch's global generator, float32."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen3Config

    shape = {
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "max_position_embeddings": recipe.max_positions,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": recipe.initializer_range,
        "dtype": "float32",
    }
    match recipe.architecture:
        case "llama":
            config = LlamaConfig(
                **shape, intermediate_size=recipe.hidden_size * 8 // 3, num_key_value_heads=recipe.num_heads
            )
        case "qwen3":
            config = Qwen3Config(
                **shape,
                intermediate_size=recipe.hidden_size * 8 // 3,
                num_key_value_heads=recipe.num_heads // 2,
                head_dim=recipe.hidden_size // recipe.num_heads,
                tie_word_embeddings=True,
            )
        case "gpt_neox":
            config = GPTNeoXConfig(**shape, intermediate_size=recipe.hidden_size * 4, rotary_pct=0.5)
    return AutoModelForCausalLM.from_config(config)


def batches(recipe: BaseRecipe, tokenizer: "PreTrainedTokenizerFast") -> Iterator["torch.Tensor"]:
    """The recipe's text without end, as ids [batch_size, length], one document a row, -100 behind its end.

    Documents of like length share a batch, so that little of it is filling.
    """
    import torch

    rng = text.seeded("pretraining", recipe.seed)
    documents = text.documents(recipe.mixture, rng)
    while True:
        chunk = list(itertools.islice(documents, 200 * recipe.batch_size))
        rows = sorted(([*ids, tokenizer.eos_token_id] for ids in tokenizer(chunk)["input_ids"]), key=len)
        for start in rng.sample(range(0, len(rows), recipe.batch_size), 200):
            batch = [torch.tensor(row) for row in rows[start : start + recipe.batch_size]]
            yield torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)


def pretrain(
    model: "PreTrainedModel",
    batches: Iterator["torch.Tensor"],
    recipe: BaseRecipe,
    report: Callable[[int, float], None] = lambda step, loss_nats: None,
) -> None:
    """Train for `recipe.steps` steps: warm up over 30, hold, fall to zero over the last two fifths.

    Args:
        model: changed in place.
        batches: as `batches` gives them.
        recipe: optimiser settings.
        report: called after each tenth step with the number of steps done and the loss of the last one.
    """
    import torch
    import torch.nn.functional as F

    from sweep.tiny.muon import Muon

    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    outer = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    optimizers = [
        Muon(inner, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(outer, lr=recipe.other_learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]

    def scale(done: int) -> float:
        return min(1.0, (done + 1) / 30, (recipe.steps - done) / (0.4 * recipe.steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in optimizers]
    model.train()
    for step, labels in enumerate(itertools.islice(batches, recipe.steps), start=1):
        # no attention mask: the filling is at the end, where no token of the text can see it
        logits = model(input_ids=labels.clamp(min=0), use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        model.zero_grad()
        if step % 10 == 0:
            report(step, loss.item())
    model.eval()


def write_base_model(
    recipe: BaseRecipe, folder: Path, report: Callable[[int, float], None] = lambda step, loss_nats: None
) -> None:
    """Pretrain and save weights (float32 safetensors), config and tokenizer, on one thread.

    One thread because the order of a sum would otherwise depend on their number, and the weights with it.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            tokenizer = train_tokenizer(recipe.architecture, recipe.vocab_size)
            model = untrained_model(recipe, tokenizer)
            pretrain(model, batches(recipe, tokenizer), recipe, report)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
