"""What a run survives, for real: killed workers, a killed driver, Ctrl-C, a damaged result, a full disk.

Every test trains the same trial of three epochs, big enough to be caught in the middle, and must end with
the weights that an undisturbed training gives.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import polars as pl
import pytest
import tiny_models
import tiny_sweeps
import torch
from tiny_sweeps import World, wait_for
from transformers import LlamaConfig, LlamaForCausalLM

from sweep import schema

pytestmark = pytest.mark.slow

CHECKPOINT_MIB = 26

QUIET = ("note: ", "failed: ")
"""Besides progress, all that a run may say on standard error."""


def write_sweep(world: World) -> Path:
    """One trial: an epoch trains for about a second, and its checkpoint takes a while to be written."""
    folder = world.folder / "models" / "large"
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=tiny_models.VOCAB_SIZE, eos_token_id=0, pad_token_id=0, bos_token_id=0, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return world.write(
        base_models={"large": {"path": "models/large"}},
        train={"num_examples": 60, "epochs": 3, "global_batch_size": 2, "learning_rate": 1e-3},
        eval_epochs="all",
        layer_delta="norms",
        measure=False,
        baselines=False,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """The files of the last checkpoint, from a training without Ray that nothing disturbed."""
    from sweep import api, train

    class Silent:
        def step(self, row: dict) -> None:
            pass

        def checkpoint(self, epoch: int, record: dict) -> None:
            pass

    folder = tmp_path_factory.mktemp("undisturbed")
    with tiny_sweeps.world(folder) as world:
        sweep = api.Sweep(write_sweep(world), folder / "out")
        [planned] = sweep.planned().trials
        train.train(
            planned.trial,
            planned.execution,
            epochs_to_keep=planned.epochs,
            folder=lambda epoch: folder / str(epoch),
            reporter=Silent(),
            threads=1,
        )
    return tiny_sweeps.files(folder / "3" / "weights")


def unit(out: Path, name: str) -> Path:
    """Folder of a unit of the one trial, such as `train/epoch-1`."""
    return next(out.glob("trials/*")) / name if list(out.glob("trials/*")) else out / "none yet"


def is_written(out: Path, name: str) -> bool:
    return (unit(out, name) / "result.json").exists()


def is_being_written(out: Path, name: str) -> bool:
    """A try has begun to write its weights and has not finished."""
    tries = [path.parent for path in unit(out, name).glob("attempts/*/weights")]
    return any(not (folder / "manifest.json").exists() for folder in tries)


def committed(out: Path) -> dict[str, bytes]:
    """Every file of every committed result."""
    found = {}
    for result in sorted(out.glob("trials/**/result.json")):
        attempt = result.parent / "attempts" / str(json.loads(result.read_text())["attempt"])
        found |= {f"{attempt.relative_to(out)}/{name}": data for name, data in tiny_sweeps.files(attempt).items()}
        found[str(result.relative_to(out))] = result.read_bytes()
    return found


def outcomes(out: Path, stage: str) -> list[str]:
    return [entry["outcome"] for entry in tiny_sweeps.attempts(out) if entry["item"].split("/")[2] == stage]


def assert_complete(out: Path, weights: dict[str, bytes]) -> None:
    """Everything is there once, nothing else is, and the weights are the right ones."""
    results = list(out.glob("trials/**/result.json"))
    assert len(results) == 3 * 3  # train, layer_delta and the benchmark, of each epoch
    for result in results:
        kept = [path.name for path in (result.parent / "attempts").iterdir()]
        assert kept == [str(json.loads(result.read_text())["attempt"])]
    [last] = unit(out, "train/epoch-3").glob("attempts/*/weights")
    assert tiny_sweeps.files(last) == weights
    tables = {name: pl.read_parquet(out / "tables" / f"{name}.parquet") for name in schema.TABLES}
    assert tables["trials"]["status"].to_list() == ["succeeded"]
    assert tables["steps"]["step"].to_list() == list(range(1, 3 * 30 + 1))
    assert tables["scores"].filter("is_primary")["epoch"].to_list() == [1, 2, 3]
    assert tables["items"].height == 3 * 8
    assert not [path for path in out.iterdir() if path.name in (".tune", "lease.json")]


def test_a_killed_worker_is_replaced_and_what_it_finished_stays(tmp_path, undisturbed):
    with tiny_sweeps.world(tmp_path) as world:
        out = tmp_path / "out"
        run = world.start("run", write_sweep(world), "--out", out, "--cpus", 1)
        wait_for(lambda: is_written(out, "train/epoch-1"), run)
        time.sleep(0.3)
        [worker] = world.workers()
        assert not is_being_written(out, "train/epoch-2")
        worker.kill()  # in the middle of training
        first = committed(out)

        wait_for(lambda: is_being_written(out, "train/epoch-2"), run, every=0.001)
        [worker] = world.workers()
        worker.kill()  # in the middle of writing
        assert is_being_written(out, "train/epoch-2")

        said, noise = run.communicate(timeout=200)
        assert run.returncode == 0, noise
        assert outcomes(out, "train") == ["lost", "lost", "succeeded"]
        assert {e.get("failure_kind") for e in tiny_sweeps.attempts(out)} == {None, "lost_worker"}
        assert noise.count("its worker process died; it is tried again") == 2
        assert said == "7 work items done, 0 failed\n"
        assert all(line.startswith(QUIET) or " work items done" in line for line in noise.splitlines())
        assert committed(out).items() >= first.items()
        assert_complete(out, undisturbed)


def test_a_killed_driver_loses_nothing_finished(tmp_path, undisturbed):
    with tiny_sweeps.world(tmp_path) as world:
        out = tmp_path / "out"
        yaml = write_sweep(world)
        run = world.start("run", yaml, "--out", out)
        wait_for(lambda: is_being_written(out, "train/epoch-2"), run, every=0.001)
        before = committed(out)
        run.kill()
        run.communicate()
        assert any("train/epoch-1" in name for name in before)

        again = world.sweep("run", yaml, "--out", out)
        assert again.returncode == 0, again.stderr
        assert committed(out).items() >= before.items()
        assert outcomes(out, "train") == ["lost", "succeeded"]
        assert_complete(out, undisturbed)


def test_a_stopped_run_keeps_what_is_finished_and_mends_what_was_damaged_since(tmp_path, undisturbed):
    with tiny_sweeps.world(tmp_path) as world:
        out = tmp_path / "out"
        yaml = write_sweep(world)
        run = world.start("run", yaml, "--out", out)
        wait_for(lambda: is_written(out, "train/epoch-1"), run)
        second = world.start("run", yaml, "--out", out)  # of the same sweep, at the same time
        wait_for(lambda: is_written(out, "train/epoch-2"), run)
        stopped = time.monotonic()
        os.killpg(run.pid, signal.SIGINT)
        said, noise = run.communicate(timeout=60)
        assert time.monotonic() - stopped < 30
        assert run.returncode == 130
        assert said == "stopped: what is finished is kept, and the same command goes on from here\n"
        assert all(line.startswith(QUIET) or " work items done" in line for line in noise.splitlines())
        before = committed(out)
        assert not is_written(out, "train/epoch-3")

        _, refusal = second.communicate(timeout=60)
        assert second.returncode == 2
        assert refusal.startswith("error: ") and refusal.count("\n") == 1
        assert f"is being run by process {run.pid}" in refusal

        result = unit(out, "train/epoch-1") / "result.json"
        result.write_bytes(result.read_bytes()[:100])
        [steps] = unit(out, "train/epoch-2").glob("attempts/*/steps.parquet")
        steps.write_bytes(steps.read_bytes()[:100])

        again = world.sweep("run", yaml, "--out", out)
        assert again.returncode == 0, again.stderr
        notes = sorted(line for line in again.stderr.splitlines() if line.startswith("note: "))
        assert len(notes) == 2
        assert "train/epoch-1: the result on disk is damaged; taken again from its finished attempt" in notes[0]
        assert "train/epoch-2: the result on disk is damaged; it will be done again" in notes[1]
        kept = {name: data for name, data in before.items() if "train/epoch-2" not in name}
        assert committed(out).items() >= kept.items()
        assert outcomes(out, "train") == ["lost", "succeeded"]
        assert_complete(out, undisturbed)


@contextlib.contextmanager
def small_disk(folder: Path, mib: int):
    """A memory disk of that size."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_a_typed_failure_and_space_mends_it(tmp_path, undisturbed):
    out = tmp_path / "disk"
    with small_disk(out, 2 * CHECKPOINT_MIB + 8), tiny_sweeps.world(tmp_path) as world:
        yaml = write_sweep(world)
        run = world.start("run", yaml, "--out", out)
        wait_for(lambda: is_written(out, "train/epoch-1"), run)
        with contextlib.suppress(OSError), (out / "other files").open("wb", buffering=0) as other:
            while True:  # somebody else fills it to the last byte
                other.write(bytes(4096))
        assert shutil.disk_usage(out).free == 0
        said, noise = run.communicate(timeout=200)
        assert run.returncode == 1, noise
        failures = [line for line in said.splitlines() if line.startswith("  ")]
        assert len(failures) >= 2  # the training at least, and the tables
        assert all("(disk): " in line and "No space left" in line for line in failures)
        assert all(line.startswith(QUIET) or " work items done" in line for line in noise.splitlines())
        before = committed(out)

        subprocess.run(["mount", "-o", f"remount,size={6 * CHECKPOINT_MIB}m", str(out)], check=True)
        again = world.sweep("run", yaml, "--out", out)
        assert again.returncode == 0, again.stderr
        assert committed(out).items() >= before.items()
        (out / "other files").unlink()
        assert_complete(out, undisturbed)
