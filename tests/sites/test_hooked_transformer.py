"""``HookedTransformer``: exact factors at every weight, and HookPoints that change nothing."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import transformer_lens
from helpers.gradients import finite_difference, reference_loss, relative_error
from helpers.hooked import (
    ALIBI,
    GATED,
    GQA,
    PARALLEL,
    ROTARY,
    SHORTFORMER,
    build,
)
from helpers.state import state
from helpers.summary import SUMMARY
from helpers.versions import NEEDS_HOOKED_TRANSFORMER
from torch import nn

import tl_backward as tlb
from tl_backward.sites import add_hook_points, attached_hook_points, remove_hook_points
from tl_backward.sites import hooked_transformer as backend

pytestmark = NEEDS_HOOKED_TRANSFORMER

TARGET = 5
STEP = 1e-6
TOKENS = torch.tensor([[3, 17, 3, 29, 8, 0]])
NORMS = ["LN", "LNPre", "RMS", "RMSPre", None]


checked = {"models": 0, "sites": 0, "autograd": 0.0, "finite difference": 0.0}


@pytest.fixture(scope="module", autouse=True)
def _table(request):
    """Add what was measured to the summary of the test run."""
    yield
    request.config.stash[SUMMARY].append(
        f"HookedTransformer, float64: {checked['models']} models, {checked['sites']} sites; "
        f"relative to the gradient's norm, against autograd at most {checked['autograd']:.1e}, "
        f"against a finite difference at most {checked['finite difference']:.1e}"
    )


def gradients(model):
    loss = reference_loss(model, TOKENS, TARGET)
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def site_names(model, mlp=("W_in", "W_out")):
    weights = [f"attn.{kind}" for kind in ("W_Q", "W_K", "W_V", "W_O")]
    weights += [f"mlp.{kind}" for kind in mlp]
    positions = model.cfg.positional_embedding_type in ("standard", "shortformer")
    return [
        "embed.W_E",
        *(["pos_embed.W_pos"] if positions else []),
        *(f"blocks.{layer}.{weight}" for layer in range(model.cfg.n_layers) for weight in weights),
        "unembed.W_U",
    ]


def check_every_site(model, step=STEP, tolerance=1e-6):
    """Autograd, a finite difference, unchanged numbers and a model that leaves as it came."""
    before, logits, plain = state(model), model(TOKENS), gradients(model)
    loss, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    assert state(model) == before
    torch.testing.assert_close(loss, reference_loss(model, TOKENS, TARGET))
    by_id = {id(p): g for p, g in zip(model.parameters(), plain, strict=True)}
    generator = torch.Generator().manual_seed(1)
    for site in tlb.weight_sites(model):
        parameter, gradient = site.parameter, by_id[id(site.parameter)]
        assert isinstance(parameter, nn.Parameter) and gradient.norm() > 1e-6, site.name
        got = site.to_parameter_layout(cache[site.name].dense())
        assert got.shape == parameter.shape
        error = relative_error(got, gradient)
        assert error <= 1e-10, site.name
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        direction /= direction.norm()
        slope = finite_difference(model, TOKENS, TARGET, parameter, direction, step)
        difference = float((slope - (got * direction).sum()).abs() / got.norm())
        assert difference <= tolerance, site.name
        checked["sites"] += 1
        checked["autograd"] = max(checked["autograd"], error)
        if step == STEP:
            checked["finite difference"] = max(checked["finite difference"], difference)
    checked["models"] += 1

    with attached_hook_points(model):
        assert {h for site in tlb.weight_sites(model) for h in (site.hook_in, site.hook_out)} <= (
            model.hook_dict.keys()
        )
        assert list(model.state_dict()) == list(before["state_dict"])
        assert torch.equal(model(TOKENS), logits)
        for got, want in zip(gradients(model), plain, strict=True):
            assert (got is None and want is None) or torch.equal(got, want)
    assert state(model) == before
    return cache


@pytest.mark.parametrize("normalization", NORMS)
@pytest.mark.parametrize("positions", [{}, ROTARY, SHORTFORMER], ids=["abs", "rotary", "short"])
@pytest.mark.parametrize("parallel", [{}, PARALLEL], ids=["serial", "parallel"])
@pytest.mark.parametrize("queries", [{}, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("gated", [{}, GATED], ids=["mlp", "gated"])
def test_every_site_is_exact(gated, queries, parallel, positions, normalization):
    model = build(**gated, **queries, **parallel, **positions, normalization_type=normalization)
    cache = check_every_site(model)
    mlp = ("W_gate", "W_in", "W_out") if gated else ("W_in", "W_out")
    assert list(cache) == site_names(model, mlp)


@pytest.mark.parametrize("normalization", NORMS)
@pytest.mark.parametrize("positions", [{}, ROTARY, SHORTFORMER], ids=["abs", "rotary", "short"])
@pytest.mark.parametrize("queries", [{}, GQA], ids=["mha", "gqa"])
def test_attention_only(queries, positions, normalization):
    model = build(attn_only=True, **queries, **positions, normalization_type=normalization)
    assert list(check_every_site(model)) == site_names(model, ())


POST_NORM = {"use_normalization_before_and_after": True, "normalization_type": "RMS"}
OLMO_2 = {
    **GATED,
    **ROTARY,
    "original_architecture": "Olmo2ForCausalLM",
    "normalization_type": "RMS",
    "d_model": 24,  # its norms of queries and keys take heads * d_head for granted
}


@pytest.mark.parametrize(
    "settings",
    [
        {"act_fn": "solu_ln"},
        {"act_fn": "solu_ln", "normalization_type": "LNPre"},
        {**GATED, **POST_NORM},
        {**GQA, **POST_NORM},
        OLMO_2,
        {"post_embedding_ln": True},
        {**ALIBI, "post_embedding_ln": True},
        {"use_hook_mlp_in": True},
        {**PARALLEL, "use_hook_mlp_in": True},
        {"output_logits_soft_cap": 2.0},
        {"d_vocab_out": 37},
        {"use_qk_norm": True, **GQA, **ROTARY},
        {"use_local_attn": True, "window_size": 2, "attn_types": ["local", "global"]},
        {"use_hook_tokens": True},
        {"scale_attn_by_inverse_layer_idx": True, "final_rms": True},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_other_settings(settings):
    model = build(**settings)
    mlp = ("W_gate", "W_in", "W_out") if "gated_mlp" in settings else ("W_in", "W_out")
    assert list(check_every_site(model)) == site_names(model, mlp)


BIASES = [{}, {**GATED, **GQA, **POST_NORM}, {**ALIBI, "act_fn": "solu_ln"}]


@pytest.mark.parametrize("settings", BIASES, ids=["gpt2", "gemma", "solu"])
def test_the_coverage_says_where_the_gradient_of_a_bias_is(settings):
    model = build(**settings)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    vjps = {}
    with attached_hook_points(model):
        ends = [f"blocks.{layer}.mlp.out.hook_in" for layer in range(2)]
        note = [(name, lambda vjp, hook: vjps.update({hook.name: vjp.clone()})) for name in ends]
        with model.hooks(bwd_hooks=note):
            reference_loss(model, TOKENS, TARGET).backward()
    reasons = tlb.coverage(model).set_index("parameter").reason
    biases = [name for name in reasons.index if ".b_" in name or "._b_" in name]
    assert len(biases) == 2 * 6 + 1
    for name in biases:
        where, gradient = reasons[name], model.get_parameter(name).grad
        if "cache.bias_gradient" in where:
            got = cache.bias_gradient(where.split("'")[1])
        else:
            got = vjps[where.split()[-1]].sum((0, 1))
        torch.testing.assert_close(got, gradient.flatten(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{**GATED, **POST_NORM}, OLMO_2, {}], ids=["before", "after", "none"]
)
def test_post_norms_are_known(settings):
    """A site says where its output is behind a norm; without one it is there already."""
    model = build(**settings)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    with attached_hook_points(model):
        _, activations = model.run_with_cache(TOKENS)
    seen = {}
    ends = [f"blocks.{i}.{end}" for i in range(2) for end in ("hook_attn_out", "hook_mlp_out")]
    note = [(name, lambda vjp, hook: seen.update({hook.name: vjp[0].clone()})) for name in ends]
    with model.hooks(bwd_hooks=note):
        reference_loss(model, TOKENS, TARGET).backward()
    for site in tlb.weight_sites(model, ["W_O", "W_out"]):
        stream = "hook_attn_out" if site.kind == "W_O" else "hook_mlp_out"
        behind = f"blocks.{site.layer}.{stream}"
        moved = not torch.equal(activations[site.hook_out], activations[behind])
        assert site.hook_residual == (behind if moved else None)
        torch.testing.assert_close(cache.residual_vjps(site.name), seen[behind])
    assert moved == bool(settings) or settings is OLMO_2  # which is another thing in 2.18


PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


@pytest.mark.parametrize("chosen", list(product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {**GATED, **GQA, **ROTARY, "normalization_type": "RMS"}, {**GQA, **PARALLEL}],
    ids=["gpt2", "llama", "parallel"],
)
def test_processed_weights(settings, chosen):
    raw = build(**settings)
    chosen = dict(zip(PROCESSING, chosen, strict=True))
    folded = {"normalization_type": f"{raw.cfg.normalization_type}Pre"} if chosen["fold_ln"] else {}
    model = build(**settings | folded)
    model.load_and_process_state_dict(raw.state_dict(), **chosen)
    loss = reference_loss(model.eval(), TOKENS, TARGET)
    torch.testing.assert_close(loss, reference_loss(raw, TOKENS, TARGET))
    if chosen["center_unembed"]:
        torch.testing.assert_close(model.W_U.mean(-1), torch.zeros_like(model.W_U.mean(-1)))
    if chosen["fold_value_biases"]:
        assert model.b_V.eq(0).all()
    check_every_site(model)


@pytest.mark.parametrize("kind", [{}, GATED], ids=["mlp", "gated"])
def test_a_site_alone_is_captured_as_with_the_others(kind):
    model = build(**kind)
    _, everything = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    for site in tlb.weight_sites(model):
        layers = None if site.layer is None else site.layer
        _, alone = tlb.run_with_backward_cache(
            model, TOKENS, TARGET, weights=site.kind, layers=layers
        )
        torch.testing.assert_close(alone[site.name].vjps, everything[site.name].vjps)
        assert torch.equal(alone[site.name].inputs, everything[site.name].inputs)


def test_tables_have_one_hot_inputs():
    model = build()
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    n = TOKENS.shape[1]
    assert torch.equal(cache["embed.W_E"].inputs.argmax(-1), TOKENS[0])
    assert torch.equal(cache["pos_embed.W_pos"].inputs, torch.eye(9, dtype=torch.float64)[:n])
    assert cache["embed.W_E"].inputs.sum(-1).eq(1).all()


@pytest.mark.parametrize("cap", [-1.0, 2.0])
@pytest.mark.parametrize("normalization", NORMS)
def test_unembed_gives_the_models_logits(normalization, cap):
    model = build(normalization_type=normalization, output_logits_soft_cap=cap)
    logits, cache = model.run_with_cache(TOKENS)
    residual = cache["blocks.1.hook_resid_post"][0]
    torch.testing.assert_close(
        backend.unembed(model, residual, apply_ln=True), logits[0], rtol=1e-12, atol=1e-12
    )
    low = backend.unembed(model, residual.float(), apply_ln=True)
    torch.testing.assert_close(low, logits[0], rtol=1e-4, atol=1e-4)


def added_names(model):
    kinds = [f"blocks.{i}.attn.{p}" for i in range(model.cfg.n_layers) for p in "qkvo"]
    kinds += ["embed", "pos_embed", "unembed"]
    gated = ["gate"] if model.cfg.gated_mlp else []
    kinds += [
        f"blocks.{i}.mlp.{p}" for i in range(model.cfg.n_layers) for p in ["in", *gated, "out"]
    ]
    return {f"{kind}.{end}" for kind in kinds for end in ("hook_in", "hook_out")}


@pytest.fixture(params=[{}, {**GATED, **GQA, "normalization_type": "RMS"}], ids=["mlp", "gated"])
def model(request):
    return build(**request.param)


def test_adding_twice_and_removing(model):
    model.add_hook("blocks.1.mlp.hook_post", lambda tensor, hook: tensor)
    before, names = state(model), set(model.hook_dict)
    remove_hook_points(model)
    assert state(model) == before
    add_hook_points(model)
    once = state(model)
    add_hook_points(model)
    with attached_hook_points(model):
        tlb.run_with_backward_cache(model, TOKENS, TARGET)
    assert state(model) == once
    assert set(model.hook_dict) == names | added_names(model)
    for name in added_names(model):
        point = model.mod_dict[name]
        assert point is model.hook_dict[name] and point.name == name
        assert isinstance(point, transformer_lens.hook_points.HookPoint) and not point.training
    remove_hook_points(model)
    assert state(model) == before


def test_they_go_also_after_an_exception(model):
    before = state(model)
    with pytest.raises(KeyboardInterrupt), attached_hook_points(model):
        raise KeyboardInterrupt
    assert state(model) == before


def test_run_with_cache_sees_every_point_in_both_directions(model):
    add_hook_points(model)
    logits, cache = model.run_with_cache(TOKENS)
    assert added_names(model) <= cache.keys()
    _, both = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    indices = {"embed.hook_in", "pos_embed.hook_in"}
    assert {f"{name}_grad" for name in added_names(model) - indices} <= both.keys()
    assert torch.equal(cache["embed.hook_in"], TOKENS)
    assert cache["pos_embed.hook_in"].tolist() == [list(range(TOKENS.shape[1]))]
    assert torch.equal(cache["unembed.hook_out"], logits)
    for layer in range(2):
        same = {
            "attn.q.hook_out": "attn.hook_q",
            "attn.k.hook_out": "attn.hook_k",
            "attn.v.hook_out": "attn.hook_v",
            "attn.o.hook_in": "attn.hook_z",
            "attn.o.hook_out": "hook_attn_out",
            "mlp.out.hook_in": "mlp.hook_post",
            "mlp.out.hook_out": "hook_mlp_out",
            "mlp.in.hook_out": f"mlp.hook_pre{'_linear' if model.cfg.gated_mlp else ''}",
        }
        if model.cfg.gated_mlp:
            same["mlp.gate.hook_out"] = "mlp.hook_pre"
        for added, own in same.items():
            for side in ("", "_grad"):
                here, there = (both[f"blocks.{layer}.{name}{side}"] for name in (added, own))
                assert torch.equal(here, there), added


def test_cached_inputs_and_gradients_are_the_factors(model):
    _, factors = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    seen = {}

    def see(gradient, hook):
        seen[hook.name] = gradient[0].flatten(1).clone()

    with attached_hook_points(model):
        names = [site.hook_out for site in tlb.weight_sites(model)]
        with model.hooks(bwd_hooks=[(name, see) for name in names]):
            reference_loss(model, TOKENS, TARGET).backward()
        _, cache = model.run_with_cache(TOKENS)
    for site in tlb.weight_sites(model):
        torch.testing.assert_close(seen[site.hook_out], factors[site.name].vjps)
        if site.layer is not None:
            torch.testing.assert_close(cache[site.hook_in][0].flatten(1), factors[site.name].inputs)


def test_reset_hooks_clears_them(model):
    add_hook_points(model)
    plain = model(TOKENS)
    model.add_hook("blocks.0.mlp.out.hook_in", lambda tensor, hook: 2 * tensor)
    model.add_hook("blocks.0.attn.q.hook_in", lambda tensor, hook: 2 * tensor, dir="bwd")
    assert not torch.equal(model(TOKENS), plain)
    model.reset_hooks()
    assert torch.equal(model(TOKENS), plain)
    assert not any(point.bwd_hooks for point in model.hook_points())


def test_a_copy_has_points_of_its_own(model):
    own = set(model.hook_dict)
    add_hook_points(model)
    twin = copy.deepcopy(model)
    plain = model(TOKENS)
    for name in twin.hook_dict.keys() - own:
        twin.add_hook(name, lambda tensor, hook: tensor + 1 if tensor.is_floating_point() else None)
    assert torch.equal(model(TOKENS), plain) and not torch.equal(twin(TOKENS), plain)
    remove_hook_points(twin)
    assert torch.equal(twin(TOKENS), plain)


def scale_in_place(tensor, hook):
    return tensor.mul_(1.5)


def scale(tensor, hook):
    return tensor * 1.5


IN_PLACE_AND_NOT = pytest.mark.parametrize("edit", [scale, scale_in_place])
BRANCHES = ["attn.q", "attn.k", "attn.v", "mlp.in", "mlp.gate"]


@IN_PLACE_AND_NOT
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("normalization", ["RMS", None])
def test_an_edit_at_one_input_touches_only_its_branch(branch, edit, normalization):
    """Without a norm the inputs are the residual stream itself."""
    model = build(**GATED, **GQA, normalization_type=normalization)
    add_hook_points(model)
    name = f"blocks.0.{branch}.hook_in"
    _, plain = model.run_with_cache(TOKENS)
    with model.hooks(fwd_hooks=[(name, edit)]):
        _, edited = model.run_with_cache(TOKENS)
    weight = next(site for site in tlb.weight_sites(model) if site.hook_in == name).parameter
    spread = weight.movedim(-3, 0).flatten(0, -3) if weight.ndim == 3 else weight[None]
    y_change = torch.einsum("bpi,hio->bpho", 0.5 * plain[name], spread)
    output = f"blocks.0.{branch}.hook_out"
    torch.testing.assert_close(
        (edited[output] - plain[output]).flatten(2), y_change.flatten(2), rtol=1e-10, atol=1e-12
    )
    others = [f"blocks.0.{other}.hook_out" for other in BRANCHES if other != branch]
    if branch.startswith("attn"):
        others = [other for other in others if ".attn." in other]
    for other in (*others, "blocks.0.hook_resid_pre"):
        assert torch.equal(edited[other], plain[other]), other
    if branch.startswith("mlp"):
        middle = "blocks.0.hook_resid_mid"
        change = edited["blocks.0.hook_resid_post"] - plain["blocks.0.hook_resid_post"]
        mlp_change = edited["blocks.0.hook_mlp_out"] - plain["blocks.0.hook_mlp_out"]
        torch.testing.assert_close(change, mlp_change)
        assert torch.equal(edited[middle], plain[middle])


def test_the_vjp_at_a_gates_input_is_its_branchs_part():
    model = build(**GATED)
    add_hook_points(model)
    seen = {}

    def see(gradient, hook):
        seen[hook.name] = gradient.clone()

    ends = [f"blocks.0.mlp.{p}.{end}" for p in ("in", "gate") for end in ("hook_in", "hook_out")]
    with model.hooks(bwd_hooks=[(name, see) for name in ends]):
        reference_loss(model, TOKENS, TARGET).backward()
    for p, weight in (("in", model.blocks[0].mlp.W_in), ("gate", model.blocks[0].mlp.W_gate)):
        part = seen[f"blocks.0.mlp.{p}.hook_out"] @ weight.T
        torch.testing.assert_close(seen[f"blocks.0.mlp.{p}.hook_in"], part)


@pytest.mark.parametrize("branch", ["in", "gate"])
def test_cutting_the_vjp_of_one_branch_leaves_the_other(branch):
    model = build(**GATED)
    mlp = model.blocks[0].mlp
    other = {"in": "gate", "gate": "in"}[branch]
    add_hook_points(model)

    def input_gradient(hooks):
        x = torch.ones(1, 2, 14, dtype=torch.float64, requires_grad=True)
        with model.hooks(bwd_hooks=hooks):
            return torch.autograd.grad(mlp(x).square().sum(), x)[0]

    def zero(gradient, hook):
        return torch.zeros_like(gradient)

    cut = input_gradient([(f"blocks.0.mlp.{branch}.hook_in", zero)])
    rest = input_gradient([(f"blocks.0.mlp.{other}.hook_in", zero)])
    torch.testing.assert_close(cut + rest, input_gradient([]))
    assert cut.norm() > 0 and rest.norm() > 0


def test_an_edited_vjp_reaches_everything_upstream(model):
    """Zero the VJP of the last MLP: its weights have none, and those below see the rest."""

    def zero(gradient, hook):
        return torch.zeros_like(gradient)

    def stop(tensor, hook):
        return tensor.detach()

    with attached_hook_points(model):
        with model.hooks(bwd_hooks=[("blocks.1.mlp.out.hook_out", zero)]):
            _, cut = tlb.run_with_backward_cache(model, TOKENS, TARGET)
        with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", stop)]):
            expected = gradients(model)
    expected = {id(p): g for p, g in zip(model.parameters(), expected, strict=True)}
    for site in tlb.weight_sites(model):
        gradient = expected[id(site.parameter)]
        got = site.to_parameter_layout(cut[site.name].dense())
        if gradient is None:
            assert ".1.mlp." in site.name and got.eq(0).all()
        else:
            assert relative_error(got, gradient) <= 1e-10, site.name


def test_hooks_run_in_the_order_in_which_the_tensor_passes(model):
    """Also hooks that were there before, and the other way round backwards."""
    mlp_in = "blocks.0.mlp.gate" if model.cfg.gated_mlp else "blocks.0.mlp.in"
    order = [
        "blocks.0.attn.q.hook_in",
        "blocks.0.attn.q.hook_out",
        "blocks.0.attn.hook_q",
        "blocks.0.attn.hook_z",
        "blocks.0.attn.o.hook_in",
        "blocks.0.attn.o.hook_out",
        "blocks.0.hook_attn_out",
        f"{mlp_in}.hook_in",
        f"{mlp_in}.hook_out",
        "blocks.0.mlp.hook_pre",
        "blocks.0.mlp.hook_post",
        "blocks.0.mlp.out.hook_in",
        "blocks.0.mlp.out.hook_out",
        "blocks.0.hook_mlp_out",
    ]
    add_hook_points(model)
    for names in (order, order[::-1]):
        forward, backward = [], []

        def note_forward(tensor, hook, seen=forward):
            seen.append(hook.name)

        def note_backward(gradient, hook, seen=backward):
            seen.append(hook.name)
            return gradient * 2

        with model.hooks(
            fwd_hooks=[(name, note_forward) for name in names],
            bwd_hooks=[(name, note_backward) for name in names],
        ):
            model(TOKENS).sum().backward()
        assert forward == order
        assert backward == order[::-1]


def neighbours(model):
    yield from [(f"attn.{p}.hook_out", f"attn.hook_{p}") for p in "qkv"]
    yield "attn.hook_z", "attn.o.hook_in"
    if model.cfg.gated_mlp:
        yield "mlp.gate.hook_out", "mlp.hook_pre"
    yield "mlp.in.hook_out", f"mlp.hook_pre{'_linear' if model.cfg.gated_mlp else ''}"
    yield "mlp.hook_post", "mlp.out.hook_in"


@pytest.mark.parametrize("set_first", [0, 1])
def test_neighbouring_hooks_see_what_the_other_did(model, set_first):
    """Both directions, whichever hook was set first."""
    add_hook_points(model)
    seen = {}

    def double(tensor, hook):
        seen[hook.name, "fwd"] = tensor.clone()
        return 2 * tensor

    def triple(gradient, hook):
        seen[hook.name, "bwd"] = gradient.clone()
        return 3 * gradient

    for pair in neighbours(model):
        first, second = (f"blocks.0.{name}" for name in pair)
        names = [second, first] if set_first else [first, second]
        with model.hooks(
            fwd_hooks=[(name, double) for name in names],
            bwd_hooks=[(name, triple) for name in names],
        ):
            reference_loss(model, TOKENS, TARGET).backward()
        torch.testing.assert_close(seen[second, "fwd"], 2 * seen[first, "fwd"])
        torch.testing.assert_close(seen[first, "bwd"], 3 * seen[second, "bwd"])


def test_the_hooks_of_the_user_take_part(model):
    def curve(tensor, hook):
        return tensor * torch.linspace(0, 2, tensor.shape[-1], dtype=tensor.dtype)

    hooks = [
        (f"blocks.{layer}.{name}", curve)
        for layer, name in product(range(2), ["mlp.hook_post", "attn.hook_z", "attn.hook_k"])
    ]
    plain = gradients(model)
    with model.hooks(fwd_hooks=hooks):
        check_every_site(model)
        patched = gradients(model)
    assert not torch.equal(plain[0], patched[0])


def test_hooks_on_added_points_take_part(model):
    add_hook_points(model)
    names = ["blocks.1.mlp.out.hook_in", "blocks.0.attn.v.hook_in", "blocks.1.attn.k.hook_out"]
    with model.hooks(fwd_hooks=[(name, scale_in_place) for name in names]):
        _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
        expected = dict(zip(map(id, model.parameters()), gradients(model), strict=True))
    for site in tlb.weight_sites(model):
        got = site.to_parameter_layout(cache[site.name].dense())
        assert relative_error(got, expected[id(site.parameter)]) <= 1e-10, site.name


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("embed.hook_in", lambda tokens, hook: tokens.fill_(4)),
        ("embed.hook_in", lambda tokens, hook: torch.full_like(tokens, 4)),
    ],
)
def test_other_tokens_can_be_put_in(model, name, edit):
    add_hook_points(model)
    tokens = TOKENS.clone()
    edited = model.run_with_hooks(tokens, fwd_hooks=[(name, edit)])
    assert torch.equal(edited, model(torch.full_like(tokens, 4)))
    assert torch.equal(tokens, TOKENS)


def test_positions_can_be_changed_and_padding_has_none():
    model = build()
    add_hook_points(model)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    padded = model(TOKENS, attention_mask=mask)
    seen = []

    def note(positions, hook):
        seen.append(positions.clone())

    def shift(positions, hook):
        return torch.where(positions < 0, positions, positions + 3)

    with model.hooks(fwd_hooks=[("pos_embed.hook_in", note)]):
        assert torch.equal(model(TOKENS, attention_mask=mask), padded)
    assert seen[0].tolist() == [[-1, -1, 0, 1, 2, 3]]
    with model.hooks(fwd_hooks=[("pos_embed.hook_in", shift)]):
        shifted = model(TOKENS, attention_mask=mask)
    remove_hook_points(model)
    with torch.no_grad():
        model.pos_embed.W_pos.copy_(model.pos_embed.W_pos.roll(-3, 0))
    torch.testing.assert_close(shifted, model(TOKENS, attention_mask=mask), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"use_split_qkv_input": True}, ["W_Q", "W_K", "W_V"]),
        ({"use_split_qkv_input": True, **GQA}, ["W_Q", "W_K", "W_V"]),
        ({"use_attn_in": True}, ["W_Q", "W_K", "W_V"]),
        ({"ungroup_grouped_query_attention": True, **GQA}, ["W_K", "W_V"]),
    ],
    ids=["split", "split-gqa", "attn_in", "ungroup"],
)
def test_weights_used_once_per_head_are_refused_by_name(settings, weights):
    setting = next(iter(settings))
    model = build(**settings)
    before, logits = state(model), model(TOKENS)
    for weight in weights:
        with pytest.raises(NotImplementedError, match=rf"blocks\.0\.attn\.{weight}.*{setting}"):
            tlb.run_with_backward_cache(model, TOKENS, TARGET, weights=weight)
    assert state(model) == before
    with attached_hook_points(model):
        assert torch.equal(model(TOKENS), logits)
    rest = {site.kind for site in tlb.weight_sites(model)} - set(weights)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET, weights=rest)
    expected = dict(zip(map(id, model.parameters()), gradients(model), strict=True))
    for site in tlb.weight_sites(model, rest):
        got = site.to_parameter_layout(cache[site.name].dense())
        assert relative_error(got, expected[id(site.parameter)]) <= 1e-10, site.name
    getattr(model, f"set_{setting}")(False)
    check_every_site(model)


def test_results_by_head_are_refused():
    model = build(use_attn_result=True)
    with pytest.raises(NotImplementedError, match=r"blocks\.1\.attn\.W_O .*cfg\.use_attn_result"):
        tlb.weight_sites(model, "W_O", 1)
    tlb.run_with_backward_cache(model, TOKENS, TARGET, weights="W_V")
    model.set_use_attn_result(False)
    check_every_site(model)


def test_quantised_weights_are_refused(model):
    model.cfg.load_in_4bit = True
    for refused in (tlb.weight_sites, add_hook_points):
        with pytest.raises(NotImplementedError, match="load_in_4bit"):
            refused(model)


def test_encoders_are_not_accepted(model):
    assert backend.accepts(model)
    assert not backend.accepts(transformer_lens.HookedEncoder(model.cfg))
    assert not backend.accepts(nn.Linear(2, 3)) and not backend.accepts(None)
