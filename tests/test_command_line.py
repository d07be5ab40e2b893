from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import PROMPT, TARGET, tiny_config
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tl_backward as tlb
from tl_backward.__main__ import app


@pytest.fixture
def run(boot, monkeypatch):
    """Run the command line on a tiny model; returns the result of the runner."""
    monkeypatch.setattr("tl_backward.demo_model.load_demo_model", lambda: boot("llama"))

    def run(*arguments: str):
        return CliRunner().invoke(app, ["lens", *arguments])

    return run


def test_table_shows_the_last_token(run, boot):
    shown = run(PROMPT, "--target", TARGET, "--layers", "0,-1", "--top-k", "4")
    assert shown.exit_code == 0, shown.output
    result = tlb.BackwardLogitLens(boot("llama"))(PROMPT, TARGET)
    lines = shown.output.splitlines()
    for kind in ("W_in", "W_out"):
        start = next(i for i, line in enumerate(lines) if line.strip().startswith(kind))
        rows = [[c.strip() for c in line.split("│")[1:-1]] for line in lines[start:] if "│" in line]
        for row, layer in zip(rows[:2], (0, 2), strict=True):
            assert row[0] == str(layer)
            assert float(row[1]) == pytest.approx(float(result[kind].norms[layer, -1]), rel=1e-2)
            assert row[4] == str(int(result[kind].target_ranks[layer, -1]))
            most = result[kind].top_tokens()[layer][-1][0].replace(" ", "·")
            assert row[2].startswith(most)
    assert f"loss {result.loss:.4f} nats" in shown.output


def test_json_holds_every_position(run, boot, tmp_path):
    path = tmp_path / "lens.json"
    shown = run(PROMPT, "--target", TARGET, "--weights", "W_gate, W_out", "--json", str(path))
    assert shown.exit_code == 0, shown.output
    written = json.loads(path.read_text())
    result = tlb.BackwardLogitLens(boot("llama"))(PROMPT, TARGET, weights=("W_gate", "W_out"))
    assert len(written["rows"]) == len(result.to_dataframe())
    assert {row["weight"] for row in written["rows"]} == {"W_gate", "W_out"}
    assert written["str_tokens"] == result.str_tokens
    assert written["loss"] == pytest.approx(float(result.loss))


def test_page_is_written_and_announced(run, tmp_path):
    path = tmp_path / "a page.html"
    shown = run(PROMPT, "--target", TARGET, "--html", str(path))
    assert shown.exit_code == 0, shown.output
    assert path.as_uri() in shown.output.replace("\n", "")
    assert path.read_text().count("<table") == 2


def test_a_target_of_several_tokens_without_its_space_is_pointed_out(run, boot):
    shown = run(PROMPT, "--target", "Paris")
    assert shown.exit_code == 0, shown.output
    with pytest.warns(UserWarning, match="with the leading space"):
        result = tlb.BackwardLogitLens(boot("llama"))(PROMPT, "Paris")
    assert f"loss {result.loss:.4f} nats" in shown.output
    assert "with the leading space, ' Paris' is one" in " ".join(shown.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([PROMPT, "--target", ""], "target is empty"),
        (["", "--target", TARGET], "prompt is empty"),
        ([PROMPT * 9, "--target", TARGET], "context of 32"),
        ([PROMPT, "--target", TARGET, "--layers", "0,3"], "layers 0 to 2"),
        ([PROMPT, "--target", TARGET, "--layers", "first"], "--layers takes whole numbers"),
        (
            [PROMPT, "--target", TARGET, "--weights", "W_Z"],
            "this model has W_E, W_Q, W_K, W_V, W_O, W_gate, W_in",
        ),
        ([PROMPT, "--target", TARGET, "--model", "no/such-model"], "cannot load --model"),
        ([PROMPT, "--target", TARGET, "--html", "/no/such/folder/x.html"], "No such file"),
        ([PROMPT], "Missing option '--target'"),
    ],
)
def test_bad_input_exits_with_2_and_one_paragraph(run, arguments, message):
    shown = run(*arguments)
    assert shown.exit_code == 2
    text = " ".join(shown.stderr.replace("│", " ").split())
    assert message in text
    assert "Traceback" not in shown.output + shown.stderr


def test_a_local_folder_as_model(tokenizer, tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("gpt2", len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lens = [sys.executable, "-m", "tl_backward", "lens", PROMPT, "--target", TARGET]
    shown = subprocess.run(
        [*lens, "--layers", "-1", "--model", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "W_out at the last token" in shown.stdout


def test_help_gives_an_example():
    shown = CliRunner().invoke(app, ["lens", "--help"])
    assert shown.exit_code == 0
    assert 'lens "Lionel Messi plays for" --target " Paris"' in " ".join(shown.output.split())
