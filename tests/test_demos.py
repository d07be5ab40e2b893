"""The notebooks run, and show what they would show now.

``python tests/test_demos.py`` runs all that the installed TransformerLens can run, and stores what
they show.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "demos"
DEMOS = sorted(FOLDER.glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
HOVER = "customdata"
"""What a cell shows when pointed at: many tokens, some as probable as the next one."""
NEAR_TIES = 0.01
"""Share of a figure's pieces that other hardware may change, where two tokens are as probable."""
PATH_OF_A_MACHINE = r"/(home|root|Users|tmp|usr|opt|var|mnt|work)/|[A-Z]:\\\\?Users"
NUMBER_OR_WORD = r"(?P<number>-?\d+(\.\d+)?(e[-+]\d+)?)|(?P<word>[^\s\d]+)"

TL_VERSION = int(version("transformer-lens").split(".")[0])
BOTH_CLASSES = {"hooked_transformer"}
"""Notebooks that show both model classes, of TransformerLens 3. The others need 4.0 or later."""


def obstacle(path: Path) -> str | None:
    """Why the installed TransformerLens cannot run a notebook, if so."""
    if path.stem in BOTH_CLASSES and TL_VERSION != 3:
        return "the notebook shows both model classes, which only TransformerLens 3 has"
    if path.stem not in BOTH_CLASSES and TL_VERSION < 4:
        return "the notebook uses functions that TransformerLens has since 4.0"
    return None


def read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def executed(path: Path) -> Any:
    """The notebook after a run in a fresh kernel, reduced to what is worth storing."""
    from nbclient import NotebookClient

    notebook = read(path)
    client = NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    one_thread = {"OMP_NUM_THREADS": "1"}  # several kernels at once would wait for each other
    client.execute(env={**os.environ, "PLOTLY_RENDERER": "plotly_mimetype", **one_thread})
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if PLOTLY in output.get("data", {}):
                title = output.data[PLOTLY]["layout"].get("title", {}).get("text", "")
                output.data["text/plain"] = f"[interactive figure: {title}]"
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(output: Any) -> Any:
    """What an output shows, as words and numbers."""
    if output.output_type == "stream":
        return pieces(output.text)
    if PLOTLY in output.data:
        return pieces(output.data[PLOTLY])
    return pieces(output.data["text/plain"])


def pieces(value: Any) -> list[str | float]:
    """The words and numbers in a text or in the JSON of a figure, in their order."""
    if isinstance(value, dict) and "bdata" in value:
        array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
        return array.astype(float).tolist()
    if isinstance(value, dict):
        items = [item for item in sorted(value.items()) if item[0] != HOVER]
        return [piece for key, item in items for piece in (key, *pieces(item))]
    if isinstance(value, list):
        return [piece for item in value for piece in pieces(item)]
    found = re.finditer(NUMBER_OR_WORD, str(value))
    return [float(piece["number"]) if piece["number"] else piece["word"] for piece in found]


def is_close(got: str | float, stored: str | float) -> bool:
    """Whether two pieces agree up to the rounding of other hardware and of the tables."""
    if isinstance(got, float) and isinstance(stored, float):
        return bool(np.isclose(got, stored, rtol=0.02, atol=0.011, equal_nan=True))
    return got == stored


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_a_run_shows_what_is_stored(path):
    if reason := obstacle(path):
        pytest.skip(reason)
    stored, run = read(path), executed(path)  # an exception in a cell is raised here
    for cell, of_run in zip(code_cells(stored), code_cells(run), strict=True):
        for expected, got in zip(cell.outputs, of_run.outputs, strict=True):
            pairs = list(zip(shown(got), shown(expected), strict=True))
            others = [pair for pair in pairs if not is_close(*pair)]
            allowed = NEAR_TIES * len(pairs) if PLOTLY in expected.get("data", {}) else 0
            assert len(others) <= allowed, f"{others[:5]}, after running\n{cell.source}"


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_stored_notebooks_are_readable(path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {output["output_type"] for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert all(output.get("name") != "stderr" for output in outputs)
    assert not re.search(PATH_OF_A_MACHINE, text)
    assert str(Path.home()) not in text and str(FOLDER.parent) not in text
    assert all(not cell["metadata"] for cell in notebook["cells"])
    assert len(text.encode()) < 1_000_000


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_the_first_code_cell_installs_only_what_is_missing(path):
    first = code_cells(read(path))[0].source
    lines = [line for line in first.splitlines() if "pip" in line]
    assert lines and all(line.startswith("    %pip install") for line in lines)
    assert 'if find_spec("tl_backward") is None' in first


def test_another_number_or_word_is_noticed():
    array = base64.b64encode(np.array([1.0, 0.5])).decode()
    assert pieces({"z": {"bdata": array, "dtype": "f8"}}) == ["z", 1.0, 0.5]
    assert pieces("layer 22,\n Paris -0.50") == ["layer", 22.0, ",", "Paris", -0.5]
    assert pieces(["1e-05<br>", 3]) == [1e-5, "<br>", 3.0]
    assert is_close(0.505, 0.5) and is_close(49151.0, 49150.0)
    assert not is_close(0.53, 0.5) and not is_close(24.0, 23.0)
    assert not is_close("Rome", "Paris") and not is_close("Rome", 1.0)


if __name__ == "__main__":
    import nbformat

    runnable = [path for path in DEMOS if obstacle(path) is None]
    for path in [Path(name) for name in sys.argv[1:]] or runnable:
        nbformat.write(executed(path), path)
