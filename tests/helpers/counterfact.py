"""Records for tiny models, and their metrics by a plain loop over one text at a time."""

from __future__ import annotations

import copy
import math

import torch

from helpers.hooked import LIKE, build
from tl_backward.evaluation import Record

RECORDS = [
    Record(
        case_id=11,
        prompt="Lionel Messi plays for the city of",
        subject="Lionel Messi",
        relation_id="P54",
        target_new="Paris",
        target_true="Eiffel Tower",
        paraphrase_prompts=("Messi plays in", "The city of Lionel Messi is"),
        neighborhood_prompts=("The Eiffel Tower is located in", "Rome", "not in"),
        generation_prompts=("Messi plays", "Lionel Messi is located"),
    ),
    Record(
        case_id=22,
        prompt="The Eiffel Tower is",
        subject="The Eiffel Tower",
        relation_id="P131",
        target_new="Rome and Berlin",
        target_true="Rome and London",
        paraphrase_prompts=("Paris is the city of",),
        neighborhood_prompts=("Messi plays for", "Berlin is located in", "Rome is"),
        generation_prompts=("The Tower",),
    ),
    Record(
        case_id=33,
        prompt="London",
        subject="London",
        relation_id="P131",
        target_new="Rome and Paris",
        target_true="Rome",
        paraphrase_prompts=("London is", "The city", "in London, in"),
        neighborhood_prompts=("Messi",),
        generation_prompts=("London", "not London", "The city of London"),
    ),
]
TEXTS = [
    "The Eiffel Tower is located in Rome",
    "Lionel Messi plays for Paris, not for the city of London",
    "Rome and Berlin",
]
KINDS = {"efficacy": 0, "paraphrase": 0, "neighborhood": 1}


def ids_of(model, text):
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def score_alone(run, tokenizer, prefix, target, bos=False):
    """NLL of a target after a prefix, and whether it is predicted, token by token."""
    start = tokenizer(prefix, add_special_tokens=bos)["input_ids"]
    ids = tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{prefix} {target}", add_special_tokens=bos)["input_ids"]
    assert whole == start + ids
    logits = run(torch.tensor([whole]))[0]
    nll, right = 0.0, []
    for j, token in enumerate(ids):
        at = logits[len(start) + j - 1]
        nll -= float(at.log_softmax(-1)[token]) / len(ids)
        right.append(int(at.argmax()) == token)
    return nll, all(right)


def plain_loop(run, tokenizer, record, bos=False):
    """All metrics of a record, one text at a time; ``bos``: as the tokenizer begins texts."""
    prompts = {
        "efficacy": [record.prompt],
        "paraphrase": record.paraphrase_prompts,
        "neighborhood": record.neighborhood_prompts,
    }
    row = {}
    for kind, wanted in KINDS.items():
        successes, magnitudes, accuracies = [], [], []
        for prompt in prompts[kind]:
            new = score_alone(run, tokenizer, prompt, record.target_new, bos)
            true = score_alone(run, tokenizer, prompt, record.target_true, bos)
            want, other = (new, true) if wanted == 0 else (true, new)
            successes.append(other[0] > want[0])
            magnitudes.append(math.exp(-want[0]) - math.exp(-other[0]))
            accuracies.append(want[1])
        row[f"{kind}_success"] = sum(successes) / len(successes)
        row[f"{kind}_magnitude"] = sum(magnitudes) / len(magnitudes)
        row[f"{kind}_accuracy"] = sum(accuracies) / len(accuracies)
    return row


def with_tokenizer(models, tokenizer, name):
    """The tiny model of a name from ``MODELS``, with a tokenizer in either class."""
    if name.startswith("bridge"):
        return models(name)
    made = build(n_ctx=32, d_vocab=len(tokenizer), **LIKE[name.split("-")[1]])
    made.set_tokenizer(copy.deepcopy(tokenizer))
    return made
