"""What the framework costs: the same small grid as a bare loop, as a script of libraries, and as a sweep.

    python benchmarks/overhead.py [--trials 6] [--arms a,b,c] [--json FILE]

a  bare        one process; a PyTorch loop, batched greedy generation, log-likelihoods of choices
b  script      Ray Tune with a fresh actor per trial, TRL's SFTTrainer, lm_eval.simple_evaluate
c  framework   `python -m sweep run`

All arms train the tiny base model on the same examples in the same order with the same settings, and score the same
benchmark items; losses and scores are compared, and a difference ends with exit status 1. One thread per process, and
at most two trials at once. Where (b) has a choice, it has the faster one: no gradient checkpointing, no dashboard, no
index of lm-eval's own tasks, nothing saved. Its batches hold the same examples in the same order as the other arms'.

Every arm runs below a process of its own that adopts orphans (Ray's daemons leave their parents). Its core-seconds are
the user and system time of all processes below, read from /proc ten times a second while they live, so up to 0.1 s of
each is missed; or what the kernel adds up for those that were waited for, where that is more (Ray's raylet waits for
none of its workers). The net figure is what each trial costs beyond the first two, which start the two workers.
"""

import argparse
import contextlib
import copy
import ctypes
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BASE_MODEL = "llama-code"
DATASETS = ("code_output", "arithmetic")
BENCHMARKS = ("code_output_test", "arithmetic_test", "sequences_test", "reading_test")
NUM_ITEMS, EVAL_BATCH, WORKERS = 100, 32, 2
TRAIN = {"num_examples": 400, "held_out_examples": 0, "epochs": 3, "global_batch_size": 16, "max_length": 128}
TRAIN["learning_rate"] = 1e-3
QUESTION = "###Question: {}\n###Answer:"
SFT = {"num_train_epochs": TRAIN["epochs"], "per_device_train_batch_size": TRAIN["global_batch_size"]}
SFT |= {"learning_rate": TRAIN["learning_rate"], "lr_scheduler_type": "cosine", "weight_decay": 0.0}
SFT |= {"max_length": TRAIN["max_length"], "max_grad_norm": 1.0, "completion_only_loss": True, "use_cpu": True}
SFT |= {"gradient_checkpointing": False, "bf16": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
"""What the script gives to TRL's SFTConfig; the rest is TRL's."""

ARMS = {"a": "bare", "b": "script", "c": "framework"}
LOSS_TOLERANCE = 1e-5
"""Of the last epoch's mean loss, relative. Arms pad and sum in other orders, and 75 steps amplify rounding."""
ITEMS_TOLERANCE = 1
"""Items of a benchmark, of 100, that may fall otherwise: near ties under the same rounding."""
RATIO_TO_BARE, RATIO_TO_SCRIPT, FLOOR_GFLOPS = 1.25, 3.0, 48.0  # the aims

Row = dict[str, Any]


# --- the arms -----------------------------------------------------------------------------------------------


def bare(work: Row) -> Row:
    """Arm (a): everything in one process, as lean as it was found to go."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(work["base_model"])
    base = AutoModelForCausalLM.from_pretrained(work["base_model"], dtype=torch.float32)
    items = {name: _items(work, name) for name in work["benchmarks"]}
    ends = [tokenizer.eos_token in t or "\n" in t for t in map(tokenizer.decode, range(base.config.vocab_size))]
    ends = torch.tensor(ends)
    results, seconds, flops = {}, 0.0, 0.0
    for trial in work["trials"]:
        model = copy.deepcopy(base)
        pairs = [(QUESTION.format(e["prompt"]), " " + e["completion"]) for e in trial["examples"]]
        pairs = _tokenised(tokenizer, [(prompt, answer + tokenizer.eos_token) for prompt, answer in pairs])
        before = time.process_time()
        losses, tokens = _train(model, pairs, trial["batches"])
        seconds += time.process_time() - before
        flops += 6 * sum(p.numel() for p in model.parameters()) * tokens
        scores = {}
        for name, (task, docs) in items.items():
            score = _choose if task["output_type"] == "multiple_choice" else _answer
            scores[name] = sum(score(model, tokenizer, task, docs, ends)) / len(docs)
        results[trial["name"]] = {"loss": _last_epoch(losses), "scores": scores}
    return {"trials": results, "gflops_per_core": flops / seconds / 1e9, "train_seconds": seconds}


def _items(work: Row, name: str) -> tuple[Row, list[Row]]:
    import yaml

    task = yaml.safe_load(Path(work["benchmarks"][name]).read_text())
    lines = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    return task, [json.loads(line) for line in lines[:NUM_ITEMS]]


def _tokenised(tokenizer: Any, pairs: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """(ids of prompt and answer, length of the prompt)."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    whole = tokenizer([prompt + answer for prompt, answer in pairs])["input_ids"]
    return [(ids, len(prompt)) for ids, prompt in zip(whole, prompts, strict=True)]


def _losses(model: Any, rows: list[tuple[list[int], int]]) -> tuple[Any, int]:
    """Loss of each answer token ([rows, columns], 0 elsewhere), and the number of positions computed."""
    import torch
    import torch.nn.functional as F

    length = max(len(ids) for ids, _ in rows)
    inputs = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    targets = [[-100] * (n - 1) + ids[n:] + [-100] * (length - len(ids) + 1) for ids, n in rows]
    targets = torch.tensor(targets)
    columns = (targets != -100).any(0).nonzero().squeeze(1)
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=columns).logits
    losses = F.cross_entropy(logits.flatten(0, 1), targets[:, columns].flatten(), reduction="none")
    return losses.view(len(rows), -1), inputs.numel()


def _train(model: Any, pairs: list[tuple[list[int], int]], batches: list[list[int]]) -> tuple[list[float], int]:
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAIN["learning_rate"], weight_decay=0.0, fused=True)
    losses, positions = [], 0
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = TRAIN["learning_rate"] * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        rows = [pairs[index] for index in batch]
        token_losses, computed = _losses(model, rows)
        loss = token_losses.sum() / sum(len(ids) - n for ids, n in rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        positions += computed
    model.eval()
    return losses, positions


def _last_epoch(losses: list[float]) -> float:
    last = losses[-(len(losses) // TRAIN["epochs"]) :]
    return sum(last) / len(last)


def _choose(model: Any, tokenizer: Any, task: Row, docs: list[Row], ends: Any) -> list[bool]:
    import torch

    texts = [(QUESTION.format(doc["instruction"]), choice) for doc in docs for choice in doc["choices"]]
    pairs = _tokenised(tokenizer, texts)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    found = [0.0] * len(pairs)
    with torch.inference_mode():
        for start in range(0, len(order), EVAL_BATCH):
            batch = order[start : start + EVAL_BATCH]
            sums = _losses(model, [pairs[i] for i in batch])[0].sum(1).tolist()
            for i, loss in zip(batch, sums, strict=True):
                found[i] = loss
    losses = iter(found)
    own = [[next(losses) for _ in doc["choices"]] for doc in docs]
    return [row.index(min(row)) == doc["label"] for row, doc in zip(own, docs, strict=True)]


def _answer(model: Any, tokenizer: Any, task: Row, docs: list[Row], ends: Any) -> list[bool]:
    prompts = tokenizer([QUESTION.format(doc["instruction"]) for doc in docs])["input_ids"]
    order = sorted(range(len(docs)), key=lambda i: len(prompts[i]))
    rule = task["filter_list"][0]["filter"][0]
    right = [False] * len(docs)
    for start in range(0, len(order), EVAL_BATCH):
        batch = order[start : start + EVAL_BATCH]
        limit = task["generation_kwargs"]["max_gen_toks"]
        rows = _generate(model, [prompts[i] for i in batch], limit, ends)
        for i, row in zip(batch, rows, strict=True):
            text = tokenizer.decode(row).split(tokenizer.eos_token)[0].split("\n")[0]
            if rule["function"] == "regex":
                text = next(iter(re.findall(rule["regex_pattern"], text)), "[invalid]")
            right[i] = text.strip() == docs[i]["response"]
    return right


def _generate(model: Any, prompts: list[list[int]], limit: int, ends: Any) -> list[list[int]]:
    """Greedy continuations, until every row has ended."""
    import torch
    from transformers import DynamicCache

    length = max(map(len, prompts))
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, done, new = DynamicCache(), torch.zeros(len(prompts), dtype=torch.bool), []
    with torch.inference_mode():
        while len(new) < limit and not done.all():
            given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            ids = model(input_ids=ids, use_cache=True, logits_to_keep=1, **given).logits[:, -1].argmax(-1, True)
            done |= ends[ids.squeeze(1)]
            new.append(ids)
            mask, positions = torch.cat([mask, torch.ones_like(ids)], 1), positions[:, -1:] + 1
    return torch.cat(new, 1).tolist()


def script(work: Row) -> Row:
    """Arm (b): the three libraries put together, each as its documentation shows."""
    import ray
    from ray import tune

    ray.init(num_cpus=WORKERS, include_dashboard=False)
    tuner = tune.Tuner(
        _script_trial,
        param_space={"work": work["path"], "trial": tune.grid_search(list(range(len(work["trials"]))))},
        run_config=tune.RunConfig(storage_path=work["folder"]),
    )
    grid = tuner.fit()
    if grid.errors:
        raise grid.errors[0]
    found = [json.loads(result.metrics["result"]) for result in grid]
    ray.shutdown()
    config = found[0]["config"]
    return {"trials": {r["name"]: {"loss": r["loss"], "scores": r["scores"]} for r in found}, "config": config}


def _script_trial(settings: Row) -> None:
    import lm_eval
    from datasets import Dataset
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from ray import tune
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    work = json.loads(Path(settings["work"]).read_text())
    trial = work["trials"][settings["trial"]]
    epochs = iter(range(TRAIN["epochs"]))
    steps = len(trial["batches"]) // TRAIN["epochs"]

    class SameOrder(SFTTrainer):
        """SFTTrainer with the examples of each epoch in the order of the other arms."""

        def _get_train_sampler(self, train_dataset=None):
            class Order(list):
                def __iter__(self):
                    epoch = next(epochs)
                    return (i for batch in trial["batches"][epoch * steps : (epoch + 1) * steps] for i in batch)

            return Order(range(len(trial["examples"])))

    tokenizer = AutoTokenizer.from_pretrained(work["base_model"])
    rows = [{"prompt": QUESTION.format(e["prompt"]), "completion": " " + e["completion"]} for e in trial["examples"]]
    trainer = SameOrder(
        model=AutoModelForCausalLM.from_pretrained(work["base_model"]),
        args=SFTConfig(output_dir=tempfile.mkdtemp(dir=work["folder"]), **SFT),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]

    question = QUESTION.format("{{ messages[-1].content }}")
    tokenizer.chat_template = "{{ bos_token }}" + question
    folders = [str(Path(path).parent) for path in work["benchmarks"].values()]
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=trainer.model.eval(), tokenizer=tokenizer, batch_size=EVAL_BATCH),
        tasks=list(work["benchmarks"]),
        task_manager=TaskManager(include_path=folders, include_defaults=False),
        limit=NUM_ITEMS,
        apply_chat_template=True,
    )["results"]
    scores = {name: float(row.get("acc,none", row.get("exact_match,answer"))) for name, row in found.items()}
    result = {"name": trial["name"], "loss": _last_epoch(losses), "scores": scores, "config": trainer.args.to_dict()}
    tune.report({"result": json.dumps(result, default=str)})


def sweep_results(out: Path) -> Row:
    """What arm (c) left in its tables."""
    import polars as pl

    trials = {}
    steps, scores = (pl.read_parquet(out / "tables" / f"{name}.parquet") for name in ("steps", "scores"))
    for row in pl.read_parquet(out / "tables" / "trials.parquet").iter_rows(named=True):
        own = pl.col("trial_id") == row["trial_id"]
        losses = steps.filter(own).sort("step")["loss_nats"].to_list()
        primary = scores.filter(own & pl.col("is_primary"))
        found = dict(zip(primary["benchmark"], primary["value"], strict=True))
        trials[f"{row['dataset']}-{row['seed']}"] = {"loss": _last_epoch(losses), "scores": found}
    return {"trials": trials}


# --- preparing, measuring, comparing ------------------------------------------------------------------------


def prepare(num_trials: int, folder: Path) -> Path:
    """Write the grid as a sweep's YAML, and as examples and batches for the other arms."""
    import yaml

    from sweep import Sweep, tiny
    from sweep.data import training_split
    from sweep.models import load_tokenizer
    from sweep.tokenization import tokenized_split
    from sweep.train import StepBatches

    cache = tiny.default_cache_dir()
    tiny.build_all([BASE_MODEL], DATASETS, BENCHMARKS, cache)
    grid = [(DATASETS[i % len(DATASETS)], i // len(DATASETS)) for i in range(num_trials)]
    config = {
        "name": "overhead",
        "base_models": {BASE_MODEL: {"tiny": BASE_MODEL}},
        "datasets": {name: {"tiny": name} for name in dict(grid)},
        "benchmarks": {name: {"tiny": name, "limit": NUM_ITEMS} for name in BENCHMARKS},
        "train": TRAIN,
        "zip": [{"dataset": [name for name, _ in grid], "seed": [seed for _, seed in grid]}],
        "execution": {"eval_batch_size": EVAL_BATCH},
        "baselines": False,
        "layer_delta": "off",
        "measure": False,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    base_path = tiny.build_base_model(BASE_MODEL, cache)
    trials = []
    for planned in Sweep(folder / "sweep.yaml", out=folder / "planned").planned().trials:
        settings = planned.trial.train
        data = tokenized_split(planned.trial, load_tokenizer(base_path, settings.template))
        examples = [example.turns[0] for example in training_split(planned.trial).train]
        lengths = [len(example.ids) for example in data.train.examples]
        size = TRAIN["global_batch_size"]
        order, batches = StepBatches(lengths, size, size, settings.resolved_data_seed), []
        for epoch in range(TRAIN["epochs"]):
            order.set_epoch(epoch)
            batches += list(order)
        rows = [{"prompt": turn.prompt, "completion": turn.completion} for turn in examples]
        trials.append({"name": f"{planned.dataset}-{settings.seed}", "examples": rows, "batches": batches})
    work = {
        "base_model": str(base_path),
        "benchmarks": {name: str(tiny.build_benchmark(name, cache)) for name in BENCHMARKS},
        "trials": trials,
        "folder": str(folder),
        "path": str(folder / "work.json"),
    }
    Path(work["path"]).write_text(json.dumps(work))
    return Path(work["path"])


def run_arm(arm: str, num_trials: int) -> Row:
    """One arm on that many trials: its results, core-seconds and seconds."""
    folder = Path(tempfile.mkdtemp(prefix="overhead-"))
    try:
        work, out = prepare(num_trials, folder), folder / "out"
        command = [sys.executable, __file__, "--arm", arm, str(work), str(folder / "result.json")]
        if arm == "c":
            command = [sys.executable, "-m", "sweep", "run", str(folder / "sweep.yaml")]
            command += ["--out", str(out), "--cpus", str(WORKERS)]
        env = os.environ | {name: "1" for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "HF_HUB_OFFLINE")}
        env |= {"TOKENIZERS_PARALLELISM": "false"}
        with (folder / "log").open("w") as log:
            measured = [sys.executable, __file__, "--measure", str(folder / "cost.json"), *command]
            code = subprocess.run(measured, cwd=ROOT, env=env, stdout=log, stderr=log, check=False).returncode
        if code != 0:
            sys.exit(f"arm {arm} failed:\n{(folder / 'log').read_text()[-4000:]}")
        result = sweep_results(out) if arm == "c" else json.loads((folder / "result.json").read_text())
        return {**result, **json.loads((folder / "cost.json").read_text())}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(target: Path, command: list[str]) -> int:
    """Run a command, wait for all its descendants, and write what they used."""
    import resource

    import psutil

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans below become children of this process
    seen: dict[tuple[int, float], float] = {}
    over = threading.Event()

    def poll() -> None:
        me = psutil.Process()
        while not over.wait(0.1):
            for process in me.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    seen[process.pid, process.create_time()] = sum(process.cpu_times()[:2])

    watcher = threading.Thread(target=poll)
    watcher.start()
    started = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    seconds = time.perf_counter() - started
    while left := psutil.Process().children():  # Ray's daemons end by themselves, soon after
        for process in left:
            with contextlib.suppress(ChildProcessError, psutil.Error):
                if time.perf_counter() - started > seconds + 20:
                    process.kill()
                os.waitpid(process.pid, os.WNOHANG)
        time.sleep(0.05)
    over.set()
    watcher.join()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    waited, polled = used.ru_utime + used.ru_stime, sum(seen.values())
    cost = {"core_seconds": max(waited, polled), "waited": waited, "polled": polled, "seconds": seconds}
    target.write_text(json.dumps({**cost, "processes": len(seen)}))
    return code


def differences(results: dict[str, Row]) -> tuple[list[Row], bool]:
    """Largest differences between each pair of arms, and whether all are within tolerance."""
    rows, arms, fine = [], list(results), True
    for first, second in [(x, y) for i, x in enumerate(arms) for y in arms[i + 1 :]]:
        one, other = results[first]["trials"], results[second]["trials"]
        if one.keys() != other.keys():
            sys.exit(f"arms {first} and {second} ran other trials: {sorted(one)} and {sorted(other)}")
        loss = max(abs(one[t]["loss"] - other[t]["loss"]) / one[t]["loss"] for t in one)
        pairs = [(one[t]["scores"][b], other[t]["scores"][b]) for t in one for b in BENCHMARKS]
        items = [round(abs(x - y) * NUM_ITEMS) for x, y in pairs]
        rows.append({"arms": f"{first}-{second}", "loss": loss, "worst_score": max(items), "scores": len(items)})
        rows[-1]["unequal_scores"] = sum(map(bool, items))
        fine &= loss <= LOSS_TOLERANCE and max(items) <= ITEMS_TOLERANCE
    return rows, fine


def main() -> int:
    """Run the arms, print the table, check that they did the same work."""
    if sys.argv[1:2] == ["--measure"]:
        return measure(Path(sys.argv[2]), sys.argv[3:])
    if sys.argv[1:2] == ["--arm"]:
        run = {"a": bare, "b": script}[sys.argv[2]]
        Path(sys.argv[4]).write_text(json.dumps(run(json.loads(Path(sys.argv[3]).read_text()))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6, help="size of the grid (6)")
    parser.add_argument("--arms", default="a,b,c", help="which arms (a,b,c)")
    parser.add_argument("--json", type=Path, help="write everything there too")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    load, n = os.getloadavg(), options.trials
    results: dict[str, Row] = {}
    for arm in options.arms.split(","):
        print(f"running {arm} {ARMS[arm]} ...", file=sys.stderr)
        results[arm] = run_arm(arm, n)
        results[arm]["whole"] = results[arm]["core_seconds"] / n
        results[arm]["net"] = math.nan
        if n > WORKERS:
            started = run_arm(arm, WORKERS)["core_seconds"]
            results[arm]["net"] = (results[arm]["core_seconds"] - started) / (n - WORKERS)
    report(results, n, load)
    rows, fine = differences(results)
    for row in rows:
        print(
            f"{row['arms']}: loss differs by {row['loss']:.1e} (relative; tolerance {LOSS_TOLERANCE:.0e}), "
            f"{row['unequal_scores']} of {row['scores']} scores differ, the worst by {row['worst_score']} of "
            f"{NUM_ITEMS} items (tolerance {ITEMS_TOLERANCE})"
        )
    if rows:
        print("same work in all arms" if fine else "NOT the same work: the figures above compare nothing")
    if options.json:
        options.json.write_text(json.dumps({"arms": results, "differences": rows, "load": load}, indent=2))
    return 0 if fine else 1


def report(results: dict[str, Row], num_trials: int, load: tuple[float, ...]) -> None:
    """Print the figures."""
    if "b" in results:
        config = ", ".join(f"{key}={value!r}" for key, value in results["b"]["config"].items() if key != "output_dir")
        print(textwrap.fill(f"TRL's SFTConfig in (b): {config}", 110), end="\n\n")
    print(f"{num_trials} trials, {WORKERS} at once; load before: {load[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'core-seconds per trial':24}{'whole':>8}{'net of start-up':>17}{'processes':>11}{'seconds':>9}")
    for arm, row in results.items():
        costs = f"{row['whole']:8.2f}{row['net']:17.2f}"
        print(f"{arm} {ARMS[arm]:22}{costs}{row['processes']:11}{row['seconds']:9.1f}")
    for over, under, words, aim in (("c", "a", "at most", RATIO_TO_BARE), ("b", "c", "at least", RATIO_TO_SCRIPT)):
        if {over, under} <= results.keys():
            whole, net = (results[over][key] / results[under][key] for key in ("whole", "net"))
            label = f"{ARMS[over]} / {ARMS[under]}"
            print(f"{label:24}{whole:8.2f}{net:17.2f}   (aim: {words} {aim})")
    if "a" in results:
        rate, floor = results["a"]["gflops_per_core"], FLOOR_GFLOPS
        print(f"bare training: {rate:.0f} GFLOP/s per core, 6 x parameters x padded tokens (aim: at least {floor:.0f})")


if __name__ == "__main__":
    sys.exit(main())
