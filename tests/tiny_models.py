"""Tiny real models with random weights and a byte-level BPE tokenizer, made from configs on the spot."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCAB_SIZE = 320

_COMMON = {"vocab_size": VOCAB_SIZE, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0}
_SHAPE = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}

_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

CONFIGS = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=True),
    "gpt_neox": lambda: GPTNeoXConfig(**_SHAPE, rotary_pct=0.5),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=8),
    "olmo2": lambda: Olmo2Config(**_GROUPED),
    "gemma2": lambda: Gemma2Config(**_GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
    "gpt2": lambda: GPT2Config(**_COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=256, **_NO_DROPOUT),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with an end token and no pad token."""
    trained = Tokenizer(tokenizer_models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [f"###Question: {a} plus {b}\n###Answer: {a + b}" for a in range(20) for b in range(20)]
    trained.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>")


def save_base(folder: Path, architecture: str = "llama", seed: int = 0, **saving: object) -> Path:
    """A model folder with config, weights and tokenizer; the global random state stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
        with torch.no_grad():  # norms that are all one and biases that are all zero hide mistakes
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder, **saving)
    tokenizer().save_pretrained(folder)
    return folder


def token_examples(num_examples: int, seed: int = 0, longest: int = 24) -> list[tuple[list[int], list[int]]]:
    """Ids and labels: a random prompt, then its first tokens again as the completion, of uneven lengths."""
    rng = random.Random(seed)
    examples = []
    for _ in range(num_examples):
        prompt = [rng.randrange(1, 60) for _ in range(rng.randint(2, longest))]
        completion = [*prompt[: rng.randint(1, len(prompt))], 0]
        examples.append((prompt + completion, [-100] * len(prompt) + completion))
    return examples
