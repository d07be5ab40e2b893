"""``diff`` and ``adapter``: what a fine-tune wrote, from the command line."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import config, randomised
from helpers.tiny_checkpoint import save_tiny_checkpoint
from helpers.versions import NEEDS_BRIDGE
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tl_backward.__main__ import app
from tl_backward.commands.shared import load
from tl_backward.editing import WeightEdit

pytestmark = NEEDS_BRIDGE


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """The base with a change of rank 1 in layer 2, and one of a norm."""
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("tuned"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[:, 5] += torch.linspace(-1, 1, 28)
        model.model.layers[0].mlp.up_proj.weight[4] += 0.5
        model.model.norm.weight += 0.5
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(base)
    folder = tmp_path_factory.mktemp("lora")
    randomised(get_peft_model(model, config(target_modules=["down_proj"]))).save_pretrained(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def text_of(shown):
    return " ".join((shown.stdout + shown.stderr).split())


def test_a_difference_is_shown(base, tuned, tmp_path):
    page, file = tmp_path / "diff.html", tmp_path / "diff.safetensors"
    shown = run("diff", base, tuned, "--html", page, "--save", file)
    assert shown.exit_code == 0, shown.output
    rows = [line.split("│") for line in shown.output.splitlines() if "blocks." in line]
    assert [row[1].strip() for row in rows] == ["blocks.2.mlp.W_out", "blocks.0.mlp.W_in"]
    norm = float(torch.linspace(-1, 1, 28).norm())
    assert float(rows[0][2]) == pytest.approx(norm, rel=1e-2)
    assert float(rows[0][4]) == 1.0
    assert "1 parameters differ that an edit cannot hold" in text_of(shown)
    assert "rank 8 leaves out 0.0% of the energy" in text_of(shown)
    assert page.as_uri() in shown.output.replace("\n", "") and "Plotly.newPlot" in page.read_text()
    edit = WeightEdit.load(file, load(str(base)))
    assert float(edit.factors["blocks.2.mlp.W_out"].norm()) == pytest.approx(norm, rel=1e-5)


def test_options_select(base, tuned):
    shown = run("diff", base, tuned, "--weights", "W_in", "--layers", "0", "--rank", "0.5")
    assert shown.exit_code == 0, shown.output
    assert "blocks.0.mlp.W_in" in shown.output and "blocks.2" not in shown.output
    equal = run("diff", base, base)
    assert equal.exit_code == 0 and "the weights do not differ" in equal.output


def test_an_adapter_is_shown(base, lora, tmp_path):
    file = tmp_path / "edit.safetensors"
    shown = run("adapter", lora, "--model", base, "--save", file)
    assert shown.exit_code == 0, shown.output
    assert all(f"blocks.{layer}.mlp.W_out" in shown.output for layer in range(3))
    assert f"3 modules; trained on {base}, read on {base}" in " ".join(shown.output.split())
    model = load(str(base))
    expected = WeightEdit.from_peft(model, lora)
    for name, g in WeightEdit.load(file, model).factors.items():
        torch.testing.assert_close(g.dense(), expected.factors[name].dense())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diff", "{base}", "{base}", "--rank", "many"], "--rank takes a number such as 8 or 0.9"),
        (["diff", "{base}", "{base}", "--rank", "0"], "rank must be a positive integer"),
        (["diff", "{base}", "{base}", "--weights", "W_Z"], "this model has W_E, W_Q"),
        (["diff", "{base}", "{lora}"], "TUNED: '{lora}' is an adapter; use python -m tl_backward"),
        (["diff", "no/such/base", "{base}"], "BASE: 'no/such/base' is neither a folder nor a name"),
        (["diff", "{base}", "no-such-model"], "cannot load TUNED no-such-model"),
        (["adapter", "nowhere", "--model", "{base}"], "ADAPTER: there is no 'nowhere'"),
        (["adapter", "{base}", "--model", "{base}"], "there is no adapter_config.json in"),
    ],
)
def test_bad_input_exits_with_2_and_one_paragraph(base, lora, arguments, message):
    places = {"base": base, "lora": lora}
    shown = run(*(argument.format(**places) for argument in arguments))
    assert shown.exit_code == 2
    assert message.format(**places) in " ".join(shown.stderr.split())
    assert "Traceback" not in shown.output + shown.stderr
