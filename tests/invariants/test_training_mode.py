"""Training mode is refused where it changes something, and nowhere else."""

from __future__ import annotations

import re
from numbers import Real

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES, FLOAT32_ONLY, make
from helpers.hooked import build
from helpers.versions import CLASSES
from torch import nn

import tl_backward as tlb
from tl_backward.sites import all_modules

TOKENS, TARGET_ID = torch.tensor([[3, 9, 1, 17, 5, 11, 2, 8, 30]]), 5
SETTING = re.compile("drop|jitter|noise")
NAMED = re.compile(r"changes its output: (?P<setting>\S+)=(?P<value>\S+) of (?P<kind>\w+) at ")
IGNORED_BY_THE_BRIDGE = ("youtu", "deepseek_v2", "deepseek_v3", "glm4_moe_lite")
"""Families whose attention in the bridge leaves the dropout out that is set."""


def boot(family, tokenizer):
    return make(family, tokenizer, torch.float32 if family in FLOAT32_ONLY else torch.float64)


def capture(model):
    return tlb.run_with_backward_cache(model, TOKENS, TARGET_ID)


def refusal(model):
    try:
        capture(model)
    except ValueError as error:
        return str(error)
    return None


def assert_as_in_eval_mode(model):
    model.train()
    loss, cache = capture(model)
    assert all(module.training for _, module in all_modules(model))
    model.eval()
    expected_loss, expected = capture(model)
    assert torch.equal(loss, expected_loss) and list(cache) == list(expected)
    for name, g in cache.items():
        assert torch.equal(g.inputs, expected[name].inputs), name
        assert torch.equal(g.vjps, expected[name].vjps), name


@torch.no_grad()
def differs_from_eval_mode(model):
    expected = model.eval()(TOKENS)
    model.train()
    return any(not torch.equal(model(TOKENS), expected) for _ in range(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_as_they_come(family, tokenizer):
    model = boot(family, tokenizer).train()
    if refusal(model):
        assert differs_from_eval_mode(model)
    else:
        assert_as_in_eval_mode(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_everything_active(family, tokenizer, monkeypatch):
    """Without the culprits that the refusals name, one by one, the model is as in eval mode."""
    config_of = FAMILIES[family]

    def with_everything_active(vocab_size):
        config = config_of(vocab_size)
        for name, value in vars(config).items():
            if SETTING.search(name) and isinstance(value, Real) and not isinstance(value, bool):
                setattr(config, name, 0.25)
        return config

    monkeypatch.setitem(FAMILIES, family, with_everything_active)
    model = boot(family, tokenizer)
    if family not in IGNORED_BY_THE_BRIDGE:
        model.train()
        assert differs_from_eval_mode(model) == bool(refusal(model))
    for _ in range(20):
        model.train()
        if (message := refusal(model)) is None:
            break
        found = NAMED.search(message)
        assert found, message
        owner, _, setting = found["setting"].rpartition(".")
        culprits = [m for _, m in all_modules(model) if type(m).__name__ == found["kind"]]
        for module in [getattr(m, owner) for m in culprits] if owner else culprits:
            if hasattr(module, setting):
                setattr(module, setting, 0.0)
    assert_as_in_eval_mode(model)


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x * (torch.rand(()) > self.drop_prob) if self.training else x


class Scaled(nn.Module):
    def forward(self, x):
        return self.by_mode(x)

    def by_mode(self, x):
        return sum(2 * x if self.training else x for _ in range(1))


class Lambda(nn.Module):
    def forward(self, x):
        return (lambda: 2 * x if self.training else x)()


CULPRITS = {
    "p=0.1 of Dropout": lambda: nn.Dropout(0.1),
    "p=0.5 of AlphaDropout": lambda: nn.AlphaDropout(),
    "self.training in the code of BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "self.training in the code of RReLU": nn.RReLU,
    "self.training in the code of _SpectralNorm": lambda: nn.utils.parametrizations.spectral_norm(
        nn.Linear(3, 3)
    ),
    "the forward pre-hook SpectralNorm of Linear": lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
    "dropout=0.2 of MultiheadAttention": lambda: nn.MultiheadAttention(4, 2, dropout=0.2),
    "dropout=0.3 of LSTM": lambda: nn.LSTM(3, 3, 2, dropout=0.3),
    "drop_prob=0.4 of DropPath": lambda: DropPath(0.4),
    "drop_prob=0.5 of DropPath": lambda: DropPath(np.float64(0.5)),
    "self.training in the code of Scaled": Scaled,
    "self.training in the code of Lambda": Lambda,
}
HARMLESS = {
    "dropout without p": lambda: nn.Dropout(0.0),
    "path that is never dropped": lambda: DropPath(0.0),
    "attention without dropout": lambda: nn.MultiheadAttention(4, 2),
    "norm": lambda: nn.LayerNorm(3),
}


@pytest.fixture(params=CLASSES)
def plain(request, tokenizer):
    """A model of its own with nothing that training mode changes."""
    if request.param == "bridge":
        return make("llama", tokenizer)

    return build()


def test_a_model_that_has_nothing_active(plain):
    assert_as_in_eval_mode(plain)


def add(model, module):
    parent = getattr(model, "original_model", model)
    parent.add_module("extra", module)


@pytest.mark.parametrize("culprit", CULPRITS)
def test_what_is_active_is_named(plain, culprit):
    add(plain, CULPRITS[culprit]())
    with pytest.raises(ValueError, match=re.escape(f"{culprit} at extra") + ".*model.eval"):
        capture(plain.train())
    plain.extra.eval() if hasattr(plain, "extra") else plain.original_model.extra.eval()
    assert refusal(plain) is None


@pytest.mark.parametrize("harmless", HARMLESS)
def test_what_is_not_active_is_not_refused(plain, harmless):
    add(plain, HARMLESS[harmless]())
    assert_as_in_eval_mode(plain)


def test_one_module_is_enough(boot_gpt2):
    boot_gpt2.blocks[1].train()
    message = refusal(boot_gpt2)
    assert "p=0.1 of Dropout at transformer.h.1" in message and "h.0" not in message
    assert boot_gpt2.blocks[1].training and not boot_gpt2.blocks[0].training


@pytest.fixture
def boot_gpt2(tokenizer):
    return make("gpt2", tokenizer)


def test_dropout_that_the_wrapper_does_counts(tokenizer):
    """TransformerLens's attention reads its own mode, and the dropout of the one inside."""
    model = make("llama", tokenizer)
    attention = model.blocks[0].attn
    attention.original_component.attention_dropout = 0.3
    attention.training = True
    assert not attention.original_component.training
    assert not torch.equal(model(TOKENS), model(TOKENS))
    assert "attention_dropout=0.3 of LlamaAttention" in refusal(model)


def test_checkpointing_is_named(tokenizer):
    """It runs the blocks again in the backward pass, when the run's hooks are gone."""
    model = make("llama", tokenizer)
    for module in model.original_model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    assert refusal(model) is None
    assert "gradient_checkpointing=True of LlamaModel at model" in refusal(model.train())


def test_every_entry_point_asks(plain):
    add(plain, nn.Dropout(0.1))
    plain.train()
    with pytest.raises(ValueError, match=r"p=0\.1 of Dropout at extra"):
        tlb.forward_pass_shift(plain, TOKENS, TARGET_ID, layer=0, lr=0.1)
    with pytest.raises(ValueError, match=r"p=0\.1 of Dropout at extra"):
        tlb.fine_tune(plain, TOKENS, TARGET_ID, lr=0.1)
    with pytest.raises(ValueError, match=r"p=0\.1 of Dropout at extra"):
        tlb.key_statistics(plain, [TOKENS[0]], 0)
