"""The commands of the analysis: `python -m analysis report DIR`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Answers from the tables of a sweep.")


@app.callback()
def _commands() -> None:
    """Keep `report` a command of its own while it is the only one."""


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a sweep, with its tables.")],
) -> None:
    """Write DIR/report/index.html, one page that works offline, with each figure's CSV and PNG beside it."""
    # Altair and Polars take a second to import, which --help need not wait for.
    from analysis import report as page
    from sweep.schema import SchemaError

    try:
        typer.echo(page.build(folder))
    except (SchemaError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
