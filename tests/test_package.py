from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires
from importlib.resources import files

import pytest

import tl_backward as tlb


@pytest.mark.parametrize("name", tlb.__all__)
def test_public_names_are_documented(name):
    thing = getattr(tlb, name)
    assert thing.__doc__ and not thing.__doc__.startswith(f"{name}(")


def test_torch_is_not_bounded():
    """A plain installation leaves the torch that is there."""
    needed = [line.replace(" ", "") for line in requires("tl-backward") if "extra" not in line]
    assert "torch" in needed
    assert "transformer-lens<5,>=2.18" in needed


def test_types_and_template_are_shipped():
    assert (files("tl_backward") / "py.typed").is_file()
    assert (files("tl_backward") / "templates" / "lens.html.j2").is_file()


def test_heavy_and_optional_packages_are_imported_where_they_are_used():
    late = {"filelock", "gguf", "jinja2", "pandas", "platformdirs", "transformer_lens"}
    program = (
        "import sys, torch, einops, jaxtyping, tqdm.auto, rich, typer\n"
        f"late = {late!r} - set(sys.modules)\n"
        "import tl_backward, tl_backward.demo_model, tl_backward.plotting, tl_backward.__main__\n"
        "print(len(late), *(late & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    count, *imported = shown.stdout.split()
    assert int(count) >= 3 and not imported
