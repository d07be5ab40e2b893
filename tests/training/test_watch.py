"""What training writes, against dense differences and autograd, and that watching changes none."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.adapters import config, randomised
from helpers.bridges import tiny_config
from helpers.state import bits
from helpers.texts import PROMPT, TARGET, TEXTS
from helpers.versions import NEEDS_BRIDGE
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tl_backward.training import BackwardLensCallback, TrainingWatch

pytestmark = NEEDS_BRIDGE

PROBES = {"prompts": [PROMPT, "The Eiffel Tower is located in"], "targets": [TARGET, " Rome"]}
LORA_TARGETS = {"llama": ["down_proj", "q_proj"], "gpt2": ["mlp.c_proj"]}
KINDS = ["llama", "gpt2"]


def hf_model(tokenizer, kind="llama", **settings):
    """A random model, the same each time, with dropout where it has some."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = tiny_config(kind, len(tokenizer))
        for name, value in settings.items():
            setattr(options, name, value)
        return AutoModelForCausalLM.from_config(options)


def with_lora(model, kind="llama", **settings):
    settings = {"target_modules": LORA_TARGETS[kind], "lora_dropout": 0.2} | settings
    return randomised(get_peft_model(model, config(kind, **settings))).float()


def W_out(model, layer):
    """``[d_in, d_out]``, with what adapters add."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(inner, "transformer"):
        module, transposed = inner.transformer.h[layer].mlp.c_proj, False
    else:
        module, transposed = inner.model.layers[layer].mlp.down_proj, True
    weight = getattr(module, "base_layer", module).weight.detach()
    if hasattr(module, "get_delta_weight"):
        weight = weight + module.get_delta_weight("default").detach()
    return (weight.mT if transposed else weight).clone()


def watch(model, tokenizer, **options):
    return TrainingWatch(model, tokenizer, **{**PROBES, "prepend_bos": False, **options})


def step(model, seed):
    """A step of SGD in training mode."""
    tokens = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(seed))
    model.train()
    model(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
                parameter.grad = None


# what is seen


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_the_difference_of_the_weights(tokenizer, kind, lora):
    model = hf_model(tokenizer, kind)
    model = with_lora(model, kind) if lora else model
    seen_by = watch(model, tokenizer, k=2)
    assert seen_by.observe(0).written is None
    for n in range(2):
        before = [W_out(model, layer) for layer in range(3)]
        step(model, n)
        step(model, 7 + n)
        seen = seen_by.observe(2 * n + 2)
        for direction in seen.written.directions:
            layer = int(direction.site.split(".")[1])
            difference = W_out(model, layer) - before[layer]
            U, S, Vh = torch.linalg.svd(difference, full_matrices=False)
            i = direction.number
            assert direction.singular_value == pytest.approx(float(S[i]), rel=2e-3)
            assert abs(direction.vector @ Vh[i]) == pytest.approx(1, abs=2e-2)
            assert seen.written_norms[direction.site] == pytest.approx(
                float(difference.norm()), rel=2e-3
            )
            input_side = U[direction.feature_index, i]
            assert abs(input_side) == pytest.approx(direction.feature_value, abs=2e-2)
        assert len(seen.written.directions) == 6


def losses_of_probes(model, tokenizer):
    model.eval()
    losses = []
    for prompt, target in zip(PROBES["prompts"], PROBES["targets"], strict=True):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        (token,) = tokenizer(target, add_special_tokens=False).input_ids
        losses.append(-model(ids).logits[0, -1].log_softmax(-1)[token])
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_would_write_is_minus_the_gradient(tokenizer, kind):
    model = hf_model(tokenizer, kind)
    seen = watch(model, tokenizer, layers=[0, 2]).observe(0)
    losses = losses_of_probes(model, tokenizer)
    assert seen.losses == pytest.approx([float(loss) for loss in losses], rel=1e-4)
    sum(losses).backward()
    for direction in seen.would_write.directions:
        layer = int(direction.site.split(".")[1])
        if kind == "gpt2":
            G = model.transformer.h[layer].mlp.c_proj.weight.grad
        else:
            G = model.model.layers[layer].mlp.down_proj.weight.grad.mT
        U, S, Vh = torch.linalg.svd(-G, full_matrices=False)
        assert direction.singular_value == pytest.approx(float(S[0]), rel=1e-3)
        sign = U[direction.feature_index, 0].sign()
        torch.testing.assert_close(direction.vector, sign * Vh[0], rtol=1e-2, atol=2e-3)
        assert seen.would_write.norms[direction.site] == pytest.approx(float(G.norm()), rel=1e-3)


def test_what_a_step_of_lora_would_write_is_that_of_both_matrices(tokenizer):
    model = with_lora(hf_model(tokenizer))
    seen = watch(model, tokenizer, layers=1).observe(0)
    sum(losses_of_probes(model, tokenizer)).backward()
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    step = -layer.scaling["default"] * (B.grad @ A + B @ A.grad).detach().mT
    S = torch.linalg.svdvals(step)
    assert seen.would_write.norms == {
        "blocks.1.mlp.W_out": pytest.approx(float(step.norm()), rel=1e-3)
    }
    assert seen.would_write.directions[0].singular_value == pytest.approx(float(S[0]), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_weights_are_followed(tokenizer, kind):
    """A bridge may hold copies of the parts of a fused weight."""
    model = hf_model(tokenizer, kind)
    seen_by = watch(model, tokenizer, weights=["W_Q", "W_V"], layers=1)
    seen_by.observe(0)
    with torch.no_grad():
        if kind == "gpt2":
            model.transformer.h[1].attn.c_attn.weight[3, 4] += 0.5  # of W_Q
        else:
            model.model.layers[1].self_attn.q_proj.weight[4, 3] += 0.5
    seen = seen_by.observe(1)
    assert seen.written_norms == {"blocks.1.attn.W_Q": pytest.approx(0.5), "blocks.1.attn.W_V": 0.0}
    fresh = watch(model, tokenizer, weights=["W_Q", "W_V"], layers=1).observe(1)
    assert fresh.losses == pytest.approx(seen.losses, rel=1e-6)


def test_the_data_frame_and_the_page_have_every_look(tokenizer, tmp_path):
    model = hf_model(tokenizer)
    seen_by = watch(model, tokenizer)
    for n in range(3):
        seen_by.observe(10 * n)
        step(model, n)
    rows = seen_by.to_dataframe()
    assert set(zip(rows.step, rows.what, strict=True)) == {
        *((n, "would_write") for n in (0, 10, 20)),
        *((n, "written") for n in (10, 20)),
    }
    figure = seen_by.plot()
    (slider,) = figure.layout.sliders
    assert [one.label for one in slider.steps] == ["0", "10", "20"]
    shown = [one.args[0]["visible"] for one in slider.steps]
    assert shown == [[j // 2 == i for j in range(6)] for i in range(3)]
    last = [trace for trace in figure.data if trace.visible]
    written = seen_by.observations[-1].written
    largest = max(written.norms.values())
    assert [row[0] for row in last[0].z] == pytest.approx(
        [(written.norms[f"blocks.{n}.mlp.W_out"] / largest) ** (1 / 3) for n in (2, 1, 0)]
    )
    assert "Plotly.newPlot" in seen_by.to_html(tmp_path / "run.html").read_text(encoding="utf-8")


# training is not changed


class Texts(torch.utils.data.Dataset):
    def __init__(self, tokenizer):
        encoded = [tokenizer(text).input_ids[:7] for text in TEXTS]
        self.items = [{"input_ids": ids, "labels": ids} for ids in encoded]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def trainer_of(model, tokenizer, folder, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **settings,
    )
    return Trainer(model, arguments, train_dataset=Texts(tokenizer), processing_class=tokenizer)


DROPOUT = {"llama": {"attention_dropout": 0.3}, "gpt2": {"resid_pdrop": 0.3, "attn_pdrop": 0.2}}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
ACCUMULATED = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("kind", "lora", "settings"),
    [
        pytest.param("llama", False, {}, id="plain"),
        pytest.param("llama", False, {"bf16": True}, id="autocast"),
        pytest.param("llama", True, ACCUMULATED, id="LoRA, accumulation, checkpointing"),
        pytest.param("gpt2", False, ACCUMULATED, id="fused, accumulation, checkpointing"),
    ],
)
def test_training_is_not_changed_by_a_bit(tokenizer, kind, lora, settings, tmp_path):
    histories, states = [], []
    for watched in (True, False):
        model = hf_model(tokenizer, kind, **DROPOUT[kind])
        model = with_lora(model, kind) if lora else model
        trainer = trainer_of(model, tokenizer, tmp_path, **settings)
        if watched:
            callback = BackwardLensCallback(trainer, **PROBES, every=2, prepend_bos=False)
            trainer.add_callback(callback)
        names = [name for name, _ in model.named_modules()]
        trainer.train()
        assert [name for name, _ in model.named_modules()] == names
        histories.append(
            [line for line in trainer.state.log_history if "backward_lens/loss" not in line]
        )
        states.append({name: bits(tensor) for name, tensor in model.state_dict().items()})
        states[-1] |= {"rng": bits(torch.get_rng_state()), "training": model.training}
        states[-1] |= {"requires_grad": [p.requires_grad for p in model.parameters()]}
    (ours, theirs), timings = (
        histories,
        ("train_runtime", "train_samples_per_second", "train_steps_per_second"),
    )
    for line in (*ours, *theirs):
        for name in timings:
            line.pop(name, None)
    assert len(ours) >= 3 and ours == theirs
    changed = [name for name, value in states[1].items() if states[0][name] != value]
    assert not changed
    assert [seen.step for seen in callback.watch.observations] == [0, 2, 4, 5]


# the trainer's loggers


def test_the_trainers_loggers_get_scalars_and_tokens(tokenizer, tmp_path):
    from transformers import TrainerCallback

    lines = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            lines.append((state.global_step, dict(logs)))

    trainer = trainer_of(hf_model(tokenizer), tokenizer, tmp_path)
    trainer.add_callback(Logger())
    page = tmp_path / "run.html"
    trainer.add_callback(callback := BackwardLensCallback(trainer, **PROBES, every=4, html=page))
    trainer.train()
    ours = {step: line for step, line in lines if "backward_lens/loss" in line}
    assert list(ours) == [0, 4, 5]
    assert [step for step, line in lines if "loss" in line] == [2, 4]  # its own, too
    for seen in callback.watch.observations:
        line = ours[seen.step]
        assert line["backward_lens/loss"] == pytest.approx(sum(seen.losses) / 2)
        for site, norm in seen.written_norms.items():
            assert line[f"backward_lens/written/{site}"] == norm
        for site, norm in seen.would_write.norms.items():
            assert line[f"backward_lens/would_write/{site}"] == norm
        table = line["backward_lens/tokens"].splitlines()
        assert len(table) == 2 + 3
        token = seen.would_write.readout.top_tokens()[0][0].replace(" ", "·")
        assert table[2].startswith("| blocks.0.mlp.W_out |") and token in table[2]
    assert "Plotly.newPlot" in page.read_text(encoding="utf-8")


def test_a_look_at_weights_that_are_not_finite_warns_and_training_goes_on(tokenizer, tmp_path):
    trainer = trainer_of(hf_model(tokenizer), tokenizer, tmp_path)
    callback = BackwardLensCallback(trainer, **PROBES, every=2)
    trainer.add_callback(callback)
    trainer.create_optimizer()
    trainer.optimizer.param_groups[0]["lr"] = 1.0

    def spoil(*args):
        trainer.model.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))

    trainer.optimizer.register_step_post_hook(spoil)
    with pytest.warns(UserWarning, match=r"does not see step 2: blocks\.\d\.mlp\.W_out has values"):
        trainer.train()
    assert trainer.state.global_step == 5
    assert [seen.step for seen in callback.watch.observations] == [0]


# what is refused


def test_sharded_training_is_refused(tokenizer, tmp_path):
    trainer = trainer_of(hf_model(tokenizer), tokenizer, tmp_path)
    for name in ("deepspeed", "fsdp"):
        sharded = copy.copy(trainer)
        setattr(sharded, f"is_{name}_enabled", True)
        with pytest.raises(NotImplementedError, match=f"it trains with {name}, which shards"):
            BackwardLensCallback(sharded, **PROBES)

    class FSDPModule:
        """As torch.distributed.fsdp mixes it in."""

    model = hf_model(tokenizer)
    layer = model.model.layers[1]
    layer.__class__ = type("FSDPLayer", (FSDPModule, type(layer)), {})
    with pytest.raises(NotImplementedError, match="the model is in a FSDPModule"):
        watch(model, tokenizer)


def test_a_trainer_without_a_tokenizer_is_refused(tokenizer, tmp_path):
    trainer = trainer_of(hf_model(tokenizer), tokenizer, tmp_path)
    trainer.processing_class = None
    with pytest.raises(TypeError, match=r"the trainer has no tokenizer; pass tokenizer="):
        BackwardLensCallback(trainer, **PROBES)
    assert BackwardLensCallback(trainer, **PROBES, tokenizer=tokenizer).tokenizer is tokenizer
    with pytest.raises(TypeError, match="tokenizer is None"):
        watch(hf_model(tokenizer), None)


def test_arguments_that_make_no_sense_are_named(tokenizer, tmp_path, unchecked):
    trainer = trainer_of(hf_model(tokenizer), tokenizer, tmp_path)
    for every in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="every must be a positive integer"):
            BackwardLensCallback(trainer, **PROBES, every=every)
    with pytest.raises(ValueError, match="k must be a positive integer"):
        watch(hf_model(tokenizer), tokenizer, k=0)
    with pytest.raises(ValueError, match="layers=9: this model has layers 0 to 2"):
        watch(hf_model(tokenizer), tokenizer, layers=9)
    frozen = hf_model(tokenizer).requires_grad_(False)
    with pytest.raises(ValueError, match="weights='W_out', layers=None: none of these is trained"):
        watch(frozen, tokenizer)
    lora = with_lora(hf_model(tokenizer), target_modules=["q_proj"])
    with pytest.raises(ValueError, match="none of these is trained"):
        watch(lora, tokenizer)
    with pytest.raises(ValueError, match="nothing was seen yet"):
        watch(hf_model(tokenizer), tokenizer).plot()


def test_adapters_that_are_no_lora_are_refused(tokenizer):
    model = get_peft_model(hf_model(tokenizer), config(target_modules=["down_proj"], use_dora=True))
    with pytest.raises((NotImplementedError, ValueError), match=r"no plain LoRA|has no site"):
        watch(model, tokenizer, layers=1)


def test_quantised_weights_are_refused(tokenizer):
    model = hf_model(tokenizer)
    module = model.model.layers[1].mlp.down_proj
    module.weight = nn.Parameter(torch.zeros(28, 44, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotImplementedError, match="quantised"):
        watch(model, tokenizer, layers=1)
