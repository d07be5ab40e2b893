"""What is timed. Each function makes the jobs of one table."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from bench.floors import TARGET, full_backward, incl_bwd, input_only_backward
from bench.models import MODELS, counterfact_like, mixture, random_tokens, smollm2
from bench.timing import Comparison, Section
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_backward as tlb
from tl_backward.demo_model import demo_model_path
from tl_backward.editing import rome_contexts

LAYERS_WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")


def weights_of(model: Any) -> tuple[str, ...]:
    there = {site.kind for site in tlb.weight_sites(model)}
    return tuple(kind for kind in LAYERS_WEIGHTS if kind in there)


def capture(name: str) -> Section:
    """One prompt of 64 tokens."""
    model, tokens = MODELS[name](), random_tokens(64)
    weights = weights_of(model)
    hooks = {h for s in tlb.weight_sites(model, weights) for h in (s.hook_in, s.hook_out)}
    middle = model.cfg.n_layers // 2
    run = partial(tlb.run_with_backward_cache, model, tokens, TARGET)
    everything = "capture of all attention and MLP matrices"
    one = f"capture of W_out in layer {middle}"
    jobs = {
        "floor": lambda: input_only_backward(model, tokens),
        everything: lambda: run(weights=weights),
        "full": lambda: full_backward(model, tokens),
        "incl_bwd": lambda: incl_bwd(model, tokens, hooks),
        "upper floor": lambda: input_only_backward(model, tokens, f"blocks.{middle}.mlp.hook_out"),
        one: lambda: run(weights="W_out", layers=middle),
    }
    comparisons = [
        Comparison(f"{everything} / forward + input-only backward", everything, "floor", 1.10),
        Comparison(f"{everything} / forward + full backward", everything, "full", 0.60),
        Comparison(f"{everything} / run_with_cache(incl_bwd=True)", everything, "incl_bwd", 0.45),
        Comparison(f"{one} / forward + backward above it", one, "upper floor", 1.10),
    ]
    return Section(jobs, comparisons)


def lens(name: str) -> Section:
    """All layers and positions of W_in and W_out, 33 tokens, ten tokens at each end, ranks."""
    model, tokens = MODELS[name](), random_tokens(33)
    reader = tlb.BackwardLogitLens(model)
    rows_read = 33 * model.cfg.n_layers * 2 - 32  # in the last layer one VJP is not zero
    vectors = torch.randn(rows_read, model.cfg.d_model)

    def floor() -> None:
        input_only_backward(model, tokens)
        W_U = model.W_U
        for part in vectors.split(64):
            part @ W_U

    jobs = {"floor": floor, "lens": lambda: reader(tokens, TARGET)}
    what = "lens / forward + input-only backward + vectors @ W_U"
    return Section(jobs, [Comparison(what, "lens", "floor", 1.25)])


def algebra(_: str) -> Section:
    """A gradient of 11008 x 4096 from 32 tokens, factored and dense."""
    from transformer_lens import FactoredMatrix

    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(32, d, generator=generator) for d in (11008, 4096))
    g = tlb.GradientFactors(x, delta)
    dense = g.dense()
    jobs = {
        "FactoredMatrix": lambda: FactoredMatrix(x.mT, delta).svd(),
        "svd": g.svd,
        "singular values": g.singular_values,
        "rank": g.rank,
        "svdvals": lambda: torch.linalg.svdvals(dense),
        "matrix_rank": lambda: torch.linalg.matrix_rank(dense),
    }
    comparisons = [
        Comparison("singular values / dense svdvals", "singular values", "svdvals", 1 / 5000),
        Comparison("rank / dense matrix_rank", "rank", "matrix_rank", 1 / 5000),
        Comparison("SVD / FactoredMatrix.svd", "svd", "FactoredMatrix", 1 / 3),
    ]
    return Section(jobs, comparisons, repeats=3)


def batch(_: str) -> Section:
    """Prompts as long as CounterFact's: in batches, and one by one."""
    model, prompts, records = smollm2(), counterfact_like(32), counterfact_like(200)
    reader = tlb.BackwardLogitLens(model)
    capture = partial(tlb.run_with_backward_cache, model, weights=weights_of(model))

    def read(model: Any, batch: list[Any]) -> list[dict[str, int]]:
        result = reader(batch, TARGET, positions=-1)
        return [{"rank": int(r)} for r in result["W_out"].target_ranks[-1, :, 0]]

    jobs = {
        "batch": lambda: capture(prompts, TARGET),
        "calls": lambda: [capture(one, TARGET) for one in prompts],
        "sweep": lambda: list(
            tlb.sweep(model, records, read, batch_size=32, length=len, progress=False)
        ),
        "lens calls": lambda: [reader(one, TARGET, positions=-1) for one in records],
    }
    comparisons = [
        Comparison("capture of 32 prompts in a batch / 32 calls", "batch", "calls", 1 / 3),
        Comparison("sweep of 200 prompts with the lens / 200 calls", "sweep", "lens calls", 0.35),
    ]
    return Section(jobs, comparisons, repeats=3)


def edits(_: str) -> Section:
    """16 rank-1 edits of W_out, each evaluated on 13 prompts of 12 tokens."""
    model, prompts = smollm2(), torch.stack([random_tokens(12, seed) for seed in range(13)])
    edits = [
        tlb.WeightEdit(model, {"blocks.24.mlp.W_out": tlb.GradientFactors(u, v)})
        for u, v in ((torch.randn(1, 1536), 0.01 * torch.randn(1, 576)) for _ in range(16))
    ]
    rows = torch.arange(len(edits)).repeat_interleave(len(prompts))
    batch = prompts.repeat(len(edits), 1)

    @torch.no_grad()
    def together() -> None:
        with model.hooks(fwd_hooks=tlb.edit_hooks(model, edits, rows)):
            model(batch)

    @torch.no_grad()
    def one_at_a_time() -> None:
        for edit in edits:
            with edit.applied():
                for prompt in prompts:
                    model(prompt.unsqueeze(0))

    jobs = {"together": together, "one at a time": one_at_a_time}
    what = "edits in one batch, by hooks / weights written and restored, prompt by prompt"
    return Section(jobs, [Comparison(what, "together", "one at a time", 1 / 5)], repeats=3)


def shift(_: str) -> Section:
    """The forward pass shift of a prompt of 12 tokens, in three of 30 layers."""
    model, tokens = smollm2(), random_tokens(12)
    n_layers = model.cfg.n_layers

    @torch.no_grad()
    def forward() -> None:
        model(tokens.unsqueeze(0))

    def shift_at(layer: int) -> None:
        tlb.forward_pass_shift(model, tokens, TARGET, layer=layer, lr=0.1, skip_if_predicted=False)

    layers = (5, 15, 25)
    jobs = {"forward": forward} | {f"layer {n}": partial(shift_at, n) for n in layers}
    comparisons = [
        Comparison(
            f"shift in layer {n} / {n + 1}/{n_layers} of a forward pass",
            f"layer {n}",
            "forward",
            1.1,
            factor=(n + 1) / n_layers,
        )
        for n in layers
    ]
    return Section(jobs, comparisons, repeats=15)


def editors(_: str) -> Section:
    """ROME in layer 10 of 30 with two contexts, a shift, and MEMIT of 16 facts in three layers."""
    model, subjects = smollm2(), [f"City {n}" for n in range(16)]
    prompts = [f"{subject} is a part of" for subject in subjects]
    prompt, subject, contexts = prompts[0], subjects[0], rome_contexts(model)[:2]
    layer, layers, steps = 10, [8, 9, 10], 20
    eye = torch.eye(model.cfg.d_mlp)
    names = [site.name for site in tlb.weight_sites(model, "W_out", layers)]
    statistics = tlb.KeyStatistics(dict.fromkeys(names, eye), n_tokens=1, ridge=0)
    longest = max(len(model.to_tokens(c.format(prompt))[0]) for c in contexts)
    texts = torch.stack([random_tokens(longest, seed) for seed in range(len(contexts) + 1)])

    def rome() -> None:
        tlb.rome(
            model,
            prompt,
            TARGET,
            subject=subject,
            layer=layer,
            statistics=statistics,
            contexts=contexts,
            steps=steps,
        )

    def passes() -> None:
        for _ in range(steps):
            input_only_backward(model, texts, f"blocks.{layer}.mlp.hook_out")

    def memit(some: slice) -> None:
        options = {"layers": layers, "statistics": statistics, "contexts": [["{}"]], "steps": 3}
        tlb.memit(model, prompts[some], TARGET, subjects=subjects[some], **options)

    jobs = {
        "rome": rome,
        "passes": passes,
        "shift": lambda: tlb.forward_pass_shift(model, prompt, TARGET, layer=24, lr="auto"),
        "at once": lambda: memit(slice(None)),
        "alone": lambda: [memit(slice(n, n + 1)) for n in range(len(prompts))],
    }
    comparisons = [
        Comparison("ROME / 20 forward + backward passes down to its layer", "rome", "passes", 1.1),
        Comparison("shift with a searched step / ROME", "shift", "rome", 0.1),
        Comparison("MEMIT of 16 facts at once / 16 calls, 3 steps", "at once", "alone", 1.0),
    ]
    return Section(jobs, comparisons, repeats=3)


def experts(_: str) -> Section:
    """256 tokens, each with 4 of 16 experts in 4 layers; transformers' grouped kernels but once."""
    model, tokens = mixture(), random_tokens(256) % 2048
    weights = (*weights_of(model), "W_router")
    config = model.blocks[0].mlp.original_component.experts.config

    def boundary() -> tlb.BackwardCache:
        return tlb.run_with_backward_cache(model, tokens, TARGET, weights=weights)[1]

    def expanded() -> None:
        for _ in boundary().values():
            pass

    def eager() -> None:
        config._experts_implementation = "eager"
        full_backward(model, tokens)
        config._experts_implementation = "grouped_mm"

    jobs = {
        "floor": lambda: input_only_backward(model, tokens),
        "boundary": boundary,
        "expanded": expanded,
        "full": lambda: full_backward(model, tokens),
        "eager": eager,
    }
    floor = "forward + input-only backward"
    comparisons = [
        Comparison(
            f"capture, the factors of experts not asked for / {floor}", "boundary", "floor", 1.05
        ),
        Comparison(f"capture and the factors of all experts / {floor}", "expanded", "floor", 1.4),
        Comparison(f"all dense weight gradients / {floor}", "full", "floor", float("inf")),
        Comparison(f"the same with eager experts / {floor}", "eager", "floor", float("inf")),
    ]
    return Section(jobs, comparisons)


def watch(_: str) -> Section:
    """A look at a training run by a probe of 12 tokens, and a step of it: 8 texts of 64 tokens."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_path())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    texts = torch.stack([random_tokens(64, seed) for seed in range(8)])
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    probe = tokenizer.decode(random_tokens(12))
    seen_by = tlb.training.TrainingWatch(model, tokenizer, probe, TARGET)

    def step() -> None:
        model.train()
        model(texts, labels=texts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def look() -> None:
        seen_by.observe(len(seen_by.observations))

    def capture() -> None:
        tlb.run_with_backward_cache(seen_by.model, probe, TARGET, weights="W_out")

    comparisons = [
        Comparison("a look at W_out in all layers / capture of it", "look", "capture", 1.5),
        Comparison("a look every 100 steps / training", "look", "step", 0.05, factor=100),
    ]
    jobs = {"step": step, "look": look, "capture": capture}
    return Section(jobs, comparisons, repeats=5)


SECTIONS = {
    "capture": (capture, tuple(MODELS)),
    "lens": (lens, ("GPT-2 small", "SmolLM2-135M")),
    "algebra": (algebra, ("random factors",)),
    "batch": (batch, ("SmolLM2-135M",)),
    "edits": (edits, ("SmolLM2-135M",)),
    "shift": (shift, ("SmolLM2-135M",)),
    "editors": (editors, ("SmolLM2-135M",)),
    "experts": (experts, ("a random mixture",)),
    "watch": (watch, ("SmolLM2-135M",)),
}
