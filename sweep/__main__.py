"""The commands: `python -m sweep COMMAND`. Exit status 0 all well, 1 something failed, 2 the request is wrong."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Massive supervised fine-tuning sweeps: one YAML in, Parquet tables out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(soft_wrap=True, highlight=False, markup=False)  # [x] in a path is text

Source = Annotated[Path, typer.Argument(help="A sweep's YAML, or the folder of one that ran.", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="The folder of a sweep.", show_default=False)]
Trial = Annotated[str, typer.Argument(help="A trial's id; the first digits are enough.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="Folder of the results; default runs/<name>.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output and nothing else.")]
Update = Annotated[bool, typer.Option(help="Accept sources that changed since they were pinned.")]


@app.command()
def plan(config: Source, out: Out = None, json: Json = False, update: Update = False) -> None:
    """What would run, what is done, what it costs. Starts nothing."""
    _answer(_open(config, out, update).plan(), json, _print_plan)


@app.command()
def run(
    config: Source,
    out: Out = None,
    retrain: Annotated[bool, typer.Option(help="Train again where weights are gone but needed.")] = False,
    update: Update = False,
    cpus: Annotated[int | None, typer.Option(min=1, help="Cores of a local Ray; default all.")] = None,
    json: Json = False,
) -> None:
    """Run what is missing; resumes what was interrupted."""
    result = _open(config, out, update).run(retrain=retrain, num_cpus=cpus, quiet=json)
    answer = {"ran": result.ran, "interrupted": result.interrupted, "failed": result.failed, "tables": result.tables}
    _answer(answer, json, _print_run)
    if result.interrupted:
        raise typer.Exit(130)
    raise typer.Exit(1 if result.failed else 0)


@app.command()
def status(source: Source, out: Out = None, json: Json = False) -> None:
    """Pending, running, succeeded, failed, and why."""
    found = _open(source, out).status()
    _answer(found, json, _print_status)
    raise typer.Exit(1 if found["failures"] else 0)


@app.command()
def show(folder: Folder, trial: Trial, json: Json = False) -> None:
    """One trial: settings, counts, scores with the lm_eval command that repeats them, tries."""
    _answer(_open(folder).show(trial), json, lambda found: console.print_json(data=found, default=str))


@app.command()
def logs(folder: Folder, trial: Trial) -> None:
    """The log of one trial."""
    sweep = _open(folder)
    path = sweep.store.log_path(sweep.find(trial))
    if not path.exists():
        _refuse(f"trial '{trial}' has no log yet: it has not started")
    sys.stdout.write(path.read_text())


@app.command()
def export(
    folder: Folder,
    trial: Trial,
    to: Annotated[Path, typer.Argument(help="New folder for the model.", show_default=False)],
    epoch: Annotated[int, typer.Option(help="Whose checkpoint.")],
    merge: Annotated[bool, typer.Option(help="Merge an adapter into its base model.")] = False,
) -> None:
    """A model that transformers or peft can load."""
    console.print(f"wrote {_open(folder).export(trial, epoch, to, merge=merge)}")


@app.command()
def collect(folder: Source, json: Json = False) -> None:
    """Rebuild the tables from the result files."""
    sweep = _open(folder)
    answer = {"folder": str(sweep.store.tables), "rows": sweep.collect()}
    _answer(answer, json, lambda a: console.print(f"{sum(a['rows'].values())} rows in {a['folder']}"))


@app.command()
def clean(
    folder: Folder,
    weights: Annotated[bool, typer.Option(help="Weights of checkpoints.")] = False,
    states: Annotated[bool, typer.Option(help="Optimizer states.")] = False,
    orphans: Annotated[bool, typer.Option(help="Trials the YAML no longer asks for.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove left-over attempts and caches; on request weights, states and orphans. Asks first."""
    sweep = _open(folder)
    chosen = {"attempts", "cache"}
    chosen |= {n for n, on in (("weights", weights), ("states", states), ("orphans", orphans)) if on}
    sizes = sweep.removable()
    for name, size in sizes.items():
        mark = "remove" if name in chosen else f"keep (--{name} removes it)"
        console.print(f"{name:9} {size / 2**20:10.1f} MiB  {mark}")
    try:
        agreed = yes or typer.confirm("Remove?")
    except typer.Abort:
        typer.echo()
        _refuse("not confirmed, nothing was removed; --yes removes without asking")
    if not agreed:
        raise typer.Exit(0)
    console.print(f"freed {sweep.clean(chosen) / 2**20:.1f} MiB")


# ---------------------------------------------------------------------- printing


def _open(source: Path, out: Path | None = None, update: bool = False) -> Any:
    from sweep.api import Sweep  # 1 s of imports that --help does not need

    return Sweep(source, out, update=update)


def _answer(answer: dict[str, Any], as_json: bool, print_it: Any) -> None:
    if as_json:
        sys.stdout.write(json.dumps(answer, default=str) + "\n")
    else:
        print_it(answer)


def _number(value: float | None, unit: str) -> str:
    return "not known" if value is None else f"{value:,.2f} {unit}" if value < 100 else f"{value:,.0f} {unit}"


def _print_plan(found: dict[str, Any]) -> None:
    console.print(f"{found['name']} in {found['folder']}")
    console.print(
        f"{found['trials']:,} trials + {found['baselines']} baselines, {found['checkpoints']:,} checkpoints, "
        f"{found['evaluations']:,} evaluations, {found['measures']} measured pairs"
    )
    table = Table(box=None, padding=(0, 3, 0, 0))
    table.add_column("work items")
    stages = list(found["work_items"]["done"])
    for stage in stages:
        table.add_column(stage, justify="right")
    for state, counts in found["work_items"].items():
        table.add_row(state.replace("_", " "), *(f"{counts[stage]:,}" for stage in stages))
    console.print(table)
    for count, text in (
        (found["checkpoints_to_retrain"], "checkpoints would be retrained (their weights are gone): --retrain"),
        (found["trials_that_continue"], "trials would continue from their kept state"),
        (found["trials_that_start_again"], "trials would start again for more epochs (no kept state)"),
        *((n, f"finished trials belong to recipe {k}") for k, n in found["orphans_of_other_recipes"].items()),
        (found["orphans"], "trials and measures in the folder are not in this YAML any more"),
    ):
        if count:
            console.print(f"{count} {text}")
    tokens = found["train_tokens"]
    console.print(f"tokens to train  {'not known' if tokens is None else f'{tokens / 1e6:,.2f} M'}")
    console.print(f"device hours     {_number(found['hours'], 'h')} ({found['basis']})")
    console.print(
        f"disk             {_number(found['disk_gib'], 'GiB')}, peak {_number(found['peak_disk_gib'], 'GiB')}"
    )


def _print_run(answer: dict[str, Any]) -> None:
    if answer["interrupted"]:
        console.print("stopped: what is finished is kept, and the same command goes on from here")
    elif not answer["ran"] and not answer["failed"]:
        console.print("nothing to do: everything this YAML asks for is done")
    else:
        console.print(f"{answer['ran']} work items done, {len(answer['failed'])} failed")
    for entry in answer["failed"]:
        console.print(f"  {entry['item']} ({entry['failure_kind']}): {entry['message']}")


def _print_status(found: dict[str, Any]) -> None:
    holder = found["running_by"]
    running = f"run by process {holder['pid']} on {holder['host']}" if holder else "not running"
    console.print(f"{found['name']} in {found['folder']}, {running}")
    console.print(", ".join(f"{count} {name}" for name, count in found["trials_and_measures"].items()))
    for failure in found["failures"]:
        text = f"  {failure['item']} (try {failure['attempt']}, {failure['failure_kind']}): {failure['message']}"
        console.print(text)


def _refuse(text: str) -> NoReturn:
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """Run a command; a wrong request is one sentence and exit status 2."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        from sweep.api import ConfigError, StoreError, UnknownTrial
        from sweep.schema import SchemaError

        if isinstance(error, ConfigError | StoreError | UnknownTrial | SchemaError | OSError) or (
            type(error).__name__ == "ResourceError"
        ):
            typer.echo(f"error: {error}", err=True)
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
