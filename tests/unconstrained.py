"""The commands with today's packages, against transformers alone: ``nox -s unconstrained``."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.tiny_checkpoint import save_tiny_checkpoint
from torch.distributions import Categorical
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_backward as tlb
from tl_backward.demo_model import demo_model_path, load_demo_model
from tl_backward.evaluation import n_gram_entropy

PROMPT, TARGET, LAYER, N_NEW = "Lionel Messi plays for", " Paris", 24, 10
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
FACTS = [  # subject, new, true, a text to continue: each of another length
    ("Messi", "Paris", "Rome", "Messi is"),
    ("Rome", "Berlin", "Paris", "Rome is the city"),
    ("London", "Rome", "Berlin", "London is not the city of"),
]
RECORDS = [
    {
        "case_id": case,
        "requested_rewrite": {
            "prompt": "{} plays for",
            "subject": subject,
            "target_new": {"str": new},
            "target_true": {"str": true},
            "relation_id": "P54",
        },
        "paraphrase_prompts": [f"For whom does {subject} play? For"],
        "neighborhood_prompts": ["The city of", "Berlin plays for"],
        "generation_prompts": [generation_prompt],
    }
    for case, (subject, new, true, generation_prompt) in enumerate(FACTS)
]


def run(folder, *arguments):
    """What a command prints; away from the repository, so that it is the installed package's."""
    command = [sys.executable, "-m", "tl_backward", *map(str, arguments)]
    shown = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ONE_THREAD)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def cells(printed):
    return [
        [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]
        for line in printed.splitlines()
        if "│" in line or "┃" in line
    ]


def without_spaces(text):
    return "".join(text.split())


def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def real():
    return loaded(demo_model_path())


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    """What the command prints, and what it writes."""
    folder = tmp_path_factory.mktemp("lens")
    options = ["--layers", LAYER, "--weights", "W_out", "--json", "lens.json"]
    printed = run(folder, "lens", PROMPT, "--target", TARGET, *options)
    return printed, json.loads((folder / "lens.json").read_text())


@pytest.fixture(scope="module")
def tokens(real, lens):
    """The prompt's, behind a BOS token if the commands put one there."""
    tokenizer = real[1]
    ids = tokenizer(PROMPT).input_ids
    shown = lens[1]["str_tokens"]
    bos = [tokenizer.bos_token_id] if shown[0] == tokenizer.bos_token else []
    assert len(shown) == len(bos + ids)
    return torch.tensor([bos + ids])


def greedy(model, tokenizer, tokens):
    ids = model.generate(tokens, max_new_tokens=N_NEW, do_sample=False)[0]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_the_lens_has_the_loss_and_the_gradient_of_transformers(real, lens, tokens):
    (model, tokenizer), (printed, written) = real, lens
    outputs = []
    handle = model.model.layers[LAYER].mlp.down_proj.register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    (target,) = tokenizer(TARGET).input_ids
    logits = model(tokens).logits
    handle.remove()
    loss = -logits[0, -1].log_softmax(-1)[target]
    (vjps,) = torch.autograd.grad(loss, outputs)
    assert written["loss"] == pytest.approx(float(loss), rel=1e-4)
    norm = float(vjps[0, -1].norm())
    (row,) = [row for row in cells(printed) if row[0] == str(LAYER)]
    assert float(row[1]) == pytest.approx(norm, rel=6e-3)  # three digits


def test_edit_continues_as_transformers_does_with_the_same_weights(real, tokens, tmp_path):
    model, tokenizer = real
    file = tmp_path / "edit.safetensors"
    options = ["--layer", LAYER, "--new-tokens", N_NEW, "--save", file]
    rows = cells(run(tmp_path, "edit", PROMPT, "--target", TARGET, *options))
    first, second = (i for i, row in enumerate(rows) if row[0] in ("before", "after"))
    texts = ["".join(row[2] for row in part) for part in (rows[first:second], rows[second:])]
    before = greedy(model, tokenizer, tokens)
    assert without_spaces(texts[0]) == without_spaces(before)

    edit = tlb.WeightEdit.load(file, load_demo_model())
    weight = model.model.layers[LAYER].mlp.down_proj.weight
    with torch.no_grad():
        original = weight.clone()
        weight += edit.factors[f"blocks.{LAYER}.mlp.W_out"].dense().mT
        after = greedy(model, tokenizer, tokens)
        weight.copy_(original)
    assert without_spaces(texts[1]) == without_spaces(after)
    assert after.startswith(PROMPT + TARGET) and after != before


@torch.no_grad()
def sampled(model, tokenizer, prompt):
    """Continue a text to 100 tokens, each drawn from the five most probable ones."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    while ids.shape[1] < 100:
        logits = model(ids).logits[:, -1]
        fifth = logits.topk(5).values[:, -1:]
        drawn = Categorical(logits=logits.masked_fill(logits < fifth, -torch.inf)).sample()
        ids = torch.cat([ids, drawn[:, None]], 1)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@torch.no_grad()
def target_nll(model, tokenizer, prompt, target):
    prefix, whole = (tokenizer(text).input_ids for text in (prompt, f"{prompt} {target}"))
    assert whole[: len(prefix)] == prefix
    log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    at = range(len(prefix) - 1, len(whole) - 1)
    return -sum(float(log_probs[i, whole[i + 1]]) for i in at) / len(at)


def test_evaluate_measures_what_transformers_writes(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "model")
    (tmp_path / "facts.json").write_text(json.dumps(RECORDS * 2))
    options = ["--data", "facts.json", "-n", 3, "--layer", 1, "--generation", "--model", folder]
    printed = {row[0]: row[1:] for row in cells(run(tmp_path, "evaluate", *options))}

    model, tokenizer = loaded(folder)
    prompts = sorted((fact[-1] for fact in FACTS), key=lambda text: len(tokenizer(text).input_ids))
    assert len({len(tokenizer(prompt).input_ids) for prompt in prompts}) == 3
    torch.manual_seed(0)
    entropies = [100 * n_gram_entropy(sampled(model, tokenizer, prompt)) for prompt in prompts]
    mean, std = torch.tensor(entropies).mean(), torch.tensor(entropies).std(correction=0)
    assert printed["ngram_entropy (text)"][0] == f"{mean:.2f} ({std:.2f})"

    succeeds = [
        target_nll(model, tokenizer, f"{subject} plays for", new)
        < target_nll(model, tokenizer, f"{subject} plays for", true)
        for subject, new, true, _ in FACTS
    ]
    assert printed["efficacy (success)"][0].startswith(f"{100 * sum(succeeds) / 3:.2f} (")
    assert printed["efficacy (accuracy)"][1] == "100.00 (0.00)"
