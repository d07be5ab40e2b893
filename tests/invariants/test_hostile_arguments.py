"""Whatever the arguments are, a command ends with 0, or with 2 and a paragraph that helps."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.texts import TARGET
from helpers.tiny_checkpoint import save_tiny_checkpoint
from helpers.versions import NEEDS_BRIDGE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tl_backward import demo_model, evaluation
from tl_backward.__main__ import app

pytestmark = NEEDS_BRIDGE

PROMPT = "Messi [/ plays"
NASTY = [
    *("", " ", "[/", "[/]", "[bold]x", ":smile:", "\0", "a\0b", "\udcff", "é\u202e\U0001f600"),
    *("x" * 300, "-1", "--", "-", ".", "nan", "inf", "1e400", "9" * 5000, "0", "1.5", "\n"),
    *("{}", "~", "a/b/c", "http://x.y/z", "auto", "\x1b[31m", ",", "0,0", "no.json", "no.txt"),
]
MARKUP = st.text(st.sampled_from("[]/:*\\\"' =#abolsmileéß😀\x1b\0\n\udc80"), max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"), "Messi plays [/ for [/] Paris")


@pytest.fixture(scope="module")
def model(folder):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder)).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    record = {
        "case_id": 1,
        "requested_rewrite": {
            "prompt": "{} plays for",
            "subject": "Messi",
            "target_new": {"str": "Paris"},
            "target_true": {"str": "Rome"},
            "relation_id": "P54",
        },
        "paraphrase_prompts": ["For whom does Messi play?"],
        "neighborhood_prompts": ["Rome is"],
        "generation_prompts": ["Messi is"],
    }
    file = tmp_path_factory.mktemp("data") / "facts.json"
    file.write_text(json.dumps([record]))
    return str(file)


@pytest.fixture
def run(model, monkeypatch, tmp_path):
    """Run a command on the tiny model; any traceback or odd exit code fails."""
    monkeypatch.setattr(demo_model, "load_demo_model", lambda: model)
    monkeypatch.chdir(tmp_path)
    return invoked


def invoked(*arguments, code=(0, 2)):
    shown = CliRunner().invoke(app, list(map(str, arguments)))
    assert "Traceback" not in shown.output + shown.stderr, arguments
    assert shown.exit_code in code, (arguments, shown.output, shown.stderr, shown.exception)
    if shown.exit_code == 2:
        paragraphs = [line for line in shown.stderr.splitlines() if line.startswith("error:")]
        assert len(paragraphs) + shown.stderr.count("─ Error ─") == 1, shown.stderr
    return shown


def without_spaces(text):
    return "".join(text.split())


def commands(data):
    """Every command as it works, and its options."""
    fact = [PROMPT, "--target", TARGET]
    evaluate = ["--data", data, "--layer", "1", "--lr", "0.5"]
    reproduce = ["gradient_rank", "--data", data]
    return {
        "lens": (
            [*fact, "--layers", "-1"],
            "--model --layers --weights --top-k --html --json --target",
        ),
        "edit": (
            [*fact, "--layer", "1", "--lr", "0.5", "--new-tokens", "1"],
            "--layer --lr --model --new-tokens --save --target",
        ),
        "evaluate": (
            evaluate,
            "--data --method --layer --lr --tokens --whiten -n --batch-size --perplexity "
            "--text-every --model",
        ),
        "reproduce": (reproduce, "--data --model -n --perplexity --jacobian-lens"),
        "sites": ([], "--model"),
    }


@pytest.mark.parametrize("command", ["lens", "edit", "evaluate", "reproduce", "sites"])
def test_every_option_with_every_nasty_value(run, data, command, model):
    before = [parameter.clone() for parameter in model.parameters()]
    arguments, options = commands(data)[command]
    for value in NASTY:
        for option in options.split():
            run(command, *arguments, option, value)
        run(command, *arguments, value)  # a second argument, or an unknown option
        if command in ("lens", "edit"):
            run(command, *arguments[1:], "--", value)
    run(value := "[/]", *arguments), run(command, f"--{value}")
    assert all(map(torch.equal, before, model.parameters()))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(prompt=MARKUP, target=MARKUP | st.text(max_size=5), html=st.booleans())
def test_texts_are_shown_as_they_are(run, prompt, target, html):
    page = ["--html", "[bold]page[/x].html"] if html else []
    Path("[bold]page[").mkdir(exist_ok=True)
    shown = run("lens", "--target", target, "--layers", "-1", *page, "--", prompt)
    is_text = not any("\udc80" in text for text in (prompt, target))
    assert (shown.exit_code == 0) == bool(prompt and target and is_text), shown.stderr
    if shown.exit_code == 0:
        assert without_spaces(f"{prompt!r} -> {target!r}: loss") in without_spaces(shown.output)
    if html and shown.exit_code == 0:
        assert Path("[bold]page[/x].html").resolve().as_uri() in without_spaces(shown.output)


def test_titles_and_cells_are_shown_as_they_are(run):
    shown = run("lens", "Messi plays [/", "--target", " [/]", "--layers", "-1")
    assert "W_out at the last token '·[/'" in shown.output
    assert "rank of '·[/]'" in shown.output
    shown = run("edit", ":smile:", "--target", " [/]", "--layer", "1", "--new-tokens", "1")
    assert ":smile:" in shown.output


# what is wrong is said before anything is loaded


def bad_inputs(data, tmp_path):
    fact = [PROMPT, "--target", TARGET]
    here, lost = tmp_path / "folder", tmp_path / "no" / "file"
    here.mkdir()
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe[")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe" * 40)
    (tmp_path / "lens.pt").write_bytes(b"no lens")
    os.mkfifo(tmp_path / "pipe")
    evaluate = ["evaluate", "--layer", "1"]
    with_data = [*evaluate, "--data", data]
    reproduce = ["reproduce", "gradient_rank", "--data", data]
    return [
        (["lens", "", "--target", TARGET], "prompt is empty"),
        (["lens", PROMPT, "--target", ""], "target is empty"),
        (["lens", *fact, "--layers", "first"], "--layers takes whole numbers"),
        (["lens", *fact, "--weights", " , "], "--weights"),
        (["lens", *fact, "--top-k", "0"], "top-k"),
        (["lens", *fact, "--html", here], "--html"),
        (["lens", *fact, "--json", lost], "--json"),
        (["lens", *fact, "--html", "x", "--json", "x"], "--html and --json are the same file"),
        (["lens", *fact, "--model", here], "has no config.json"),
        (["lens", *fact, "--model", data], "--model"),
        (["edit", *fact, "--lr", "nan"], "--lr takes a finite number"),
        (["edit", *fact, "--layer", "9" * 5000], "--layer takes a number"),
        (["edit", *fact, "--new-tokens", "-3"], "new-tokens"),
        (["edit", *fact, "--save", here], "--save"),
        (["edit", *fact, "--save", tmp_path / "pipe"], "--save"),
        (["sites", "--model", lost], "--model"),
        ([*evaluate, "--data", ""], "--data"),
        ([*evaluate, "--data", lost], "--data"),
        ([*evaluate, "--data", "no.json"], "--data: 'no.json'"),
        ([*evaluate, "--data", tmp_path / "deep.json"], "deep.json"),
        ([*evaluate, "--data", tmp_path / "object.json"], "holds a JSON dict"),
        ([*evaluate, "--data", tmp_path / "bytes.json"], "bytes.json"),
        ([*with_data, "-n", "-1"], "-n"),
        ([*with_data, "--batch-size", "0"], "batch-size"),
        ([*with_data, "--text-every", "0"], "text-every"),
        ([*with_data, "--perplexity", lost], "--perplexity"),
        ([*with_data, "--perplexity", tmp_path / "bytes.txt"], "bytes.txt is not UTF-8 text"),
        ([*with_data, "--whiten", "no.txt"], "--whiten"),
        ([*with_data, "--method", "fine-tuning"], "--lr must be a number"),
        (["evaluate", "--data", data], "--layer is missing"),
        (["reproduce", "no_such", "--data", data], "no experiment 'no_such'"),
        ([*reproduce, "--jacobian-lens", lost], "--jacobian-lens"),
        ([*reproduce, "--jacobian-lens", here], "--jacobian-lens"),
        ([*reproduce, "--perplexity", "no.txt"], "--perplexity"),
        ([*reproduce, "--model", ""], "--model is empty"),
    ]


def test_what_can_be_checked_is_checked_before_the_model_loads(data, tmp_path, monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_model, "load_demo_model", loaded)
    monkeypatch.setattr(TransformerBridge, "boot_transformers", loaded)
    for arguments, message in bad_inputs(data, tmp_path):
        shown = invoked(*arguments, code=(2,))
        assert message in " ".join(shown.stderr.replace("│", " ").split()), arguments
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    assert sorted(os.listdir(tmp_path / "folder")) == []


def test_a_wrong_path_is_named_without_loading_the_libraries():
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('tl_backward', run_name='__main__')\n"
        "finally: print(*{'transformers', 'transformer_lens', 'datasets'} & set(sys.modules))\n"
    )
    for arguments in (["evaluate", "--data", "no.json", "--layer", "1"], ["sites", "--model", "."]):
        shown = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True
        )
        assert (shown.returncode, shown.stdout.strip()) == (2, ""), shown.stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_files_that_must_not_be_written(run, tmp_path):
    tmp_path.chmod(0o500)
    shown = run("lens", PROMPT, "--target", TARGET, "--html", tmp_path / "x.html", code=(2,))
    assert "cannot be written" in shown.stderr


# what only the model can tell


@pytest.mark.parametrize("layer", [99, -4])
def test_evaluate_names_a_layer_that_is_not_there(run, data, monkeypatch, layer):
    monkeypatch.setattr(evaluation, "evaluate", None)  # no record is run
    shown = run("evaluate", "--data", data, "--layer", layer, code=(2,))
    assert f"--layer {layer}" in shown.stderr and "layers 0 to 2" in shown.stderr


def test_evaluate_fails_if_no_record_can_be_measured(run, data, monkeypatch):
    def fails(**options):
        def method(model, record):
            raise ValueError("no such subject")

        return method

    monkeypatch.setattr(evaluation, "shift", fails)
    shown = run("evaluate", "--data", data, "--layer", "1", code=(2,))
    assert "all records failed; ValueError: no such subject" in shown.stderr
    assert "efficacy (success)" in shown.stdout


def test_files_that_are_no_jacobian_lens(run, data, tmp_path):
    lens = pytest.importorskip(
        "transformer_lens.tools.analysis.jacobian_lens", reason="there is no JacobianLens"
    )

    def saved(name, d_model, layers):
        jacobians = {layer: torch.eye(d_model) for layer in range(layers)}
        fitted = lens.JacobianLens(jacobians, n_prompts=1, d_model=d_model)
        fitted.save(str(tmp_path / name))

    saved("narrow.pt", 20, 2)
    saved("deep.pt", 28, 9)
    (tmp_path / "text.pt").write_text("no lens")
    torch.save({"J": {0: torch.eye(28)}}, tmp_path / "half.pt")
    torch.save([torch.eye(28)], tmp_path / "list.pt")
    torch.save({"J": {0: Path}}, tmp_path / "code.pt")
    for name in ("narrow", "deep", "text", "half", "list", "code"):
        options = ["--data", data, "--jacobian-lens", f"{name}.pt", "--out", "out"]
        shown = run("reproduce", "translator_ranks", *options, code=(2,))
        assert f"--jacobian-lens: '{name}.pt'" in shown.stderr
        assert not Path("out").exists()


@pytest.mark.parametrize("config", ["", "[]", "{}", "[" * 100_000, '{"model_type": "llama"}', "\0"])
def test_damaged_folders_of_models(run, folder, tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    shown = run("sites", "--model", tmp_path, code=(2,))
    assert f"cannot load --model {tmp_path}" in shown.stderr
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2])
    run("sites", "--model", tmp_path, code=(2,))


# the user ends it


@pytest.mark.parametrize("place", ["load", "lens", "edit", "generate"])
def test_ctrl_c_ends_with_130_and_the_weights_as_they_were(run, model, monkeypatch, place):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    before = [parameter.clone() for parameter in model.parameters()]
    target = {
        "load": "tl_backward.demo_model.load_demo_model",
        "lens": "tl_backward.BackwardLogitLens.__call__",
        "edit": "tl_backward.editing.forward_pass_shift",
        "generate": "tl_backward.evaluation.generate_tokens",
    }[place]
    monkeypatch.setattr(target, interrupted)
    command = ["lens"] if place == "lens" else ["edit", "--layer", "1"]
    shown = invoked(*command, PROMPT, "--target", TARGET, code=(130,))
    assert "error" not in shown.stderr
    assert all(map(torch.equal, before, model.parameters()))


def test_streams_that_are_closed_full_or_of_another_encoding(folder):
    command = [sys.executable, "-m", "tl_backward", "lens", "--model", str(folder)]
    fact = ["é [/", "--target", " ü"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}

    def start(arguments, **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen([*command, *arguments], **options)

    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "wb") as full:
        started = {
            "broken pipe": start(fact, stdout=writing),
            "full": start(fact, stdout=full),
            "ascii": start(fact, env=ascii_only),
            "bytes": start([b"\xff\xfe", *fact[1:]]),
            "closed": start(fact, preexec_fn=lambda: os.close(1)),
        }
    os.close(writing)
    shown = {name: process.communicate() for name, process in started.items()}
    codes = {name: process.returncode for name, process in started.items()}
    assert codes == {"broken pipe": 1, "full": 2, "ascii": 0, "bytes": 2, "closed": 0}, shown
    for out, err in shown.values():
        assert b"Traceback" not in err and b"Exception ignored" not in err
        assert b"Traceback" not in (out or b"")
    assert b"'\\xe9 [/' -> ' \\xfc'" in shown["ascii"][0]
    assert b"No space left" in shown["full"][1]
