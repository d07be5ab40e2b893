"""Linear layers whose weights are stored in 4 or 8 bits, with scales beside them."""

from __future__ import annotations

import pytest
import torch
from helpers.bridges import boot_tiny
from helpers.gradients import relative_error
from helpers.versions import NEEDS_BRIDGE
from torch import nn

import tl_backward as tlb
from tl_backward.editing.gradient_step import gradient_step

pytestmark = NEEDS_BRIDGE

TOKENS, TARGET = torch.tensor([[3, 9, 1, 17, 5, 11, 2, 8, 30]]), 5
PACKED = ("mlp.W_in", "mlp.W_out", "attn.W_K")


class Packed(nn.Module):
    """Two numbers of 4 bits in a byte, in one column, as bitsandbytes has them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        W = linear.weight.detach()
        self.register_buffer("scale", W.abs().max() / 7)
        codes = (W / self.scale).round().add(8).to(torch.uint8).reshape(-1, 2)
        self.weight = nn.Parameter(codes[:, :1] * 16 + codes[:, 1:], requires_grad=False)
        self.bias = linear.bias

    def dequantised(self) -> torch.Tensor:
        codes = torch.cat([self.weight // 16, self.weight % 16], dim=1).to(self.scale.dtype)
        return ((codes - 8) * self.scale).reshape(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantised(), self.bias)


class WithoutBackward(Packed):
    """As a kernel for inference."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class InItsOwnFormat(Packed):
    """Without a tensor that is called ``weight``, as GPTQ and AWQ have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("qweight", self.weight.data)
        del self.weight

    def dequantised(self) -> torch.Tensor:
        self.weight = self.qweight
        W = super().dequantised()
        del self.weight
        return W


def layers(model):
    """The components of a bridge whose layers are packed."""
    return [
        part
        for block in model.blocks
        for part in (block.mlp._modules["in"], block.mlp._modules["out"], block.attn.k)
    ]


def put(component, layer):
    """Have TransformerLens wrap another layer, and transformers call the component as before."""
    component._modules["_original_component"] = layer


@pytest.fixture(scope="module", params=[Packed, InItsOwnFormat])
def models(request, tokenizer):
    """Packed, and with the same numbers in plain layers."""
    packed, plain = (boot_tiny("llama", tokenizer=tokenizer) for _ in range(2))
    for component, other in zip(layers(packed), layers(plain), strict=True):
        layer = request.param(component.original_component)
        other.original_component.weight.data = layer.dequantised()
        put(component, layer)
    return packed, plain


def test_capture_and_lens(models):
    packed, plain = models
    caches = [tlb.run_with_backward_cache(model, TOKENS, TARGET)[1] for model in models]
    assert [*caches[0]] == [*caches[1]]
    for name, g in caches[1].items():
        assert g.shape == caches[0][name].shape
        assert relative_error(caches[0][name].dense(), g.dense()) <= 1e-12
    reads = [tlb.BackwardLogitLens(model)(TOKENS, TARGET) for model in models]
    assert torch.equal(reads[0]["W_out"].bottom_ids, reads[1]["W_out"].bottom_ids)
    sites = {site.name: site for site in tlb.weight_sites(packed)}
    assert {n for n in sites if sites[n].packed} == {
        f"blocks.{layer}.{name}" for layer in range(3) for name in PACKED
    }
    for site in tlb.weight_sites(plain):
        assert (site.d_in, site.d_out) == (sites[site.name].d_in, sites[site.name].d_out)


def test_hooks_and_refusals(models):
    packed, plain = models
    edits = []
    for model in models:
        _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
        edits.append(gradient_step(cache, lr=0.1, weights=("W_in", "W_out"), model=model))
    hooked = packed.run_with_hooks(TOKENS, fwd_hooks=edits[0].fwd_hooks())
    with edits[1].applied():
        torch.testing.assert_close(hooked, plain(TOKENS))
    assert relative_error(hooked, packed(TOKENS)) > 1e-3
    refused = r"blocks\.0\.mlp\.W_in is stored packed .*use fwd_hooks\(\)"
    with pytest.raises(NotImplementedError, match=refused):
        edits[0].apply()
    with pytest.raises(NotImplementedError, match=refused):
        _ = tlb.weight_sites(packed, "W_in", 0)[0].parameter
    shift = tlb.forward_pass_shift(packed, TOKENS[0].tolist(), TARGET, layer=1, lr=0.1)
    with pytest.raises(NotImplementedError, match=r"blocks\.1\.mlp\.W_out is stored packed"):
        shift.apply()


def test_coverage(models):
    rows = tlb.coverage(models[0]).set_index("parameter")
    for name in [name for name in rows.index if name.endswith("down_proj.weight")]:
        assert rows.site[name].endswith("mlp.W_out")
    assert (rows.site.notna() ^ rows.reason.notna()).all()


def test_an_unembedding_is_refused_where_its_values_are_needed(tokenizer):
    model = boot_tiny("llama", tokenizer=tokenizer)
    put(model.unembed, Packed(model.unembed.original_component))
    assert tlb.run_with_backward_cache(model, TOKENS, TARGET, weights="W_U")
    with pytest.raises(NotImplementedError, match=r"unembed\.W_U is stored packed"):
        tlb.BackwardLogitLens(model)(TOKENS, TARGET)


def test_a_layer_without_a_backward_pass_is_refused(tokenizer):
    """Everything below it would get no VJP."""
    model = boot_tiny("llama", tokenizer=tokenizer)
    component = model.blocks[1].mlp._modules["in"]
    put(component, WithoutBackward(component.original_component))
    with pytest.raises(NotImplementedError, match=r"layer of blocks\.1\.mlp\.W_in .* no backward"):
        tlb.run_with_backward_cache(model, TOKENS, TARGET)
    assert len(tlb.run_with_backward_cache(model, TOKENS, TARGET, layers=2)[1]) == 7


def test_bitsandbytes(tokenizer):
    """The library's own 4-bit layer, against plain layers with what it says its numbers are."""
    bnb = pytest.importorskip("bitsandbytes")
    packed, plain = (boot_tiny("llama", torch.float32, tokenizer=tokenizer) for _ in range(2))
    for component, other in zip(layers(packed), layers(plain), strict=True):
        linear = component.original_component
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32
        )
        layer.load_state_dict({"weight": linear.weight})
        layer = layer.to("cpu").eval()
        W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        other.original_component.weight.data = W
        put(component, layer)
    caches = [tlb.run_with_backward_cache(m, TOKENS, TARGET)[1] for m in (packed, plain)]
    for name, g in caches[1].items():
        assert relative_error(caches[0][name].dense(), g.dense()) <= 1e-4
