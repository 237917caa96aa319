"""Run the walkthroughs and keep their outputs. After changing a code cell:

    python notebooks/execute.py                            # all of them, in place
    python notebooks/execute.py 01_architecture.ipynb      # some

The notebook keeps the hash of the code that made its outputs; a test compares it with the code that is there.
"""
import hashlib
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def source_hash(notebook) -> str:
    """Of the code cells: prose may change without a new run."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def execute(path: Path):
    """The notebook with new outputs, run in its folder; the file is left alone. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, record_timing=False,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata["outputs_of_source"] = source_hash(notebook)
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.name for path in HERE.glob("*.ipynb")):
        started = time.time()
        nbformat.write(execute(HERE / name), HERE / name)
        print(f"{name}: {time.time() - started:.0f} s")
