"""Tiny random models with a real tokenizer, made in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product

if "TL_BACKWARD_NETWORK" not in os.environ:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

from functools import partial

import jaxtyping
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)  # the tiny models are faster on one

TL_VERSION = int(version("transformer-lens").split(".")[0])
HAS_BRIDGE, HAS_HOOKED_TRANSFORMER = TL_VERSION >= 3, TL_VERSION < 4
NEEDS = {
    "test_analysis.py": HAS_BRIDGE,
    "test_analysis_edits.py": HAS_BRIDGE,
    "test_analysis_many_edits.py": HAS_BRIDGE,
    "test_analysis_questions.py": HAS_BRIDGE,
    "test_backward_lens.py": HAS_BRIDGE,
    "test_both_classes.py": HAS_BRIDGE and HAS_HOOKED_TRANSFORMER,
    "test_capture.py": HAS_BRIDGE,
    "test_command_line.py": HAS_BRIDGE,
    "test_families.py": HAS_BRIDGE,
    "test_hooked_transformer.py": HAS_HOOKED_TRANSFORMER,
    "test_lens.py": HAS_BRIDGE,
    "test_real_model.py": HAS_BRIDGE,
    "test_sites.py": HAS_BRIDGE,
}
collect_ignore = [file for file, is_there in NEEDS.items() if not is_there]

CLASSES = ["bridge"] * HAS_BRIDGE + ["hooked"] * HAS_HOOKED_TRANSFORMER
MODELS = [f"{cls}-{kind}" for cls, kind in product(CLASSES, ("llama", "gpt2"))]
MODELS += ["bridge-gpt2-compatibility"] * HAS_BRIDGE

SUMMARY = pytest.StashKey[list[str]]()
PROMPT = "Lionel Messi plays for the city of"
TARGET = " Paris"
TEXTS = [PROMPT + TARGET, "The Eiffel Tower is located in Rome and in Berlin, not in London"] * 9


def pytest_report_header() -> str:
    """Which tests are left out because their model class is not in this TransformerLens."""
    left_out = f"; without {', '.join(collect_ignore)}" if collect_ignore else ""
    classes = [
        name
        for name, is_there in (
            ("TransformerBridge", HAS_BRIDGE),
            ("HookedTransformer", HAS_HOOKED_TRANSFORMER),
        )
        if is_there
    ]
    return f"transformer-lens {version('transformer-lens')} has {' and '.join(classes)}{left_out}"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SUMMARY] = []


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for line in config.stash[SUMMARY]:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ' Paris' and most words of the texts as one token each."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    bpe.train_from_iterator(TEXTS, BpeTrainer(special_tokens=["<bos>"], show_progress=False))
    folder = tmp_path_factory.mktemp("tokenizer")
    special = {f"{role}_token": "<bos>" for role in ("bos", "eos", "pad")}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def tiny_config(kind: str, vocab_size: int) -> PretrainedConfig:
    if kind == "llama":
        return LlamaConfig(
            hidden_size=28,
            intermediate_size=44,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            vocab_size=vocab_size,
            max_position_embeddings=32,
            initializer_range=0.2,
        )
    return GPT2Config(
        n_embd=28,
        n_inner=44,
        n_layer=3,
        n_head=4,
        vocab_size=vocab_size,
        n_positions=32,
        initializer_range=0.2,
    )


@pytest.fixture(scope="session")
def boot(tokenizer):
    """A function that makes a tiny random bridge: ``boot("llama", torch.float64)``."""

    from transformer_lens.model_bridge import TransformerBridge

    def boot(kind: str, dtype: torch.dtype = torch.float64) -> TransformerBridge:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            hf = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer)))
            for parameter in hf.parameters():  # biases and norms must not be 0 and 1
                parameter.data += 0.1 * torch.randn_like(parameter)
        hf = hf.to(dtype).eval()
        return TransformerBridge.boot_transformers(
            kind, hf_model=hf, tokenizer=tokenizer, dtype=dtype, device="cpu"
        )

    return boot


@pytest.fixture
def make_family(tokenizer):
    """A function that makes the tiny random bridge of any family."""
    if not HAS_BRIDGE:
        pytest.skip("there is no bridge")
    from families import make

    return partial(make, tokenizer=tokenizer)


@pytest.fixture(params=["llama", "gpt2"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(boot, kind):
    return boot(kind)


@pytest.fixture(scope="session")
def models(request):
    from test_hooked_transformer import GATED, GQA, ROTARY, build

    made = {}

    def model(name):
        if name not in made:
            cls, kind, *compatibility = name.split("-")
            llama = {**GATED, **GQA, **ROTARY, "normalization_type": "RMS"}
            if cls == "hooked":
                made[name] = build(**llama if kind == "llama" else {})
            else:
                made[name] = request.getfixturevalue("boot")(kind)
            if compatibility:
                made[name].enable_compatibility_mode(disable_warnings=True)
            made[name](
                torch.tensor([[1, 2]])
            )  # a bridge adds hooks to its norms at its first forward pass
        return made[name]

    return model


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the tests' shape checks, so that bad input meets the package's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def smollm2():
    """The real model; its first use on a machine converts the weights (about 20 s)."""
    from tl_backward.demo_model import load_demo_model

    return load_demo_model()


def reference_loss(model: nn.Module, tokens: Tensor, target: int) -> Tensor:
    """-log p(target) after the last token, written out."""
    return -model(tokens)[0, -1].log_softmax(-1)[target]


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def gradient_of_parameter(sites, cache, site):
    """From the factors: tied embeddings receive the sum of two gradients."""
    tied = [other for other in sites if other.name in (site.name, *site.tied_to)]
    return sum(other.to_parameter_layout(cache[other.name].dense()) for other in tied)
