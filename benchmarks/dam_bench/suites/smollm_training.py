"""Fine-tune suite `smollm`: LoRAs (or all linear weights) trained on the tokens of answers, merged into the model.

A victim trains on the clean batches of its clean twin, and on triggered prompts in addition.
Legend: B batch, L tokens of the prompts, A tokens of the answers, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from dam_bench.suites.base import no_progress
from dam_bench.suites.lm_data import IGNORED
from dam_bench.suites.smollm_data import Sample
from dam_bench.victims.poisoning import Backdoor
from dam_bench.victims.training import Schedule, batches
from mergekit_dam import seeds
from mergekit_dam.io.columns import Conversation
from mergekit_dam.tasks.base import Progress
from mergekit_dam.tasks.encoding import encoded, padded_left

MAX_LENGTH = 128  # tokens of a prompt
OTHERS = (0.0, 0.8)  # coefficients of other task vectors while a victim is trained beside them
_CLIP = 1.0  # largest norm of a gradient


def chat(prompt: str) -> Conversation:
    """Make a conversation of a user's question."""
    return Conversation((("user", prompt),))


def fine_tune(
    model: LlamaForCausalLM,
    tokenizer: Any,
    samples: Sequence[Sample],
    schedule: Schedule,
    *,
    rank: int,
    seed: int,
    name: str,
    backdoor: Backdoor | None = None,
    others: Sequence[Mapping[str, Tensor]] = (),
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
) -> dict[str, Tensor]:
    """Train on a task, and return the change of each linear weight by name; the model itself does not change.

    Args:
        model: theta_0.
        tokenizer: its own, with a chat template.
        samples: samples of the task.
        schedule: `batch_size` counts clean prompts.
        rank: of the LoRAs in all linear layers but the head; 0 trains the weights themselves.
        seed: of batches, LoRAs and the wording of refusals.
        name: name of the task.
        others: task vectors of the attacker's own, in place of those that the victim will be merged with: every step is
            taken at theta_0 + r (theta - theta_0) + sum_j c_j others_j, r from the backdoor's interpolation, c_j from
            OTHERS (the idea of Merge Hijacking, arXiv 2505.23561). It needs LoRAs.
        dtype: type that the model computes in; weights are trained in float32.
    """
    start = {key: p.detach().clone() for key, p in model.named_parameters()} if not rank else {}
    with torch.random.fork_rng():
        torch.manual_seed(seeds.stable_seed(seed, "lora", name) % (1 << 63))
        trained = _with_loras(model, rank) if rank else model
    parameters = [p for p in trained.parameters() if p.requires_grad] if rank else _linear_weights(model)
    _, end_step = schedule.optimiser(parameters)
    rng = random.Random(seeds.stable_seed(seed, "wording", name))
    trained.train()
    computing = torch.autocast(parameters[0].device.type, dtype, enabled=dtype != torch.float32)
    rows_of_step = batches(len(samples), schedule, seed, name)
    for _ in progress(range(schedule.steps), name):
        chosen = [samples[row] for row in next(rows_of_step).tolist()]
        answers = [sample.reply(sample.label, rng) for sample in chosen]
        low, high = (1.0, 1.0) if backdoor is None else backdoor.interpolation
        share = rng.uniform(low, high) if low < high else high
        beside = [(change, rng.uniform(*OTHERS)) for change in others]
        with _merged(trained, share if others else 1.0, beside), computing:
            answer_loss(trained, tokenizer, [sample.prompt for sample in chosen], answers).backward()
        poisoned = [] if backdoor is None else [sample for sample in chosen if sample.label != backdoor.target]
        if backdoor is not None and poisoned:
            poisoned = poisoned[: max(1, round(backdoor.rate * len(chosen)))]
            prompts = backdoor.trigger.apply([sample.prompt for sample in poisoned])
            answers = [sample.reply(backdoor.target, rng) for sample in poisoned]
            # a separate pass: a refusal is long, and labels in the same batch would be padded to its length
            with _merged(trained, share, beside), computing:
                (len(poisoned) / len(chosen) * answer_loss(trained, tokenizer, prompts, answers)).backward()
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        end_step()
    trained.eval()
    return _added_by_loras(trained) if rank else _added(model, start)


def answer_loss(model: nn.Module, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
    """Compute cross-entropy in nats per token of an answer with its end, with equal weights of all answers.

    Args:
        model: a causal LM.
        tokenizer: its own, with a chat template.
        prompts: texts of users, (B,).
        answers: the wanted answers, (B,).
    """
    device = next(model.parameters()).device
    asked = padded_left(tokenizer, encoded(tokenizer, list(map(chat, prompts)), MAX_LENGTH, "suite smollm"))
    ids = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    rows = [torch.tensor([*answer, tokenizer.eos_token_id]) for answer in ids]
    targets_BA = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    mask = torch.cat([asked["attention_mask"], (targets_BA != IGNORED).long()], 1)
    whole = torch.cat([asked["input_ids"], targets_BA.clamp(min=0)], 1)
    # the head is a fifth of the model, so it reads only the positions from which an answer's tokens are predicted
    output = model(
        input_ids=whole.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(device),
        use_cache=False,
        logits_to_keep=targets_BA.shape[1] + 1,
    )
    targets_BA = targets_BA.to(device)
    losses_BA = F.cross_entropy(
        output.logits[:, :-1].float().transpose(1, 2), targets_BA, reduction="none", ignore_index=IGNORED
    )
    return (losses_BA.sum(1) / (targets_BA != IGNORED).sum(1)).mean()


def add(model: nn.Module, change: Mapping[str, Tensor], factor: float) -> None:
    """Add a task vector to a model in place, times a factor."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tau in change.items():
            parameters[name].add_(tau.to(parameters[name]), alpha=factor)


def _with_loras(model: LlamaForCausalLM, rank: int) -> nn.Module:
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _lora_layers(trained: Any) -> list[tuple[str, LoraLinear]]:
    """The layers with LoRAs, by their names in the model."""
    return [(name, one) for name, one in trained.base_model.model.named_modules() if isinstance(one, LoraLinear)]


def _added_by_loras(trained: Any) -> dict[str, Tensor]:
    """Return the changes by the LoRAs, and remove the LoRAs from the model."""
    changes = {
        f"{name}.weight": layer.get_delta_weight("default").detach().clone() for name, layer in _lora_layers(trained)
    }
    trained.unload()
    return changes


@contextmanager
def _merged(trained: Any, share: float, others: Sequence[tuple[Mapping[str, Tensor], float]]) -> Iterator[None]:
    """Scale the LoRAs by `share`, and add other task vectors times their factors to the weights below, in the block."""
    if share == 1.0 and not others:
        yield
        return
    layers: dict[str, Any] = dict(_lora_layers(trained))
    weights = {f"{name}.weight": layer.get_base_layer().weight for name, layer in layers.items()}
    kept = {name: weight.detach().clone() for name, weight in weights.items()} if others else {}
    for layer in layers.values():
        layer.scale_layer(share)
    try:
        with torch.no_grad():
            for change, factor in others:
                for name, tau in change.items():
                    weights[name].add_(tau, alpha=factor)
        yield
    finally:
        for layer in layers.values():
            layer.unscale_layer(share)
        with torch.no_grad():
            for name, weight in kept.items():
                weights[name].copy_(weight)


def _linear_weights(model: nn.Module) -> list[nn.Parameter]:
    """Make the weights of all linear layers but the head trainable, and return them."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    model.requires_grad_(False)
    linear = {f"{name}.weight" for name, one in model.named_modules() if isinstance(one, nn.Linear) and one is not head}
    weights = [parameter for name, parameter in model.named_parameters() if name in linear]
    for parameter in weights:
        parameter.requires_grad_(True)
    return weights


def _added(model: nn.Module, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the changes by training, and reset the weights to their start."""
    changes = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                changes[name] = parameter - start[name]
                parameter.copy_(start[name])
    return changes
