"""Fixtures: tiny random models with a real tokenizer, made in memory, and the real model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

if "TL_BACKWARD_NETWORK" not in os.environ:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

from functools import partial

import jaxtyping
import pytest
import torch
from helpers.bridges import boot_tiny
from helpers.families import make
from helpers.hooked import LIKE, build
from helpers.state import changes_of, state_of_model
from helpers.summary import SUMMARY
from helpers.texts import tokenizer_from
from helpers.versions import HAS_BRIDGE, HAS_HOOKED_TRANSFORMER, NO_BRIDGE
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)  # the tiny models are faster on one


def pytest_report_header() -> str:
    """Which model classes are tested: the others are not in this TransformerLens."""
    classes = ["TransformerBridge"] * HAS_BRIDGE + ["HookedTransformer"] * HAS_HOOKED_TRANSFORMER
    return f"transformer-lens {version('transformer-lens')} has {' and '.join(classes)}"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SUMMARY] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The notebooks first: one that is begun last lets the other processes wait for it."""
    items.sort(key=lambda item: item.path.name != "test_demos.py")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for line in config.stash[SUMMARY]:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ' Paris' and most words of the texts as one token each."""
    return tokenizer_from(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer_with_bos(tmp_path_factory) -> PreTrainedTokenizerFast:
    """The same, but it puts ``<bos>`` before every text, as Llama's and Gemma's do."""
    return tokenizer_from(tmp_path_factory.mktemp("tokenizer_with_bos"), adds_bos=True)


@pytest.fixture(scope="session")
def boot(tokenizer):
    """A function that makes a tiny random bridge: ``boot("llama", torch.float64)``."""
    return partial(boot_tiny, tokenizer=tokenizer)


@pytest.fixture
def make_family(tokenizer):
    """A function that makes the tiny random bridge of any family."""
    return partial(make, tokenizer=tokenizer)


@pytest.fixture(params=["llama", "gpt2"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(boot, kind):
    return boot(kind)


@pytest.fixture(scope="session")
def shared() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The models that all tests share, by name, each with its state when it was made."""
    return {}


@pytest.fixture(scope="session")
def make_model(boot):
    """A function that makes a tiny model of a name from ``MODELS``."""

    def model(name):
        cls, kind, *compatibility = name.split("-")
        made = build(**LIKE[kind]) if cls == "hooked" else boot(kind)
        if compatibility:
            made.enable_compatibility_mode(disable_warnings=True)
        made(torch.tensor([[1, 2]]))  # a bridge adds hooks to its norms at its first forward pass
        return made

    return model


@pytest.fixture(scope="session")
def models(make_model, shared):
    """A function that gives the tiny model of a name from ``MODELS``, the same in every test."""

    def model(name):
        if name not in shared:
            made = make_model(name)
            shared[name] = made, state_of_model(made)
        return shared[name][0]

    return model


@pytest.fixture(scope="module", autouse=True)
def _shared_models_are_left_as_they_came(shared) -> Iterator[None]:
    yield
    from tl_backward import remove_hook_points

    for name, (model, _) in shared.items():
        if name.startswith("hooked"):  # hooks of edits leave the HookPoints that they need
            remove_hook_points(model)
    changed = {
        name: changes
        for name, (model, before) in shared.items()
        if (changes := changes_of(model, before))
    }
    for name in changed:
        del shared[name]
    assert not changed, f"tests of this file have changed models that others share: {changed}"


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the tests' shape checks, so that bad input meets the package's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def smollm2():
    """The real model; its first use on a machine converts the weights (about 20 s)."""
    if not HAS_BRIDGE:
        pytest.skip(NO_BRIDGE)
    from tl_backward.demo_model import load_demo_model

    return load_demo_model()
