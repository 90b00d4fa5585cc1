"""The notebook runs on a sweep's tables, and is kept without outputs."""

from pathlib import Path

import analysis_tables as planted
import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "demo_tables.ipynb"


def test_notebook_runs_on_the_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("SWEEP_DIR", str(planted.write(tmp_path)))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
    assert "image/png" in notebook.cells[-1].outputs[0].data


def test_notebook_is_kept_without_outputs_and_defines_nothing():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert "def " not in cell.source and "class " not in cell.source
