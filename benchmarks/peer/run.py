"""The public DAM step, as fusion_bench's classes perform it, on models of this benchmark: the peer to compare with.

Set up its own environment once (fusion_bench is never imported by mergekit_dam), then run it:

    make -C benchmarks/peer
    benchmarks/peer/.venv/bin/python benchmarks/peer/run.py --base BASE --model M1 M1.parquet --model M2 M2.parquet \
        --steps 300 --coefficient-steps 300 --out OUT
    benchmarks/peer/.venv/bin/python benchmarks/peer/run.py --random-clip 4 --steps 5 --coefficient-steps 0 --out OUT

It writes the merged body as OUT/config.json and OUT/model.safetensors, with the base's class and tensor names, and
OUT/peer.json: seconds per step, peak resident memory, versions and settings. Settings are those of fusion_bench's own
file clip_safe_concrete_layer_wise_adamerging.yaml but for the steps and the batch size asked for.

Facts about the code that is called (fusion_bench 0.2.33, clip_safe_concrete_adamerging.py); all stay as they are:
- One mask, not two; Task-Shared and Backdoor-Detection are two terms of one loss.
- The safety term is the entropy of the answer to x + delta: it rewards a confident answer, the target's included.
- The perturbed input is clamped to [0, 1] although pixels are normalised already, and in the mask step alone.
- delta moves by 1e-4 per step; `trigger_norm` is never read.
- The layer-wise class reads an undefined `config` and passes an argument that its merged model does not take. It
  cannot start, so the task-wise class is what runs here, with the file of the layer-wise one: there is no other.
- The inner step is Adam with a step of 1 on coefficients of 0.3, the first one hence to -0.7 or 1.3; the merge that
  opens the next step still has these coefficients, and only afterwards are they reset.
- The last task's loss is logged as the loss; `mask_sparsity` is a density; the final mask is one random draw.
- Its batches are test images. Here, and only here, that is changed: they come from the calibration files.
Families: ViTModel under ViTForImageClassification; CLIPModel under CLIPVisionModel with the zero_shot/head.safetensors
of suite clip-paper; BertModel under BertForSequenceClassification.
Text is an extension that nobody published; the clamp then cuts word embeddings, too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import json
import shutil
import statistics
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from adapters import ClipEncoders, ImageEncoders, PublicStep, TextEncoders
from fusion_bench.modelpool import BaseModelPool
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

SETTINGS = "method/concrete_subspace/clip_safe_concrete_layer_wise_adamerging.yaml"
FAMILIES = {
    "vit": (ImageEncoders, transformers.ViTModel, transformers.ViTForImageClassification),
    "clip": (ClipEncoders, transformers.CLIPVisionModel, transformers.CLIPVisionModel),
    "bert": (TextEncoders, transformers.BertModel, transformers.BertForSequenceClassification),
}


def settings(steps: int, coefficient_steps: int) -> DictConfig:
    """fusion_bench's own file with other numbers of steps, and without checkpoints on the way."""
    package = importlib.util.find_spec("fusion_bench_config")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("fusion_bench_config is missing: reinstall fusion-bench")
    config = OmegaConf.load(Path(next(iter(package.submodule_search_locations))) / SETTINGS)
    assert isinstance(config, DictConfig)
    config.max_steps, config.max_adamerging_steps = steps, coefficient_steps
    config.save_interval = steps + coefficient_steps + 1
    return config


def column(file: str, kind: str, num_samples: int) -> list[Any]:
    """The one column of images or texts in a parquet file; labels are not read."""
    data = datasets.load_dataset("parquet", data_files=file, split="train")
    wanted = [name for name, feature in data.features.items() if _is(feature, kind)]
    if len(wanted) != 1:
        raise SystemExit(f"{file}: expected one column of {kind}s, got {wanted or list(data.features)}")
    rows = data.select_columns(wanted).select(range(min(num_samples, len(data))))[wanted[0]]
    return [_decoded(row) if kind == "image" else row for row in rows]


def _is(feature: Any, kind: str) -> bool:
    if kind == "text":
        return getattr(feature, "dtype", None) in {"string", "large_string"}
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def _decoded(row: Any) -> Image.Image:
    return (row if isinstance(row, Image.Image) else Image.open(io.BytesIO(row["bytes"]))).convert("RGB")


def pixels(images: list[Image.Image], folders: list[Path], family: str) -> Tensor:
    """Normalised pixels_NCHW by the first preprocessor_config.json that is found."""
    folder = next((f for f in folders if (f / "preprocessor_config.json").is_file()), None)
    kind = transformers.CLIPImageProcessor if family == "clip" else transformers.ViTImageProcessor
    processor = kind.from_pretrained(folder) if folder else kind()
    found: Tensor = processor(images, return_tensors="pt")["pixel_values"]
    return found


def embeddings(texts: list[str], folder: Path, base: Any, max_length: int) -> tuple[Tensor, Tensor]:
    """Word embeddings (N, L, D) of theta_0's table, and the attention mask (N, L)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(texts, truncation=True, max_length=max_length, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        return base.get_input_embeddings()(encoded["input_ids"]), encoded["attention_mask"]


def on_models(args: argparse.Namespace, logs: Path) -> tuple[PublicStep, BaseModelPool]:
    """The step and the models of the command line; a fine-tune without a tensor of the base has theta_0's."""
    family = transformers.AutoConfig.from_pretrained(args.base).model_type
    if family not in FAMILIES:
        raise SystemExit(f"{args.base}: expected one of {', '.join(FAMILIES)}, got {family}")
    step_class, base_class, tuned_class = FAMILIES[family]
    base = base_class.from_pretrained(args.base, dtype=torch.float32)
    heads: dict[str, Any] = {}
    data: dict[str, tuple[Tensor, ...]] = {}
    models: dict[str, Any] = {"_pretrained_": base}
    more: dict[str, Any] = {}
    for folder, file in args.model:
        name, models[Path(folder).name] = Path(folder).name, deepcopy(base)
        tuned = tuned_class.from_pretrained(folder, dtype=torch.float32)
        if family == "clip":
            head = load_file(Path(folder) / "zero_shot" / "head.safetensors")
            heads[name], more["projection_PW"] = head["weight"], head["projection"]
        else:
            heads[name] = tuned.classifier
            tuned = getattr(tuned, tuned.base_model_prefix)
        models[name].load_state_dict(tuned.state_dict(), strict=False)
        rows = column(file, "text" if family == "bert" else "image", args.num_samples)
        if family == "bert":
            data[name] = embeddings(rows, Path(folder), base, args.max_length)
        else:
            data[name] = (pixels(rows, [Path(folder), args.base], family),)
    return make_step(step_class, args, data, logs, heads=heads, **more), BaseModelPool(models=models)


def make_step(
    step_class: type[PublicStep], args: argparse.Namespace, data: dict[str, Any], logs: Path, **heads: Any
) -> PublicStep:
    config = settings(args.steps, args.coefficient_steps)
    return step_class(config, data, batch_size=args.batch_size, device=args.device, logs=logs, **heads)


def on_random_clip(args: argparse.Namespace, logs: Path) -> tuple[PublicStep, BaseModelPool]:
    """T random models of the shapes of CLIP ViT-B/32 and random pixels, for time and memory alone."""
    config = transformers.CLIPVisionConfig()  # its defaults are ViT-B/32's
    base = transformers.CLIPVisionModel(config)
    names = [f"m{index}" for index in range(args.random_clip)]
    models: dict[str, Any] = {"_pretrained_": base} | {name: deepcopy(base) for name in names}
    for name in names:
        with torch.no_grad():
            for parameter in models[name].parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
    shape = (2 * args.batch_size, 3, config.image_size, config.image_size)
    data = {name: (torch.randn(shape),) for name in names}
    features_KP = 100 * torch.nn.functional.normalize(torch.randn(100, config.projection_dim), dim=-1)
    projection_PW = torch.randn(config.projection_dim, config.hidden_size) / config.hidden_size**0.5
    heads = dict.fromkeys(names, features_KP)
    step = make_step(ClipEncoders, args, data, logs, heads=heads, projection_PW=projection_PW)
    return step, BaseModelPool(models=models)


def save(model: Any, base: Path, out: Path) -> None:
    """The body with the tensors of the base's body: its class may have others, as a pooler that was never saved."""
    model.save_pretrained(out)
    wanted = {name for file in sorted(base.glob("*.safetensors")) for name in load_file(file)}
    if any(name.startswith("vision_model.") for name in wanted):
        wanted = {name for name in wanted if name.startswith("vision_model.")}
    merged = load_file(out / "model.safetensors")
    if lost := sorted(wanted - set(merged)):
        raise SystemExit(f"{out}: no tensor {lost[0]} as in {base}; save the base with transformers 5")
    save_file({name: merged[name] for name in wanted}, out / "model.safetensors", metadata={"format": "pt"})
    for file in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (base / file).is_file():
            shutil.copy(base / file, out / file)


def peak_rss_bytes() -> int | None:
    """Of this process alone: what getrusage tells can be the peak of the process that started this one."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def report(args: argparse.Namespace, step: PublicStep, seconds: float) -> dict[str, Any]:
    seen = step.step_seconds[1:] or step.step_seconds  # the first step allocates
    packages = ("fusion-bench", "torch", "transformers", "lightning")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "settings": OmegaConf.to_container(step.config) | {"batch_size": args.batch_size, "seed": args.seed},
        "samples": {name: len(tensors[0]) for name, tensors in step._data.items()},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "seconds": {
            "all": seconds,
            "per_mask_step_median": statistics.median(seen) if seen else None,
            "mask_steps": step.step_seconds,
            "mask_steps_processor": step.step_processor_seconds,
            "per_coefficient_step": step.coefficient_seconds / max(1, args.coefficient_steps),
        },
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The public DAM step as fusion_bench's classes perform it.")
    parser.add_argument("--base", type=Path, help="directory of theta_0: ViTModel, CLIPModel or BertModel")
    parser.add_argument("--model", nargs=2, action="append", default=[], metavar=("DIR", "PARQUET"))
    parser.add_argument("--random-clip", type=int, metavar="T", help="time T random models of CLIP ViT-B/32's shapes")
    parser.add_argument("--steps", type=int, default=1000, help="mask steps")
    parser.add_argument("--coefficient-steps", type=int, default=1000, help="steps on the coefficients afterwards")
    parser.add_argument("--batch-size", type=int, default=16, help="samples per task and step")
    parser.add_argument("--num-samples", type=int, default=512, help="calibration samples per task, the first ones")
    parser.add_argument("--max-length", type=int, default=64, help="tokens per text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if (args.random_clip is None) == (args.base is None) or (args.base is not None and len(args.model) < 2):
        parser.error("give --base and at least two --model, or --random-clip T")
    transformers.set_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as logs:
        step, pool = (on_models if args.random_clip is None else on_random_clip)(args, Path(logs))
        start = time.perf_counter()
        merged = step.run(pool)
        seconds = time.perf_counter() - start
    if args.random_clip is None:
        save(merged, args.base, args.out)
    (args.out / "peer.json").write_text(json.dumps(report(args, step, seconds), indent=1) + "\n")


if __name__ == "__main__":
    main()
