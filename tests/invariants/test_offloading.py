"""Weights that accelerate keeps on the CPU or on disk between the calls of their modules."""

from __future__ import annotations

import json
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.hooks import SequentialHook, attach_align_device_hook
from accelerate.utils import OffloadedWeightsLoader
from helpers.families import FAMILIES, bridge_of, random_model
from helpers.gradients import reference_loss, relative_error
from helpers.versions import NEEDS_BRIDGE, TL_VERSION
from safetensors.torch import save_file

import tl_backward as tlb
from tl_backward.editing.gradient_step import gradient_step

pytestmark = [
    NEEDS_BRIDGE,
    pytest.mark.skipif(
        TL_VERSION < 4,
        reason="TransformerLens 3.9 gives offloaded models a bias that accelerate has no values of",
    ),
]

PROMPT, TARGET = [3, 9, 1, 17, 5, 11, 2, 8, 30], 5
CPU = torch.device("cpu")


def to_cpu(hf, folder):
    accelerate.cpu_offload(hf, execution_device=CPU)


def to_disk(hf, folder):
    accelerate.disk_offload(hf, str(folder), execution_device=CPU)


def to_checkpoint(hf, folder):
    """As ``from_pretrained(..., device_map=...)`` leaves what goes to disk."""
    file = str(folder / "model.safetensors")
    save_file({name: tensor.clone() for name, tensor in hf.state_dict().items()}, file)
    index = {name: {"safetensors_file": file, "weight_name": name} for name in hf.state_dict()}
    weights = OffloadedWeightsLoader(index=index)
    attach_align_device_hook(hf, execution_device=CPU, offload=True, weights_map=weights)


def pair(tokenizer, family, offload, folder, dtype=torch.float64):
    """Two bridges of the same weights, one of them offloaded."""
    plain, offloaded = (random_model(FAMILIES[family](len(tokenizer)), dtype) for _ in range(2))
    offload(offloaded, folder)
    return bridge_of(plain, tokenizer), bridge_of(offloaded, tokenizer)


@pytest.fixture(scope="module", params=["llama", "llama_tied", "gemma", "gpt2", "opt", "youtu"])
def family(request):
    return request.param


@pytest.fixture(scope="module", params=[to_cpu, to_disk, to_checkpoint])
def models(request, tokenizer, family, tmp_path_factory):
    return pair(tokenizer, family, request.param, tmp_path_factory.mktemp("offloaded"))


def test_capture_and_lens(models):
    """As without offloading, number by number; and the placeholders stay as trainable as before."""
    plain, offloaded = models
    parameters = torch.nn.Module.parameters
    trainable = [p.requires_grad for p in parameters(offloaded.original_model)]
    loss, cache = tlb.run_with_backward_cache(plain, PROMPT, TARGET)
    other_loss, other = tlb.run_with_backward_cache(offloaded, PROMPT, TARGET)
    assert torch.equal(loss, other_loss) and [*cache] == [*other]
    for name, g in cache.items():
        assert torch.equal(g.inputs, other[name].inputs)
        assert torch.equal(g.vjps, other[name].vjps)
    assert [p.requires_grad for p in parameters(offloaded.original_model)] == trainable
    assert any(p.device.type == "meta" for p in parameters(offloaded.original_model))
    kind = "W_out" if any(name.endswith(".W_out") for name in cache) else "W_out_proj"
    reads = [tlb.BackwardLogitLens(m)(PROMPT, TARGET, weights=kind)[kind] for m in models]
    assert torch.equal(reads[0].top_ids, reads[1].top_ids)
    assert torch.equal(reads[0].norms, reads[1].norms)


def test_coverage(models):
    """The same sites; a weight that is tied has a placeholder at each of its places."""
    names = [{n for s in tlb.coverage(m).site.dropna() for n in s.split(" + ")} for m in models]
    assert names[0] == names[1]


@pytest.mark.parametrize("offload", [to_cpu, to_disk])
def test_edits(tokenizer, family, offload, tmp_path):
    """Applied as to the weights themselves, and reverted bit for bit where they are kept."""
    models = pair(tokenizer, family, offload, tmp_path)
    kept = [site.parameter.clone() for site in tlb.weight_sites(models[1])]
    edited = []
    for model in models:
        _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET)
        kinds = {"W_out", "W_out_proj", "W_Q"} & {name.rpartition(".")[2] for name in cache}
        edit = gradient_step(cache, lr=0.1, weights=kinds, model=model)
        before = model(torch.tensor([PROMPT]))
        with edit.applied():
            edited.append(model(torch.tensor([PROMPT])))
        assert torch.equal(model(torch.tensor([PROMPT])), before)
    assert torch.equal(*edited) and relative_error(edited[0], before) > 1e-3
    now = [site.parameter for site in tlb.weight_sites(models[1])]
    assert all(torch.equal(*both) for both in zip(kept, now, strict=True))


def test_the_forward_shift(tokenizer, tmp_path):
    """As without offloading, found and applied."""
    edited = []
    for model in pair(tokenizer, "llama", to_cpu, tmp_path):
        with tlb.forward_pass_shift(model, PROMPT, TARGET, layer=1, lr=0.2).applied():
            edited.append(model(torch.tensor([PROMPT])))
    assert torch.equal(*edited)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_on_disk(tokenizer, tmp_path, dtype):
    """By the bytes of the files: those of one weight change, and come back."""
    _, model = pair(tokenizer, "llama", to_disk, tmp_path, dtype)
    files = {path.name: path.read_bytes() for path in sorted(tmp_path.glob("*.dat"))}
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET, weights="W_out", layers=1)
    edit = gradient_step(cache, lr=0.5, model=model)
    edit.apply()
    changed = {
        path.name for path in tmp_path.glob("*.dat") if path.read_bytes() != files[path.name]
    }
    assert changed == {"model.layers.1.mlp.down_proj.weight.dat"}
    (site,) = tlb.weight_sites(model, "W_out", 1)
    index = json.loads(Path(tmp_path, "index.json").read_text())
    name = "model.layers.1.mlp.down_proj.weight"
    read = accelerate.utils.offload.load_offloaded_weight(tmp_path / f"{name}.dat", index[name])
    assert site.parameter.dtype == dtype and torch.equal(site.parameter, read)
    edit.revert()
    assert files == {path.name: path.read_bytes() for path in sorted(tmp_path.glob("*.dat"))}


def test_tied_weights_in_memory_are_one(tokenizer, tmp_path):
    plain, offloaded = pair(tokenizer, "llama_tied", to_cpu, tmp_path)
    ties = [
        {s.name: s.tied_to for s in tlb.weight_sites(m) if s.tied_to} for m in (plain, offloaded)
    ]
    assert ties[0] == ties[1] == {"embed.W_E": ("unembed.W_U",), "unembed.W_U": ("embed.W_E",)}


def test_tied_weights_in_files_are_two(tokenizer, tmp_path):
    """accelerate writes one file for each name, so a change of one is no change of the other."""
    _, model = pair(tokenizer, "llama_tied", to_disk, tmp_path)
    W_E, W_U = (tlb.weight_sites(model, kind)[0] for kind in ("W_E", "W_U"))
    assert W_E.tied_to == W_U.tied_to == ()
    before = W_E.parameter.clone()
    with torch.no_grad():
        W_U.parameter.add_(1)
    assert torch.equal(W_E.parameter, before)


def test_a_checkpoint_takes_no_edit(tokenizer, tmp_path):
    plain, model = pair(tokenizer, "llama", to_checkpoint, tmp_path)
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET, weights="W_out", layers=1)
    edit = gradient_step(cache, lr=0.1, model=model)
    with pytest.raises(
        NotImplementedError, match=r"W_out is offloaded to a checkpoint.*cpu_offload"
    ):
        edit.apply()
    hooked = model.run_with_hooks(torch.tensor([PROMPT]), fwd_hooks=edit.fwd_hooks())
    with gradient_step(cache, lr=0.1, model=plain).applied():
        torch.testing.assert_close(hooked, plain(torch.tensor([PROMPT])))


def test_an_offloaded_weight_under_several_hooks(tokenizer, tmp_path):
    """Modules that are preloaded have a chain of hooks."""
    plain, model = pair(tokenizer, "llama", to_cpu, tmp_path)
    (site,) = tlb.weight_sites(model, "W_out", 1)
    module = site.holder[0]
    module._hf_hook = SequentialHook(module._hf_hook)
    (other,) = tlb.weight_sites(plain, "W_out", 1)
    assert torch.equal(site.parameter, other.parameter)


def test_saved_edits_know_their_weights(tokenizer, tmp_path):
    plain, offloaded = pair(tokenizer, "llama", to_cpu, tmp_path)
    path = tlb.forward_pass_shift(plain, PROMPT, TARGET, layer=1, lr=0.2).save(tmp_path / "edit")
    tlb.WeightEdit.load(path, offloaded)
    with torch.no_grad():
        tlb.weight_sites(offloaded, "W_out", 1)[0].parameter.mul_(2)
    with pytest.raises(ValueError, match="W_out is not the one that this edit was saved for"):
        tlb.WeightEdit.load(path, offloaded)


def test_gradients_through_an_offloaded_model(tokenizer, tmp_path):
    """By autograd on the model as it was, in the layout of the parameter."""
    plain, offloaded = pair(tokenizer, "llama", to_disk, tmp_path)
    _, cache = tlb.run_with_backward_cache(offloaded, PROMPT, TARGET)
    loss = reference_loss(plain, torch.tensor([PROMPT]), TARGET)
    for site, own in zip(tlb.weight_sites(offloaded), tlb.weight_sites(plain), strict=True):
        (gradient,) = torch.autograd.grad(loss, own.parameter, retain_graph=True)
        got = site.to_parameter_layout(cache[site.name].dense())
        assert got.shape == site.parameter.shape
        assert relative_error(got, gradient) <= 1e-10
