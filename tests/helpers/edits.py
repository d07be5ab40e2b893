"""Random edits of a model, and what a model gives with and without them."""

from __future__ import annotations

from functools import partial

import torch

import tl_backward as tlb
from tl_backward.editing import WeightEdit
from tl_backward.factors import GradientFactors
from tl_backward.sites import all_parameters, attached_hook_points

TOKENS = torch.tensor([[3, 17, 3, 29, 8, 9], [1, 2, 3, 4, 5, 6]])


def weights(model):
    """Every parameter, to the bit."""
    return [p.detach().flatten().view(torch.uint8).clone() for p in all_parameters(model)]


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def factors(site, n=2, seed=0, dtype=torch.float64, scale=0.1):
    """Random vectors that change the site's output by about as much as it is large."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return GradientFactors(draw(n, site.d_in).to(dtype), scale * draw(n, site.d_out).to(dtype))


def name_of(layer):
    """The name of the site of W_out in a layer."""
    return f"blocks.{layer}.mlp.W_out"


def W_out(model, layer):
    return tlb.weight_sites(model, "W_out", layer)[0]


def random_edit(model, name, **options):
    (site,) = (site for site in tlb.weight_sites(model) if site.name == name)
    return WeightEdit(model, {name: factors(site, **options)})


def logits(model, hooks=(), tokens=TOKENS):
    with torch.no_grad(), attached_hook_points(model), model.hooks(fwd_hooks=list(hooks)):
        return model(tokens)


def applied_logits(edit, tokens=TOKENS):
    with edit.applied():
        return logits(edit.model, tokens=tokens)


def hooked_logits(edit, tokens=TOKENS):
    with attached_hook_points(edit.model):
        return logits(edit.model, edit.fwd_hooks(), tokens)


def added(edit, name):
    """What is added to a weight, written out."""
    g = edit.factors[name]
    return sum(torch.outer(u, v) for u, v in zip(g.inputs, g.vjps, strict=True))


def seen_at(model, point, tokens, hooks=()):
    """What a hook of TransformerLens sees at a HookPoint, heads side by side."""
    seen = []
    see = (point, lambda tensor, hook: seen.append(tensor.flatten(2).clone()))
    logits(model, [*hooks, see], torch.as_tensor(tokens).reshape(1, -1))
    return seen[0][0]


def embedding(model, token):
    return model.W_U[:, token].detach()


def gap(of_last, target):
    """The logit of the target minus the largest other one."""
    others = torch.cat([of_last[:target], of_last[target + 1 :]])
    return float(of_last[target] - others.max())
