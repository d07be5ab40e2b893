"""Several prompts at once, with any loss: each gets what autograd gives it alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.families import make
from helpers.gradients import gradient_of_parameter
from helpers.state import state
from helpers.texts import PROMPT, TARGET
from helpers.versions import MODELS, NEEDS_BRIDGE, TL_VERSION
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

import tl_backward as tlb
from tl_backward.capture.batch import Batch
from tl_backward.capture.objectives import Objective
from tl_backward.sites import attached_hook_points

PROMPTS = [[3, 17, 3, 9, 8], [6, 2], [12, 1, 20, 6, 9, 4, 13]]
OTHERS = [[4, 1, 7], [5], [2, 2, 8, 1]]  # the other run, of the KL divergence
SIDES = pytest.mark.parametrize("side", ["right", "left"])


@pytest.fixture(params=MODELS)
def model(models, request):
    """Exact in float64, but transformers' Llama computes its softmax in float32 in any dtype.

    In float64 this makes -inf of its mask, and nan of the rows of padding on the left.
    """
    if request.param == "bridge-llama":
        return request.getfixturevalue("boot")("llama", torch.float32)
    return models(request.param)


def tolerance(model):
    return 1e-10 if model.cfg.dtype == torch.float64 else 1e-5


def other_logits(model):
    with torch.no_grad():
        return [model(torch.tensor([text])) for text in OTHERS]


def quadratic(logits, tokens):
    return logits.square().mean((1, 2)) + (logits[:, -1] * tokens[:, :1]).sum(-1)


# For each loss: what is passed, and the same for one example written out, from [pos, d_vocab]
# logits of the text that follows.
ANSWERS, DISTRACTORS = [5, 11, 2], [1, 3, 9]
LONG = [[5], [7, 9, 1], [3, 2]]
CASES = {
    "target": (
        lambda model: {"target": ANSWERS},
        lambda model, b, logits: -logits[-1].log_softmax(-1)[ANSWERS[b]],
        PROMPTS,
    ),
    "one target for all": (
        lambda model: {"target": 7},
        lambda model, b, logits: -logits[-1].log_softmax(-1)[7],
        PROMPTS,
    ),
    "targets of several tokens": (
        lambda model: {"target": LONG},
        lambda model, b, logits: (
            -sum(logits[len(PROMPTS[b]) - 1 + j].log_softmax(-1)[t] for j, t in enumerate(LONG[b]))
            / len(LONG[b])
        ),
        [text + target for text, target in zip(PROMPTS, LONG, strict=True)],
    ),
    "logit difference": (
        lambda model: {"loss_fn": tlb.logit_diff(ANSWERS, torch.tensor(DISTRACTORS))},
        lambda model, b, logits: logits[-1, ANSWERS[b]] - logits[-1, DISTRACTORS[b]],
        PROMPTS,
    ),
    "KL divergence": (
        lambda model: {"loss_fn": tlb.kl_divergence(other_logits(model))},
        lambda model, b, logits: torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=other_logits(model)[b][0, -1]),
            torch.distributions.Categorical(logits=logits[-1]),
        ),
        PROMPTS,
    ),
    "the model's own loss": (
        lambda model: {"loss_fn": tlb.lm_cross_entropy_loss},
        lambda model, b, logits: torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(PROMPTS[b][1:])
        ),
        PROMPTS,
    ),
    "any function": (
        lambda model: {"loss_fn": quadratic},
        lambda model, b, logits: logits.square().mean() + PROMPTS[b][0] * logits[-1].sum(),
        PROMPTS,
    ),
}


def assert_close(got, want, tolerance, name):
    """Relative to the norm; a text of two tokens has attention matrices without a gradient."""
    assert got.shape == want.shape, name
    assert (got - want).norm() <= tolerance * want.norm(), name


@pytest.fixture
def padded_model(model, side):
    if TL_VERSION == 3 and getattr(model, "compatibility_mode", False) and side == "left":
        with pytest.raises(ValueError, match=r"VJPs at .* not finite.*try padding_side='right'"):
            tlb.run_with_backward_cache(model, PROMPTS, 5, padding_side=side)
        pytest.skip("TransformerLens 3: padding on the left has nan gradients in this mode")
    return model


@SIDES
@pytest.mark.parametrize("case", CASES)
def test_a_batch_gives_each_example_its_gradient(padded_model, case, side):
    model = padded_model
    arguments, written_out, texts = CASES[case]
    losses, cache = tlb.run_with_backward_cache(
        model, PROMPTS, padding_side=side, **arguments(model)
    )
    assert losses.shape == (3,) and torch.equal(losses, cache.loss)
    sites = tlb.weight_sites(model)
    parameters = [site.parameter for site in sites]
    total = dict.fromkeys(cache, 0)
    for b, text in enumerate(texts):
        loss = written_out(model, b, model(torch.tensor([text]))[0])
        assert abs(losses[b] - loss) <= tolerance(model) * abs(loss)
        one = cache.example(b)
        assert torch.equal(one.loss, losses[b])
        assert (
            one.tokens.tolist()
            == text[: len(PROMPTS[b]) + max(0, len(one.target_ids.reshape(-1)) - 1)]
        )
        for site, gradient in zip(sites, torch.autograd.grad(loss, parameters), strict=True):
            got = gradient_of_parameter(sites, one, site)
            assert_close(got, gradient, tolerance(model), site.name)
            total[site.name] = total[site.name] + gradient
    for site in sites:
        got = gradient_of_parameter(sites, cache, site)
        assert_close(got, total[site.name], tolerance(model), site.name)


def assert_same(one, alone, tolerance):
    """Two caches of one prompt."""
    for field in ("tokens", "positions", "target_ids", "target_positions"):
        assert torch.equal(getattr(one, field), getattr(alone, field)), field
    assert one.str_tokens == alone.str_tokens
    assert abs(one.loss - alone.loss) <= tolerance * abs(alone.loss)
    pairs = [
        *((name, one[name].inputs, g.inputs) for name, g in alone.items()),
        *((name, one[name].vjps, g.vjps) for name, g in alone.items()),
        *((name, one.residual.vjps[name], vjps) for name, vjps in alone.residual.vjps.items()),
        *(
            (name, one.residual.activations[name], x)
            for name, x in alone.residual.activations.items()
        ),
    ]
    for name, ours, theirs in pairs:
        assert_close(ours, theirs, tolerance, name)


@SIDES
@pytest.mark.parametrize("positions", [None, -1, slice(-2, None), [0, 1]], ids=str)
def test_an_example_is_what_it_is_alone(padded_model, side, positions):
    model = padded_model
    _, cache = tlb.run_with_backward_cache(
        model, PROMPTS, LONG, padding_side=side, positions=positions
    )
    n_kept = [len(kept) for kept in cache.positions]
    for name, g in cache.items():
        ragged = len(set(n_kept)) > 1
        assert g.lengths == (tuple(n_kept) if ragged else None)
        assert g.vjps.shape[:-1] == ((sum(n_kept),) if ragged else (3, n_kept[0])), name
    for b, (prompt, target) in enumerate(zip(PROMPTS, LONG, strict=True)):
        _, alone = tlb.run_with_backward_cache(
            model, torch.tensor(prompt), target, positions=positions
        )
        assert_same(cache.example(b), alone, tolerance(model))


def test_a_batch_of_one_has_a_batch_axis(model):
    loss, cache = tlb.run_with_backward_cache(model, [PROMPTS[0]], 5)
    assert loss.shape == (1,)
    assert cache["W_out", 1].vjps.shape[:2] == (1, 5)
    _, alone = tlb.run_with_backward_cache(model, PROMPTS[0], 5)
    assert_same(cache.example(0), alone, 1e-12)


def test_prompts_and_targets_in_all_their_forms(model):
    same = [[3, 17, 3], [6, 2, 1]]
    _, want = tlb.run_with_backward_cache(model, same, [5, 9])
    for prompts in (torch.tensor(same), [torch.tensor(same[0]), torch.tensor([same[1]])]):
        for target in (torch.tensor([5, 9]), torch.tensor([[5], [9]]), [[5], torch.tensor(9)]):
            _, cache = tlb.run_with_backward_cache(model, prompts, target)
            assert cache.target_ids.tolist() == [5, 9]
            assert torch.equal(cache["W_out", 0].vjps, want["W_out", 0].vjps)
    _, cache = tlb.run_with_backward_cache(model, same, torch.tensor([[5, 1], [9, 2]]))
    assert cache.target_ids.tolist() == [[5, 1], [9, 2]]


def test_a_target_of_several_tokens_is_marked(model):
    _, cache = tlb.run_with_backward_cache(model, PROMPTS[0], [7, 9, 1])
    assert cache.tokens.tolist() == [*PROMPTS[0], 7, 9]
    assert cache.target_ids.tolist() == [7, 9, 1]
    assert cache.target_positions.tolist() == [4, 5, 6]
    _, cache = tlb.run_with_backward_cache(model, PROMPTS, LONG)
    assert cache.target_ids.tolist() == [[5, -1, -1], [7, 9, 1], [3, 2, -1]]
    assert [p.tolist() for p in cache.target_positions] == [[4], [1, 2, 3], [6, 7]]
    assert cache.example(2).target_ids.tolist() == [3, 2]
    _, cache = tlb.run_with_backward_cache(model, PROMPTS, loss_fn=quadratic)
    assert cache.target_ids.shape == (3, 0)
    assert [len(p) for p in cache.target_positions] == [0, 0, 0]


def test_a_loss_sees_equal_texts_together_and_others_alone(model):
    seen = []

    def note(logits, tokens):
        seen.append((tuple(logits.shape[:2]), tokens.tolist()))
        return logits[:, -1, 0]

    tlb.run_with_backward_cache(model, PROMPTS, loss_fn=note, padding_side="right")
    assert seen == [((1, len(text)), [text]) for text in PROMPTS]
    seen.clear()
    tlb.run_with_backward_cache(model, [[3, 1], [6, 2]], loss_fn=note)
    assert seen == [((2, 2), [[3, 1], [6, 2]])]


@pytest.mark.parametrize("grad", [True, False])
def test_a_loss_may_run_the_model(model, grad):
    """What it gives is a constant, as if it had been computed before, and without this run's hooks.

    The captured run is patched, forward and backward.
    """
    hooks = {
        "fwd_hooks": [("blocks.0.hook_mlp_out", lambda tensor, hook: 2 * tensor)],
        "bwd_hooks": [("blocks.1.hook_mlp_out", lambda vjp, hook: 3 * vjp)],
    }

    def loss_with(reference):
        return lambda logits, tokens: (logits[:, -1] - reference()[:, -1]).square().sum(-1)

    def run_again():
        with torch.set_grad_enabled(grad):
            return model(torch.tensor([OTHERS[0]]))

    before = run_again().detach()
    for prompts in (PROMPTS[0], PROMPTS):
        arguments = {"padding_side": "right", **hooks}
        want_loss, want = tlb.run_with_backward_cache(
            model, prompts, loss_fn=loss_with(lambda: before), **arguments
        )
        loss, cache = tlb.run_with_backward_cache(
            model, prompts, loss_fn=loss_with(run_again), **arguments
        )
        assert torch.equal(loss, want_loss)
        for name, g in want.items():
            assert torch.equal(cache[name].inputs, g.inputs), name
            assert torch.equal(cache[name].vjps, g.vjps), name
        assert cache.residual.vjps.keys() == want.residual.vjps.keys()
        assert torch.equal(cache.accumulated_vjps(), want.accumulated_vjps())


def test_the_kl_divergence_takes_logits_in_all_their_forms(model):
    same = [[3, 17, 3], [6, 2, 1]]
    with torch.no_grad():
        other = model(torch.tensor([[1, 2], [8, 4]]))
    losses = [
        tlb.run_with_backward_cache(model, same, loss_fn=tlb.kl_divergence(logits))[0]
        for logits in (other, list(other), list(other[:, -1]), [one[None] for one in other])
    ]
    assert all(torch.equal(loss, losses[0]) for loss in losses) and losses[0].min() > 0
    alone, _ = tlb.run_with_backward_cache(model, same[1], loss_fn=tlb.kl_divergence(other[1]))
    torch.testing.assert_close(alone, losses[0][1])


def test_a_token_that_cannot_come_next_adds_nothing_to_the_kl_divergence(model):
    other = torch.randn(model.cfg.d_vocab, generator=torch.Generator().manual_seed(0))
    other = other.to(model.cfg.dtype).index_fill(0, torch.tensor([2, 7]), -torch.inf)
    loss, cache = tlb.run_with_backward_cache(
        model, PROMPTS[0], loss_fn=tlb.kl_divergence(other), weights="W_U"
    )
    logits = model(torch.tensor([PROMPTS[0]]))[0, -1].detach()
    want = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=of) for of in (other, logits))
    )
    torch.testing.assert_close(loss, want)
    want = logits.softmax(-1) - other.softmax(-1)
    torch.testing.assert_close(cache["W_U", None].vjps[-1], want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the loss of example 0 is nan"):
        tlb.run_with_backward_cache(
            model, PROMPTS[0], loss_fn=tlb.kl_divergence(torch.full_like(other, torch.nan))
        )


def negated(objective):
    return lambda logits, tokens: -objective(logits, tokens)


def test_an_objective_of_ids_may_be_used_in_a_function(model):
    for prompts, answers in ((PROMPTS, 5), ([[3, 17], [6, 2]], torch.tensor([5, 2]))):
        arguments = {"padding_side": "right", "weights": "W_out"}
        (loss, cache), (want, swapped) = (
            tlb.run_with_backward_cache(model, prompts, loss_fn=loss_fn, **arguments)
            for loss_fn in (negated(tlb.logit_diff(answers, 7)), tlb.logit_diff(7, answers))
        )
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
        vjps = cache["W_out", 0].vjps
        torch.testing.assert_close(vjps, swapped["W_out", 0].vjps, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("prompts", [PROMPTS, [[3, 17], [6, 2]]], ids=["ragged", "equal"])
def test_a_loss_may_edit_its_logits_in_place(model, prompts):
    def in_place(logits, tokens):
        return logits.mul_(2)[:, -1, 5]

    (loss, cache), (want, plain) = (
        tlb.run_with_backward_cache(model, prompts, loss_fn=loss_fn, padding_side="right")
        for loss_fn in (in_place, lambda logits, tokens: (2 * logits)[:, -1, 5])
    )
    assert torch.equal(loss, want)
    for name, g in plain.items():
        assert torch.equal(cache[name].vjps, g.vjps), name


def test_a_custom_loss_is_called_once_with_everything_it_needs():
    objective = Objective(lambda logits, tokens, of: logits[:, 0, 0] * of, {"of": torch.ones(2)})
    logits = torch.randn(2, 3, 4)
    assert torch.equal(objective(logits, torch.zeros(2, 3).long()), logits[:, 0, 0])
    assert torch.equal(objective.example(1)(logits[1:], torch.zeros(1, 3).long()), logits[1:, 0, 0])


def test_padding_puts_texts_where_the_mask_says():
    texts = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    right, left = (Batch(texts, [[], []], False, side, 9) for side in ("right", "left"))
    assert right.tokens.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert right.mask.int().tolist() == [[1, 1, 1], [1, 0, 0]]
    assert left.tokens.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert left.mask.int().tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("side", ["left"])
def test_hooks_see_the_padded_batch(padded_model, side):
    """A forward hook at a position changes what it changes in TransformerLens."""
    model = padded_model

    def double_last(tensor, hook):
        return torch.cat([tensor[:, :-1], 2 * tensor[:, -1:]], dim=1)

    hooks = [("blocks.0.hook_mlp_out", double_last)]
    loss, _ = tlb.run_with_backward_cache(model, PROMPTS, 5, padding_side=side, fwd_hooks=hooks)
    for b, prompt in enumerate(PROMPTS):
        alone, _ = tlb.run_with_backward_cache(model, prompt, 5, fwd_hooks=hooks)
        assert abs(loss[b] - alone) <= tolerance(model) * alone


def replaced(vjp, hook):
    """The same at every token of every text; in attention patterns, for every distance back."""
    if hook.name.endswith(("hook_attn_scores", "hook_pattern")):
        position = torch.arange(vjp.shape[-1], dtype=vjp.dtype)
        return (position - position[:, None] - 1).tril().expand(vjp.shape).clone()
    return torch.linspace(-1, 2, vjp.shape[-1], dtype=vjp.dtype).expand(vjp.shape).clone()


def assert_vjps_stay_within_their_texts(model, prompts, point, side, tolerance):
    hooks = [(f"blocks.1.{point}", replaced)]
    with attached_hook_points(model), model.hooks(bwd_hooks=hooks):
        _, cache = tlb.run_with_backward_cache(model, prompts, 5, padding_side=side)
    for b, prompt in enumerate(prompts):
        _, alone = tlb.run_with_backward_cache(model, prompt, 5, bwd_hooks=hooks)
        assert alone["W_V", 0].norm() > 0
        one = cache.example(b)
        for name, g in alone.items():
            assert_close(one[name].vjps, g.vjps, tolerance, name)


WIDE, AS_WIDE_AS_HEADS = PROMPTS, [[3, 17, 3, 9], [6, 2]]


@SIDES
@pytest.mark.parametrize("prompts", [WIDE, AS_WIDE_AS_HEADS], ids=["wide", "as wide as heads"])
@pytest.mark.parametrize(
    "point",
    [
        *("mlp.out.hook_out", "hook_resid_pre", "attn.q.hook_out", "attn.hook_z"),
        *("attn.hook_attn_scores", "attn.hook_pattern"),
    ],
)
def test_a_replaced_vjp_stays_within_its_text(padded_model, prompts, point, side):
    """Also where a hook writes to padding, which has no VJP."""
    assert_vjps_stay_within_their_texts(padded_model, prompts, point, side, tolerance(padded_model))


@NEEDS_BRIDGE
@pytest.mark.parametrize("prompts", [WIDE, AS_WIDE_AS_HEADS], ids=["wide", "as wide as heads"])
@pytest.mark.parametrize(
    ("family", "point"),
    [
        ("opt", "mlp.out.hook_out"),  # [batch * pos, d_model]
        ("llama", "attn.hook_rot_k"),  # kept as [batch, head, pos, d_head]
        ("qwen2_moe", "mlp.gate.hook_in"),  # [batch * pos, d_model]
    ],
)
def test_a_replaced_vjp_of_another_layout_stays_within_its_text(tokenizer, family, point, prompts):

    model = make(family, tokenizer, torch.float32)
    assert_vjps_stay_within_their_texts(model, prompts, point, "right", 1e-4)


# ----- as text -----


@pytest.fixture
def bridge(boot):
    return boot("gpt2")


TEXTS = ["The Eiffel Tower is located in", PROMPT]


@SIDES
def test_text_is_tokenised_one_by_one(bridge, side):
    losses, cache = tlb.run_with_backward_cache(bridge, TEXTS, [" Rome", TARGET], padding_side=side)
    for b, (text, target) in enumerate(zip(TEXTS, [" Rome", TARGET], strict=True)):
        alone, one = tlb.run_with_backward_cache(bridge, text, target)
        torch.testing.assert_close(losses[b], alone, rtol=1e-12, atol=0)
        assert cache.str_tokens[b] == one.str_tokens == bridge.to_str_tokens(text)
        assert_same(cache.example(b), one, 1e-10)


@SIDES
def test_a_padded_tensor_is_what_the_texts_are(bridge, side):
    """Its pad token is also the token that begins every text."""
    _, want = tlb.run_with_backward_cache(bridge, TEXTS, TARGET, padding_side=side)
    tokens = bridge.to_tokens(TEXTS, padding_side=side)
    assert tokens.eq(bridge.tokenizer.pad_token_id).sum() > len(TEXTS)
    with pytest.warns(UserWarning, match="'<bos>' at the .* of row 0 is treated as padding"):
        _, cache = tlb.run_with_backward_cache(bridge, tokens, TARGET, padding_side=side)
    assert [t.tolist() for t in cache.tokens] == [t.tolist() for t in want.tokens]
    assert torch.equal(cache["W_in", 1].vjps, want["W_in", 1].vjps)


def test_a_text_that_ends_with_the_pad_token_is_passed_in_a_list(bridge):
    pad = bridge.tokenizer.pad_token_id
    texts = torch.tensor([[5, 6, pad], [7, 8, 9]])
    with pytest.warns(UserWarning, match=r"end of row 0 .* a list of rows"):
        _, cache = tlb.run_with_backward_cache(bridge, texts, 5)
    assert [t.tolist() for t in cache.tokens] == [[5, 6], [7, 8, 9]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompts in ([*texts], texts.tolist()):
            _, cache = tlb.run_with_backward_cache(bridge, prompts, 5)
            assert [t.tolist() for t in cache.tokens] == texts.tolist()


def test_the_tokenizer_says_which_side_is_padded(bridge):
    seen = []
    hooks = [("hook_embed", lambda tensor, hook: seen.append(tensor.clone()))]
    for side in ("right", "left"):
        bridge.tokenizer.padding_side = side
        try:
            tlb.run_with_backward_cache(bridge, TEXTS, TARGET, fwd_hooks=hooks)
        finally:
            bridge.tokenizer.padding_side = "right"
    right, left = seen
    shorter = len(bridge.to_tokens(TEXTS[0])[0])
    assert shorter < right.shape[1]
    assert torch.equal(right[0, :shorter], left[0, -shorter:])


def test_prepend_bos_counts_for_prompts_and_not_for_targets(bridge):
    ids = bridge.to_tokens(" Rome and Berlin", prepend_bos=False)[0].tolist()
    assert len(ids) > 1
    for prepend_bos in (True, False):
        _, cache = tlb.run_with_backward_cache(
            bridge, TEXTS, " Rome and Berlin", prepend_bos=prepend_bos
        )
        assert cache.target_ids.tolist() == [ids, ids]
        for b, text in enumerate(TEXTS):
            prompt = bridge.to_tokens(text, prepend_bos=prepend_bos)[0].tolist()
            assert cache.tokens[b].tolist() == prompt + ids[:-1]


def test_tokens_of_a_logit_difference_as_text(bridge):
    arguments = {"loss_fn": tlb.logit_diff([" Rome", TARGET], " Berlin")}
    losses, _ = tlb.run_with_backward_cache(bridge, TEXTS, **arguments)
    for b, (text, answer) in enumerate(zip(TEXTS, [" Rome", TARGET], strict=True)):
        last = bridge(text)[0, -1]
        ids = [bridge.to_single_token(token) for token in (answer, " Berlin")]
        torch.testing.assert_close(losses[b], last[ids[0]] - last[ids[1]])


def test_the_models_own_loss_is_transformer_lenss(bridge):
    loss, _ = tlb.run_with_backward_cache(bridge, PROMPT, loss_fn=tlb.lm_cross_entropy_loss)
    torch.testing.assert_close(loss, bridge(PROMPT, return_type="loss"))


def test_a_target_without_its_leading_space_gives_a_warning(bridge):
    assert len(bridge.to_tokens("Paris", prepend_bos=False)[0]) > 1
    with pytest.warns(UserWarning, match="with the leading space, ' Paris' is one"):
        tlb.run_with_backward_cache(bridge, PROMPT, "Paris")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tlb.run_with_backward_cache(bridge, PROMPT, " Rome and")


@pytest.fixture(scope="module")
def spaced_and_not(tmp_path_factory):
    """A model to which words, and the end of a word, are one token with a space and without.

    Their ids are in the order of a byte-level tokenizer of real text: ``" the"`` is more frequent
    than ``"the"``, and ``"ing"`` than ``" ing"``.
    """
    words = ["<bos>", "in", "ing", " the", "the", " Paris", "Paris", " ing", ".", " .", "7", " 7"]
    words += ["ING", " ING", " (", "The", " FOR", " for", ":", " ", "\n"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<bos>"))
    tokenizer.pre_tokenizer = Split(Regex(r" ?\w+| ?\W"), "isolated")
    folder = tmp_path_factory.mktemp("spaced_and_not")
    special = {f"{role}_token": "<bos>" for role in ("bos", "eos", "pad", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return make("gpt2", PreTrainedTokenizerFast.from_pretrained(folder))


@pytest.mark.parametrize(
    ("prompt", "target"),
    [("The for", "Paris"), ("The:", "Paris"), ("The for", "the"), ("The the.", "the")],
)
def test_a_word_of_one_token_without_its_leading_space_gives_a_warning(
    spaced_and_not, prompt, target
):
    model = spaced_and_not
    hint = f"'{target}' has no leading space.* ' {target}' is also one token"
    with pytest.warns(UserWarning, match=hint):
        tlb.run_with_backward_cache(model, prompt, target)
    with pytest.warns(UserWarning, match=hint + r".* \(example 0, 2\)"):
        tlb.run_with_backward_cache(model, [prompt] * 3, [target, f" {target}", target])
    with pytest.warns(UserWarning, match=hint):
        tlb.forward_pass_shift(model, prompt, target, layer=0, lr=0.1)
    with pytest.warns(UserWarning, match=hint):
        tlb.run_with_backward_cache(model, prompt, loss_fn=tlb.logit_diff(target, " ing"))


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        *(("The for", target) for target in (" Paris", "ing", ".", "7", "\n")),
        *((f"The{end}", "Paris") for end in (" ", "\n", " (")),
        ("The FOR", "ING"),
        ([17], 6),
    ],
)
def test_a_target_that_continues_a_word_gives_no_warning(spaced_and_not, prompt, target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tlb.run_with_backward_cache(spaced_and_not, prompt, target)
        tlb.BackwardLogitLens(spaced_and_not)(prompt, target, targets="Paris", vocab=["the"])


# ----- bad input -----


def first_only(logits, tokens):
    return torch.stack([of[-1, 0].detach() if b else of[-1, 0] for b, of in enumerate(logits)])


def saturated(logits, tokens):
    return (logits[:, -1, 0] - 1e4 * tokens[:, 0].ne(3)).sigmoid()


@pytest.mark.parametrize("loss_fn", [first_only, saturated])
def test_examples_without_any_vjp_are_named(model, loss_fn):
    """Detached, or flat: which of the two cannot be seen, and the latter is right."""
    prompts = [[3, 1], [12, 1], [12, 1]]
    with pytest.warns(UserWarning, match="all VJPs of example 1, 2 are zero"):
        _, cache = tlb.run_with_backward_cache(model, prompts, loss_fn=loss_fn)
    assert cache["W_V", 0].example(0).norm() > 0
    assert cache["W_V", 0].example(1).norm() == cache["W_V", 0].example(2).norm() == 0


def test_a_loss_of_activations_inside_is_not_flat(model):
    kept = []
    hooks = [("blocks.0.hook_mlp_out", lambda tensor, hook: kept.append(tensor))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, cache = tlb.run_with_backward_cache(
            model,
            [[3, 1], [6, 2]],
            loss_fn=lambda logits, tokens: kept[-1].square().sum((1, 2)),
            fwd_hooks=hooks,
        )
    assert torch.equal(cache.residual.vjps["blocks.0.hook_mlp_out"], 2 * kept[-1])
    assert cache["W_U", None].norm() == 0


def scalar(logits, tokens):
    return logits.mean()


def per_token(logits, tokens):
    return logits[:, :, 0]


def detached(logits, tokens):
    return logits.detach()[:, -1, 0]


def constant(logits, tokens):
    return torch.ones(len(logits), requires_grad=True) + 1


def steep(logits, tokens):
    return (0 * logits[:, -1, 0]).sqrt()


def integers(logits, tokens):
    return tokens[:, 0]


def infinite_for_short_ones(logits, tokens):
    return logits[:, -1, 0] / (tokens.shape[1] != 2)


def raises(logits, tokens):
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": [5, 7]}, ValueError, "target holds 2 targets for 3 prompts"),
        ({"target": [5, 7, -1]}, ValueError, r"outside the vocabulary \(example 2\)"),
        ({"target": [5, [], 1]}, ValueError, r"target is empty \(example 1\)"),
        ({"target": [5, 7, 1.5]}, TypeError, r"target must be .* \(example 2\)"),
        ({"target": torch.ones(3)}, TypeError, r"target must be .* \(example 0\)"),
        ({"target": [5, 7, [1] * 30]}, ValueError, r"\(example 2\) has 7 tokens and 29 of its"),
        ({"prompt": [[3], []], "target": 5}, ValueError, r"prompt is empty \(example 1\)"),
        ({"prompt": [], "target": 5}, ValueError, "prompt is empty"),
        ({"prompt": torch.zeros(0, 3).long(), "target": 5}, ValueError, "prompt is an empty list"),
        ({"prompt": [[3], [10**6]], "target": 5}, ValueError, r"vocabulary \(example 1\)"),
        ({"prompt": [[3], [1] * 40], "target": 5}, ValueError, r"\(example 1\) has 40 tokens"),
        ({"prompt": [[3], 1.5], "target": 5}, TypeError, r"prompt must be .* \(example 1\)"),
        ({"prompt": 1.5, "target": 5}, TypeError, "prompt must be a string, token ids"),
        (
            {"prompt": {"text": "a"}, "target": 5},
            TypeError,
            "mapping without input_ids.* keys text",
        ),
        (
            {"prompt": {"input_ids": [3]}, "target": 5},
            ValueError,
            "no attention_mask.* whole output",
        ),
        ({"prompt": b"abc", "target": 5}, TypeError, "prompt must be a string, token ids.* b'abc'"),
        ({"prompt": [b"abc"], "target": 5}, TypeError, r"token ids \(example 0\), got b'abc'"),
        ({"target": b"abc"}, TypeError, "target must be a string, token ids.* b'abc'"),
        ({"target": bytearray(b"abc")}, TypeError, "target must be a string, token ids"),
        ({"target": 5, "positions": 3}, ValueError, "prompt 1 has positions 0 to 1"),
        ({"target": 5, "padding_side": "middle"}, ValueError, "'left' or 'right', got 'middle'"),
        ({}, ValueError, "pass either target= or loss_fn="),
        ({"target": 5, "loss_fn": quadratic}, ValueError, "pass either target= or loss_fn="),
        ({"loss_fn": scalar}, ValueError, r"loss_fn, called with example 0 alone, .* a scalar"),
        ({"loss_fn": per_token}, ValueError, r"returned the shape \[1, 5\]"),
        ({"loss_fn": detached}, ValueError, "example 0 alone, returned a tensor that is detached"),
        ({"loss_fn": steep}, ValueError, "though the loss is; try a higher precision, and check"),
        ({"loss_fn": constant}, ValueError, "does not depend on the logits"),
        ({"loss_fn": constant, "prompt": [3]}, ValueError, "does not depend on the logits"),
        ({"loss_fn": integers}, TypeError, "must return a floating-point tensor"),
        ({"loss_fn": infinite_for_short_ones}, ValueError, "the loss of example 1 is -?inf"),
        ({"loss_fn": raises}, ZeroDivisionError, ""),
        ({"loss_fn": tlb.logit_diff([5, 7], 1)}, ValueError, "answer holds 2 .* 3 prompts"),
        ({"loss_fn": tlb.logit_diff(5, [[7, 1], 2, 3])}, ValueError, "other=.* exactly one token"),
        (
            {"loss_fn": tlb.kl_divergence(torch.zeros(2, 3, 31))},
            ValueError,
            "other_logits has entries for 2 prompts, but there are 3",
        ),
        (
            {"loss_fn": tlb.kl_divergence(torch.zeros(3, 7, 31))},
            ValueError,
            "other_logits is one tensor for prompts of different lengths.* pass a list",
        ),
        (
            {"loss_fn": tlb.kl_divergence([torch.zeros(9)] * 3)},
            ValueError,
            "other_logits covers 9 tokens, but this model has",
        ),
        ({"loss_fn": "nll"}, TypeError, "loss_fn must be a function .* got 'nll'"),
        ({"loss_fn": tlb.logit_diff}, TypeError, "got 'logit_diff'"),
        ({"loss_fn": tlb.kl_divergence}, TypeError, "got 'kl_divergence'"),
        (
            {"loss_fn": negated(tlb.logit_diff(" a", 1))},
            TypeError,
            "answer=' a': .* pass token ids",
        ),
        ({"loss_fn": negated(tlb.logit_diff(5, [1, 2]))}, ValueError, "2 prompts, but there are 1"),
        (
            {"prompt": [[3, 1], [6]], "loss_fn": tlb.lm_cross_entropy_loss},
            ValueError,
            "at least two tokens",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named_and_changes_nothing(models, arguments, error, message):

    model = models(MODELS[-1])
    before = state(model)
    with pytest.raises(error, match=message):
        tlb.run_with_backward_cache(
            model, **{"prompt": PROMPTS, "padding_side": "right"} | arguments
        )
    assert state(model) == before


def test_padding_on_the_left_is_refused_where_it_is_seen(tokenizer):
    for family in ("mamba", "openai-gpt"):
        model = make(family, tokenizer)
        with pytest.raises(NotImplementedError, match="pass padding_side='right'"):
            tlb.run_with_backward_cache(model, PROMPTS, 5, padding_side="left")


def test_an_example_that_is_not_there(models):
    model = models(MODELS[0])
    _, cache = tlb.run_with_backward_cache(model, PROMPTS, 5)
    with pytest.raises(IndexError, match="this cache has 3 prompts"):
        cache.example(3)
    with pytest.raises(ValueError, match="single prompt"):
        cache.example(0).example(0)
