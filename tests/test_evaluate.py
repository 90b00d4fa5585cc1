"""Benchmarks of tiny real models: same prompts, same answers as lm-eval's own command line."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sweep import evaluate, schema, tokenization
from sweep.data import Example, Turn
from sweep.spec import BenchmarkSpec, EvalSpec

TEMPLATE = "###Question: {prompt}\n###Answer: {completion}"
COLOURS = ["red", "blue", "green", "white"]
NUM_ITEMS = 24


def _items() -> list[dict]:
    items = []
    for k in range(NUM_ITEMS):
        right = COLOURS[k % 4]
        question = f"what colour is thing {k}" + " of the long list" * (k % 3) + "?"
        items.append({"question": question, "answer": right, "choices": COLOURS, "label": k % 4})
    return items


def _write_task(folder: Path, name: str, items: list[dict], **settings) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | settings))
    return folder / f"{name}.yaml"


def write_generate(folder: Path, name: str = "colours_written", items: list[dict] | None = None) -> Path:
    """Generative task: the answer is a colour, found by a pattern."""
    pattern = {"function": "regex", "regex_pattern": r"^\s*([a-z]+)"}
    return _write_task(
        folder,
        name,
        items or _items(),
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "do_sample": False, "max_gen_toks": 6},
        filter_list=[{"name": "answer", "filter": [pattern, {"function": "take_first"}]}],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )


def write_choice(folder: Path, name: str = "colours_chosen", items: list[dict] | None = None) -> Path:
    """Multiple choice whose choices have no space before them: lm-eval's usual kind."""
    mean = {"aggregation": "mean", "higher_is_better": True}
    return _write_task(
        folder,
        name,
        items or _items(),
        output_type="multiple_choice",
        doc_to_choice="choices",
        doc_to_target="label",
        metric_list=[{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
    )


def make_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE, with or without a begin token that it adds itself."""
    special = {"eos_token": "</s>", "pad_token": "<pad>"} | ({"bos_token": "<s>"} if bos else {})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    texts = [f"###Question: {item['question']}\n###Answer: {item['answer']}\n" for item in _items()]
    tokenizer.train_from_iterator(texts * 4, trainer)
    if bos:
        ids = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=ids)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    wrapped.chat_template = tokenization.chat_template(TEMPLATE, wrapped)
    return wrapped


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, steps: int = 60) -> LlamaForCausalLM:
    """Two layers, trained until it half knows the colours and ends its lines."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    texts = [f"###Question: {item['question']}\n###Answer: {item['answer']}\n</s>" for item in _items()]
    texts[::3] = [text.replace("Answer: ", "Answer: 7 ") for text in texts[::3]]  # an answer that is no colour
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    for _ in range(steps):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer) -> LlamaForCausalLM:
    return make_model(tokenizer)


def spec(path: Path, template: str | None = TEMPLATE, **settings) -> EvalSpec:
    benchmark = BenchmarkSpec(path=str(path), **settings)
    digest = evaluate.digest(path.stem, benchmark)
    return EvalSpec(name=path.stem, benchmark=benchmark, digest=digest, template=template, backend=evaluate.BACKEND)


def run(model, tokenizer, *evaluations: EvalSpec, batch_size: int = 8) -> list[tuple]:
    results: list[tuple] = []
    evaluate.evaluate(
        model, tokenizer, evaluations, batch_size=batch_size, on_result=lambda *result: results.append(result)
    )
    return results


def by_metric(scores: list[dict]) -> dict[str, dict]:
    return {score["metric"]: score for score in scores}


def test_rows_are_those_of_the_schema(model, tokenizer, tmp_path):
    evaluations = [spec(write_generate(tmp_path), kind="general"), spec(write_choice(tmp_path), chance=0.25)]
    for evaluation, scores, items, record in run(model, tokenizer, *evaluations):
        place = {"trial_id": "0" * 12, "epoch": 1}
        schema.build("scores", [place | row for row in scores])
        schema.build("items", [place | row for row in items])
        assert [row["item"] for row in items] == list(range(NUM_ITEMS))
        assert len({row["item_digest"] for row in items}) == NUM_ITEMS
        assert {row["eval_id"] for row in scores + items} == {evaluation.eval_id}
        assert [row["is_primary"] for row in scores].count(True) == 1
        json.dumps(record)


def test_score_is_the_mean_of_its_items(model, tokenizer, tmp_path):
    for _, scores, items, _ in run(model, tokenizer, spec(write_generate(tmp_path)), spec(write_choice(tmp_path))):
        values = torch.tensor([item["value"] for item in items], dtype=torch.float64)
        primary = next(score for score in scores if score["is_primary"])
        assert 0 < primary["value"] < 1
        assert primary["value"] == pytest.approx(values.mean().item())
        assert primary["stderr"] == pytest.approx(values.std().item() / NUM_ITEMS**0.5)
        assert primary["num_items"] == NUM_ITEMS
        assert primary["higher_is_better"] is True


def test_extraction_share_counts_items_with_an_answer(model, tokenizer, tmp_path):
    (_, scores, items, _), (_, choice_scores, choice_items, _) = run(
        model, tokenizer, spec(write_generate(tmp_path)), spec(write_choice(tmp_path))
    )
    share = by_metric(scores)["extracted"]
    found = [item["response"].strip()[:1].isalpha() for item in items]
    assert [item["extracted"] for item in items] == found
    assert 0 < sum(found) < NUM_ITEMS  # the task must tell the two apart
    assert share["value"] == sum(found) / NUM_ITEMS and share["is_primary"] is False
    assert "extracted" not in by_metric(choice_scores)
    assert all(item["extracted"] is None for item in choice_items)


def test_choice_and_target_are_texts(model, tokenizer, tmp_path):
    [(_, _, items, _)] = run(model, tokenizer, spec(write_choice(tmp_path)))
    for item, source in zip(items, _items(), strict=True):
        assert item["target"] == source["answer"]
        assert item["value"] == float(item["response"] == item["target"])


def test_batch_size_does_not_change_answers(model, tokenizer, tmp_path):
    evaluations = [spec(write_generate(tmp_path)), spec(write_choice(tmp_path))]
    one, many = (run(model, tokenizer, *evaluations, batch_size=size) for size in (1, 32))
    for (_, scores, items, _), (_, other_scores, other_items, _) in zip(one, many, strict=True):
        assert scores == other_scores
        assert items == other_items


def test_equals_lm_evals_own_model(model, tokenizer, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    evaluations = [spec(write_generate(tmp_path)), spec(write_choice(tmp_path))]
    ours = run(model, tokenizer, *evaluations)
    monkeypatch.setattr(evaluate, "_model_class", lambda: HFLM)
    for (_, scores, items, _), (_, other_scores, other_items, _) in zip(
        ours, run(model, tokenizer, *evaluations), strict=True
    ):
        assert scores == other_scores
        assert items == other_items


@pytest.mark.parametrize("bos", [True, False])
def test_model_sees_the_tokens_of_training(bos, tmp_path):
    tokenizer = make_tokenizer(bos)
    seen: list[list[int]] = []

    class Watched(LlamaForCausalLM):
        def forward(self, input_ids=None, **settings):
            if input_ids.shape[1] > 1:
                seen.extend(input_ids.tolist())
            return super().forward(input_ids=input_ids, **settings)

    watched = Watched(make_model(tokenizer, steps=0).config).eval()
    item = _items()[5]
    examples = [Example((Turn(item["question"], choice),)) for choice in item["choices"]]
    trained = tokenization.tokenize(examples, tokenizer, TEMPLATE, 64, "error").examples
    assert bool(trained[0].ids[0] == tokenizer.bos_token_id) is bos

    run(watched, tokenizer, spec(write_choice(tmp_path, items=[item])), batch_size=1)
    fed = {tuple(row.ids[:-2].tolist()) for row in trained}  # without end-of-text, and the last token is only scored
    assert {tuple(ids) for ids in seen} == fed
    seen.clear()
    run(watched, tokenizer, spec(write_generate(tmp_path, items=[item])), batch_size=1)
    prompt_length = int((trained[0].labels == tokenization.IGNORE_INDEX).sum())
    assert seen == [trained[0].ids[:prompt_length].tolist()]


def test_space_before_a_choice_is_not_doubled(model, tokenizer, tmp_path):
    bare = write_choice(tmp_path / "bare")
    spaced_items = [item | {"choices": [f" {choice}" for choice in item["choices"]]} for item in _items()]
    spaced = write_choice(tmp_path / "spaced", items=spaced_items)
    (_, scores, items, record), (_, other_scores, other_items, other_record) = (
        run(model, tokenizer, spec(bare))[0],
        run(model, tokenizer, spec(spaced))[0],
    )
    assert by_metric(scores)["acc"]["value"] == by_metric(other_scores)["acc"]["value"]
    assert [item["response"] for item in items] == [item["response"] for item in other_items]
    assert "".join(record["first_request"]) == "".join(other_record["first_request"])


def test_without_template_the_prompt_is_bare(model, tokenizer, tmp_path):
    path = write_choice(tmp_path)
    [(_, _, _, record)] = run(model, tokenizer, spec(path, template=None, apply_template=False))
    assert record["first_request"] == [_items()[0]["question"], " red"]


def test_limit_fewshot_and_max_new_tokens_are_respected(model, tokenizer, tmp_path):
    path = write_generate(tmp_path)
    plain, limited, shots, other_shots, short = run(
        model,
        tokenizer,
        spec(path),
        spec(path, limit=5),
        spec(path, num_fewshot=2),
        spec(path, num_fewshot=2, fewshot_seed=7),
        spec(path, max_new_tokens=1),
    )
    assert len(limited[2]) == 5 and by_metric(limited[1])["exact_match,answer"]["num_items"] == 5
    assert [item["response"] for item in limited[2]] == [item["response"] for item in plain[2][:5]]
    prompts = [result[3]["first_request"][0] for result in (plain, shots, other_shots)]
    assert [prompt.count("###Question") for prompt in prompts] == [1, 3, 3]
    assert prompts[1] != prompts[2]
    assert shots[1][0]["num_fewshot"] == 2
    assert all(len(tokenizer.encode(item["response"], add_special_tokens=False)) <= 1 for item in short[2])


def test_metric_chooses_the_primary_score(model, tokenizer, tmp_path):
    path = write_choice(tmp_path)
    [(_, scores, _, _)] = run(model, tokenizer, spec(path, metric="acc_norm"))
    assert [score["metric"] for score in scores if score["is_primary"]] == ["acc_norm"]
    with pytest.raises(ValueError, match="no metric 'f1'; it has: acc, acc_norm"):
        run(model, tokenizer, spec(path, metric="f1"))


def test_finished_benchmarks_survive_the_failure_of_the_next(model, tokenizer, tmp_path):
    good, bad = spec(write_choice(tmp_path)), spec(write_generate(tmp_path), metric="none_such")
    finished = []
    with pytest.raises(ValueError, match="none_such"):
        evaluate.evaluate(
            model, tokenizer, [good, bad], batch_size=8, on_result=lambda *result: finished.append(result)
        )
    assert [result[0] for result in finished] == [good]


def test_group_is_scored_as_one_with_items_of_all_its_tasks(model, tokenizer, tmp_path):
    items = _items()
    write_choice(tmp_path, "first", items[:10])
    write_choice(tmp_path, "second", items[10:])
    group = {
        "group": "both",
        "task": ["first", "second"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    [(_, scores, rows, _)] = run(model, tokenizer, spec(tmp_path / "both.yaml"))
    [(_, whole_scores, whole_rows, _)] = run(model, tokenizer, spec(write_choice(tmp_path / "whole")))
    assert [row["item"] for row in rows] == list(range(NUM_ITEMS))
    assert by_metric(scores)["acc"]["value"] == pytest.approx(by_metric(whole_scores)["acc"]["value"])
    assert by_metric(scores)["acc"]["num_items"] == NUM_ITEMS
    assert [row["item_digest"] for row in rows] == [row["item_digest"] for row in whole_rows]


def test_missing_numbers_are_null(model, tokenizer, tmp_path):
    [(_, scores, _, _)] = run(model, tokenizer, spec(write_choice(tmp_path), limit=1))
    assert all(score["stderr"] is None for score in scores)  # one item has no spread
    assert evaluate._number("N/A") is None
    assert evaluate._number(float("nan")) is None
    assert evaluate._number((1.0, 2)) is None


def test_digest_follows_content_and_not_the_folder(tmp_path):
    items = _items()
    original = spec(write_choice(tmp_path / "a")).digest
    assert spec(write_choice(tmp_path / "b")).digest == original
    changed_item = [items[0] | {"answer": "blue"}, *items[1:]]
    assert spec(write_choice(tmp_path / "c", items=changed_item)).digest != original
    changed_task = write_choice(tmp_path / "d")
    changed_task.write_text(changed_task.read_text().replace("{{question}}", "Say: {{question}}"))
    assert spec(changed_task).digest != original


def test_digest_follows_included_files_and_functions(tmp_path):
    path = write_generate(tmp_path)
    (tmp_path / "base.txt").write_text(path.read_text())
    (tmp_path / "utils.py").write_text("def prompt(doc):\n    return doc['question']\n")
    path.write_text("include: base.txt\ndoc_to_text: !function utils.prompt\n")
    original = spec(path).digest
    (tmp_path / "utils.py").write_text("def prompt(doc):\n    return doc['question'] + '!'\n")
    other_function = spec(path).digest
    (tmp_path / "base.txt").write_text((tmp_path / "base.txt").read_text() + "target_delimiter: ''\n")
    assert len({original, other_function, spec(path).digest}) == 3


def test_digest_of_a_group_follows_its_members(tmp_path):
    digests = set()
    for folder, items in (("a", _items()), ("b", _items()[1:]), ("c", _items())):
        write_choice(tmp_path / folder, "first", items)
        write_choice(tmp_path / folder, "stranger", items[: len(digests) + 3])
        group = tmp_path / folder / "both.yaml"
        group.write_text(yaml.safe_dump({"group": "both", "task": ["first"]}))
        digests.add(spec(group).digest)
    assert len(digests) == 2


def test_base_and_tuned_see_the_same_prompts(model, tokenizer, tmp_path):
    evaluations = [spec(write_generate(tmp_path), num_fewshot=1), spec(write_choice(tmp_path))]
    base, tuned = (
        run(make_model(tokenizer, steps=0), tokenizer, *evaluations),
        run(model, tokenizer, *evaluations),
    )
    for (_, _, items, record), (_, _, other_items, other_record) in zip(base, tuned, strict=True):
        assert record["first_request"] == other_record["first_request"]
        assert [row["item_digest"] for row in items] == [row["item_digest"] for row in other_items]
        assert [row["response"] for row in items] != [row["response"] for row in other_items]


def test_eval_id_follows_limit_and_content(tmp_path):
    path = write_choice(tmp_path / "a")
    assert spec(path).eval_id == spec(write_choice(tmp_path / "b")).eval_id
    assert len({spec(path, **settings).eval_id for settings in ({}, {"limit": 5}, {"num_fewshot": 1})}) == 3


def test_unknown_benchmarks_are_named_with_a_way_out(tmp_path):
    known = {name: {"file": f"{name}.yaml", "members": []} for name in ("arc_easy", "hellaswag")}
    (tmp_path / f"lm_eval-{evaluate.LM_EVAL_VERSION}-tasks.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"'arc': task 'arc_esay' does not exist; did you mean 'arc_easy'\?"):
        evaluate.digest("arc", BenchmarkSpec(task="arc_esay"), tmp_path)
    with pytest.raises(ValueError, match="benchmark 'mine': no file /nowhere/task.yaml"):
        evaluate.digest("mine", BenchmarkSpec(path="/nowhere/task.yaml"))
    with pytest.raises(ValueError, match="benchmark 'tiny': tiny 'fact_test' does not exist; did you mean"):
        evaluate.digest("tiny", BenchmarkSpec(tiny="fact_test"))
    (tmp_path / "other.yaml").write_text("name: demo\n")
    with pytest.raises(ValueError, match="has no `task` with a name"):
        evaluate.digest("mine", BenchmarkSpec(path=str(tmp_path / "other.yaml")))
    path = write_choice(tmp_path)
    path.with_suffix(".jsonl").unlink()
    with pytest.raises(ValueError, match=r"data file .*colours_chosen.jsonl, which does not exist"):
        spec(path)


def test_digest_of_lm_evals_own_tasks_needs_no_import_of_it(tmp_path):
    known = {
        "arc": {"file": None, "members": ["arc_easy", "arc_challenge"]},
        "arc_easy": {"file": "tasks/arc/arc_easy.yaml", "members": []},
        "arc_challenge": {"file": "tasks/arc/arc_challenge.yaml", "members": []},
    }
    (tmp_path / f"lm_eval-{evaluate.LM_EVAL_VERSION}-tasks.json").write_text(json.dumps(known))
    code = (
        "import sys; from pathlib import Path\n"
        "from sweep import evaluate; from sweep.spec import BenchmarkSpec\n"
        "for task in ('arc', 'arc_easy', 'arc_challenge'):\n"
        "    print(evaluate.digest('x', BenchmarkSpec(task=task), Path(sys.argv[1])))\n"
        "assert not {'lm_eval', 'torch', 'ray', 'polars'} & set(sys.modules)"
    )
    lines = subprocess.check_output([sys.executable, "-c", code, str(tmp_path)], text=True).split()
    assert len(set(lines)) == 3


def test_settings_that_lm_eval_would_ignore_are_refused(model, tokenizer, tmp_path):
    path = write_generate(tmp_path)
    path.write_text(path.read_text() + "num_fewshot: 0\n")
    with pytest.raises(ValueError, match="defined with num_fewshot: 0; ask for 0 instead of 2"):
        run(model, tokenizer, spec(path, num_fewshot=2))
    untemplated = make_tokenizer()
    untemplated.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        run(model, untemplated, spec(path, template=None))


WITHOUT_INDEX = """
import json, sys
from lm_eval.tasks._index import TaskIndex
from lm_eval.__main__ import cli_evaluate
TaskIndex.build = lambda *_, **__: {}
for sys.argv in json.loads(sys.argv[1]):
    cli_evaluate()
"""
"""lm-eval's command lines without its list of built-in tasks, which takes 13 s and is not asked here."""


def _command_answers(lines: list[str], outputs: list[Path], whole: bool) -> list[list[dict]]:
    """Run printed commands as a user would, without network, and read their items."""
    commands = [[*shlex.split(line), "--output_path", str(out)] for line, out in zip(lines, outputs, strict=True)]
    scripts = Path(sys.executable).parent
    processes = [[str(scripts / program), *words] for program, *words in commands]
    if not whole:
        processes = [[sys.executable, "-c", WITHOUT_INDEX, json.dumps(commands)]]
    for words in processes:
        environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-3000:]
    found = []
    for output in outputs:
        [file] = output.rglob("samples_*.jsonl")
        samples = [json.loads(text) for text in file.read_text().splitlines()]
        found.append(sorted(samples, key=lambda sample: sample["doc_id"]))
    return found


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_printed_command_gives_the_same_answers(whole, model, tokenizer, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base, full, adapter = tmp_path / "base", tmp_path / "full", tmp_path / "adapter"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    tuned = make_model(tokenizer, seed=1, steps=40)
    tuned.save_pretrained(full)
    tokenizer.save_pretrained(full)
    lora = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    lora.save_pretrained(adapter)

    written = spec(write_generate(tmp_path), num_fewshot=1, max_new_tokens=5, limit=20)
    chosen = spec(write_choice(tmp_path))
    merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).merge_and_unload().eval()
    [(_, _, written_items, _)] = run(tuned, tokenizer, written)
    [(_, scores, chosen_items, _)] = run(merged, tokenizer, chosen)
    assert [item["response"] for item in chosen_items] != [
        item["response"] for item in run(model, tokenizer, chosen)[0][2]
    ]
    paths = {"base_path": str(base), "batch_size": 8}
    lines = [
        evaluate.command(written, tokenizer, checkpoint_path=str(full), tokenizer_path=str(full), **paths),
        evaluate.command(chosen, tokenizer, checkpoint_path=str(adapter), adapter=True, **paths),
    ]
    samples, choices = _command_answers(lines, [tmp_path / "out0", tmp_path / "out1"], whole)
    assert [sample["resps"][0][0] for sample in samples] == [item["response"] for item in written_items]
    assert [sample["exact_match"] for sample in samples] == [item["value"] for item in written_items]
    for sample, item in zip(choices, chosen_items, strict=True):
        likelihoods = [float(response[0][0]) for response in sample["resps"]]
        assert COLOURS[likelihoods.index(max(likelihoods))] == item["response"]
        assert sample["acc"] == item["value"]
