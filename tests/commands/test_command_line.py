from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pandas as pd
import pytest
import torch
from helpers.bridges import tiny_config
from helpers.generation import greedy, lose_the_cache
from helpers.texts import PROMPT, TARGET
from helpers.versions import NEEDS_BRIDGE
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tl_backward as tlb
from tl_backward import analysis, editing, evaluation
from tl_backward.__main__ import app

pytestmark = NEEDS_BRIDGE


@pytest.fixture
def run(boot, monkeypatch):
    """Run the command line on a tiny model; returns the result of the runner."""
    monkeypatch.setattr("tl_backward.demo_model.load_demo_model", lambda: boot("llama"))

    def run(*arguments: str, command: str = "lens"):
        return CliRunner().invoke(app, [command, *arguments])

    return run


def test_table_shows_the_last_token(run, boot):
    shown = run(PROMPT, "--target", TARGET, "--layers", "0,-1", "--top-k", "4")
    assert shown.exit_code == 0, shown.output
    result = tlb.BackwardLogitLens(boot("llama"))(PROMPT, TARGET, prepend_bos=False)
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
    result = tlb.BackwardLogitLens(boot("llama"))(
        PROMPT, TARGET, weights=("W_gate", "W_out"), prepend_bos=False
    )
    assert len(written["rows"]) == len(result.to_dataframe())
    assert {row["weight"] for row in written["rows"]} == {"W_gate", "W_out"}
    assert written["str_tokens"] == result.str_tokens
    assert written["loss"] == pytest.approx(float(result.loss))


def test_a_target_of_several_tokens_is_ranked_by_its_last_at_the_last_token(run, boot, tmp_path):
    path = tmp_path / "lens.json"
    shown = run(PROMPT, "--target", " Paris Rome", "--weights", "W_out", "--json", str(path))
    assert shown.exit_code == 0, shown.output
    result = tlb.BackwardLogitLens(boot("llama"))(
        PROMPT, " Paris Rome", weights="W_out", prepend_bos=False
    )
    assert "rank of '·Rome'" in shown.output and "-> ' Paris Rome'" in shown.output
    written = json.loads(path.read_text())
    assert written["target_id"] == result.target_ids.tolist()
    assert {row["target"] for row in written["rows"]} == {" Paris", " Rome"}


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
        result = tlb.BackwardLogitLens(boot("llama"))(PROMPT, "Paris", prepend_bos=False)
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


def test_edit_shows_before_and_after(run, boot, tmp_path):
    path = tmp_path / "edit.safetensors"
    shown = run(
        PROMPT, "--target", TARGET, "--layer", "1", "--bos", "--save", str(path), command="edit"
    )
    assert shown.exit_code == 0, shown.output
    model = boot("llama")
    edit = tlb.WeightEdit.load(path, model)
    with edit.applied():
        top = model(PROMPT)[0, -1].softmax(-1).topk(1)
    assert model.tokenizer.decode(top.indices) == TARGET
    after = next(line for line in shown.output.splitlines() if "after" in line)
    assert f"·Paris {top.values.item():.2f}" in after
    before = next(line for line in shown.output.splitlines() if "before" in line)
    assert f"{model(PROMPT)[0, -1].softmax(-1).max():.2f}" in before


def test_edit_shows_the_text_of_whole_passes_though_the_cache_is_lost(run, boot, monkeypatch):
    model = boot("llama")
    lose_the_cache(model)
    monkeypatch.setattr("tl_backward.demo_model.load_demo_model", lambda: model)
    options = ["--target", TARGET, "--layer", "1", "--new-tokens", "6", "--bos"]
    shown = run(PROMPT, *options, command="edit")
    assert shown.exit_code == 0, shown.output
    tokens = model.to_tokens(PROMPT, prepend_bos=True)
    (ids,) = greedy(model, tokens, 6)
    new = ids[tokens.shape[1] :]
    text = model.tokenizer.decode(new[: new.index(0)] if 0 in new else new)  # 0 ends a text
    rows = [line.split("│")[3:4] for line in shown.output.splitlines() if "│" in line]
    before = "".join(cell[0].strip() for cell in rows[: len(rows) // 2])
    assert "".join(f"{PROMPT}{text}".split()) in "".join(before.split())
    assert "texts are generated without it" in " ".join(shown.stderr.split())


def counterfact(tmp_path):
    facts = [("The Eiffel Tower", "Rome", "Paris"), ("London", "Paris", "Berlin")]
    records = [
        {
            "case_id": case,
            "requested_rewrite": {
                "prompt": "{} is located in",
                "subject": subject,
                "target_new": {"str": new},
                "target_true": {"str": true},
                "relation_id": "P1",
            },
            "paraphrase_prompts": [f"Not in Berlin is {subject} located but in"],
            "neighborhood_prompts": ["The city of", "Lionel Messi plays for"],
            "generation_prompts": [f"{subject} is"],
        }
        for case, (subject, new, true) in enumerate(facts)
    ]
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(records))
    return path


def test_evaluate_prints_the_table(run, boot, tmp_path):
    path = counterfact(tmp_path)
    options = ["--data", str(path), "--layer", "1", "--lr", "0.7", "--out", str(tmp_path / "out")]
    shown = run(*options, command="evaluate")
    assert shown.exit_code == 0, shown.output
    records = evaluation.load_records(path)
    frame = evaluation.evaluate(boot("llama"), records, evaluation.shift(layer=1, lr=0.7))
    name = "shift, layer 1, lr 0.7, first tokens"
    expected = evaluation.table({name: frame})
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in shown.output.splitlines()]
    cells = {row[0]: row[2] for row in rows if len(row) == 3}
    assert cells["efficacy (accuracy)"] == expected["accuracy", "efficacy"][name]
    assert cells["neighborhood (magnitude)"] == expected["magnitude", "neighborhood"][name]
    folders = {"unedited", "shift-layer-1-lr-0.7-first-tokens"}
    assert folders <= {folder.name for folder in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (["--tokens", "all"], lambda: evaluation.shift(layer=1, lr=0.7, tokens="all")),
        (["--method", "gradient-step"], lambda: evaluation.gradient(layers=1, lr=0.7)),
        (["--method", "fine-tuning"], lambda: evaluation.fine_tuning(layers=1, lr=0.7)),
    ],
)
def test_evaluate_with_every_method(run, boot, tmp_path, options, method):
    path = counterfact(tmp_path)
    shown = run(*["--data", str(path), "--layer", "1", "--lr", "0.7", *options], command="evaluate")
    assert shown.exit_code == 0, shown.output
    frame = evaluation.evaluate(boot("llama"), evaluation.load_records(path), method())
    expected = evaluation.table({"edited": frame})["magnitude", "efficacy"]["edited"]
    row = next(line for line in shown.output.splitlines() if "efficacy (magnitude)" in line)
    assert row.split("│")[3].strip() == expected


def lines_of(path, n):
    """A text of which the command takes all lines but two for the statistics."""
    cities = ("Paris", "Rome", "in", "Berlin", "the city", "London")
    lines = [
        f"Lionel Messi plays for {a}, {b} is located in {c}"
        for a in cities
        for b in cities
        for c in cities
    ][:n]
    path.write_text("\n".join(lines))
    return lines


CONTEXTS = 2
EDITORS = {
    "rome": (tlb.rome, {"layer": 1}, ("--set", "steps=3", "--set", "clamp=2")),
    "memit": (tlb.memit, {"layers": [0, 1]}, ("--set", "steps=3", "--set", "weight=50")),
    "alpha-edit": (tlb.alpha_edit, {"layers": [0, 1]}, ("--set", "steps=3", "--set", "l2=2")),
    "adam": (tlb.adam_fine_tune, {"layer": 1}, ("--set", "steps=3", "--set", "bound=0.001")),
}


@pytest.mark.parametrize("name", EDITORS)
def test_evaluate_measures_what_the_editors_do(run, boot, tmp_path, monkeypatch, name):
    """The norm of each edit is that of a call of the editor with the same statistics."""
    monkeypatch.setattr(evaluation, "N_LINES", 2)
    monkeypatch.setattr("tl_backward.editing.contexts.STARTS", ("London", "The city", "in"))
    editor, where, sets = EDITORS[name]
    path, text, out = counterfact(tmp_path), tmp_path / "text.txt", tmp_path / "out"
    lines = lines_of(text, 120)
    options = ["--data", str(path), "--method", name, "--layer", "1", "--out", str(out), *sets]
    given = {key: json.loads(value) for key, value in (s.split("=") for s in sets[1::2])} | where
    model = boot("llama")
    if name != "adam":
        options += ["--whiten", str(text), "--contexts", str(CONTEXTS)]
        layers = where.get("layers", [1])
        statistics = tlb.key_statistics(model, lines[2:], layers, ridge=0, prepend_bos=False)
        given |= {"statistics": statistics, "contexts": editing.rome_contexts(model)[:CONTEXTS]}
    if "layers" in where:
        plain, texts = editing.memit_contexts(model, False)
        given["contexts"] = [plain, texts[: CONTEXTS - 1]]
    shown = run(*options, command="evaluate")
    assert shown.exit_code == 0, shown.output
    (about,) = (json.loads(file.read_text()) for file in out.glob("*.json"))
    (folder,) = (one for one in out.iterdir() if one.is_dir() and one.name != "unedited")
    table = pd.read_parquet(folder).sort_values("record")
    assert table["error"].isna().all()
    assert about["settings"]["layer"] == 1 and about["method"] == name
    for record, norm in zip(evaluation.load_records(path), table["edit_norm"], strict=True):
        prompt, target, subject = record.prompt, f" {record.target_new}", record.subject
        facts = (prompt, target), {"subject": subject}
        if "layers" in where:
            facts = ([prompt], [target]), {"subjects": [subject]}
        elif name == "adam":
            facts = (prompt, target), {}
        edit = editor(model, *facts[0], **facts[1], **given, prepend_bos=False)
        assert norm == pytest.approx(float(edit.norm()), rel=1e-6)


def test_evaluate_trains_mend_on_other_records(run, boot, tmp_path):
    path, file, out = counterfact(tmp_path), tmp_path / "mend.safetensors", tmp_path / "out"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([*entries, entries[0], entries[1]]))
    options = ["--data", str(path), "-n", "2", "--tune", "1", "--method", "mend"]
    options += ["--editor", str(file), "--out", str(out), "--set", "rank=4", "--set", "steps=2"]
    shown = run(*options, "--set", "batch_size=2", command="evaluate")
    assert shown.exit_code == 0, shown.output
    (about,) = (json.loads(file.read_text()) for file in out.glob("*.json"))
    assert about["training"]["n_records"] == 1
    editor = tlb.MendEditor.load(file, boot("llama"))
    assert list(editor.report.edit_losses) == about["training"]["edit_losses"]
    record = evaluation.load_records(path)[1]
    edit = editor(boot("llama").to_tokens(record.prompt, prepend_bos=False)[0], " Paris")
    (folder,) = (one for one in out.iterdir() if one.is_dir() and one.name != "unedited")
    norms = pd.read_parquet(folder).set_index("case_id")["edit_norm"]
    assert norms[record.case_id] == pytest.approx(float(edit.norm()), rel=1e-6)
    again = run(*options, "--set", "batch_size=2", command="evaluate")
    assert again.exit_code == 0, again.output


def test_evaluate_chooses_settings_on_the_records_behind(run, boot, tmp_path):
    """By the harmonic mean of the successes; the table has what ``evaluate`` says of each."""
    path = counterfact(tmp_path)
    first, second = json.loads(path.read_text())
    path.write_text(json.dumps([first, second, first]))
    grid = ["--layer", "0,1", "--lr", "0.3,1.5"]
    options = ["--data", str(path), "-n", "1", "--tune", "2", *grid, "--set", "value=centred"]
    shown = run(*options, "--out", str(tmp_path / "out"), command="evaluate")
    assert shown.exit_code == 0, shown.output
    records = evaluation.load_records(path)[1:]
    made = partial(evaluation.shift, value="centred")
    chosen = evaluation.tune(boot("llama"), records, made, {"layer": [0, 1], "lr": [0.3, 1.5]})
    layer, lr = chosen.settings["layer"], chosen.settings["lr"]
    assert f"layer {layer}, lr {lr}, value centred" in " ".join(shown.output.split())
    (about,) = (json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json"))
    assert about["settings"] == chosen.settings | {"value": "centred"} and about["tuned_on"] == 2
    assert [row["score"] for row in about["tuning"]] == chosen.table["score"].tolist()


def test_evaluate_with_a_whitened_key_and_texts(run, boot, tmp_path, monkeypatch):
    """The key's statistics are of other lines than those whose perplexity is measured."""
    monkeypatch.setattr(evaluation, "N_LINES", 2)
    path, text = counterfact(tmp_path), tmp_path / "text.txt"
    lines = [f"Lionel Messi plays for the city of {city}, not" for city in ("Paris", "Rome", "in")]
    text.write_text("\n".join(lines))
    options = ["--data", str(path), "--layer", "1", "--lr", "0.7", "--whiten", str(text)]
    shown = run(*options, "--perplexity", str(text), "--text-every", "2", command="evaluate")
    assert shown.exit_code == 0, shown.output
    model = boot("llama")
    statistics = tlb.key_statistics(model, lines[2:], 1, prepend_bos=False)
    frame = evaluation.evaluate(
        model,
        evaluation.load_records(path),
        evaluation.shift(layer=1, lr=0.7, key="whitened", statistics=statistics),
        perplexity_texts=lines,
        text_every=2,
    )
    expected = evaluation.table({"edited": frame})["text", "perplexity"]["edited"]
    row = next(line for line in shown.output.splitlines() if "perplexity (text)" in line)
    assert row.split("│")[3].strip() == expected


def test_evaluate_does_not_mix_results_of_other_options(run, tmp_path):
    options = ["--data", str(counterfact(tmp_path)), "--method", "unedited"]
    options += ["--out", str(tmp_path / "out")]
    assert run(*options, command="evaluate").exit_code == 0
    assert run(*options, command="evaluate").exit_code == 0
    shown = run(*options, "--generation", command="evaluate")
    assert shown.exit_code == 2
    message = " ".join(shown.stderr.split())
    assert "other fn (measure.generation: false then, true now)" in message


def test_reproduce_writes_tables_and_a_report(run, boot, tmp_path):
    data, out = counterfact(tmp_path), tmp_path / "report"
    compare_top_100 = {"gradient_neurons", "optimizer_updates"}  # the model has fewer tokens
    names = [name for name in analysis.EXPERIMENTS if name not in compare_top_100]
    shown = run(*names, "--data", str(data), "-n", "2", "--out", str(out), command="reproduce")
    assert shown.exit_code == 0, shown.output
    records = evaluation.load_records(data)
    for name in names:
        written = pd.read_parquet(out / f"{name}.parquet")
        expected = analysis.EXPERIMENTS[name].run(boot("llama"), records, prepend_bos=False)
        pd.testing.assert_frame_equal(written, expected, check_dtype=False)
    page = (out / "report.html").read_text()
    assert [page.count(f"<h2>{name}</h2>") for name in names] == [1] * len(names)
    assert page.count('class="plotly-graph-div"') == len(names)
    assert "cdn" not in page.split("<h2>")[-1]


def test_reproduce_goes_on_where_it_was_interrupted(run, tmp_path, monkeypatch):
    options = ["gradient_rank", "--data", str(counterfact(tmp_path)), "--out", str(tmp_path / "r")]
    assert run(*options, command="reproduce").exit_code == 0
    first = pd.read_parquet(tmp_path / "r" / "gradient_rank.parquet")
    monkeypatch.setattr("tl_backward.analysis.over_records.run_facts", None)  # not called again
    assert run(*options, command="reproduce").exit_code == 0
    again = pd.read_parquet(tmp_path / "r" / "gradient_rank.parquet")
    pd.testing.assert_frame_equal(first, again, check_dtype=False)
    shown = run(*options, "--bos", command="reproduce")
    assert shown.exit_code == 2
    assert "other options (prepend_bos: false then, true now)" in " ".join(shown.stderr.split())


def test_reproduce_takes_texts_and_a_jacobian_lens(run, boot, tmp_path):
    lens = pytest.importorskip(
        "transformer_lens.tools.analysis.jacobian_lens", reason="there is no JacobianLens"
    )
    model, data, out = boot("llama"), counterfact(tmp_path), tmp_path / "report"
    d_model = model.cfg.d_model
    jacobians = {layer: torch.eye(d_model).roll(layer, 0) for layer in range(2)}
    fitted = lens.JacobianLens(jacobians, n_prompts=1, d_model=d_model)
    fitted.save(str(tmp_path / "lens.pt"))
    text = tmp_path / "text.txt"
    text.write_text("The Eiffel Tower is located in the city of Paris")
    options = ["--data", str(data), "--perplexity", str(text), "--out", str(out)]
    options += ["--jacobian-lens", str(tmp_path / "lens.pt")]
    shown = run("translator_ranks", "many_edits", *options, command="reproduce")
    assert shown.exit_code == 0, shown.output
    ranks = pd.read_parquet(out / "translator_ranks.parquet")
    assert "jacobian" in set(ranks["translator"])
    edits = pd.read_parquet(out / "many_edits.parquet")
    before = evaluation.perplexity(model, [text.read_text()])
    assert edits.query("size == 0")["perplexity"].tolist() == pytest.approx([float(before)] * 2)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("edit", [PROMPT, "--target", TARGET, "--layer", "first"], "--layer takes a number or"),
        ("edit", [PROMPT, "--target", TARGET, "--layer", "9"], "layers 0 to 2"),
        ("evaluate", ["--data", "DATA"], "--layer is missing"),
        ("evaluate", ["--data", "DATA", "--layer", "1", "--lr", "x"], "--lr takes a number"),
        (
            "evaluate",
            ["--data", "DATA", "--layer", "1", "--method", "fine-tuning"],
            "--lr must be a number",
        ),
        ("evaluate", ["--data", "/no/such.json", "--layer", "1"], "such.json"),
        (
            "evaluate",
            ["--data", "DATA", "--layer", "1", "--method", "memit"],
            "--whiten is missing: memit needs",
        ),
        (
            "evaluate",
            ["--data", "DATA", "--layer", "1", "--contexts", "2"],
            "--contexts is not for shift",
        ),
        (
            "evaluate",
            ["--data", "DATA", "--layer", "1", "--set", "speed=3"],
            "--set speed=3: shift has no setting 'speed'; it has skip_if_predicted,",
        ),
        ("evaluate", ["--data", "DATA", "--layer", "1", "--set", "value"], "--set takes NAME="),
        ("evaluate", ["--data", "DATA", "--layer", "0,1"], "--tune: of the records behind"),
        ("evaluate", ["--data", "DATA", "--method", "mend"], "no record is left to train MEND on"),
        ("reproduce", ["figure_99", "--data", "DATA"], "no experiment 'figure_99'; available: gra"),
    ],
)
def test_bad_input_of_the_other_commands(run, tmp_path, command, arguments, message):
    data = str(counterfact(tmp_path))
    shown = run(*(data if part == "DATA" else part for part in arguments), command=command)
    assert shown.exit_code == 2
    assert message in " ".join(shown.stderr.replace("│", " ").split())


def test_help_gives_an_example():
    shown = CliRunner().invoke(app, ["lens", "--help"])
    assert shown.exit_code == 0
    assert 'lens "Lionel Messi plays for" --target " Paris"' in " ".join(shown.output.split())
