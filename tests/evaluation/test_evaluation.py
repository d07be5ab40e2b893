"""Edits evaluated in batches, against plain loops over one text at a time."""

from __future__ import annotations

import copy
import math
import re
import sys
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
from helpers.bridges import tiny_config
from helpers.counterfact import (
    KINDS,
    RECORDS,
    TEXTS,
    ids_of,
    plain_loop,
    score_alone,
    with_tokenizer,
)
from helpers.state import state, state_of_model
from helpers.versions import MODELS, NEEDS_BRIDGE
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

import tl_backward as tlb
from tl_backward.editing import (
    StepNotFoundError,
    WeightEdit,
    fine_tune,
    forward_pass_shift,
    gradient_step,
)
from tl_backward.evaluation import (
    evaluate,
    fine_tuning,
    generate_texts,
    generation,
    gradient,
    n_gram_entropy,
    perplexity,
    score_targets,
    shift,
    table,
    tokenised,
    unedited,
)
from tl_backward.evaluation.scoring import Case
from tl_backward.factors import GradientFactors


@pytest.fixture(params=MODELS)
def model(models, tokenizer, request):
    return with_tokenizer(models, tokenizer, request.param)


@pytest.fixture
def precision(request):
    """In transformers, Llama's softmax and norms are in float32."""
    return 1e-6 if request.node.callspec.params["model"] == "bridge-llama" else 1e-10


def model_and_bridge(tokenizer, kind):
    """A model of transformers, and a bridge of a copy of it."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind, len(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config).double().eval()
    bridge = TransformerBridge.boot_transformers(
        kind, hf_model=copy.deepcopy(hf), tokenizer=tokenizer, dtype=torch.float64
    )
    return hf, bridge


def random_edits(model):
    """Another edit for each case: of another weight, another rank, or none."""
    generator = torch.Generator().manual_seed(0)
    sites = {(site.kind, site.layer): site for site in tlb.weight_sites(model)}
    chosen = {11: [("W_out", 1)], 22: [("W_in", 0), ("W_O", 1)], 33: []}

    def factors(site, n):
        u = torch.randn(n, site.d_in, generator=generator, dtype=torch.float64)
        v = torch.randn(n, site.d_out, generator=generator, dtype=torch.float64)
        return GradientFactors(u, 0.2 * v)

    return {
        case: WeightEdit(
            model, {sites[key].name: factors(sites[key], n) for n, key in enumerate(of, 1)}
        )
        for case, of in chosen.items()
    }


def columns(frame):
    return [name for name in frame if name.startswith(tuple(KINDS))]


# scores


@NEEDS_BRIDGE
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_are_those_of_transformers(tokenizer, kind, batch_size):
    hf, bridge = model_and_bridge(tokenizer, kind)
    facts = [
        (prompt, (record.target_new, record.target_true))
        for record in RECORDS
        for prompt in (record.prompt, *record.paraphrase_prompts, *record.neighborhood_prompts)
    ]
    cases = [tokenised(bridge, prompt, targets) for prompt, targets in facts]
    nll, predicted = score_targets(bridge, cases, batch_size=batch_size)
    for i, (prompt, targets) in enumerate(facts):
        for j, target in enumerate(targets):
            want, right = score_alone(lambda ids: hf(ids).logits, tokenizer, prompt, target)
            assert float(nll[i, j]) == pytest.approx(want, abs=1e-6 if kind == "llama" else 1e-10)
            assert bool(predicted[i, j]) == right


def test_a_target_is_predicted_when_each_of_its_tokens_is(model):
    """The greedy continuation is; with its last token, or its first, exchanged it is not."""
    prefix = ids_of(model, "The Eiffel Tower")
    greedy = list(prefix)
    for _ in range(3):
        with torch.no_grad():
            greedy.append(int(model(torch.tensor([greedy]))[0, -1].argmax()))
    first, *_, last = target = greedy[len(prefix) :]
    others = [[*target[:-1], last - 1], [first - 1, *target[1:]], target[:1], target[:2]]
    case = tokenised(model, "The Eiffel Tower", ["Paris"])._replace(targets=[target, *others])
    predicted = score_targets(model, [case]).predicted
    assert predicted.tolist() == [[True, False, False, True, True]]


def test_one_run_for_the_targets_that_it_can_serve(models, monkeypatch):
    """Targets of one token need the prefix alone, and a longer one serves those that begin it."""
    model, seen = models(MODELS[0]), []
    forward = type(model).forward

    def counted(self, tokens, *args, **kwargs):
        seen.append(list(tokens.shape))
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    prefix = [3, 1, 4]
    for targets, rows in [
        ([[5], [6]], [[1, 3]]),
        ([[5], [5, 6], [5, 6, 7]], [[1, 5]]),
        ([[5, 6], [7, 8]], [[2, 4]]),
    ]:
        seen.clear()
        score_targets(model, [Case(prefix, targets)])
        assert seen == rows


def test_hooks_on_the_model_take_part(model):
    cases = [tokenised(model, "The city", ["Paris"])]
    plain = score_targets(model, cases).nll
    edit = random_edits(model)[11]
    with tlb.sites.attached_hook_points(model), model.hooks(fwd_hooks=edit.fwd_hooks()):
        hooked = score_targets(model, cases).nll
    assert (plain - hooked).abs() > 1e-3
    want = score_targets(model, cases, edits=[edit], rows=[0]).nll
    torch.testing.assert_close(hooked, want, rtol=1e-10, atol=1e-10)


def test_an_edit_of_the_unembedding(model):
    """Scores read it at few positions only."""
    site = tlb.weight_sites(model, "W_U")[0]
    generator = torch.Generator().manual_seed(1)
    u, v = (
        torch.randn(1, d, generator=generator, dtype=torch.float64) for d in (site.d_in, site.d_out)
    )
    edit = WeightEdit(model, {site.name: GradientFactors(u, 0.1 * v)})
    cases = [tokenised(model, p, ["Rome and Paris", "Rome"]) for p in ("The city of", "London")]
    got = score_targets(model, cases, edits=[edit], rows=[0, -1]).nll
    with edit.applied():
        applied = score_targets(model, cases).nll
    plain = score_targets(model, cases).nll
    torch.testing.assert_close(got[0], applied[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got[1], plain[1], rtol=1e-10, atol=1e-10)
    assert (applied - plain)[0].abs().min() > 1e-3


@NEEDS_BRIDGE
def test_tokens_that_the_tokenizer_joins(models, monkeypatch, tmp_path):
    """Without pre-tokenizer, merges reach over the end of the prefix."""
    from transformers import PreTrainedTokenizerFast

    model = models("bridge-gpt2")
    bpe = Tokenizer(BPE())
    texts = ["of Paris", "of Paris of Paris", "the city"] * 3
    bpe.train_from_iterator(texts, BpeTrainer(vocab_size=30, show_progress=False))
    special = {"bos_token": "o", "pad_token": "o"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(tmp_path)
    joining = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    monkeypatch.setattr(model, "tokenizer", joining)
    whole = ids_of(model, "of Paris")
    assert whole[: len(ids_of(model, "of"))] != ids_of(model, "of")
    case = tokenised(model, "of", ["Paris", "city"])
    assert case.prefix == ids_of(model, "of")
    assert case.targets == [ids_of(model, " Paris"), ids_of(model, " city")]


def test_a_prefix_longer_than_the_context(model):
    prompt = "in " * 31 + "in"
    tokenised(model, prompt, ["Paris"])
    with pytest.raises(ValueError, match=r"has 32 tokens and a target has 2, more .* of 32"):
        tokenised(model, prompt, ["Paris", "Eiffel Tower"])
    with pytest.raises(ValueError, match="rows has 1 entries, but there are 2 prefixes"):
        score_targets(model, [tokenised(model, "in", ["Paris"])] * 2, rows=[-1])


def untimed(frame):
    """All of it but what differs from run to run."""
    return frame.drop(columns="seconds")


# many edits in one batch


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_batch_of_different_edits_gives_what_each_applied_edit_gives(
    model, precision, batch_size
):
    edits, before = random_edits(model), state(model)
    frame = evaluate(
        model, RECORDS, lambda m, r: edits[r.case_id], batch_size=batch_size, progress=False
    )
    assert state(model) == before
    assert frame["case_id"].tolist() == [11, 22, 33]
    assert frame["error"].isna().all()
    for record, row in zip(RECORDS, frame.to_dict("records"), strict=True):
        edit = edits[record.case_id]
        plain = plain_loop(model, model.tokenizer, record)
        with edit.applied():
            want = plain_loop(model, model.tokenizer, record)
        assert {name: row[name] for name in want} == pytest.approx(want, abs=precision)
        assert row["edit_norm"] == pytest.approx(float(edit.norm()), abs=1e-12)
        changed = abs(want["efficacy_magnitude"] - plain["efficacy_magnitude"])
        assert (changed > 1e-5) == bool(edit.factors)


@NEEDS_BRIDGE
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_unedited_model_against_transformers(tokenizer, kind):
    hf, bridge = model_and_bridge(tokenizer, kind)
    frame = evaluate(bridge, RECORDS, unedited, progress=False)
    for record, row in zip(RECORDS, frame.to_dict("records"), strict=True):
        want = plain_loop(lambda ids: hf(ids).logits, tokenizer, record)
        assert {name: row[name] for name in want} == pytest.approx(want, abs=1e-6)
    assert frame["edit_norm"].eq(0).all()


# methods


def test_methods_make_the_edits_of_the_editing_package(model):
    record, options = RECORDS[1], {"prepend_bos": False}
    target = " Rome and Berlin"
    _, cache = tlb.run_with_backward_cache(model, record.prompt, target, weights="W_in", **options)
    for method, want in [
        (
            shift(layer=1, lr=0.3),
            forward_pass_shift(model, record.prompt, target, layer=1, lr=0.3, **options),
        ),
        (
            shift(layer=0, lr=0.2, tokens="all"),
            forward_pass_shift(
                model, record.prompt, target, layer=0, lr=0.2, tokens="all", **options
            ),
        ),
        (
            fine_tuning(lr=0.1, layers=1, max_steps=2),
            fine_tune(model, record.prompt, target, lr=0.1, layers=1, max_steps=2, **options),
        ),
        (
            gradient(lr=0.1, weights=["W_in"], layers=0),
            gradient_step(cache, lr=0.1, layers=0, model=model),
        ),
    ]:
        edit = method(model, record)
        assert edit.factors.keys() == want.factors.keys() and edit.factors
        for name, g in want.factors.items():
            assert torch.equal(edit.factors[name].dense(), g.dense())
    assert unedited(model, record) is None


def test_an_edit_that_succeeds_is_seen_to(model):
    records = [replace(record, target_new="Paris") for record in RECORDS]
    method = fine_tuning(lr=0.2, weights="W_U", max_steps=100)
    frame = evaluate(model, records, method, progress=False)
    before = evaluate(model, records, unedited, progress=False)
    assert frame["efficacy_accuracy"].tolist() == [1, 1, 1]
    edited = before["efficacy_accuracy"] == 0
    assert edited.any() and (frame["edit_norm"] > 0).tolist() == edited.tolist()
    gains = frame["efficacy_magnitude"] - before["efficacy_magnitude"]
    assert (gains > 0).tolist() == edited.tolist()


# what goes wrong


def failing(error):
    def method(model, record):
        if record.case_id == 22:
            raise error
        return forward_pass_shift(model, record.prompt, " Paris", layer=1, lr=0.3)

    return method


def test_an_error_stays_in_its_row(model, tmp_path):
    before = state_of_model(model)  # a bridge's generate notes more in its attributes
    frame = evaluate(
        model,
        RECORDS,
        failing(RuntimeError("no idea")),
        generation=True,
        perplexity_texts=TEXTS,
        path=tmp_path / "errors",
        progress=False,
    )
    assert state_of_model(model) == before
    assert frame["error"].tolist()[1] == "RuntimeError: no idea"
    measured = [*columns(frame), "ngram_entropy", "perplexity", "edit_norm"]
    assert frame.loc[1, measured].isna().all()
    assert frame.loc[[0, 2], measured].notna().all(axis=None)
    assert frame.loc[[0, 2], "error"].isna().all()
    alone = evaluate(model, [RECORDS[0], RECORDS[2]], failing(None), progress=False)
    got = frame.loc[[0, 2], columns(frame)].reset_index(drop=True)
    pd.testing.assert_frame_equal(got, alone[columns(alone)], rtol=1e-6)


def test_records_that_all_fail(model):
    def method(model, record):
        raise ValueError("no")

    frame = evaluate(
        model, RECORDS, method, generation=True, perplexity_texts=TEXTS, progress=False
    )
    assert frame["error"].tolist() == ["ValueError: no"] * 3


def test_the_best_edit_of_a_search_without_success_is_measured(model):
    best = random_edits(model)[11]
    frame = evaluate(
        model, RECORDS, failing(StepNotFoundError("nothing found", best)), progress=False
    )
    assert frame["error"].tolist()[1] == "StepNotFoundError: nothing found"
    want = evaluate(model, RECORDS[1:2], lambda m, r: best, progress=False)
    pd.testing.assert_frame_equal(
        frame.loc[[1], columns(frame)].reset_index(drop=True), want[columns(want)], rtol=1e-6
    )


def test_a_record_that_is_too_long(model):
    long = replace(RECORDS[0], paraphrase_prompts=("in " * 40,))
    frame = evaluate(model, [RECORDS[2], long], unedited, progress=False)
    assert frame["error"].isna().tolist() == [True, False]
    assert re.search("ValueError: 'in in .* more than the model's context of 32", frame["error"][1])
    assert frame.loc[0, columns(frame)].notna().all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_error_of_the_method_goes_through(model, error):
    before = state(model)
    with pytest.raises(error):
        evaluate(model, RECORDS, failing(error()), progress=False)
    assert state(model) == before


def test_bad_input(model):
    before = state(model)
    with pytest.raises(TypeError, match=r"method returned 3 for case .* must return a WeightEdit"):
        evaluate(model, RECORDS, lambda m, r: 3, progress=False)
    with pytest.raises(ValueError, match="records is empty"):
        evaluate(model, [], unedited)
    with pytest.raises(ValueError, match="text_every must be at least 1, got 0"):
        evaluate(model, RECORDS, unedited, text_every=0)
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        evaluate(model, RECORDS, unedited, batch_size=0)
    assert state(model) == before


def test_an_active_dropout_is_refused(model):
    model.add_module("extra", torch.nn.Dropout(0.1))
    try:
        with pytest.raises(ValueError, match=r"training mode.* p=0\.1 of Dropout at extra"):
            evaluate(model, RECORDS, unedited)
    finally:
        del model.extra


# resuming


class Interrupted:
    """Makes the edits of some cases, notes which, and is interrupted at one call.

    Neither makes another method of it: ``pickle`` stores the edits only.
    """

    def __init__(self, edits: dict, fail_at: int | None = None) -> None:
        self.edits, self.fail_at, self.calls = edits, fail_at, []

    def __call__(self, model, record):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(record.case_id)
        return self.edits[record.case_id]

    def __getstate__(self):
        return {"edits": {case: edit.factors for case, edit in self.edits.items()}}


@pytest.mark.parametrize("fail_at", [1, 2])
def test_an_interrupted_evaluation_goes_on_where_it_was(models, tmp_path, fail_at):
    model = models("bridge-gpt2-compatibility")
    edits, path = random_edits(model), tmp_path / "table"
    first, second = Interrupted(edits, fail_at), Interrupted(edits)
    options = {"batch_size": 1, "progress": False, "perplexity_texts": TEXTS}
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, RECORDS, first, path=path, **options)
    assert len(pd.read_parquet(path)) == fail_at
    resumed = evaluate(model, RECORDS, second, path=path, **options)
    assert sorted(first.calls + second.calls) == [11, 22, 33]
    at_once = evaluate(model, RECORDS, Interrupted(edits), **options)
    pd.testing.assert_frame_equal(untimed(resumed), untimed(at_once), check_dtype=False)
    on_disk = pd.read_parquet(path).sort_values("record", ignore_index=True)
    pd.testing.assert_frame_equal(on_disk, resumed, check_dtype=False)


@pytest.mark.parametrize(
    ("others", "what"),
    [
        ({"records": RECORDS[:2]}, "other records .number: 3 then, 2 now"),
        ({"method": shift(layer=1, lr=-0.3)}, "other fn .method.lr: 0.3 then, -0.3 now"),
        ({"method": shift(layer=-2, lr=0.3)}, "other fn .method.layer: 1 then, -2 now"),
        ({"method": unedited}, 'other fn .method.__qualname__: ".*method" then, "unedited" now'),
        ({"generation": True}, "other fn .*generation: false then, true now"),
        ({"perplexity_texts": TEXTS[:1]}, "other fn .*perplexity_texts"),
        ({"text_every": 2}, "other fn .*has_texts.every: 1 then, 2 now"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_the_results_of_another_evaluation_are_refused(models, tmp_path, others, what):
    model = models(MODELS[-1])
    given = {"records": RECORDS, "method": shift(layer=1, lr=0.3), "perplexity_texts": TEXTS}
    given |= {"path": tmp_path, "progress": False}
    evaluate(model, **given)
    with pytest.raises(ValueError, match=what):
        evaluate(model, **given | others)


def test_the_results_of_an_edited_model_are_refused(models, tmp_path):
    model = models(MODELS[-1])
    evaluate(model, RECORDS, unedited, path=tmp_path, progress=False)
    edit = random_edits(model)[11]
    with edit.applied(), pytest.raises(ValueError, match=r"other model \(weights\.\S+\)"):
        evaluate(model, RECORDS, unedited, path=tmp_path, progress=False)
    evaluate(model, RECORDS, unedited, path=tmp_path, progress=False)


def test_progress_is_shown(models, capsys):
    model = models("bridge-gpt2-compatibility")
    evaluate(model, RECORDS, unedited)
    assert "3/3" in capsys.readouterr().err


def test_the_use_of_statistics_makes_no_others_of_them(models, tokenizer, tmp_path):
    """What they compute once and keep has no part in what the folder knows."""
    model = with_tokenizer(models, tokenizer, MODELS[-1])
    statistics = tlb.key_statistics(model, TEXTS, 1)
    method = shift(layer=1, lr=0.3, key="whitened", statistics=statistics)
    first = evaluate(model, RECORDS, method, path=tmp_path, progress=False)
    again = evaluate(model, RECORDS, method, path=tmp_path, progress=False)
    pd.testing.assert_frame_equal(first, again)


# BOS


@pytest.fixture(params=["tokenizer", "tokenizer_with_bos"])
def transformers_alone(request):
    """A model of transformers and its tokenizer, a bridge, and whether the tokenizer adds BOS."""
    tokenizer = request.getfixturevalue(request.param)
    return *model_and_bridge(tokenizer, "gpt2"), tokenizer, request.param == "tokenizer_with_bos"


def same_row(got, want):
    assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-6, abs=1e-9)


@NEEDS_BRIDGE
def test_texts_begin_as_the_tokenizer_has_them(transformers_alone):
    """The table is that of transformers alone, in which nothing is said of BOS."""
    hf, bridge, tokenizer, bos = transformers_alone

    def run(ids):
        return hf(ids).logits

    frame = evaluate(bridge, RECORDS, unedited, perplexity_texts=TEXTS, progress=False)
    assert frame["prepend_bos"].tolist() == [bos] * len(RECORDS)
    assert table({"unedited": frame})["records", "bos"].tolist() == ["yes" if bos else "no"]
    for record, (_, row) in zip(RECORDS, frame.iterrows(), strict=True):
        want = plain_loop(run, tokenizer, record, bos=True)
        want["perplexity"] = perplexity_alone(run, tokenizer, TEXTS, bos=True)
        same_row(row, want)


@NEEDS_BRIDGE
def test_texts_are_generated_as_the_tokenizer_begins_them(transformers_alone, monkeypatch):
    _, bridge, tokenizer, _ = transformers_alone
    given = []

    def keep(model, tokens, n_new, **options):
        given.append(tokens.tolist())
        return tokens

    monkeypatch.setattr(generation, "generate_tokens", keep)
    assert generate_texts(bridge, ["Rome and"]) == ["Rome and"]
    assert given.pop() == [tokenizer("Rome and")["input_ids"]]
    for bos in (True, False):
        assert generate_texts(bridge, ["Rome and"], prepend_bos=bos) == ["Rome and"]
        assert given.pop() == [[tokenizer.bos_token_id] * bos + ids_of(bridge, "Rome and")]


@NEEDS_BRIDGE
@pytest.mark.parametrize("bos", [True, False])
def test_whether_texts_begin_with_bos_can_be_said(transformers_alone, bos):
    hf, bridge, tokenizer, own = transformers_alone
    first = [tokenizer.bos_token_id] * bos

    def run(ids):
        return hf(torch.tensor([first + ids[0].tolist()])).logits[:, bos:]

    options = {"prepend_bos": bos, "perplexity_texts": TEXTS, "progress": False}
    frame = evaluate(bridge, RECORDS, unedited, **options)
    assert frame["prepend_bos"].tolist() == [bos] * len(RECORDS)
    for record, (_, row) in zip(RECORDS, frame.iterrows(), strict=True):
        same_row(row, plain_loop(run, tokenizer, record))
    own_frame = evaluate(bridge, RECORDS, unedited, perplexity_texts=TEXTS, progress=False)
    assert untimed(own_frame).equals(untimed(frame)) == (bos == own)


@NEEDS_BRIDGE
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    ("method", "edit"),
    [
        (shift(layer=1, lr=0.5), partial(forward_pass_shift, layer=1, lr=0.5)),
        (fine_tuning(lr=0.1, max_steps=2), partial(fine_tune, lr=0.1, max_steps=2)),
        (gradient(lr=0.1), None),
    ],
    ids=["shift", "fine_tuning", "gradient"],
)
def test_a_method_edits_the_texts_that_are_measured(transformers_alone, method, edit, bos):
    _, bridge, tokenizer, own = transformers_alone
    record = RECORDS[0]
    ids = tokenizer(record.prompt, add_special_tokens=False)["input_ids"]
    prompt = [tokenizer.bos_token_id] * bos + ids
    (target,) = tokenizer(" Paris", add_special_tokens=False)["input_ids"]
    if edit is None:
        _, cache = tlb.run_with_backward_cache(bridge, prompt, target, weights="W_out")
        want = gradient_step(cache, lr=0.1, model=bridge)
    else:
        want = edit(bridge, prompt, target)
    frame = evaluate(bridge, [record], method, prepend_bos=bos, progress=False)
    assert frame["edit_norm"].item() == pytest.approx(float(want.norm()), rel=1e-9)
    by_itself = method(bridge, record)
    assert (float(by_itself.norm()) == pytest.approx(float(want.norm()), rel=1e-9)) == (bos == own)


def test_only_a_method_that_takes_it_is_told_of_bos(model):
    told = []

    def takes_it(model, record, *, prepend_bos):
        told.append(prepend_bos)

    for method in (takes_it, lambda model, record: told.append(None)):
        evaluate(model, RECORDS[:1], method, prepend_bos=True, progress=False)
    assert told == [True, None]


# perplexity


@torch.no_grad()
def perplexity_alone(run, tokenizer, texts, longest=32, bos=False):
    each = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, add_special_tokens=bos)["input_ids"][:longest])
        each.append(torch.nn.functional.cross_entropy(run(ids[None])[0, :-1], ids[1:]).exp())
    return float(sum(each) / len(each))


@NEEDS_BRIDGE
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_perplexity_is_that_of_transformers_loss(tokenizer, kind):
    hf, bridge = model_and_bridge(tokenizer, kind)
    each = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        each.append(math.exp(hf(ids, labels=ids).loss.item()))
    assert float(perplexity(bridge, TEXTS)) == pytest.approx(sum(each) / len(each), rel=1e-5)


@pytest.mark.parametrize("tokens_per_pass", [1, 25, 1000])
def test_perplexity_under_many_edits(model, precision, monkeypatch, tokens_per_pass):
    monkeypatch.setattr(sys.modules[perplexity.__module__], "TOKENS_PER_PASS", tokens_per_pass)
    edits, before = list(random_edits(model).values()), state(model)
    got = perplexity(model, TEXTS, edits)
    assert state(model) == before
    for edit, value in zip(edits, got.tolist(), strict=True):
        with edit.applied():
            want = perplexity_alone(model, model.tokenizer, TEXTS)
        assert value == pytest.approx(want, rel=precision)
    assert (got[:2] - got[2]).abs().min() > 1e-2
    assert torch.equal(got[2:], perplexity(model, TEXTS))


def test_long_texts_are_cut(model, precision, monkeypatch):
    long = ["London and Rome " * 30]
    want = perplexity_alone(model, model.tokenizer, long)
    assert float(perplexity(model, long)) == pytest.approx(want, rel=precision)
    monkeypatch.setattr(sys.modules[perplexity.__module__], "MAX_TOKENS", 6)
    cut = perplexity_alone(model, model.tokenizer, long, 6)
    assert float(perplexity(model, long)) == pytest.approx(cut, rel=precision)
    assert cut != pytest.approx(want, rel=1e-3)


def test_texts_without_perplexity(model):
    with pytest.raises(ValueError, match="texts is empty"):
        perplexity(model, [])
    with pytest.raises(ValueError, match="texts: 'in' is one token"):
        perplexity(model, ["Rome and Paris", "in"])


@pytest.mark.parametrize(("every", "measured"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [0])])
def test_texts_of_some_of_the_records(model, precision, every, measured):
    edits = random_edits(model)
    frame = evaluate(
        model,
        RECORDS,
        lambda m, r: edits[r.case_id],
        generation=True,
        perplexity_texts=TEXTS,
        text_every=every,
        progress=False,
    )
    assert frame.index[frame["perplexity"].notna()].tolist() == measured
    assert frame.index[frame["ngram_entropy"].notna()].tolist() == measured
    want = perplexity(model, TEXTS, [edits[RECORDS[i].case_id] for i in measured]).tolist()
    assert frame.loc[measured, "perplexity"].tolist() == pytest.approx(want, rel=precision)


# generation


@torch.no_grad()
def greedy(model, prompt, n):
    ids = ids_of(model, prompt)
    while len(ids) < n:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return model.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_texts_of_many_edits_are_those_of_each_applied(model, monkeypatch, batch_size):
    monkeypatch.setattr(generation, "TOP_K", 1)
    monkeypatch.setattr(generation, "MAX_TOKENS", 9)
    edits, before = list(random_edits(model).values()), state(model)
    pairs = [(p, row) for row, record in enumerate(RECORDS) for p in record.generation_prompts]
    prompts, rows = zip(*pairs, strict=True)
    texts = generate_texts(model, prompts, edits=edits, rows=rows, batch_size=batch_size)
    assert state(model) == before
    for prompt, row, text in zip(prompts, rows, texts, strict=True):
        with edits[row].applied():
            assert text == greedy(model, prompt, 9)
    assert texts != generate_texts(model, prompts)


def test_each_token_is_one_of_the_five_most_probable(model, monkeypatch):
    (text,) = generate_texts(model, ["The city of"])
    ids = ids_of(model, "The city of")
    assert text.startswith("The city of")
    written = []

    def keep(*args, **kwargs):
        written.append(generate(*args, **kwargs))
        return written[-1]

    generate = generation.generate_tokens
    monkeypatch.setattr(generation, "generate_tokens", keep)
    generate_texts(model, ["The city of"] * 3)
    tokens = written[0].clone()  # HookedTransformer makes it in inference mode
    assert tokens.shape == (3, 32) and tokens[:, : len(ids)].tolist() == [ids] * 3
    logits = model(tokens)[:, len(ids) - 1 : -1]
    ranks = (logits > logits.gather(-1, tokens[:, len(ids) :, None])).sum(-1)
    assert int(ranks.max()) <= 4 and int(ranks.max()) > 0
    assert len(set(map(tuple, tokens.tolist()))) > 1


def test_the_entropy_of_a_record_is_the_mean_over_its_texts(model):
    edits = random_edits(model)
    frame = evaluate(model, RECORDS, lambda m, r: edits[r.case_id], generation=True, progress=False)
    again = evaluate(model, RECORDS, lambda m, r: edits[r.case_id], generation=True, progress=False)
    pd.testing.assert_frame_equal(untimed(frame), untimed(again))
    # evaluate takes the longest records first
    order = sorted(range(3), key=lambda i: -len(RECORDS[i].prompt))
    pairs = [(p, row) for row, i in enumerate(order) for p in RECORDS[i].generation_prompts]
    texts = generate_texts(
        model,
        [prompt for prompt, _ in pairs],
        edits=[edits[RECORDS[i].case_id] for i in order],
        rows=[row for _, row in pairs],
    )
    for row, i in enumerate(order):
        of_record = [n_gram_entropy(t) for t, (_, r) in zip(texts, pairs, strict=True) if r == row]
        assert frame["ngram_entropy"][i] == pytest.approx(sum(of_record) / len(of_record))


def test_no_prompts_and_wrong_rows(model):
    assert generate_texts(model, []) == []
    with pytest.raises(ValueError, match="rows has 1 entries, but there are 2 prompts"):
        generate_texts(model, ["The", "London"], rows=[0])
