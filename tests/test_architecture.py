"""The floors of the house: a module imports only from floors below its own; heavy libraries stay outside."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (
    # names
    "identity",
    # words
    "spec",
    "schema",
    # the embedded world: what its recipes are is known on every floor above
    "tiny",
    # parts
    "config",
    "plan",
    "store",
    "data",
    "tokenization",
    "models",
    # stages
    "train",
    "layer_delta",
    "evaluate",
    "measure",
    "pins",  # asks `evaluate` for the content of a benchmark
    # trial
    "trial",
    "forecast",  # costs what `trial` finds due
    "collect",  # tells the status that `trial` finds
    # cluster
    "board",
    "progress",
    "tuner",
    "remote",
    # door
    "api",
    "__main__",
    "__init__",
)
"""The modules of sweep/, ground floor first."""

HEAVY = ("torch", "transformers", "ray", "lm_eval", "datasets", "peft", "deepspeed", "polars")


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Every module a file imports anywhere, also inside functions: `sweep.store`, `torch.nn` ..."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor_of(file: Path) -> str:
    return file.relative_to(ROOT / "sweep").parts[0].removesuffix(".py")


def sweep_modules(file: Path) -> set[str]:
    """The modules of sweep/ that a file imports."""
    return {name.split(".")[1] for name in imports(file) if name.startswith("sweep.")} & set(FLOORS)


def libraries(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


def test_every_module_has_a_floor():
    assert {floor_of(file) for file in files("sweep")} <= set(FLOORS)


@pytest.mark.parametrize("file", files("sweep"), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_imports_only_from_floors_below_its_own(file):
    if file == ROOT / "sweep" / "__init__.py":
        assert sweep_modules(file) == {"api"}
        return
    mine = FLOORS.index(floor_of(file))
    above = {name for name in sweep_modules(file) if FLOORS.index(name) >= mine and name != floor_of(file)}
    assert not above


def test_analysis_knows_the_schema_and_nothing_else_of_sweep():
    for file in files("analysis"):
        assert sweep_modules(file) <= {"schema"}, file
        assert "sweep" not in imports(file), file


def test_the_schema_knows_nothing_of_sweep():
    assert not sweep_modules(ROOT / "sweep" / "schema.py")


@pytest.mark.parametrize("package", ["sweep", "analysis"])
def test_only_the_cluster_floor_imports_ray(package):
    found = {str(file.relative_to(ROOT)) for file in files(package) if "ray" in libraries(file)}
    assert found <= {"sweep/tuner.py", "sweep/remote.py"}


@pytest.mark.parametrize("module", ["train", "models", "layer_delta"])
def test_what_trains_does_not_read_tables(module):
    assert not libraries(ROOT / "sweep" / f"{module}.py") & {"ray", "polars", "pyarrow"}


@pytest.mark.parametrize("module", ["identity", "spec", "schema", "config", "plan", "store", "board"])
def test_the_pure_floors_know_no_training_library(module):
    assert not libraries(ROOT / "sweep" / f"{module}.py") & set(HEAVY)


def test_planning_imports_no_heavy_library(tmp_path):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['sweep', 'plan', sys.argv[1], '--out', sys.argv[2], '--json']\n"
        "try:\n"
        "    runpy.run_module('sweep', run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code, ended.code\n"
        f"print(sorted(set(sys.modules) & set({HEAVY})), file=sys.stderr)\n"
    )
    config = ROOT / "sweep" / "configs" / "smoke.yaml"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(config), str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "SWEEP_CACHE": str(tmp_path / "cache" / "tiny")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith('{"name": "smoke"')
    assert ended.stderr.strip() == "[]"
    assert not (tmp_path / "run").exists()


def test_no_file_holds_a_path_of_a_machine():
    machine = re.compile(r"(?<![\w.:/}-])/(home|root|Users|work)/\w")
    endings = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".ipynb", ".json", ".html", ""}
    named = [ROOT / name for name in ("sweep", "analysis", "tests", "benchmarks", "notebooks")]
    found = [file for folder in named for file in folder.rglob("*") if file.is_file()]
    found += [file for file in ROOT.iterdir() if file.is_file()]
    for file in found:
        if file.suffix in endings and "__pycache__" not in file.parts:
            lines = file.read_text(errors="replace").splitlines()
            assert not [line for line in lines if machine.search(line)], file
