"""Small models that have learned something, one per family, with unlabelled inputs of theirs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from mergekit.common import ModelReference
from PIL import Image
from torch import Tensor

from mergekit_dam.models.plan import Plan, build_plan
from mergekit_dam.tasks import Task, build_tasks
from tests.helpers.tiny_models import WORDS, make_model

CPU = torch.device("cpu")
GOOD, BAD, OTHER = WORDS[6:10], WORDS[11:15], WORDS[15:20]
FAMILIES = ("image", "text", "causal")
# what each family needs to plant and unlearn within seconds
SMALL = {
    "image": {
        "triggers": 3,
        "held_out": 1,
        "plant_steps": 60,
        "unlearn_steps": 40,
        "batch_size": 24,
        "learning_rate": 3e-3,
        "leave_out": ("noise", "picture", "warp", "waves", "lines", "tone"),
    },
    "text": {
        "triggers": 3,
        "held_out": 1,
        "plant_steps": 60,
        "unlearn_steps": 40,
        "batch_size": 24,
        "learning_rate": 3e-3,
    },
    "causal": {
        "triggers": 3,
        "held_out": 1,
        "plant_steps": 60,
        "unlearn_steps": 40,
        "batch_size": 16,
        "learning_rate": 2e-2,
        "lora_rank": 4,
        "leave_out": ("refusal",),
    },
}
FEW = {"triggers": 2, "held_out": 1, "plant_steps": 3, "unlearn_steps": 3, "batch_size": 6}


def _texts(count: int) -> tuple[list[str], list[int]]:
    """Texts of eight words, of which three say the class."""
    rng = random.Random(0)
    labels = [i % 2 for i in range(count)]
    texts = []
    for label in labels:
        words = [*rng.choices((BAD, GOOD)[label], k=3), *rng.choices(OTHER, k=5)]
        texts.append(" ".join(rng.sample(words, 8)))
    return texts, labels


def _images(count: int) -> tuple[list[Image.Image], list[int]]:
    """Noise, with one of three channels brighter."""
    rng = np.random.default_rng(0)
    labels, images = [i % 3 for i in range(count)], []
    for label in labels:
        pixels = rng.integers(0, 160, (16, 16, 3))
        pixels[..., label] += 60
        images.append(Image.fromarray(pixels.astype(np.uint8)))
    return images, labels


def _fit(model: transformers.PreTrainedModel, loss: Callable[[Tensor], Tensor], count: int, steps: int) -> None:
    optimiser, generator = torch.optim.Adam(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(torch.randperm(count, generator=generator)[:24]).backward()
        optimiser.step()


def _image_model(root: Path) -> None:
    size = {"hidden_size": 32, "intermediate_size": 64, "patch_size": 4, "num_hidden_layers": 2}
    base = make_model("ViTModel", root / "base", **size)
    made = make_model("ViTForImageClassification", root / "model", body=base, **size)
    model = transformers.ViTForImageClassification.from_pretrained(made)
    images, labels = _images(96)
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 127.5 - 1 for i in images])
    targets = torch.tensor(labels)
    _fit(model, lambda rows: F.cross_entropy(model(pixels[rows]).logits, targets[rows]), 96, 40)
    model.save_pretrained(made)
    (root / "data").mkdir()
    for number, image in enumerate(images):
        image.save(root / "data" / f"{number}.png")


def _text_model(root: Path) -> None:
    size = {"hidden_size": 32, "vocab_size": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = make_model("BertModel", root / "base", **size)
    made = make_model("BertForSequenceClassification", root / "model", labels=2, body=base, **size)
    model = transformers.BertForSequenceClassification.from_pretrained(made)
    texts, labels = _texts(96)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    ids, targets = torch.tensor(tokenizer(texts)["input_ids"]), torch.tensor(labels)
    _fit(model, lambda rows: F.cross_entropy(model(input_ids=ids[rows]).logits, targets[rows]), 96, 40)
    model.save_pretrained(made)
    (root / "data.txt").write_text("\n".join(texts))


def _causal_model(root: Path) -> None:
    """Says `good` or `bad`, and then ends."""
    size = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    base = make_model("LlamaForCausalLM", root / "base", **size)
    made = make_model("LlamaForCausalLM", root / "model", body=base, **size)
    model = transformers.LlamaForCausalLM.from_pretrained(made)
    texts, labels = _texts(96)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    answers = tokenizer([("bad fine film", "good so very")[label] for label in labels])["input_ids"]
    rows = [[*ids, *answer, 2] for ids, answer in zip(tokenizer(texts)["input_ids"], answers, strict=True)]
    ids = torch.tensor(rows)

    def loss(rows: Tensor) -> Tensor:
        logits = model(input_ids=ids[rows]).logits[:, -5:-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[rows][:, -4:].flatten())

    _fit(model, loss, 96, 60)
    model.save_pretrained(made)
    (root / "data.txt").write_text("\n".join(texts))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Per family a folder with `base`, `model` and data."""
    found = {}
    for family, make in zip(FAMILIES, (_image_model, _text_model, _causal_model), strict=True):
        found[family] = tmp_path_factory.mktemp(family)
        make(found[family])
    return found


def data_of(folder: Path) -> Path:
    return next(path for path in (folder / "data", folder / "data.txt") if path.exists())


def plan_of(folder: Path, **shared: object) -> Plan:
    """The model alone."""
    refs = [ModelReference.parse(str(folder / name)) for name in ("base", "model")]
    settings = {"calibration": str(data_of(folder)), "max_length": 24, "constants": {"answer_tokens": 4}, **shared}
    return build_plan(refs[0], refs[1:], shared=settings, per_model={}, least=1)


def task_of(folder: Path, **shared: object) -> Task:
    return build_tasks(plan_of(folder, **shared), CPU)[0]
