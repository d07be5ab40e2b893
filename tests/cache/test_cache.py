"""Caches on disk: what is saved comes back exactly, or not at all."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.texts import PROMPT, TARGET
from helpers.versions import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor

from tl_backward import tensor_files
from tl_backward.cache import BackwardCache
from tl_backward.cache.residual import Residual
from tl_backward.capture import run_with_backward_cache
from tl_backward.factors import GradientFactors

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
STRINGS = ["", "<bos>", " Zürich", "日本", "🙂", "\ud83d", "\ud83d\ude42", "\0\x1b\n\\n", '"\u2028']


def make_cache(
    dtype: torch.dtype = torch.float32,
    batch: tuple[int, ...] = (),
    n: int = len(STRINGS),
    d: int = 5,
    **changes: object,
) -> BackwardCache:
    """A cache whose W_in and W_gate read one tensor, a view into a larger one."""
    rng = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    wide = random(*batch, n, 2 * d)
    odd = random(*batch, n, 3)
    odd.view(-1)[:4] = torch.tensor([-0.0, torch.inf, torch.nan, torch.finfo(dtype).tiny / 2])
    fields = {
        "factors": {
            "blocks.10.mlp.W_out": GradientFactors(random(*batch, n, 4), odd),
            "blocks.2.mlp.W_in": GradientFactors(wide[..., :d], random(*batch, n, 4)),
            "blocks.2.mlp.W_gate": GradientFactors(wide[..., :d], random(*batch, n, 4)),
            "blocks.2.attn.W_Q": GradientFactors(wide[..., 1 : d + 1], random(*batch, n, 2)),
            "embed.W_E": GradientFactors(random(n, *batch, 6).movedim(0, -2), random(*batch, n, 3)),
        },
        "post_norm_vjps": {"blocks.10.mlp.W_out": random(n, 3)},
        "residual": Residual(
            n_layers=11,
            n_heads=2,
            lengths=None,
            vjps={"hook_embed": random(*batch, n, 3), "blocks.2.hook_mlp_out": odd},
            activations={"blocks.2.hook_mlp_out": random(*batch, n, 3)},
            attention={10: random(*batch, n, 3)},
            heads={2: random(2, *batch, n, 3), 10: random(2, *batch, n, 3)},
        ),
        "tokens": torch.arange(len(STRINGS)) + 2**40,
        "str_tokens": STRINGS,
        "positions": torch.arange(n, dtype=torch.int32).flip(0),
        "target_ids": torch.tensor(7),
        "target_positions": torch.tensor([n - 1]),
        "loss": torch.tensor(1 / 3, dtype=dtype),
        "weights_processing": "fold_ln, center_writing_weights",
    }
    return BackwardCache(**(fields | changes))


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """What makes two tensors the same: nan, -0.0 and subnormal numbers included."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, bytes(data.tolist())


def everything(cache: BackwardCache) -> dict[str, object]:
    return {
        "factors": [(k, bits(g.inputs), bits(g.vjps)) for k, g in cache.factors.items()],
        "post_norm_vjps": [(k, bits(vjps)) for k, vjps in cache.post_norm_vjps.items()],
        "lengths": [g.lengths for g in cache.values()],
        "residual": [
            (cache.residual.n_layers, cache.residual.n_heads, cache.residual.lengths),
            *(
                [(key, bits(tensor)) for key, tensor in getattr(cache.residual, kind).items()]
                for kind in ("vjps", "activations", "attention", "heads")
            ),
        ],
        **{
            k: [bits(t) for t in value] if isinstance(value, list) else bits(value)
            for k in ("tokens", "positions", "target_ids", "target_positions", "loss")
            for value in [getattr(cache, k)]
        },
        "str_tokens": cache.str_tokens,
        "weights_processing": cache.weights_processing,
    }


@pytest.fixture
def path(tmp_path) -> Path:
    return make_cache().save(tmp_path / "cache.safetensors")


def rewrite(path: Path, tensors: dict[str, Tensor | None] | None = None, **metadata: str) -> None:
    """Change tensors (None: leave out) and metadata of a saved cache."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() | metadata
    tensors = safetensors.torch.load_file(path) | (tensors or {})
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(tensors, path, metadata)


# ----- what comes back -----


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_comes_back_to_the_bit(tmp_path, dtype, batch):
    cache = make_cache(dtype, batch)
    path = cache.save(str(tmp_path / "cache"))
    assert path == tmp_path / "cache"
    assert everything(BackwardCache.load(str(path))) == everything(cache)


def test_empty_and_overlapping_parts_come_back(tmp_path):
    rows = torch.randn(4, 3)
    cache = make_cache(
        factors={
            "a.W": GradientFactors(rows[:3], rows[1:]),
            "b.W": GradientFactors(rows[:3, :2], rows[:3].requires_grad_()),
            "c.W": GradientFactors(torch.zeros(0, 3), torch.zeros(0, 2)),
            "d.W": GradientFactors(torch.ones(1, 1).expand(3, 2), rows[1:].view(3, 3).mT),
        },
        post_norm_vjps={},
    )
    loaded = BackwardCache.load(cache.save(tmp_path / "cache"))
    assert everything(loaded) == everything(cache)
    assert not loaded["b.W"].vjps.requires_grad
    no_factors = make_cache(factors={}, post_norm_vjps={})
    loaded = BackwardCache.load(no_factors.save(tmp_path / "cache"))
    assert everything(loaded) == everything(no_factors)


@given(st.lists(st.text(st.characters(exclude_categories=()))))
@settings(deadline=None, derandomize=True, max_examples=50, database=None)
def test_any_strings_come_back(tmp_path_factory, strings):
    cache = make_cache(str_tokens=strings)
    path = cache.save(tmp_path_factory.mktemp("strings") / "cache")
    assert BackwardCache.load(path).str_tokens == strings


def test_shared_tensors_are_written_once_and_shared_again(tmp_path):
    n, d = 50, 2000
    cache = make_cache(n=n, d=d)
    path = cache.save(tmp_path / "cache")
    assert 2 * n * d * 4 < path.stat().st_size < 2.2 * n * d * 4  # of W_in and W_gate, and of W_Q
    for again in ("second", "third"):
        cache = BackwardCache.load(path)
        W_in, W_gate, W_Q = (cache[kind, 2] for kind in ("W_in", "W_gate", "W_Q"))
        assert W_gate.inputs is W_in.inputs
        assert W_gate.vjps is not W_in.vjps
        assert not torch.equal(W_Q.inputs, W_in.inputs)
        path = cache.save(tmp_path / again)
        assert path.stat().st_size == (tmp_path / "cache").stat().st_size


def test_a_loaded_cache_does_not_depend_on_its_file(path):
    want = everything(make_cache())
    loaded = BackwardCache.load(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert everything(loaded) == want


def test_the_device_is_that_of_a_captured_cache(path):
    cache = BackwardCache.load(path, device="meta")
    on_device = [cache.loss, *cache.post_norm_vjps.values()]
    on_device += [x for g in cache.values() for x in (g.inputs, g.vjps)]
    assert {x.device.type for x in on_device} == {"meta"}
    assert cache["W_gate", 2].inputs is cache["W_in", 2].inputs
    ids = [cache.tokens, cache.positions, cache.target_ids]
    assert {x.device.type for x in ids} == {"cpu"}


def test_the_file_is_plain_safetensors(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header["__metadata__"]["format"] == "tl_backward.BackwardCache"
    assert header["__metadata__"]["version"] == "2"
    assert header["factors.blocks.10.mlp.W_out.vjps"]["shape"] == [len(STRINGS), 3]
    assert len(data) == 8 + length + max(
        entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
    )


def test_a_captured_cache_comes_back(tmp_path, model):
    _, cache = run_with_backward_cache(model, PROMPT, TARGET)
    loaded = BackwardCache.load(cache.save(tmp_path / "cache"))
    assert everything(loaded) == everything(cache)
    assert len({id(g.inputs) for g in loaded.values()}) < len(loaded)
    assert loaded.residual.vjps["blocks.1.hook_resid_pre"] is loaded["W_out", 0].vjps
    for name, g in cache.items():
        torch.testing.assert_close(loaded[name].dense(), g.dense(), rtol=1e-12, atol=1e-15)


def test_a_batch_comes_back(tmp_path, models):
    prompts, targets = [[3, 17, 3, 9], [6, 2], [12, 1, 20]], [[5], [11, 2], [4, 4, 8]]
    _, cache = run_with_backward_cache(models(MODELS[0]), prompts, targets, per_head=True)
    loaded = BackwardCache.load(cache.save(tmp_path / "cache"))
    assert everything(loaded) == everything(cache)
    assert everything(loaded.example(1)) == everything(cache.example(1))


# ----- saves that fail -----


def full_disk(tensors: object, path: Path, metadata: object) -> None:
    Path(path).write_bytes(b"half a file")
    raise SafetensorError("no space left on device")


def interrupted(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("older", [True, False], ids=["over an older file", "new"])
@pytest.mark.parametrize(
    ("module", "function", "fails", "error"),
    [
        (tensor_files, "save_file", full_disk, OSError),
        (tensor_files, "save_file", interrupted, KeyboardInterrupt),
        (os, "replace", interrupted, KeyboardInterrupt),
    ],
    ids=["full disk", "interrupted while writing", "interrupted after it"],
)
def test_a_failed_save_leaves_what_was_there(
    tmp_path, monkeypatch, module, function, fails, error, older
):
    path = tmp_path / "cache"
    if older:
        make_cache(n=2).save(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(module, function, fails)
        make_cache().save(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    make_cache().save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    assert everything(BackwardCache.load(path)) == everything(make_cache())


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is not an ordinary file; pass another name"):
        make_cache().save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_full_disk_names_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "save_file", full_disk)
    with pytest.raises(OSError, match=r"the_cache could not be written: no space left"):
        make_cache().save(tmp_path / "the_cache")


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_cache().save(tmp_path / "nowhere" / "cache")
    assert not list(tmp_path.iterdir())


# ----- files that are no saved cache -----


def refused(path: Path) -> str:
    """The message of the ValueError, which is one paragraph and names the path."""
    with pytest.raises(ValueError) as raised:
        BackwardCache.load(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_a_missing_file(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            BackwardCache.load(path)


def test_truncated_anywhere(path):
    data = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, *range(200, len(data), 97), len(data) - 1):
        path.write_bytes(data[:length])
        assert "truncated" in refused(path)
        assert "save the BackwardCache again" in refused(path)
    path.write_bytes(data + b"\0")
    assert "damaged" in refused(path)
    path.write_bytes(data)
    assert everything(BackwardCache.load(path)) == everything(make_cache())


@pytest.mark.parametrize(
    "data", [b"no tensors\n", b"Lorem ipsum\n" * 500, b"\x80\x04N.", b"PK\x03\x04" * 50]
)
def test_another_kind_of_file(path, data):
    path.write_bytes(data)
    assert "not a safetensors file" in refused(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=str)
def test_a_foreign_safetensors_file(path, metadata):
    safetensors.torch.save_file({"weight": torch.ones(2)}, path, metadata)
    assert "holds no BackwardCache; pass a file" in refused(path)


def test_another_version(path):
    rewrite(path, version="3")
    assert "has format version 3" in refused(path)
    assert "reads version 2; upgrade tl_backward" in refused(path)


def test_missing_and_unknown_tensors(path):
    rewrite(path, {"factors.blocks.10.mlp.W_out.vjps": None, "loss": None})
    assert "missing tensors" in refused(path) and "blocks.10.mlp.W_out.vjps" in refused(path)
    make_cache().save(path)
    rewrite(path, {"stowaway": torch.ones(2)})
    assert "unknown tensors" in refused(path)


def test_factors_that_do_not_belong_together(path, unchecked):
    rewrite(path, {"factors.blocks.2.attn.W_Q.vjps": torch.ones(2, 2)})
    assert "inputs and vjps must be" in refused(path)


NO_MAPPING = json.dumps(
    {"factors": [], "post_norm_vjps": [], "tokens": "", "positions": "", "target_ids": ""}
)


@pytest.mark.parametrize("contents", ["", "{", "[]", "{}", "3", NO_MAPPING])
def test_damaged_contents(path, contents):
    rewrite(path, contents=contents)
    assert "damaged BackwardCache" in refused(path)
    assert "save the BackwardCache again" in refused(path)
