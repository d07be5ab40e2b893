"""What made a result: equal in every process, and different, by name, after every change."""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.texts import PROMPT
from helpers.versions import MODELS, NEEDS_BRIDGE
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_backward as tlb
from tl_backward.provenance import hash_of, provenance, require_same
from tl_backward.provenance.descriptions import describe, text_of


def parts(value: object) -> dict:
    return describe(value=value)["value"]


def changed(one: object, other: object) -> set[str]:
    """The names of the parts that differ."""
    a, b = ({name: text_of(part) for name, part in parts(each).items()} for each in (one, other))
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


def compiled(source: str, **others: object):
    """The function ``fn`` of a script, and what else the script refers to."""
    script = {"__name__": "__main__"} | others
    exec(compile(source, "script.py", "exec"), script)
    return script["fn"]


# ----- functions -----

CHANGES = {
    "an operator": ("fn = lambda x: x + 1", "fn = lambda x: x - 1", "__code__"),
    "a constant": ("fn = lambda x: x + 1", "fn = lambda x: x + 2", "__code__"),
    "a constant of another type": ("fn = lambda x: x * 1", "fn = lambda x: x * 1.0", "__code__"),
    "a sign": ("fn = lambda x: x * 0.0", "fn = lambda x: x * -0.0", "__code__"),
    "an attribute's name": ("fn = lambda x: x.real", "fn = lambda x: x.imag", "__code__"),
    "an argument's name": ("fn = lambda x: 1", "fn = lambda y: 1", "__code__"),
    "a set of constants": (
        "fn = lambda x: x in {'a', 'b'}",
        "fn = lambda x: x in {'a', 'c'}",
        "__code__",
    ),
    "a nested function": (
        "def fn(x):\n  def nested():\n    return (1, 2)\n  return nested()",
        "def fn(x):\n  def nested():\n    return (1, 3)\n  return nested()",
        "__code__",
    ),
    "a handler": (
        "def fn(x):\n  try:\n    x()\n    x()\n  except KeyError:\n    pass",
        "def fn(x):\n  x()\n  try:\n    x()\n  except KeyError:\n    pass",
        "__code__",
    ),
    "a default": ("def fn(x, lr=1): pass", "def fn(x, lr=-1): pass", "lr"),
    "a default of a keyword": ("def fn(x, *, lr=1): pass", "def fn(x, *, lr=-1): pass", "lr"),
    "a global": ("LR = 1\nfn = lambda x: LR", "LR = 2\nfn = lambda x: LR", "__globals__.LR"),
    "a global of a nested function": (
        "LR = 1\ndef fn(x):\n  return [LR for _ in x]",
        "LR = 2\ndef fn(x):\n  return [LR for _ in x]",
        "__globals__.LR",
    ),
    "a helper": (
        "def help(x): return x + 1\nfn = lambda x: help(x)",
        "def help(x): return x + 2\nfn = lambda x: help(x)",
        "__globals__.help",
    ),
    "a helper's helper": (
        "one = lambda: 1\nhelp = lambda: one()\nfn = lambda x: help()",
        "one = lambda: 2\nhelp = lambda: one()\nfn = lambda x: help()",
        "__globals__.help",
    ),
    "a helper that it calls by turns": (
        "def fn(x): return x and help(x - 1)\ndef help(x): return fn(x) + 1",
        "def fn(x): return x and help(x - 1)\ndef help(x): return fn(x) + 2",
        "__globals__.help",
    ),
    "a class": (
        "class A:\n  def f(self): return 1\nfn = lambda x: A().f()",
        "class A:\n  def f(self): return 2\nfn = lambda x: A().f()",
        "__globals__.A",
    ),
    "a base class": (
        "class B:\n  lr = 1\nclass A(B): pass\nfn = lambda x: A().lr",
        "class B:\n  lr = 2\nclass A(B): pass\nfn = lambda x: A().lr",
        "__globals__.A",
    ),
    "a property": (
        "class A:\n  @property\n  def lr(self): return 1\nfn = lambda x: A().lr",
        "class A:\n  @property\n  def lr(self): return 2\nfn = lambda x: A().lr",
        "__globals__.A",
    ),
    "what a cache is around": (
        "from functools import lru_cache\n@lru_cache\ndef fn(x): return 1",
        "from functools import lru_cache\n@lru_cache\ndef fn(x): return 2",
        "__code__",
    ),
    "what a decorator of a library is around": (
        "import torch\n@torch.no_grad()\ndef fn(x): return 1",
        "import torch\n@torch.no_grad()\ndef fn(x): return 2",
        "func.__code__",
    ),
    "a decorator of a library": (
        "import torch\n@torch.no_grad()\ndef fn(x): return 1",
        "import torch\n@torch.enable_grad()\ndef fn(x): return 1",
        "ctx_factory.__self__",
    ),
}


@pytest.mark.parametrize(("then", "now", "name"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_a_function_is_named(then, now, name):
    assert name in changed(compiled(then), compiled(now))
    assert changed(compiled(then), compiled("\n\n" + then)) == set()


def shifted(lr: object, layer: int = 1):
    def fn(model, batch):
        return [lr, layer]

    return fn


class Method:
    """Calls a function with what it holds."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def __call__(self, model, batch):
        return self.lr

    def bound(self, model, batch):
        return self.lr

    def other(self, lr):
        return lambda model, batch: lr


class Slotted:
    __slots__ = ("lr",)

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def __call__(self, model, batch):
        return self.lr


@dataclass(frozen=True)
class Options:
    lr: float


def stepped(model, batch, lr):
    return lr


BINDINGS = {
    "a closure": (shifted, "lr"),
    "a closure in a closure": (lambda lr: shifted(shifted(lr)), "lr.lr"),
    "a mapping in a closure": (lambda lr: shifted({"lr": lr}), "lr.lr"),
    "a dataclass in a closure": (lambda lr: shifted(Options(lr)), "lr"),
    "an array": (lambda lr: shifted(np.array([lr, 1.0])), "lr"),
    "a tensor": (lambda lr: shifted(torch.tensor([lr, 1.0])), "lr"),
    "a tensor without axes": (lambda lr: shifted(torch.tensor(lr)), "lr"),
    "a mapping with other keys": (lambda lr: shifted({(1, "a"): lr, 2: 0}), "lr"),
    "a set": (lambda lr: shifted({"a", "b", str(lr)}), "lr"),
    "a torch module": (lambda lr: shifted(torch.nn.LeakyReLU(lr)), "lr"),
    "a weight": (lambda lr: shifted(linear(lr)), "lr"),
    "a partial": (lambda lr: functools.partial(stepped, lr=lr), "lr"),
    "a partial of a partial": (
        lambda lr: functools.partial(functools.partial(stepped, lr=0.5), lr=lr),
        "lr",
    ),
    "a partial by position": (lambda lr: functools.partial(stepped, None, None, lr), "args[2]"),
    "a partial of a closure": (lambda lr: functools.partial(shifted(lr), model=None), "lr"),
    "an object that is called": (Method, "lr"),
    "an object with slots": (Slotted, "value"),
    "a method": (lambda lr: Method(lr).bound, "__self__.lr"),
    "a namespace": (lambda lr: shifted(SimpleNamespace(lr=lr)), "lr"),
}


def linear(lr: float) -> torch.nn.Linear:
    module = torch.nn.Linear(2, 3, bias=False)
    module.weight.data.fill_(lr)
    return module


@pytest.mark.parametrize(("make", "name"), BINDINGS.values(), ids=BINDINGS.keys())
def test_what_a_function_binds_is_named(make, name):
    assert changed(make(0.3), make(-0.3)) == {name}
    assert changed(make(0.3), make(0.3)) == set()


def test_a_partial_overrides_a_default():
    def fn(model, batch, lr=0.1):
        return lr

    described = parts(functools.partial(fn, lr=0.3))
    assert (described["lr"], described["lr'"]) == (0.3, 0.1)


def test_what_was_fitted_may_be_known_by_what_it_was_fitted_on():
    def fitted(texts: list[str], digits: float, bind):
        function = bind(digits)
        vars(function)["made_by"] = {"texts": texts}
        return function

    for bind in (shifted, lambda lr: functools.partial(stepped, lr=lr)):
        one, again = fitted(["a"], 0.3, bind), fitted(["a"], 0.1 + 0.2, bind)
        assert changed(one, again) == set()
        assert changed(shifted(one), shifted(again)) == set()
        assert changed(one, fitted(["b"], 0.3, bind)) == {"texts"}
    assert "__code__" in changed(fitted(["a"], 1, shifted), fitted(["a"], 1, Method(1).other))


def test_what_was_computed_from_the_rest_is_no_part():
    class Statistics:
        def __init__(self) -> None:
            self.n = 3

        @functools.cached_property
        def factor(self) -> torch.Tensor:
            return torch.randn(3)

    used = Statistics()
    assert used.factor.shape == (3,)
    assert changed(shifted(used), shifted(Statistics())) == set()


def test_values_of_equal_contents_are_equal():
    one = [{"a": 1, "b": (1, 2)}, {"x", "y"}, 3, True, "text"]
    other = [OrderedDict(b=[1, 2], a=np.int64(1)), frozenset(["y", "x"]), 3, np.bool_(True), "text"]
    assert changed(one, other) == set()
    assert changed({"a": 1}, MappingProxyType({"a": 1})) == {"a", "value"}  # the same, as one part
    for value, like_it in [
        (1, True),
        (1, 1.0),
        (1, "1"),
        (None, "None"),
        ([1], [[1]]),
        (b"a", "a"),
    ]:
        assert changed([value], [like_it]) == {"value"}


def test_circles_are_described():
    def recursive(n):
        return n and recursive(n - 1)

    node = SimpleNamespace(value=1)
    node.parent = SimpleNamespace(child=node)
    assert changed(recursive, recursive) == set()
    assert changed(shifted(node), shifted(deepcopy(node))) == set()
    other = deepcopy(node)
    other.value = 2
    assert changed(shifted(node), shifted(other)) == {"lr"}


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (threading.Lock(), "lr"),
        ({"deep": [open(os.devnull)]}, "lr.deep"),  # noqa: SIM115
        ((x for x in "ab"), "lr"),
        (functools.reduce(lambda inner, _: [inner], range(100_000), []), "lr"),
    ],
    ids=["lock", "file", "generator", "depth"],
)
def test_what_is_known_by_its_address_alone_is_refused_by_name(value, name):
    with pytest.raises(TypeError, match=f"{name} cannot be recognised .*__getstate__"):
        parts(shifted(value))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(JSON, JSON)
@settings(deadline=None, derandomize=True, max_examples=200, database=None)
def test_values_differ_exactly_if_their_contents_do(one, other):
    def typed(value):
        if isinstance(value, dict):
            return ["dict", *sorted((key, typed(item)) for key, item in value.items())]
        return list(map(typed, value)) if isinstance(value, list) else (repr(value),)

    assert (changed([one], [other]) == set()) == (repr(typed(one)) == repr(typed(other)))
    assert changed([one], [deepcopy(one)]) == set()


# ----- modules of the user -----


def test_a_module_of_the_user_is_known_by_its_sources(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def fn_with(deepest: str):
        for name in ("users_helpers", "users_helpers.deep", "users_own"):
            sys.modules.pop(name, None)
        (tmp_path / "users_helpers").mkdir(exist_ok=True)
        (tmp_path / "users_helpers" / "__init__.py").write_text("from . import deep")
        (tmp_path / "users_helpers" / "deep.py").write_text(deepest)
        (tmp_path / "users_own.py").write_text(
            "import users_helpers\ndef fn(x): return users_helpers.deep.score(x)"
        )
        importlib.invalidate_caches()
        return importlib.import_module("users_own").fn

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    then, again = fn_with("def score(x): return 1"), fn_with("def score(x): return 1")
    assert changed(then, again) == set()
    described = parts(again)
    assert parts(fn_with("def score(x): return 2")) != described


def test_a_package_is_known_by_its_version(monkeypatch):
    fn = compiled("import jaxtyping\nfn = lambda x: jaxtyping.Float")
    described = parts(fn)
    monkeypatch.setattr("jaxtyping.__version__", "0.0.0")
    assert {name for name in described if parts(fn)[name] != described[name]} == {
        "__globals__.jaxtyping"
    }


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import test_provenance
print(*test_provenance.hashes_of_all_cases())
"""


def hashes_of_all_cases() -> list[str]:
    functions = [compiled(source) for source, _, _ in CHANGES.values()]
    functions += [make(0.3) for make, _ in BINDINGS.values()]
    return [hash_of(parts(function)) for function in functions]


def test_another_process_describes_the_same():
    """With other hashes of strings, and so another order of sets."""
    other = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.split() == hashes_of_all_cases()


# ----- models -----


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


def test_every_weight_is_a_part(model):
    before = parts(model)
    for site in tlb.weight_sites(model):
        first = (0,) * site.parameter.ndim
        with torch.no_grad():
            value = site.parameter[first].clone()
            site.parameter[first] = value.nextafter(value + 1)
            after = parts(model)
            site.parameter[first] = value
        differing = {name for name in before if before[name] != after[name]}
        assert differing and all(name.startswith("weights.") for name in differing), site.name
    assert parts(model) == before


@NEEDS_BRIDGE
def test_the_use_of_a_model_makes_no_other_of_it(models):
    model = models(MODELS[0])
    before = parts(model)
    tlb.run_with_backward_cache(model, PROMPT, " Paris")
    model.generate(PROMPT, max_new_tokens=2, verbose=False)
    model.tokenizer([PROMPT], truncation=True, max_length=3, padding="max_length")
    assert parts(model) == before


@NEEDS_BRIDGE
def test_the_same_model_made_again_is_the_same(request):
    boot = request.getfixturevalue("boot")
    assert changed(boot("llama"), boot("llama")) == set()
    assert "cfg.dtype" in changed(boot("llama"), boot("llama", torch.float32))


def test_settings_of_a_model_are_named(models):
    model = models(MODELS[0])
    before, eps = parts(model), model.cfg.eps
    model.cfg.eps = 0.5
    try:
        assert {name for name, part in parts(model).items() if part != before[name]} == {"cfg.eps"}
    finally:
        model.cfg.eps = eps


@NEEDS_BRIDGE
def test_the_tokenizer_is_a_part(models):
    model = models(MODELS[0])
    before, tokenizer = parts(model), model.tokenizer
    try:
        model.tokenizer = deepcopy(tokenizer)
        assert parts(model) == before
        model.tokenizer.add_tokens(["another"])
        assert {n for n, part in parts(model).items() if part != before[n]} == {"tokenizer"}
    finally:
        model.tokenizer = tokenizer


@pytest.mark.parametrize("kind", ["hook point", "torch", "partial"])
def test_hooks_of_the_user_are_parts(models, kind):
    model = models(MODELS[0])
    before, point = parts(model), model.blocks[0].hook_resid_post

    def with_hook(scale: float) -> dict:
        def hook(*arguments, **named):
            return None if scale else 0

        if kind == "hook point":
            model.add_hook("blocks.0.hook_resid_post", hook, is_permanent=True)
            remove = functools.partial(point.remove_hooks, including_permanent=True)
        else:
            hook = functools.partial(hook) if kind == "partial" else hook
            remove = model.blocks[0].ln1.register_forward_hook(hook).remove
        try:
            return parts(model)
        finally:
            remove()

    once, again, other = with_hook(1.0), with_hook(1.0), with_hook(2.0)
    assert once == again
    assert once != other
    (name,) = once.keys() - before.keys()
    assert name.startswith("hooks.blocks.0.")
    assert parts(model) == before


def test_an_offloaded_model_is_the_same():
    accelerate = pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 11}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads))
    before = parts(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert parts(model) == before


# ----- folders -----


def test_all_that_differs_is_named(tmp_path):
    then = provenance([1, 2], fn=shifted(0.3), model=1)
    then["versions"]["torch"] = "1.0"
    require_same(tmp_path, then, {})
    now = provenance([1], fn=shifted(-0.3), model=2)
    with pytest.raises(ValueError) as refused:
        require_same(tmp_path, now, {"table": hash_of(then)})
    torch_now = now["versions"]["torch"]
    assert re.search(
        rf'holds results of other versions .torch: "1.0" then, "{torch_now}" now.; '
        r"other records .number: 2 then, 1 now, contents\); other fn .lr: 0.3 then, -0.3 now.; "
        r"other model .value: 1 then, 2 now.\. .* a new folder",
        str(refused.value),
    )


def test_of_many_differences_some_are_named(tmp_path):
    then, now = ({f"lr{i}": lr for i in range(9)} for lr in (0.3, -0.3))
    require_same(tmp_path, {"fn": then}, {})
    with pytest.raises(ValueError, match=r"lr2: 0.3 then, -0.3 now, 6 more\)"):
        require_same(tmp_path, {"fn": now}, {"table": hash_of({"fn": then})})


def test_what_is_new_or_gone_is_named(tmp_path):
    require_same(tmp_path, {"fn": {"lr": 1}}, {})
    with pytest.raises(ValueError, match='layer: "missing" then, 2 now, lr: 1 then, "missing" now'):
        require_same(tmp_path, {"fn": {"layer": 2}}, {"table": hash_of({"fn": {"lr": 1}})})


def test_results_of_several_are_refused(tmp_path):
    require_same(tmp_path, {"fn": {"lr": 1}}, {})
    found = {"one": hash_of({"fn": {"lr": 1}}), "other": hash_of({"fn": {"lr": 2}})}
    with pytest.raises(ValueError, match=r"_provenance\.json does not describe other"):
        require_same(tmp_path, {"fn": {"lr": 1}}, found)


@pytest.mark.parametrize("note", [None, b"", b"[]", b'{"fn": []}', b"\xff", b"[" * 100_000])
def test_without_a_readable_note_only_equal_results_are_accepted(tmp_path, note):
    made_by = provenance([], fn=shifted(1))
    if note is not None:
        (tmp_path / "_provenance.json").write_bytes(note)
    with pytest.raises(ValueError, match=r"_provenance\.json does not describe table"):
        require_same(tmp_path, made_by, {"table": "sha256:0"})
    require_same(tmp_path, made_by, {"table": hash_of(made_by)})
    with pytest.raises(ValueError, match="lr: 1 then, 2 now"):
        require_same(tmp_path, provenance([], fn=shifted(2)), {"table": hash_of(made_by)})
