"""Make CLIP's vision tower a classifier of the benchmark, with a frozen zero-shot head on a trained and merged body.

Legend: B batch, C channels, H, W pixels, W width of the tower, P projection, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPVisionModel
from transformers.modeling_outputs import ImageClassifierOutput

from mergekit_dam.tasks.readout import pooled, prompts

_FILE = Path("zero_shot") / "head.safetensors"  # in a folder, so that no library reads it as the model's tensors


class ZeroShotClip(nn.Module):
    """CLIP's vision tower with a fixed zero-shot head (Radford et al., arXiv 2103.00020, section 3.1).

    Args:
        body: the vision tower.
        projection_PW: visual projection of the full CLIP.
        weight_KP: class features of unit length, times the logit scale.
    """

    def __init__(self, body: CLIPVisionModel, projection_PW: Tensor, weight_KP: Tensor) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("projection", projection_PW)
        self.classifier = nn.Linear(weight_KP.shape[1], weight_KP.shape[0], bias=False)
        self.classifier.weight = nn.Parameter(weight_KP, requires_grad=False)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        features_BW = self.body(pixel_values=pixel_values).pooler_output
        embedded_BP = F.normalize(F.linear(features_BW, self.get_buffer("projection")), dim=-1)
        return ImageClassifierOutput(logits=self.classifier(embedded_BP))

    def save_head(self, folder: Path) -> None:
        """Write the head beside a saved body."""
        (folder / _FILE).parent.mkdir(exist_ok=True)
        weight = self.classifier.weight.detach().cpu().contiguous()
        save_file({"weight": weight, "projection": self.get_buffer("projection").cpu().contiguous()}, folder / _FILE)

    @classmethod
    def load(cls, body: CLIPVisionModel, folder: Path) -> ZeroShotClip:
        """Combine a body with the head that `save_head` wrote to `folder`."""
        head = load_file(folder / _FILE)
        return cls(body, head["projection"], head["weight"])


@torch.no_grad()
def with_head(body: CLIPVisionModel, base: Path, classes: Sequence[str]) -> ZeroShotClip:
    """Combine a body with the head that `dam` makes of the same names (tasks/readout.py).

    Args:
        body: theta_0's tower or a fine-tune.
        base: folder of the full CLIP with its tokenizer.
        classes: K names.
    """
    clip = CLIPModel.from_pretrained(base).eval()
    text = clip.get_text_features(**prompts(classes, (base,), str(base)))
    features_KP = F.normalize(text if isinstance(text, Tensor) else pooled(text), dim=-1)
    return ZeroShotClip(body, clip.visual_projection.weight.detach().clone(), clip.logit_scale.exp() * features_KP)
