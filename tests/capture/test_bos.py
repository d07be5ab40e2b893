"""Whether texts begin with a BOS token, which TransformerLens and the tokenizer see differently."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.families import make
from helpers.hooked import build
from helpers.texts import PROMPT, TARGET, TEXTS
from helpers.versions import CLASSES, NEEDS_BRIDGE
from typer.testing import CliRunner

import tl_backward as tlb
from tl_backward.capture.bos import prepends_bos

RECORDS = [
    {
        "case_id": case,
        "requested_rewrite": {
            "prompt": prompt,
            "subject": subject,
            "target_new": {"str": "Paris"},
            "target_true": {"str": "Rome"},
            "relation_id": "P1",
        },
    }
    for case, prompt, subject in (
        (1, "{} plays for the city of", "Lionel Messi"),
        (2, "{} is located in", "The Eiffel Tower"),
    )
]


@pytest.fixture(params=["tokenizer", "tokenizer_with_bos"])
def own(request):
    """A tokenizer, and whether it puts a BOS before texts by itself."""
    return request.getfixturevalue(request.param), request.param == "tokenizer_with_bos"


@pytest.fixture(params=CLASSES)
def model(request, own):
    """A model with that tokenizer, as TransformerLens rebuilds it."""
    tokenizer, _ = own
    if request.param == "bridge":
        return make("gpt2", tokenizer)
    model = build(d_vocab=len(tokenizer))
    model.set_tokenizer(tokenizer)
    return model


@pytest.fixture
def bridge(own):
    return make("gpt2", own[0])


def test_the_default_is_the_tokenizers_own(model, own):
    tokenizer, bos = own
    assert (tokenizer(PROMPT)["input_ids"][0] == tokenizer.bos_token_id) is bos
    assert model.cfg.default_prepend_bos
    assert prepends_bos(model) is bos
    assert prepends_bos(model, True) is True and prepends_bos(model, False) is False


def test_without_a_tokenizer_there_is_no_bos(models):
    name = "hooked-gpt2" if "hooked" in CLASSES else "bridge-gpt2"
    model = models(name)
    tokenizer, model.tokenizer = model.tokenizer, None
    try:
        assert prepends_bos(model) is False
    finally:
        model.tokenizer = tokenizer


@NEEDS_BRIDGE
def test_a_tokenizer_whose_files_are_gone_is_asked_about(bridge, own, monkeypatch):
    monkeypatch.setattr(bridge.tokenizer, "name_or_path", "no/such-tokenizer")
    if own[1] or bridge.tokenizer("a")["input_ids"][1:]:
        with pytest.raises(ValueError, match=r"cannot tell.* pass prepend_bos=True or False"):
            prepends_bos(bridge)
    assert prepends_bos(bridge, False) is False


@NEEDS_BRIDGE
@pytest.mark.parametrize("asked", [None, True, False])
def test_key_statistics(bridge, own, asked, tmp_path):
    """Against the inputs of transformers' module, for the ids of transformers' tokenizer."""
    tokenizer, bos = own
    bos = bos if asked is None else asked
    texts, path = TEXTS[:2], tmp_path / "statistics.safetensors"
    got = tlb.key_statistics(bridge, texts, layer=1, prepend_bos=asked, path=path)
    seen = []
    mlp = bridge.blocks[1].mlp.original_component
    handle = mlp.c_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        bridge(torch.tensor([[tokenizer.bos_token_id] * bos + ids]))
    handle.remove()
    x = torch.cat(seen).detach()
    assert got.prepend_bos is bos and got.n_tokens == len(x)
    torch.testing.assert_close(
        got.second_moments["blocks.1.mlp.W_out"], x.mT @ x / len(x), rtol=1e-6, atol=1e-8
    )
    again = tlb.key_statistics(bridge, texts, layer=1, prepend_bos=bos, path=path)
    assert again.prepend_bos is bos
    with pytest.raises(ValueError, match=f"prepend_bos={bos}, but texts now begin with"):
        tlb.key_statistics(bridge, texts, layer=1, prepend_bos=not bos, path=path)
    assert tlb.key_statistics(bridge, [[3, 1]], layer=1).prepend_bos is None


@NEEDS_BRIDGE
@pytest.mark.parametrize("asked", [None, True, False])
def test_experiments(bridge, own, asked):
    from tl_backward import analysis

    tokenizer, bos = own
    bos = bos if asked is None else asked
    options = {"prepend_bos": asked, "progress": False}
    frame = analysis.gradient_rank(bridge, RECORDS, layers=0, **options)
    prompts = [
        rewrite["prompt"].format(rewrite["subject"])
        for rewrite in (record["requested_rewrite"] for record in RECORDS)
    ]
    lengths = [len(tokenizer(p, add_special_tokens=False)["input_ids"]) + bos for p in prompts]
    assert frame.groupby("record")["n_tokens"].first().tolist() == lengths
    pairs = analysis.fact_similarity(bridge, RECORDS, layers=0, **options)
    smallest = analysis.smallest_edit(
        bridge, RECORDS[:1], layers=1, methods=["shift"], texts=TEXTS[1:2], **options
    )
    for table in (frame, pairs, smallest):
        assert table["prepend_bos"].eq(bos).all()
    ids = tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]
    loss = bridge(torch.tensor([[tokenizer.bos_token_id] * bos + ids]), return_type="loss")
    assert smallest["perplexity_before"].tolist() == pytest.approx([loss.exp().item()])


@NEEDS_BRIDGE
@pytest.mark.parametrize(("option", "asked"), [(None, None), ("--bos", True), ("--no-bos", False)])
def test_the_command_line(bridge, own, option, asked, monkeypatch, tmp_path):
    from tl_backward.__main__ import app

    monkeypatch.setattr("tl_backward.demo_model.load_demo_model", lambda: bridge)
    bos = own[1] if asked is None else asked
    options = [] if option is None else [option]
    path = tmp_path / "lens.json"
    command = ["lens", PROMPT, "--target", TARGET, "--json", str(path), *options]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    said = f"texts {'with' if bos else 'without'} a BOS token"
    assert said in " ".join(shown.output.split())
    written = json.loads(path.read_text())
    assert written["prepend_bos"] is bos
    assert (written["str_tokens"][0] == "<bos>") is bos
    command = ["edit", PROMPT, "--target", TARGET, "--layer", "1", "--lr", "1000", *options]
    shown = CliRunner().invoke(app, [*command, "--save", str(tmp_path / "edit")])
    assert shown.exit_code == 0, shown.output
    assert said in " ".join(shown.output.split())
    saved = tlb.WeightEdit.load(tmp_path / "edit", bridge)
    want = tlb.forward_pass_shift(bridge, PROMPT, TARGET, layer=1, lr=1000.0, prepend_bos=bos)
    assert float(saved.norm()) == pytest.approx(float(want.norm()))
