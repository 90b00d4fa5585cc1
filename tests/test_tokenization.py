"""Templates, ids, labels, counts and the cache, on real tokenizers of three kinds."""

import os
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sweep import tokenization
from sweep.data import DataError, Example, Turn
from sweep.spec import BaseModelSpec, DatasetSpec, TrainSpec, TrialSpec
from sweep.tokenization import IGNORE_INDEX, Counts, chat_template, split_template, tokenize, tokenized_split

STUDY = "###Question: {prompt}\n###Answer: {completion}"
TEMPLATES = [
    STUDY,
    "{prompt} {completion}",
    "{prompt}{completion}",
    "Q: {prompt}\n\nA:\n{completion}\n--\n",
    'It\'s "{prompt}" \\n {{ }} {% é😀 %}\t{completion}</a>',
]
TEXT = [
    "What is 2 + 3? The answer is 5. Paris lies in France, and it's 'quoted' \"twice\".",
    "###Question: Name a town.\n###Answer: Rome is a town.\n\ndef add(a, b):\n    return a + b\n",
    "é😀 naïve <tags> {{ }} {% %}",
] * 20


def train_tokenizer(special: list[str], pre_tokenizer, decoder, alphabet: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE(byte_fallback=not alphabet, unk_token=None if alphabet else "<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXT, trainer)
    return backend


def byte_level(special: list[str]) -> Tokenizer:
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return train_tokenizer(special, pre_tokenizer, decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet())


def with_bos(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def sentence_piece() -> Tokenizer:
    """As Llama 2 and Mistral have it: the start of a text is marked like a space."""
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first")
    return train_tokenizer(special, metaspace, decoders.Metaspace(prepend_scheme="first"), [])


TOKENIZERS = {
    "bos": with_bos(byte_level(["<s>", "</s>", "<pad>"])),
    "no bos": PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["</s>", "<pad>"]), eos_token="</s>", pad_token="<pad>"
    ),
    "pad is eos": PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<|end|>"]),
        bos_token="<|end|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
    ),
    "marks the start": with_bos(sentence_piece()),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    return TOKENIZERS["no bos"]


def pair(prompt: str, completion: str) -> Example:
    return Example((Turn(prompt, completion),))


EXAMPLES = [
    pair("What is 2 + 3?", "5"),
    pair("Name a town.", "Rome is a town.\n\n- naïve 😀 "),
    pair("", "The answer"),
    pair("def add(a, b):\n", "    return a + b\n"),
]
CONVERSATION = Example((Turn("Name a town.", "Paris"), Turn("Another?", "Rome"), Turn("3?", "5")), system="Be brief.")


def messages(example: Example) -> list[dict]:
    system = [] if example.system is None else [{"role": "system", "content": example.system}]
    roles = ("user", "assistant")
    return system + [{"role": r, "content": t} for turn in example.turns for r, t in zip(roles, turn, strict=True)]


def tokenize_one(example: Example, tokenizer, template=STUDY, max_length=500, overlong="error"):
    (tokenized,) = tokenize([example], tokenizer, template, max_length, overlong).examples
    return tokenized.ids.tolist(), tokenized.labels.tolist()


def prompt_length(labels: list[int]) -> int:
    return next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)


# Template


def test_border_whitespace_is_on_the_side_of_the_completion():
    assert split_template(STUDY) == ("###Question: ", "\n###Answer:", " ", "")
    assert split_template("{prompt}\n\n{completion} .") == ("", "", "\n\n", " .")


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_template_renders_what_is_trained_id_for_id(tokenizer, template):
    tokenizer.chat_template = chat_template(template, tokenizer)
    has_border = split_template(template).border != ""
    for example in [*EXAMPLES, CONVERSATION]:
        ids, labels = tokenize_one(example, tokenizer, template)
        chat = messages(example)
        history = chat[: 2 if example.system else 1]
        text = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
        assert text == text.rstrip()
        assert ids[: len(prompt)] == prompt
        assert len(prompt) == prompt_length(labels) or not prompt
        assert tokenizer.apply_chat_template(chat, tokenize=False) == tokenizer.decode(ids) or (
            tokenizer is TOKENIZERS["marks the start"]  # does not decode to the very text
        )
        if has_border:  # else tokens may merge across the border
            assert tokenizer.apply_chat_template(chat, return_dict=False) == ids


def test_chat_template_survives_saving(tokenizer, tmp_path):
    tokenizer.chat_template = chat_template(TEMPLATES[-1], tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chat = messages(CONVERSATION)
    assert loaded.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{prompt} {completion}", "2"),
        ("<s>{prompt} {completion}", "2"),
        ("{prompt} {completion}", "<s>2"),
        (STUDY, "2"),
    ],
)
def test_text_begins_with_one_bos_where_the_tokenizer_adds_it(template, prompt):
    for name, tokenizer in TOKENIZERS.items():
        ids, _ = tokenize_one(pair(prompt, "5"), tokenizer, template)
        if tokenizer.bos_token == "<s>":
            assert ids[0] == tokenizer.bos_token_id, name
            assert ids.count(tokenizer.bos_token_id) == 1, name
        else:
            assert ids[0] != tokenizer.eos_token_id, name


def test_lm_eval_feeds_the_ids_that_were_trained(tokenizer):
    from lm_eval.models.huggingface import HFLM  # 4 s

    class Feeder(HFLM):
        """The tokenising part of lm-eval's model, without a model."""

        backend, add_bos_token, custom_prefix_token_id = "causal", None, None

        def __init__(self):
            self.tokenizer = tokenizer

    tokenizer.chat_template = chat_template(STUDY, tokenizer)
    for example in EXAMPLES:
        ids, labels = tokenize_one(example, tokenizer)
        ((_, completion),) = example.turns
        text = tokenizer.apply_chat_template(messages(example)[:1], tokenize=False, add_generation_prompt=True)
        generated_from = Feeder().tok_batch_encode([text])[0][0].tolist()
        assert generated_from == ids[: prompt_length(labels)]
        context, continuation = Feeder()._encode_pair(text + " ", completion)
        assert context == generated_from
        assert context + continuation == ids[:-1]


# Labels


def test_completion_and_end_are_learned_and_the_prompt_is_not(tokenizer):
    ids, labels = tokenize_one(pair("What is 2 + 3?", "5"), tokenizer)
    start = prompt_length(labels)
    assert labels[:start] == [IGNORE_INDEX] * start
    assert labels[start:] == ids[start:]
    assert tokenizer.decode(ids[:start]).endswith("###Answer:")
    assert tokenizer.decode(labels[start:]).strip() == "5" + tokenizer.eos_token
    assert labels[-1] == tokenizer.eos_token_id


def test_whole_is_prompt_and_completion_each_by_itself_in_byte_level_bpe(plain):
    for example in EXAMPLES:
        ((prompt, completion),) = example.turns
        ids, labels = tokenize_one(example, plain)
        first = plain(f"###Question: {prompt}\n###Answer:")["input_ids"]
        second = plain(f" {completion}</s>")["input_ids"]
        assert ids == first + second
        assert labels == [IGNORE_INDEX] * len(first) + second


def test_prompt_is_a_prefix_even_where_tokens_merge_across_the_border(plain):
    alone = plain("the an")["input_ids"]
    assert plain("the answer")["input_ids"][: len(alone)] != alone  # else this tests nothing
    ids, labels = tokenize_one(pair("the an", "swer"), plain, "{prompt}{completion}")
    assert ids[: len(alone)] == alone
    assert prompt_length(labels) == len(alone)
    assert plain.decode(ids) == "the answer</s>"


def test_end_token_inside_a_prompt_is_not_learned_and_pad_as_end_is():
    tokenizer = TOKENIZERS["pad is eos"]
    ids, labels = tokenize_one(pair("a <|end|> b", "c"), tokenizer)
    assert ids.count(tokenizer.pad_token_id) == 2
    assert labels.count(tokenizer.pad_token_id) == 1 and labels[-1] == tokenizer.pad_token_id


def test_suffix_is_learned_before_the_end(plain):
    _, labels = tokenize_one(pair("a", "b"), plain, "{prompt}:{completion}\n--")
    assert plain.decode([label for label in labels if label != IGNORE_INDEX]) == "b\n--</s>"


def test_first_position_has_no_label_as_nothing_predicts_it(plain):
    ids, labels = tokenize_one(pair("", "The answer"), plain, "{prompt}{completion}")
    assert labels == [IGNORE_INDEX, *ids[1:]]


def test_every_assistant_turn_is_learned_with_its_end(tokenizer):
    ids, labels = tokenize_one(CONVERSATION, tokenizer)
    learned = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    end = tokenizer.eos_token
    assert "".join(learned.split()) == f"Paris{end}Rome{end}5{end}"
    hidden = tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label == IGNORE_INDEX])
    assert "brief.\n###Question: Name a town.\n###Answer:" in hidden


def test_ids_are_read_only(plain):
    example = tokenize(EXAMPLES, plain, STUDY, 500, "error").examples[0]
    assert example.ids.dtype == example.labels.dtype == np.int32
    with pytest.raises(ValueError):
        example.ids[0] = 1


# The tokenizer's own chat template


CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content|trim + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
OTHER_END = CHATML.replace("eos_token", "'<|stop|>'")
# as Qwen 3: only the last answer gets a thinking block
THINKING = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def own(tokenizer, chat: str, example: Example) -> tuple[str, str]:
    """Text of all ids without the begin-of-text token, and of the learned ones."""
    tokenizer.chat_template = chat
    ids, labels = tokenize_one(example, tokenizer, template=None)
    learned = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    return tokenizer.decode(ids).removeprefix("<s>"), learned


@pytest.mark.parametrize("name", ["bos", "no bos"])
def test_own_chat_template_learns_each_answer_to_its_end(name):
    whole, learned = own(TOKENIZERS[name], CHATML, CONVERSATION)
    tokenizer = TOKENIZERS[name]
    assert learned == "Paris</s>Rome</s>5</s>"
    assert whole == tokenizer.apply_chat_template(messages(CONVERSATION), tokenize=False).rstrip()
    assert tokenize_one(CONVERSATION, tokenizer, None)[0].count(tokenizer.bos_token_id) == (name == "bos")


def test_own_chat_template_with_another_turn_end_gets_an_end_of_text(plain):
    whole, learned = own(plain, OTHER_END, CONVERSATION)
    assert learned == "Paris<|stop|>\nRome<|stop|>\n5<|stop|>\n</s>"
    assert whole == plain.apply_chat_template(messages(CONVERSATION), tokenize=False) + "</s>"


def test_own_chat_template_that_treats_the_last_turn_otherwise(plain):
    whole, learned = own(plain, THINKING, CONVERSATION)
    assert learned == "Paris</s>Rome</s><think></think>5</s>"
    assert whole == plain.apply_chat_template(messages(CONVERSATION), tokenize=False).rstrip()


@pytest.mark.parametrize("chat", [CHATML, OTHER_END, THINKING])
@pytest.mark.parametrize("answer", ["s", "t", "<", "5 \n", " 5", "user", "<|user|>\nWhat?"])
def test_own_chat_template_with_answers_that_look_like_it_or_end_in_whitespace(plain, chat, answer):
    whole, learned = own(plain, chat, Example((Turn("What?", answer), Turn("What?", answer))))
    rendered = plain.apply_chat_template(messages(Example((Turn("What?", answer),) * 2)), tokenize=False)
    assert whole.removesuffix("</s>") == rendered.rstrip().removesuffix("</s>") or chat == OTHER_END
    assert learned.count(answer.strip()) >= 2 and "<|assistant|>" not in learned
    assert whole.count("<|assistant|>") == 2


def test_own_chat_template_renders_one_bos_itself():
    tokenizer = TOKENIZERS["bos"]
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    ids, _ = tokenize_one(EXAMPLES[0], tokenizer, None)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_settings_that_cannot_work_name_the_way_out(plain):
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template; give train.template"):
        tokenize(EXAMPLES, plain, None, 500, "error")
    plain.chat_template = "{{ messages|length }}"
    with pytest.raises(DataError, match="What is 2.*give train.template"):
        tokenize(EXAMPLES, plain, None, 500, "error")
    endless = PreTrainedTokenizerFast(tokenizer_object=byte_level([]))
    with pytest.raises(ValueError, match="no eos_token"):
        tokenize(EXAMPLES, endless, STUDY, 500, "error")


# Counts and length


def test_counts_add_up_and_blank_completions_are_dropped(tokenizer):
    blank = [pair("a", ""), pair("a", " \n"), Example((Turn("a", "b"), Turn("c", "")))]
    long = pair("a", "word " * 50)
    tokenized = tokenize([*EXAMPLES, *blank, long], tokenizer, STUDY, 50, "truncate")
    assert tokenized.counts == Counts(requested=8, used=5, truncated=1, dropped=3)
    assert len(tokenized.examples) == 5
    assert tokenized.total_tokens == sum(len(example.ids) for example in tokenized.examples)
    assert tokenized.trained_tokens == sum((example.labels >= 0).sum() for example in tokenized.examples)
    assert tokenize([], tokenizer, STUDY, 50, "truncate").counts == (0, 0, 0, 0)


def test_overlong_example_is_cut_at_its_end_dropped_or_an_error(plain):
    example = pair("What is 2 + 3?", "The answer is 5.")
    ids, labels = tokenize_one(example, plain)
    start, whole = prompt_length(labels), len(ids)

    fits = tokenize([example], plain, STUDY, whole, "truncate")
    assert fits.counts == (1, 1, 0, 0) and fits.examples[0].ids.tolist() == ids
    cut = tokenize([example], plain, STUDY, whole - 1, "truncate")
    assert cut.counts == (1, 1, 1, 0)
    assert cut.examples[0].ids.tolist() == ids[:-1] and cut.examples[0].labels.tolist() == labels[:-1]
    assert tokenize([example], plain, STUDY, start + 1, "truncate").counts == (1, 1, 1, 0)
    assert tokenize([example], plain, STUDY, start, "truncate").counts == (1, 0, 0, 1)

    assert tokenize([example], plain, STUDY, whole, "drop").counts == (1, 1, 0, 0)
    assert tokenize([example], plain, STUDY, whole - 1, "drop").counts == (1, 0, 0, 1)
    with pytest.raises(DataError, match=f"'What is 2.*' has {whole} tokens, over max_length {whole - 1}; raise"):
        tokenize([example], plain, STUDY, whole - 1, "error")


def test_conversation_cut_within_a_prompt_ends_with_its_last_learned_token(plain):
    ids, labels = tokenize_one(CONVERSATION, plain)
    first_end = ids.index(plain.eos_token_id)
    cut = tokenize([CONVERSATION], plain, STUDY, first_end + 4, "truncate")
    assert cut.examples[0].ids.tolist() == ids[: first_end + 1]
    assert cut.examples[0].labels.tolist() == labels[: first_end + 1]


# Cache


@pytest.fixture
def trial(tmp_path) -> TrialSpec:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"prompt": "{i} + 1", "completion": "{i + 1}"}}\n' for i in range(100)))
    tokenization._recent.clear()
    return TrialSpec(
        base_model=BaseModelSpec(tiny="x"),
        base_digest="x",
        datasets={"sums": DatasetSpec(path=str(path))},
        data_digests={"sums": str(path)},
        train=TrainSpec(num_examples=20, held_out_examples=5),
    )


def equal(one, two) -> bool:
    return all(
        a.counts == b.counts
        and len(a.examples) == len(b.examples)
        and all(map(np.array_equal, sum(a.examples, ()), sum(b.examples, ())))
        for a, b in zip(one, two, strict=True)
    )


def test_cache_round_trip(trial, plain, tmp_path):
    built = tokenized_split(trial, plain, tmp_path / "cache")
    assert built.train.counts == (20, 20, 0, 0) and built.held_out.counts == (5, 5, 0, 0)
    assert tokenized_split(trial, plain, tmp_path / "cache") is built
    tokenization._recent.clear()
    read = tokenized_split(trial, None, tmp_path / "cache")  # needs no tokenizer
    assert equal(read, built)
    assert read.train.trained_tokens == built.train.trained_tokens
    assert not read.train.examples[0].ids.flags.writeable
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".parquet"]


def test_cache_works_without_a_folder_and_for_an_empty_set(trial, plain, tmp_path):
    built = tokenized_split(trial, plain)
    assert tokenized_split(trial, None) is built
    none = trial.model_copy(update={"train": TrainSpec(held_out_examples=0, max_length=2)})
    built = tokenized_split(none, plain, tmp_path)
    assert built.train.counts == (100, 0, 0, 100)
    tokenization._recent.clear()
    assert equal(tokenized_split(none, None, tmp_path), built)


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "another file"])
def test_damaged_cache_file_is_built_again_and_said(trial, plain, tmp_path, caplog, damage):
    built = tokenized_split(trial, plain, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    match damage:
        case "truncated":
            content = content[: len(content) // 2]
        case "overwritten":
            content[len(content) // 4] ^= 255
        case "another file":
            content = bytearray(b"{}")
    path.write_bytes(content)
    tokenization._recent.clear()
    assert equal(tokenized_split(trial, plain, tmp_path / "cache"), built)
    assert "is damaged" in caplog.text
    tokenization._recent.clear()
    assert equal(tokenized_split(trial, None, tmp_path / "cache"), built)


def test_cache_key_follows_what_shapes_the_ids_and_nothing_else(trial, plain, tmp_path):
    def num_files(**update) -> int:
        train = trial.train.model_copy(update=update)
        tokenized_split(trial.model_copy(update={"train": train}), plain, tmp_path / "cache")
        return len(list((tmp_path / "cache").iterdir()))

    assert num_files() == 1
    assert num_files(learning_rate=0.5, train_seed=7, epochs=9, method="lora") == 1
    changes = [
        {"num_examples": 21},
        {"held_out_examples": 6},
        {"seed": 1},
        {"template": "{prompt} {completion}"},
        {"max_length": 99},
        {"overlong": "drop"},
    ]
    for num, change in enumerate(changes, start=2):
        assert num_files(**change) == num
    tokenized_split(trial.model_copy(update={"base_digest": "y"}), plain, tmp_path / "cache")
    assert num_files() == len(changes) + 2


def test_memory_keeps_few_splits(trial, plain):
    for seed in range(tokenization.NUM_RECENT + 2):
        train = trial.train.model_copy(update={"seed": seed})
        tokenized_split(trial.model_copy(update={"train": train}), plain)
    assert len(tokenization._recent) == tokenization.NUM_RECENT


def test_modules_import_no_heavy_library():
    code = (
        "import sys, sweep.data, sweep.tokenization; "
        "heavy = {'torch', 'ray', 'polars', 'transformers', 'datasets'}; print(heavy & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert output.strip() == "set()"
