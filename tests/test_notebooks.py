"""Every notebook runs from top to bottom, each in under five minutes (slow)."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_runs(file, monkeypatch):
  monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # the blip3o command
  notebook = nbformat.read(file, as_version=4)
  saved = [kinds(cell) for cell in notebook.cells]
  NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(file.parent)}}).execute()
  assert [kinds(cell) for cell in notebook.cells] == saved, "other outputs than those saved in it; save it again"


def kinds(cell):
  """Which outputs a cell has: text, pictures. (Warnings come and go.)"""
  outputs = [one for one in cell.get("outputs", ()) if one.get("name") != "stderr"]
  return sorted({kind for one in outputs for kind in one.get("data", {one.output_type: None})})
