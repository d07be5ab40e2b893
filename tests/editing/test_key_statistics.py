"""Second moments of W_out's inputs, and keys whitened by them."""

from __future__ import annotations

import pytest
import torch
from helpers.edits import random_edit, same_bits, seen_at, weights
from helpers.state import state
from helpers.texts import TEXTS
from helpers.versions import MODELS, NEEDS_BRIDGE

import tl_backward as tlb
from tl_backward.editing import KeyStatistics, key_statistics

GENERATOR = torch.Generator().manual_seed(1)
SAMPLE = [
    torch.randint(1, 30, (n,), generator=GENERATOR).tolist() for n in (3, 7, 1, 5, 7, 6, 2) * 4
]


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


def name_of(layer):
    return f"blocks.{layer}.mlp.W_out"


def inputs(model, layer, texts=SAMPLE):
    (site,) = tlb.weight_sites(model, "W_out", layer)
    return torch.cat([seen_at(model, site.hook_in, ids) for ids in texts])


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_second_moments_of_every_token_and_of_no_padding(model, batch_size):
    """Against the inputs of each text alone."""
    before = state(model)
    statistics = key_statistics(model, SAMPLE, layer=[0, -1], batch_size=batch_size)
    assert state(model) == before
    last = model.cfg.n_layers - 1
    assert list(statistics.second_moments) == [name_of(0), name_of(last)]
    assert statistics.n_tokens == sum(map(len, SAMPLE))
    for layer in (0, last):
        x = inputs(model, layer)
        expected = x.mT @ x / len(x)
        torch.testing.assert_close(
            statistics.second_moments[name_of(layer)], expected, rtol=1e-6, atol=1e-8
        )


def test_whitened_keys_against_a_dense_solve(model):
    statistics = key_statistics(model, SAMPLE, layer=1, ridge=0.03)
    C = statistics.second_moments[name_of(1)]
    x = inputs(model, 1)[:5]
    C = C + 0.03 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
    for got, one in zip(statistics.whitened(name_of(1), x), x, strict=True):
        solved = torch.linalg.solve(C, one)
        torch.testing.assert_close(got, one.dot(one) * solved / one.dot(solved))
        torch.testing.assert_close(got.dot(one), one.dot(one))


def test_a_whitened_key_touches_the_sample_least(models):
    """Of all keys with the same product with x; without ridge, by the method of Lagrange."""
    model = models(MODELS[0])
    statistics = key_statistics(model, SAMPLE * 3, layer=1, ridge=1e-9)
    sample, x = inputs(model, 1), inputs(model, 1)[:1]

    def touched(key):
        return float((sample @ key.mT).square().mean())

    best = statistics.whitened(name_of(1), x)
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1e-1):
        noise = torch.randn(1, x.shape[1], generator=generator, dtype=torch.float64)
        other = best + scale * (noise - (noise @ x.mT) / (x @ x.mT) * x)
        torch.testing.assert_close(other @ x.mT, best @ x.mT)
        assert touched(best) < touched(other)
    assert touched(best) < touched(x)


@NEEDS_BRIDGE
def test_texts_as_strings_and_the_bos_token(boot):
    model = boot("llama")
    with_bos = key_statistics(model, TEXTS[:2], layer=1, prepend_bos=True)
    ids = [model.to_tokens(text, prepend_bos=True)[0].tolist() for text in TEXTS[:2]]
    x = inputs(model, 1, ids)
    torch.testing.assert_close(
        with_bos.second_moments[name_of(1)], x.mT @ x / len(x), rtol=1e-6, atol=1e-8
    )
    without = key_statistics(model, TEXTS[:2], layer=1, prepend_bos=False)
    assert without.n_tokens == with_bos.n_tokens - 2


def test_texts_longer_than_the_context_are_cut(models):
    model = models(MODELS[0])
    long = [(i * 7) % 29 for i in range(model.cfg.n_ctx + 5)]
    statistics = key_statistics(model, [long], layer=0)
    assert statistics.n_tokens == model.cfg.n_ctx
    x = inputs(model, 0, [long[: model.cfg.n_ctx]])
    torch.testing.assert_close(statistics.second_moments[name_of(0)], x.mT @ x / len(x))


@NEEDS_BRIDGE
def test_half_precision_is_summed_in_more(boot):
    model = boot("gpt2", torch.bfloat16)
    statistics = key_statistics(model, SAMPLE, layer=1)
    C = statistics.second_moments[name_of(1)]
    assert C.dtype == torch.float32
    x = inputs(model, 1)
    assert x.dtype == torch.bfloat16
    torch.testing.assert_close(C, x.float().mT @ x.float() / len(x), rtol=0.05, atol=1e-3)
    assert statistics.whitened(name_of(1), x[:2]).dtype == torch.bfloat16


def test_read_from_the_file_that_was_written(models, tmp_path, monkeypatch):
    """No text is run the second time; another ridge may be taken."""
    model, path = models(MODELS[0]), tmp_path / "keys.safetensors"
    statistics = key_statistics(model, SAMPLE, layer=[0, 1], path=path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

    def refuse(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(model, "forward", refuse)
    again = key_statistics(model, SAMPLE, layer=[0, 1], path=str(path), ridge=0.5)
    monkeypatch.undo()
    assert (again.n_tokens, again.ridge) == (statistics.n_tokens, 0.5)
    assert list(again.second_moments) == list(statistics.second_moments)
    for name, C in statistics.second_moments.items():
        assert torch.equal(again.second_moments[name], C)
    assert KeyStatistics.load(path, model).ridge == statistics.ridge


def test_a_file_of_other_weights_or_layers(models, tmp_path):
    model, path = models(MODELS[0]), tmp_path / "keys.safetensors"
    key_statistics(model, SAMPLE, layer=1, path=path)
    with pytest.raises(ValueError, match=r"path: .* of blocks.1.mlp.W_out, not of layer=0"):
        key_statistics(model, SAMPLE, layer=0, path=path)
    with (
        random_edit(model, name_of(1)).applied(),
        pytest.raises(ValueError, match="this model has other weights"),
    ):
        key_statistics(model, SAMPLE, layer=1, path=path)
    with pytest.raises(ValueError, match="this model has other weights"):
        KeyStatistics.load(path, models(MODELS[1]))
    edit = random_edit(model, name_of(1)).save(tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match="holds no KeyStatistics"):
        KeyStatistics.load(edit, model)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated, damaged"):
        key_statistics(model, SAMPLE, layer=1, path=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 77}, "layers=77: this model has layers"),
        ({"texts": []}, "texts is empty"),
        ({"ridge": -0.1}, "ridge must be a number of at least 0"),
        ({"ridge": float("nan")}, "ridge must be a number of at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_input(models, options, message):
    model = models(MODELS[0])
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        key_statistics(model, **({"texts": SAMPLE, "layer": 1} | options))
    assert same_bits(weights(model), before)


def test_statistics_that_do_not_fit(models):
    """Of another layer; or of so few tokens that nothing can be inverted without a ridge."""
    model = models(MODELS[0])
    few = key_statistics(model, [[1, 2, 3]], layer=1, ridge=0.0)
    x = inputs(model, 1)[:1]
    with pytest.raises(ValueError, match=r"statistics has no entry for blocks.0.mlp.W_out"):
        few.whitened(name_of(0), x)
    with pytest.raises(ValueError, match=r"is singular with ridge=0.0; use a larger ridge"):
        few.whitened(name_of(1), x)
    with pytest.raises(ValueError, match=r"statistics has no entry for blocks.0.mlp.W_out"):
        tlb.editing.forward_pass_shift(
            model, [1, 2, 3], 5, layer=0, lr=0.1, key="whitened", statistics=few
        )


# solving, and the directions that inputs hardly have


def random_statistics(ridge=0.0, n_texts=60):
    x = torch.randn(n_texts, 11, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return KeyStatistics({"site": x.mT @ x / n_texts}, n_tokens=n_texts, ridge=ridge)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_solve_against_a_dense_solve(ridge):
    statistics = random_statistics(ridge)
    C = statistics.second_moments["site"]
    C = C + ridge * C.diagonal().mean() * torch.eye(11, dtype=torch.float64)
    x = torch.randn(4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(statistics.solve("site", x), torch.linalg.solve(C, x.mT).mT)


@pytest.mark.parametrize(("fraction", "rank"), [(0.1, 1), (0.5, 5), (0.99, 10)])
def test_the_null_space_has_a_share_of_the_directions(fraction, rank):
    """It is a projector, and what it leaves has the smallest second moment there is."""
    statistics = random_statistics()
    P, C = statistics.null_space("site", fraction=fraction), statistics.second_moments["site"]
    torch.testing.assert_close(P, P.mT)
    torch.testing.assert_close(P @ P, P)
    assert float(P.trace()) == pytest.approx(rank)
    smallest = torch.linalg.svdvals(C).flip(0)[:rank]
    assert float((P @ C).trace()) == pytest.approx(float(smallest.sum()))


def test_the_null_space_below_a_threshold():
    """Eigenvalues 1 to 5: strictly below 3 are two."""
    statistics = KeyStatistics({"site": torch.diag(torch.arange(5.0, 0, -1))}, 9, 0.0)
    expected = torch.diag(torch.tensor([0.0, 0, 0, 1, 1], dtype=torch.float64))
    torch.testing.assert_close(statistics.null_space("site", threshold=3.0), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either fraction or threshold"),
        ({"fraction": 0.5, "threshold": 0.5}, "either fraction or threshold"),
        ({"fraction": 0.0}, "keeps 0 of the 11"),
        ({"fraction": 1.0}, "keeps 11 of the 11"),
        ({"threshold": 1e-9}, "keeps 0 of the 11"),
    ],
)
def test_a_null_space_that_is_nothing_or_everything_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        random_statistics().null_space("site", **options)


def test_a_second_moment_that_is_singular_but_for_rounding_is_refused():
    with pytest.raises(ValueError, match="singular with ridge=0"):
        random_statistics(n_texts=10).solve("site", torch.ones(1, 11, dtype=torch.float64))


@NEEDS_BRIDGE
def test_statistics_are_told_by_the_models_name_but_not_by_its_maker(boot):
    model = boot("gpt2")
    made = key_statistics(model, SAMPLE, 1)
    shift = {"layer": 1, "lr": 0.1, "key": "whitened", "skip_if_predicted": False}
    expected = tlb.forward_pass_shift(model, [3, 4], 5, statistics=made, **shift)
    for name in (f"maker/{made.model}", None):
        same = KeyStatistics(made.second_moments, made.n_tokens, made.ridge, name)
        got = tlb.forward_pass_shift(model, [3, 4], 5, statistics=same, **shift)
        assert torch.equal(got.factors[name_of(1)].dense(), expected.factors[name_of(1)].dense())
    other = KeyStatistics(made.second_moments, made.n_tokens, made.ridge, "maker/other")
    with pytest.raises(ValueError, match="statistics come from maker/other"):
        tlb.forward_pass_shift(model, [3, 4], 5, statistics=other, **shift)
