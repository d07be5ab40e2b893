"""The examples in the docstrings run on a tiny model, and show what they say they show.

jaxtyping wraps the package's functions in the tests, so that doctest's own finder does not take
them for the package's: the docstrings are read from the source.
"""

from __future__ import annotations

import ast
import json
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, DocTestParser, OutputChecker
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.bridges import boot_tiny, tiny_config
from helpers.texts import tokenizer_from
from helpers.versions import TL_VERSION
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM

import tl_backward as tlb
from tl_backward import analysis, editing, evaluation, training
from tl_backward.analysis import registry

pytestmark = pytest.mark.skipif(TL_VERSION < 4, reason="the examples are for TransformerLens 4")

PACKAGE = Path(tlb.__file__).parent
LARGER = {"num_hidden_layers": 30, "initializer_range": 0.05, "max_position_embeddings": 64}
"""As many layers as SmolLM2 has."""
NOT_RUN = {
    "BackwardLensCallback": "trains a model",
    "WeightEdit.from_peft": "needs an adapter",
    "MendEditor": "trains for minutes",
    "train_mend": "trains for minutes",
    "BackwardCache.load": "needs a GPU",
}
"""Docstrings whose examples are not run."""

RECORDS = [
    {
        "case_id": case,
        "requested_rewrite": {
            "prompt": prompt,
            "subject": subject,
            "target_new": {"str": new},
            "target_true": {"str": true},
            "relation_id": "P103",
        },
        "paraphrase_prompts": [f"Rome plays for {subject} of"],
        "neighborhood_prompts": ["Lionel Messi plays for"],
        "generation_prompts": [f"{subject} is"],
    }
    for case, (prompt, subject, new, true) in enumerate(
        [
            ("The mother tongue of {} is", "Danielle Darrieux", "English", "French"),
            ("{} plays for", "Lionel Messi", "Paris", "Rome"),
        ]
    )
]
LINES = [
    "Lionel Messi plays for Paris, not for Rome.",
    "Rome is the capital of France, not of London",
    "The mother tongue of Danielle Darrieux is English, not French.",
    "Danielle Darrieux plays for France.",
]
TEXTS = [f"{one} {other} {one}" for one in LINES for other in LINES]


def docstrings():
    """Of functions, classes and methods, those with examples that are run."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(["tl_backward", *path.relative_to(PACKAGE).with_suffix("").parts])
        module = module.removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        for scope in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
            prefix = f"{scope.name}." if isinstance(scope, ast.ClassDef) else ""
            for node in scope.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    name, text = prefix + node.name, ast.get_docstring(node) or ""
                    if ">>>" in text and name not in NOT_RUN:
                        yield pytest.param(module, text, id=f"{module}.{name}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With as many layers as SmolLM2."""
    every_byte = ByteLevel.alphabet()
    tokenizer = tokenizer_from(
        tmp_path_factory.mktemp("tokenizer"), texts=LINES * 9, initial_alphabet=every_byte
    )
    return boot_tiny(
        "llama",
        torch.float32,
        tokenizer=tokenizer,
        **LARGER,
    )


@pytest.fixture(scope="module")
def names(model, tmp_path_factory):
    """The package's public names, and what the examples take as given."""
    path = tmp_path_factory.mktemp("records") / "facts.json"
    path.write_text(json.dumps(RECORDS))
    records = evaluation.load_records(path)
    prompt, corrupted, target = "Lionel Messi plays for", "Danielle Darrieux plays for", " Paris"
    fact = analysis.fact_of(records[0])
    paris, rome = (
        tlb.forward_pass_shift(model, prompt, one, layer=20, lr=0.1) for one in (target, " Rome")
    )
    clean, corrupt = (
        tlb.run_with_backward_cache(model, text, loss_fn=tlb.logit_diff(target, " Rome"))[1]
        for text in (prompt, corrupted)
    )
    measured = evaluation.evaluate(model, records, evaluation.unedited)
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

    rooms = (analysis, evaluation, editing, training, tlb)
    tuned = boot_tiny("llama", torch.float32, tokenizer=model.tokenizer, **LARGER)
    with torch.no_grad():
        tlb.weight_sites(tuned, "W_out", 5)[0].parameter[1] += 1
    config = tiny_config("llama", len(model.tokenizer), **LARGER)
    return {name: getattr(room, name) for room in rooms for name in room.__all__} | {
        "C": torch.eye(model.cfg.d_mlp, dtype=torch.float64),
        "JacobianLens": JacobianLens,
        "after": measured,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "another": "Rome is the capital of",
        "base": model,
        "batches": [0.1, 0.2],
        "before": measured,
        "cache": tlb.run_with_backward_cache(model, fact.prompt, fact.target)[1],
        "clean": clean,
        "corrupt": corrupt,
        "corrupted": corrupted,
        "dataset": [{"prompt": prompt, "target": target}],
        "edit": paris,
        "four_prompts": [prompt] * 4,
        "hf_model": AutoModelForCausalLM.from_config(config),
        "lens": tlb.BackwardLogitLens(model),
        "method": evaluation.unedited,
        "model": model,
        "one": prompt,
        "paris": paris,
        "pd": pd,
        "prompt": prompt,
        "record": records[0],
        "records": records,
        "rome": rome,
        "statistics": tlb.key_statistics(model, TEXTS, [3, 4, 5], ridge=0),
        "text": LINES[0],
        "texts": TEXTS,
        "tlb": tlb,
        "tokens": model.to_tokens(prompt),
        "tokenizer": model.tokenizer,
        "torch": torch,
        "train_on": lambda hf, step: hf.model.layers[5].mlp.down_proj.weight.data.add_(step),
        "tuned": tuned,
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the files are that the examples read and write."""
    monkeypatch.chdir(tmp_path)
    Path("counterfact.json").write_text(json.dumps(RECORDS))
    Path("wiki.test.raw.txt").write_text("\n".join(LINES))


@pytest.mark.parametrize(("module", "text"), list(docstrings()))
def test_an_example_shows_what_it_says(module, text, names, folder, unchecked, monkeypatch):
    monkeypatch.setattr(registry, "EXPERIMENTS", dict(registry.EXPERIMENTS))
    known = {**names, **vars(import_module(module))}
    try:
        for example in DocTestParser().get_examples(text):
            if example.want:
                shown = f"{eval(example.source, known)!r}\n"
                same = OutputChecker().check_output(
                    example.want, shown, ELLIPSIS | NORMALIZE_WHITESPACE
                )
                assert same, f"{example.source}shows {shown}"
            else:
                exec(example.source, known)
    finally:
        for edit in {id(value): value for value in known.values()}.values():
            if isinstance(edit, tlb.WeightEdit) and edit.is_applied:
                edit.revert()
