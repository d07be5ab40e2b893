from __future__ import annotations

import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from helpers.families import make
from helpers.texts import PROMPT, TARGET, TEXTS
from helpers.versions import NEEDS_BRIDGE
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import tl_backward as tlb
from tl_backward.lens._vocabulary import read_vocabulary

pytestmark = NEEDS_BRIDGE


@pytest.fixture
def result(model):
    return tlb.BackwardLogitLens(model)(PROMPT, TARGET, top_k=4)


READ_OTHERWISE = {
    "gemma2": "a soft cap",
    "cohere2": "scaled logits",
    "gpt_neox": "LayerNorm with bias",
    "qwen2": "RMSNorm",
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind_of_weight", ["W_in", "W_out"])
@pytest.mark.parametrize("family", ["llama", "gpt2", *READ_OTHERWISE])
def test_readout_equals_transformer_lens(boot, tokenizer, family, kind_of_weight, normalize):
    """Ids, log-probabilities and ranks against TransformerLens's own readout kernel."""
    kernel = pytest.importorskip(
        "transformer_lens.tools.analysis.logit_lens",
        reason="TransformerLens 3 has no logit_readout",
    )
    model = make(family, tokenizer) if family in READ_OTHERWISE else boot(family)
    result = tlb.BackwardLogitLens(model)(
        PROMPT, TARGET, top_k=4, normalize=normalize, chunk_size=3
    )
    read = result[kind_of_weight]
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET, weights=kind_of_weight)
    vectors = torch.stack(
        [
            g.inputs if kind_of_weight == "W_in" else cache.residual_vjps(name)
            for name, g in cache.items()
        ]
    )
    torch.testing.assert_close(read.norms, vectors.norm(dim=-1))
    if normalize:
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    log_probs = kernel.logit_readout(
        model, vectors.nan_to_num(), return_type="log_probs"
    ).values.double()
    values, ids = log_probs.sort(dim=-1)
    target = log_probs[..., model.to_single_token(TARGET), None]
    seen = ~read.zero_mask
    assert seen.any()
    torch.testing.assert_close(
        read.top_values[seen], values.flip(-1)[..., :4][seen], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        read.bottom_values[seen], values[..., :4][seen], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(read.top_ids[seen], ids.flip(-1)[..., :4][seen])
    assert torch.equal(read.bottom_ids[seen], ids[..., :4][seen])
    assert torch.equal(read.target_ranks[seen], (log_probs > target).sum(-1)[seen])


def test_w_gate_is_read_by_its_inputs(boot):
    model = boot("llama")
    result = tlb.BackwardLogitLens(model)(PROMPT, TARGET, weights=("W_gate", "W_in"), layers=1)
    assert torch.equal(result["W_gate"].top_ids, result["W_in"].top_ids)
    assert torch.equal(result["W_gate"].norms, result["W_in"].norms)
    assert not torch.equal(result["W_gate"].vjp_norms, result["W_in"].vjp_norms)


def test_zero_rows_are_marked_and_not_read(result):
    """Appendix A: in the last layer only the last token has a VJP."""
    read = result["W_out"]
    n = len(result.str_tokens)
    expected = torch.zeros(3, n, dtype=torch.bool)
    expected[2, :-1] = True
    assert torch.equal(read.zero_mask, expected)
    assert torch.equal(read.norms == 0, expected) and torch.equal(read.vjp_norms, read.norms)
    assert torch.equal(read.target_ranks == -1, expected)
    assert torch.equal(read.top_values.isnan().all(-1), expected)
    assert read.top_tokens()[2][0] == read.bottom_tokens()[2][0] == []
    assert not result["W_in"].zero_mask.any()


def test_tokens_are_the_ids_decoded(model, result):
    for read in result.values():
        for tokens, ids in (
            (read.top_tokens(), read.top_ids),
            (read.bottom_tokens(), read.bottom_ids),
        ):
            assert tokens[0][2] == [model.tokenizer.decode([i]) for i in ids[0, 2].tolist()]


def test_the_target_of_the_loss(model):
    lens, two = tlb.BackwardLogitLens(model), [PROMPT, "The Eiffel Tower"]
    assert lens(PROMPT, TARGET, targets=" Rome").loss_target == TARGET
    assert lens(two, [TARGET, " Paris Rome"]).loss_target == [TARGET, " Paris Rome"]
    assert lens(two, [TARGET, " Rome"]).example(1).loss_target == " Rome"
    assert lens(two, [TARGET, " Rome"], batch_slice=1).loss_target == " Rome"
    logit_diff = lens(two, loss_fn=tlb.logit_diff(TARGET, " Rome"), targets=TARGET)
    assert logit_diff.loss_target is None and logit_diff.example(0).loss_target is None


def test_rank_trajectory(result):
    assert torch.equal(result.rank_trajectory(TARGET), result["W_out"].target_ranks)
    assert torch.equal(result.rank_trajectory(weight="W_in"), result["W_in"].target_ranks)
    with pytest.raises(ValueError, match="ran with ' Paris'"):
        result.rank_trajectory(" Rome")
    with pytest.raises(KeyError, match="'W_gate' was not read; available: W_in, W_out"):
        result.rank_trajectory(weight="W_gate")
    with pytest.raises(ValueError, match="without a target; pass targets="):
        replace(result, target_ids=result.target_ids[None][:0]).rank_trajectory()


def test_rank_trajectory_takes_the_first_weight_where_w_out_was_not_read(model):
    result = tlb.BackwardLogitLens(model)(PROMPT, TARGET, weights=("W_Q", "W_in"))
    assert torch.equal(result.rank_trajectory(), result["W_Q"].target_ranks)


def test_rank_trajectory_takes_the_strings_that_the_lens_was_given(model):
    lens, prompts = tlb.BackwardLogitLens(model), [PROMPT, "The Eiffel Tower"]
    result = lens(prompts, TARGET)
    assert torch.equal(result.rank_trajectory(TARGET), result["W_out"].target_ranks)
    several = lens(PROMPT, TARGET, targets=[" Rome", model.to_single_token(TARGET)])
    for i, name in enumerate((" Rome", TARGET)):
        expected = several["W_out"].target_ranks[..., i]
        assert torch.equal(several.rank_trajectory(name), expected)
    whole = lens(PROMPT, " Paris Rome")
    assert torch.equal(whole.rank_trajectory(" Paris Rome"), whole["W_out"].target_ranks)
    two = lens(prompts, [TARGET, " Rome"])
    with pytest.raises(ValueError, match=r"ran with \[' Paris', ' Rome'\]"):
        two.rank_trajectory(TARGET)
    assert torch.equal(two.example(1).rank_trajectory(" Rome"), two["W_out"].target_ranks[:, 1, :4])


LONG = [" Paris Rome", TARGET, [7, 9, 1]]
"""Targets of two tokens, of one and of three."""
OF_LONG = [PROMPT, "The Eiffel Tower", " located in"]


def test_each_position_has_the_token_that_it_predicts(model):
    """And any other the first; ranks are counted in the readouts of all tokens."""
    result = tlb.BackwardLogitLens(model)(
        OF_LONG[2], [7, 9, 1], vocab=list(range(model.cfg.d_vocab))
    )
    n = len(model.to_tokens(OF_LONG[2])[0])
    expected = [*[7] * n, 9, 1]
    assert result.target_ids.tolist() == expected
    assert result.target == model.tokenizer.batch_decode([[i] for i in expected])
    assert result.prompt_tokens == result.str_tokens[:n] == model.to_str_tokens(OF_LONG[2])
    assert result.loss_target_ids == [7, 9, 1]
    for read in result.values():
        seen = ~read.zero_mask
        values = read.vocab_values.double()
        own = values.gather(-1, result.target_ids.expand(3, -1)[..., None])
        assert torch.equal(read.target_ranks[seen], (values > own).sum(-1)[seen])
        torch.testing.assert_close(
            read.target_values[seen], own[seen].squeeze(-1).to(read.target_values)
        )


@pytest.mark.parametrize("positions", [None, -1, [0, -2]], ids=str)
def test_an_example_has_the_targets_that_it_has_alone(model, positions):
    lens = tlb.BackwardLogitLens(model)
    batch = lens(OF_LONG, LONG, positions=positions)
    read = {name: frame for name, frame in batch.to_dataframe().groupby("example")}
    for b, (prompt, target) in enumerate(zip(OF_LONG, LONG, strict=True)):
        one, alone = batch.example(b), lens(prompt, target, positions=positions)
        assert torch.equal(one.target_ids, alone.target_ids)
        assert one.target == alone.target and one.loss_target == alone.loss_target
        assert one.ranks_by_token == alone.ranks_by_token == (b != 1)
        assert one.prompt_tokens == alone.prompt_tokens == batch.prompt_tokens[b]
        assert one["W_out"].target_ranks.shape == alone["W_out"].target_ranks.shape
        assert f"target={alone.loss_target!r}" in repr(one)
        assert {*read[b].target} == {*([alone.target] if b == 1 else alone.target)}
        of_cache = lens(
            cache=tlb.run_with_backward_cache(model, prompt, target)[1], positions=positions
        )
        assert torch.equal(of_cache.target_ids, alone.target_ids)
        assert torch.equal(of_cache["W_in"].target_ranks, alone["W_in"].target_ranks)


def test_the_frame_names_the_target_of_a_row(model):
    frame = tlb.BackwardLogitLens(model)(OF_LONG[2], [7, 9, 1], top_k=1).to_dataframe()
    names = dict(zip(frame.position, frame.target, strict=True))
    assert [*names.values()][-3:] == model.tokenizer.batch_decode([[7], [9], [1]])
    assert "target" not in tlb.BackwardLogitLens(model)(PROMPT, TARGET).to_dataframe()


def test_rank_trajectory_of_a_target_of_several_tokens(model):
    lens = tlb.BackwardLogitLens(model)
    one = lens(PROMPT, " Paris Rome")
    for name in (None, " Paris Rome"):
        assert torch.equal(one.rank_trajectory(name), one["W_out"].target_ranks)
    for name in (TARGET, model.to_single_token(TARGET), " Rome"):
        with pytest.raises(ValueError, match="ran with ' Paris Rome'"):
            one.rank_trajectory(name)
    mixed = lens(OF_LONG[:2], LONG[:2])
    with pytest.raises(ValueError, match=r"ran with \[' Paris Rome', ' Paris'\]"):
        mixed.rank_trajectory(TARGET)
    assert torch.equal(mixed.rank_trajectory(), mixed["W_out"].target_ranks)
    for b, name in enumerate(LONG[:2]):
        example = mixed.example(b)
        assert torch.equal(example.rank_trajectory(name), example["W_out"].target_ranks)
    same = lens(OF_LONG[:2], " Paris Rome")
    assert torch.equal(same.rank_trajectory(" Paris Rome"), same["W_out"].target_ranks)
    asked = lens(PROMPT, " Paris Rome", targets=TARGET)
    assert torch.equal(asked.rank_trajectory(TARGET), asked["W_out"].target_ranks)
    assert not asked.ranks_by_token and "target=' Paris'" in repr(asked)


def test_rank_trajectory_where_the_tokenizer_strips_spaces(tmp_path):
    words = Tokenizer(BPE())
    words.pre_tokenizer, words.decoder = Metaspace(), MetaspaceDecoder()
    words.train_from_iterator(TEXTS, BpeTrainer(special_tokens=["<s>"], show_progress=False))
    special = {f"{role}_token": "<s>" for role in ("bos", "eos", "pad")}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
    model = make("llama", PreTrainedTokenizerFast.from_pretrained(tmp_path))
    result = tlb.BackwardLogitLens(model)(PROMPT, TARGET)
    assert result.target == "Paris"
    for name in (TARGET, "Paris"):
        assert torch.equal(result.rank_trajectory(name), result["W_out"].target_ranks)


@pytest.mark.parametrize(
    ("family", "kind", "read", "left_out"),
    [("jamba", "W_O", [1, 3], "layers 0, 2")],
)
def test_layers_without_a_site_are_named(tokenizer, family, kind, read, left_out):
    """State-space mixers in the place of attention."""
    model = make(family, tokenizer)
    lens, (_, cache) = tlb.BackwardLogitLens(model), tlb.run_with_backward_cache(model, PROMPT, 5)
    for arguments in ({"prompt": PROMPT, "target": 5}, {"cache": cache}):
        with pytest.warns(UserWarning, match=f"{kind} in {left_out}; tl_backward.coverage"):
            result = lens(**arguments, weights=kind)
        assert result[kind].layers == read
        assert result.left_out == {kind: [i for i in range(model.cfg.n_layers) if i not in read]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lens(PROMPT, 5, weights=kind, layers=read).left_out == {}


def test_dataframe_is_tidy(result):
    frame = result.to_dataframe()
    n = len(result.str_tokens)
    zero_rows = n - 1
    assert len(frame) == 2 * 3 * n * 8 - zero_rows * 8 + zero_rows
    keys = ["weight", "layer", "position", "end", "k"]
    assert not frame.dropna(subset="end").duplicated(keys).any()
    cell = frame.query("weight == 'W_out' and layer == 1 and position == 2 and end == 'bottom'")
    assert cell["token"].tolist() == result["W_out"].bottom_tokens()[1][2]
    assert cell["k"].tolist() == [0, 1, 2, 3]
    assert cell["log_prob"].tolist() == result["W_out"].bottom_values[1, 2].tolist()
    assert cell["target_rank"].unique().tolist() == [int(result["W_out"].target_ranks[1, 2])]
    assert cell["str_token"].unique().tolist() == [result.str_tokens[2]]
    unread = frame.query("weight == 'W_out' and layer == 2 and position == 0").iloc[0]
    assert unread["norm"] == 0 and frame["token_id"].isna().sum() == zero_rows


def test_reprs_are_one_line(model, result):
    short = "Readout(W_out [3, 8]: blocks.0.mlp.W_out, blocks.1.mlp.W_out, blocks.2.mlp.W_out; "
    assert repr(result["W_out"]) == short + "4 top, 4 bottom tokens)"
    vectors = torch.ones(30, model.cfg.d_model, dtype=model.cfg.dtype)
    read = tlb.BackwardLogitLens(model).read(vectors, vocab=[1, 2])
    assert repr(read) == "Readout(vectors [30]: 0, ..., 29; 2 vocab tokens)"


def test_layers_and_positions_select(model, result):
    part = tlb.BackwardLogitLens(model)(
        PROMPT, TARGET, weights="W_out", layers=[-1, 0], positions=[-1, 1], top_k=4
    )
    assert part["W_out"].layers == [0, 2] and list(part) == ["W_out"]
    n = len(result.str_tokens)
    assert part.positions.tolist() == [n - 1, 1]
    whole = result["W_out"].bottom_ids[[0, 2]][:, [-1, 1]]
    assert torch.equal(part["W_out"].bottom_ids, whole)


def test_result_keeps_no_model(model, result):
    def no_model(thing):
        raise AssertionError("the result refers to the model")

    type(model).__reduce_ex__ = lambda self, protocol: no_model(self)
    try:
        copy = pickle.loads(pickle.dumps(result))
    finally:
        del type(model).__reduce_ex__
    assert torch.equal(copy["W_in"].top_ids, result["W_in"].top_ids)


def test_logits_never_exist_whole():
    seen = []

    def unembed(rows):
        seen.append(len(rows))
        return rows.repeat(1, 5)

    vectors = torch.randn(11, 3)
    targets = torch.ones(11, 1, dtype=torch.long)
    read = read_vocabulary(vectors, unembed, targets, top_k=2, bottom_k=1, chunk_size=4)
    assert seen == [4, 4, 3]
    assert read.top_ids.shape == (11, 2) and read.bottom_ids.shape == (11, 1)


@pytest.mark.parametrize("d_vocab", [3 * 64, 1000, 64 * 40 + 7])
@pytest.mark.parametrize("k", [0, 1, 7, 192])
def test_ends_and_entropy_are_those_of_the_whole_vocabulary(d_vocab, k):
    logits = 40 * torch.randn(9, d_vocab, generator=torch.Generator().manual_seed(d_vocab))
    logits[0, -3:], logits[1, :2] = torch.tensor([500.0, -500, 400]), torch.tensor([-600.0, 600])
    targets = torch.arange(18).reshape(9, 2) % d_vocab
    read = read_vocabulary(
        logits, lambda rows: rows, targets, top_k=k, bottom_k=k, return_type="logits"
    )
    values, ids = logits.sort(-1)
    assert torch.equal(read.top_ids, ids.flip(-1)[:, :k])
    assert torch.equal(read.bottom_ids, ids[:, :k])
    assert torch.equal(read.top_values, values.flip(-1)[:, :k])
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(read.entropy.double(), entropy, rtol=1e-5, atol=1e-4)
    ranks = (logits.unsqueeze(1) > logits.gather(1, targets).unsqueeze(2)).sum(-1)
    assert torch.equal(read.target_ranks, ranks)


def test_vocab_takes_strings(model):
    lens = tlb.BackwardLogitLens(model)
    one, other = map(model.to_single_token, (" Paris", " Rome"))
    by_id = lens(PROMPT, TARGET, vocab=[one, other])["W_in"].vocab_values
    assert torch.equal(lens(PROMPT, TARGET, vocab=[" Paris", other])["W_in"].vocab_values, by_id)
    single = lens(PROMPT, TARGET, vocab=" Rome")["W_in"].vocab_values
    assert torch.equal(single, by_id[..., 1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(boot, kind, dtype):
    result = tlb.BackwardLogitLens(boot(kind, dtype))(PROMPT, TARGET, top_k=3)
    assert result.loss.dtype == torch.float32
    assert result["W_out"].top_values[0].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, r"top_k must be an integer in \[1, "),
        ({"top_k": 10**6}, r"top_k must be an integer in \[1, "),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1"),
        ({"weights": ("W_in", "W_nope")}, "this model has W_E"),
        ({"weights": "W_U"}, "the lens reads W_Q, W_K, W_V, W_in, W_gate, W_O, W_out"),
        ({"vjps": "both"}, "vjps must be 'residual' or 'output'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        tlb.BackwardLogitLens(model)(PROMPT, TARGET, **arguments)
