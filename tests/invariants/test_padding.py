"""A batch gives each example what it gets alone, however its padding is told."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.texts import TEXTS
from helpers.versions import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

import tl_backward as tlb

BOS, PAD, TARGET = 0, 9, 5
WORDS = st.integers(1, 20).filter(lambda token: token != PAD)
SIDES = st.sampled_from(["left", "right"])
EXTRA = st.integers(0, 4)
FORMS = {
    "tensors": lambda encoding: encoding,
    "arrays": lambda encoding: {name: value.numpy() for name, value in encoding.items()},
    "lists": lambda encoding: {name: value.tolist() for name, value in encoding.items()},
    "a BatchEncoding": BatchEncoding,
}


def texts(tokens):
    return st.lists(st.lists(tokens, min_size=1, max_size=7), min_size=1, max_size=4)


def padded(rows, pad, side, extra):
    """The rows in one tensor, and its mask, ``extra`` pads wider than the longest."""
    width = max(map(len, rows)) + extra
    fill = [[pad] * (width - len(row)) for row in rows]
    zeros = [[0] * len(of_row) for of_row in fill]
    ones = [[1] * len(row) for row in rows]
    if side == "left":
        rows, fill = fill, rows
        ones, zeros = zeros, ones
    return (
        torch.tensor([row + more for row, more in zip(rows, fill, strict=True)]),
        torch.tensor([row + more for row, more in zip(ones, zeros, strict=True)]),
    )


@pytest.fixture(scope="module")
def with_own_pad(boot):
    """A model whose pad token is nothing else."""
    model = boot("gpt2")
    model.tokenizer.pad_token = model.tokenizer.convert_ids_to_tokens(PAD)
    assert model.tokenizer.pad_token_id == PAD != model.tokenizer.eos_token_id
    return model


@pytest.fixture(scope="module")
def with_shared_pad(boot):
    """A model whose pad token also begins and ends texts, as GPT-2's does."""
    model = boot("gpt2")
    assert model.tokenizer.pad_token_id == model.tokenizer.bos_token_id == BOS
    return model


def assert_each_is_alone(model, rows, side, prompt, **arguments):
    """Losses and a gradient, against autograd's of every row alone."""
    _, cache = tlb.run_with_backward_cache(
        model, prompt, TARGET, padding_side=side, weights="W_out", **arguments
    )
    (site,) = tlb.weight_sites(model, "W_out", 1)
    for b, row in enumerate(rows):
        one = cache.example(b) if isinstance(cache.tokens, list) else cache
        assert one.tokens.tolist() == row
        alone = -model(torch.tensor([row]))[0, -1].log_softmax(-1)[TARGET]
        (gradient,) = torch.autograd.grad(alone, site.parameter)
        torch.testing.assert_close(one.loss, alone.detach(), rtol=1e-10, atol=0)
        error = site.to_parameter_layout(one[site.name].dense()) - gradient
        assert error.norm() <= 1e-9 * gradient.norm()


@given(rows=texts(WORDS), side=SIDES, extra=EXTRA, as_array=st.booleans())
@settings(max_examples=20, deadline=None)
def test_pads_that_are_nothing_else_are_no_text(with_own_pad, rows, side, extra, as_array):
    """At either end, whichever side texts are padded on for the run."""
    tokens, _ = padded(rows, PAD, side, extra)
    prompt = tokens.numpy() if as_array else tokens
    for run_side in ("left", "right"):
        assert_each_is_alone(with_own_pad, rows, run_side, prompt)


@given(rows=texts(st.integers(0, 20)), side=SIDES, extra=EXTRA, form=st.sampled_from([*FORMS]))
@settings(max_examples=20, deadline=None)
def test_an_attention_mask_tells_pads_from_text(with_shared_pad, rows, side, extra, form):
    """Also where texts begin or end with the token that pads them."""
    tokens, mask = padded(rows, BOS, side, extra)
    encoding = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": 0 * tokens}
    assert_each_is_alone(with_shared_pad, rows, side, FORMS[form](encoding))


@given(rows=texts(WORDS), side=SIDES, extra=EXTRA, bos=st.booleans())
@settings(max_examples=20, deadline=None)
def test_pads_that_may_be_text_are_cut_with_a_warning(with_shared_pad, rows, side, extra, bos):
    """``prepend_bos`` says whether one of those on the left is the text's own."""
    rows = [[BOS, *row] for row in rows] if bos else rows
    tokens, mask = padded(rows, BOS, side, extra)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_each_is_alone(with_shared_pad, rows, side, tokens, prepend_bos=bos)
    assert bool(caught) == (not mask.all() or (bos and side == "left"))
    assert all("'<bos>' at the" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "how",
    [{"padding": "max_length", "max_length": 25}, {"padding": True, "pad_to_multiple_of": 29}],
)
@pytest.mark.parametrize("n", [1, 2])
def test_what_a_tokenizer_pads_beyond_the_longest_text(with_shared_pad, side, how, n):
    model, tokenizer = with_shared_pad, with_shared_pad.tokenizer
    encoding = tokenizer(TEXTS[:n], padding_side=side, return_tensors="pt", **how)
    assert not encoding.attention_mask.any(0).all()
    rows = tokenizer(TEXTS[:n]).input_ids
    assert_each_is_alone(model, rows, side, encoding)
    with pytest.warns(UserWarning, match="is treated as padding.* tokenizer's whole output"):
        assert_each_is_alone(model, rows, side, encoding.input_ids)


def test_pads_on_the_other_side_are_named(with_shared_pad):
    tokens, _ = padded([[3, 4], [5, 6, 7]], BOS, "left", 2)
    with pytest.warns(
        UserWarning, match="at the beginning of row 0, 1 is treated as text.* 'right'"
    ):
        _, cache = tlb.run_with_backward_cache(
            with_shared_pad, tokens, TARGET, padding_side="right"
        )
    assert [of.tolist() for of in cache.tokens] == tokens.tolist()


def test_a_list_is_taken_as_it_is(with_own_pad):
    """And a token that is padding and nothing else is named."""
    rows = [[3, 4, PAD], [5, 6, 7]]
    with pytest.warns(UserWarning, match=r"pad token .* at an end of row 0 is treated as text"):
        assert_each_is_alone(with_own_pad, rows, "right", rows)


@pytest.mark.parametrize("name", MODELS)
def test_a_mask_needs_no_tokenizer(models, name):
    model = models(name)
    rows = [[3, 4], [5, 6, 7]]
    tokens, mask = padded(rows, 11, "right", 2)
    encoding = {"input_ids": tokens, "attention_mask": mask}
    losses, _ = tlb.run_with_backward_cache(model, encoding, TARGET, padding_side="right")
    for loss, row in zip(losses, rows, strict=True):
        alone = -model(torch.tensor([row]))[0, -1].log_softmax(-1)[TARGET]
        torch.testing.assert_close(loss, alone.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attention_mask": [[1, 0, 1]]}, ValueError, "attention_mask of row 0 has a gap"),
        ({"attention_mask": [[0, 2, 1]]}, ValueError, "of row 0 must hold a 0 or 1 for each"),
        ({"attention_mask": [[1, 1]]}, ValueError, "of row 0 must hold a 0 or 1 for each"),
        ({"attention_mask": [[1] * 3] * 2}, ValueError, "has 2 rows, but input_ids has 1"),
        ({"attention_mask": [[0, 0, 0]]}, ValueError, r"prompt is empty \(example 0\)"),
        ({"token_type_ids": [[0, 0, 1]]}, NotImplementedError, "nonzero token_type_ids"),
        ({"input_ids": [[3, 4, 99999]]}, ValueError, "outside the vocabulary"),
    ],
)
def test_a_malformed_encoding_is_refused(with_shared_pad, changes, error, message, unchecked):
    encoding = {"input_ids": [[3, 4, 5]], "attention_mask": [[1, 1, 1]]} | changes
    with pytest.raises(error, match=message):
        tlb.run_with_backward_cache(with_shared_pad, encoding, TARGET)


def test_a_tensor_of_pads_alone_holds_no_text(with_own_pad):
    with pytest.raises(ValueError, match=r"prompt is empty \(example 1\)"):
        tlb.run_with_backward_cache(with_own_pad, torch.tensor([[3, PAD], [PAD, PAD]]), TARGET)


def test_an_edit_reads_padded_prompts_as_a_capture_does(with_shared_pad):
    """Its prompts may be padded on the left, though it runs them padded on the right."""
    model = with_shared_pad
    rows = [[3, 4], [5, 6, 7]]
    tokens, mask = padded(rows, BOS, "left", 1)
    encoding = {"input_ids": tokens, "attention_mask": mask}
    model.tokenizer.padding_side = "left"
    try:
        with pytest.warns(UserWarning, match="treated as padding"):
            of_tensor = tlb.fine_tune(model, tokens, TARGET, lr=0.1, max_steps=1, prepend_bos=False)
    finally:
        model.tokenizer.padding_side = "right"
    for edit in (of_tensor, tlb.fine_tune(model, encoding, TARGET, lr=0.1, max_steps=1)):
        want = tlb.fine_tune(model, rows, TARGET, lr=0.1, max_steps=1)
        assert edit.report == want.report
