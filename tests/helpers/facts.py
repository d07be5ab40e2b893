"""CounterFact records, and what autograd gives for one of them."""

from __future__ import annotations

import torch

import tl_backward as tlb
from tl_backward.analysis import fact_of, prompt_segments


def record(prompt, subject, new="Paris", true="Rome"):
    return {
        "case_id": 7,
        "requested_rewrite": {
            "prompt": prompt,
            "subject": subject,
            "target_new": {"str": new},
            "target_true": {"str": true},
        },
    }


RECORDS = [
    record("{} plays for the city of", "Lionel Messi", "Paris", "Rome"),
    record("The {} is in", "Eiffel Tower", "Berlin and Rome", "London"),
    record("The city of {} is located in the city of", "Paris", "London", "Berlin"),
]


class Reference:
    """One record by autograd, with nothing of the capture: ``x``, ``delta`` and dense gradients."""

    def __init__(self, model, record):
        fact = fact_of(record)
        self.tokens = model.to_tokens(fact.prompt)
        self.segments = prompt_segments(model, self.tokens[0].tolist(), fact)
        self.n = len(self.segments)
        self.target, self.original = (
            int(model.to_tokens(text, prepend_bos=False)[0, 0])
            for text in (fact.target, fact.original)
        )
        self.sites = {site.name: site for site in tlb.weight_sites(model, ("W_in", "W_out"))}
        self.x, added, hooks = {}, {}, []
        for name, site in self.sites.items():
            added[name] = torch.zeros(1, self.n, site.d_out, dtype=model.cfg.dtype)
            added[name].requires_grad_()
            hooks.append((site.hook_in, lambda x, hook, name=name: self._note(name, x)))
            hooks.append((site.hook_out, lambda y, hook, name=name: y + added[name]))
        end = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        hooks.append((end, lambda x, hook: self._note("end", x)))
        self.parameters = [site.parameter for site in self.sites.values()]
        with model.hooks(fwd_hooks=hooks):
            self.logits = model(self.tokens)[0]
        self.loss = -self.logits[-1].log_softmax(-1)[self.target]
        self.answer = int(self.logits[-1].argmax())
        wanted = [*added.values(), *self.parameters]
        found = [g.detach() for g in torch.autograd.grad(self.loss, wanted)]
        self.vjps = {name: g[0] for name, g in zip(added, found, strict=False)}
        self.dense = {
            name: g if g.shape == (site.d_in, site.d_out) else g.T
            for (name, site), g in zip(self.sites.items(), found[len(added) :], strict=True)
        }

    def _note(self, name, x):
        self.x[name] = x.detach()[0]


def lens_logits(model, vector):
    return (model.ln_final(vector[None, None]) @ model.W_U + model.b_U)[0, 0].detach()


def rank_of(logits, token):
    return int((logits > logits[token]).sum())


def at(frame, **place):
    """The rows at a place, one for each position."""
    for column, value in place.items():
        frame = frame[frame[column] == value]
    return frame
