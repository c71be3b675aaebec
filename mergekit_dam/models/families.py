"""Define model families that mergekit 0.1.5 cannot merge, or only with heads like the base's.

All classes that share an encoder map to ONE architecture, so that a headless base can be merged with fine-tunes whose
heads have any size. The output has the tensors of the base, and every spelling of a name that occurs on disk (with or
without the class prefix, LayerNorm.gamma/beta) is an alias. The JSON files in `architectures/` list the tensors, by
names without the class prefix.

The class does not determine the tensors of a checkpoint: bert-base-uncased calls itself BertForMaskedLM and has a
pooler, newer files of that class have none, older ones have `position_ids`. mergekit fails on a tensor that fine-tunes
have and the base lacks, so an optional tensor is listed only if the base's files have it.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import threading
import warnings
from typing import Any

from mergekit.architecture import ModelArchitecture, ModuleArchitecture, ModuleDefinition, WeightInfo
from mergekit.io import ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from pydantic import BaseModel
from transformers import PretrainedConfig

from mergekit_dam.registry import PLUGINS, load_plugins

_LOCK = threading.Lock()
_LEGACY = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
# tensors that mergekit requires of every model of a class, though some lack them: computed buffers that new files of
# GPT-NeoX do not hold, and norms that only some sizes of Command R have
_VARIANTS: dict[str, tuple[str, str | None]] = {
    "GPTNeoXForCausalLM": (r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$", None),
    "CohereForCausalLM": (r"\.self_attn\.[qk]_norm\.weight$", "use_qk_norm"),
}
CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel")  # ends of the names of causal LMs
_SINGLE_ENCODERS = ("vit", "bert", "roberta", "distilbert", "clip_vision")


class Aliases(tuple[str, ...]):
    """A tuple of spellings that can be added to a list, as mergekit 0.1.5 does for optional weights."""

    def __radd__(self, other: list[str]) -> list[str]:
        return [*other, *self]


class EncoderTensors(BaseModel, frozen=True, extra="forbid"):
    """Tensor names of an encoder and of the heads that transformers adds to it, as in a JSON file."""

    model_type: str
    prefix: str
    headless: tuple[str, ...]
    layer_prefix: str
    num_layers_config_key: str
    pre_weights: tuple[str, ...]
    layer_weights: tuple[str, ...]
    post_weights: tuple[str, ...]
    heads: dict[str, tuple[str, ...]]
    either_spelling: tuple[str, ...] = ()
    vocabulary_axis: dict[str, int]
    tied: dict[str, str]
    buffers: tuple[str, ...]


class EncoderArchitecture(ModuleArchitecture, BaseModel, frozen=True):
    """mergekit's definition of an encoder's weights, for the class that a config names.

    Args:
        tensors: names of the tensors.
        config_key: key of the encoder's config in a nested config, e.g. `vision_config`.
        extra: names of tensors outside the encoder that this module also writes.
    """

    tensors: EncoderTensors
    config_key: str | None = None
    extra: tuple[str, ...] = ()

    def name(self) -> str:
        return self.tensors.model_type

    def num_layers_config_key(self) -> str:
        key = self.tensors.num_layers_config_key
        return f"{self.config_key}.{key}" if self.config_key else key

    def num_layers(self, config: PretrainedConfig) -> int:
        own = getattr(config, self.config_key, config) if self.config_key else config
        return int(getattr(own, self.tensors.num_layers_config_key))

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        bare = self._is_bare(config)
        return _present([self._body(name, bare) for name in self.tensors.pre_weights], config)

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        layer = f"{self.tensors.layer_prefix}.{index}."
        bare = self._is_bare(config)
        return [self._body(layer + name, bare) for name in self.tensors.layer_weights]

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        outside = (*self.tensors.heads.get(_class_name(config), ()), *self.extra)
        bare = self._is_bare(config)
        weights = [self._body(name, bare) for name in self.tensors.post_weights]
        return _present([*weights, *(self._weight(name, (), optional=True) for name in outside)], config)

    def _body(self, name: str, is_bare: bool) -> WeightInfo:
        prefixed = self.tensors.prefix + name
        own, other = (name, prefixed) if is_bare else (prefixed, name)
        # a base saved without its pooler or mask token can still be merged, so these are optional
        optional = name in self.tensors.buffers or name.startswith("pooler.") or name.endswith("mask_token")
        return self._weight(own, (other,), optional=optional, bare=name)

    def _is_bare(self, config: PretrainedConfig) -> bool:
        class_name = _class_name(config)
        if class_name in self.tensors.either_spelling:
            # transformers before 5 loads these only with the prefix: the output keeps the base's spelling
            return not any(name.startswith(self.tensors.prefix) for name in _names_on_disk(config) or ())
        return class_name in self.tensors.headless

    def _weight(self, name: str, others: tuple[str, ...], *, optional: bool, bare: str | None = None) -> WeightInfo:
        spellings = [name, *others]
        for new, old in _LEGACY.items():
            spellings += [s.removesuffix(new) + old for s in (name, *others) if s.endswith(new)]
        tied = self.tensors.tied.get(name)
        # model_construct: validation would turn Aliases into a plain tuple
        return WeightInfo.model_construct(
            name=name,
            aliases=Aliases(spellings[1:]) or None,
            optional=optional,
            vocabulary_axis=self.tensors.vocabulary_axis.get(bare or name),
            force_dtype="int64" if bare in self.tensors.buffers else None,
            tied_names=(tied,) if tied else None,
        )


class VariantArchitecture(ModuleArchitecture, BaseModel, frozen=True, arbitrary_types_allowed=True):
    """mergekit's own definition without tensors that only some models of the class have.

    Args:
        original: mergekit's definition.
        excluded: pattern of the names of these tensors.
        required_by: entry of config.json that is set where a model has them; None: no model needs them.
    """

    original: ModuleArchitecture
    excluded: str
    required_by: str | None

    def name(self) -> str:
        return str(getattr(self.original, "name", lambda: "")())

    def num_layers_config_key(self) -> str:
        return str(self.original.num_layers_config_key())

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        return self._of_variant(self.original.pre_weights(config), config)

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        return self._of_variant(self.original.layer_weights(index, config) or [], config)

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        return self._of_variant(self.original.post_weights(config), config)

    def _of_variant(self, weights: list[WeightInfo], config: PretrainedConfig) -> list[WeightInfo]:
        if self.required_by is not None and getattr(config, self.required_by, False):
            return weights
        return [weight for weight in weights if not re.search(self.excluded, weight.name)]


def _class_name(config: PretrainedConfig) -> str:
    return str((config.architectures or [""])[0])


def _present(weights: list[WeightInfo], config: PretrainedConfig) -> list[WeightInfo]:
    """Drop the optional weights that the base's files lack; keep all where the files are unknown."""
    names = _names_on_disk(config)
    if names is None:
        return weights
    return [w for w in weights if not w.optional or names.intersection((w.name, *(w.aliases or ())))]


def _names_on_disk(config: PretrainedConfig) -> frozenset[str] | None:
    """Tensor names in the weight files beside this config; None if there are no such local files."""
    path = str(config.name_or_path)
    for ref, loader in list(LoaderCache().loaders.items()):  # other threads add to it
        if ref.model.path == path:
            return frozenset(loader.index.tensor_paths)
    try:
        return frozenset(ShardedTensorIndex.from_disk(path).tensor_paths) if os.path.isdir(path) else None
    except (OSError, RuntimeError, ValueError):
        return None  # the code that reads the tensors reports the damage


def load_tensors(name: str) -> EncoderTensors:
    """Read the tensor names of a family of this package, e.g. `vit`."""
    text = importlib.resources.files("mergekit_dam.models.architectures").joinpath(f"{name}.json").read_text("utf-8")
    return EncoderTensors.model_validate(json.loads(text))


def _architectures() -> dict[str, ModelArchitecture]:
    """Build class name -> architecture, with one object per family."""
    architectures: dict[str, ModelArchitecture] = {}
    for name in _SINGLE_ENCODERS:
        architectures |= _family(load_tensors(name), config_key="vision_config" if name == "clip_vision" else None)
    outside = ("logit_scale", "visual_projection.weight", "text_projection.weight")
    towers = {
        "vision_model": EncoderArchitecture(tensors=load_tensors("clip_vision"), config_key="vision_config"),
        "text_model": EncoderArchitecture(tensors=load_tensors("clip_text"), config_key="text_config", extra=outside),
    }
    architectures["CLIPModel"] = _model(towers, ["CLIPModel"], "clip", vocab_size_config_key="text_config.vocab_size")
    return architectures


def _family(tensors: EncoderTensors, *, config_key: str | None = None) -> dict[str, ModelArchitecture]:
    """Build class name -> architecture of a family with a single encoder; all classes share it."""
    classes = [*tensors.headless, *tensors.heads]
    module = EncoderArchitecture(tensors=tensors, config_key=config_key)
    return dict.fromkeys(classes, _model({"default": module}, classes, tensors.model_type))


def _model(
    modules: dict[str, EncoderArchitecture], classes: list[str], model_type: str, **more: Any
) -> ModelArchitecture:
    definitions = {key: ModuleDefinition(architecture=module) for key, module in modules.items()}
    return ModelArchitecture(
        modules=definitions,
        architectures=classes,
        model_type=model_type,
        tagalong_files=["preprocessor_config.json", "processor_config.json"],
        **more,
    )


def _with_variant(known: ModelArchitecture, excluded: str, required_by: str | None) -> ModelArchitecture:
    modules = {}
    for key, part in known.modules.items():
        variant = VariantArchitecture(original=part.architecture, excluded=excluded, required_by=required_by)
        modules[key] = part.model_copy(update={"architecture": variant})
    return known.model_copy(update={"modules": modules})


def register_family(tensors: EncoderTensors) -> None:
    """Register the classes of a further family with mergekit; earlier definitions of these classes are replaced.

    Args:
        tensors: of the family, e.g. those of one that is here with some fields changed (`load_tensors`).
    """
    from mergekit.architecture import json_definitions

    with _LOCK:
        json_definitions.NAME_TO_ARCH.update({name: [arch] for name, arch in _family(tensors).items()})


def register_architectures() -> None:
    """Register all families, and those of plugins, with mergekit; repeated calls change nothing, errors only warn."""
    try:
        from mergekit.architecture import json_definitions

        table: dict[str, Any] = json_definitions.NAME_TO_ARCH
        with _LOCK:
            # EncoderArchitecture marks an entry as ours: architectures that are built twice would be unequal
            if not _is_ours(table.get("BertModel")):
                for name, architecture in _architectures().items():
                    table[name] = [architecture]
                for name, variant in ((n, v) for n, v in _VARIANTS.items() if n in table):
                    table[name] = [_with_variant(known, *variant) for known in table[name]]
    except Exception as error:
        warnings.warn(f"mergekit-dam: model families not registered: {error!r}", stacklevel=2)
    load_plugins(PLUGINS)


def _is_ours(entry: Any) -> bool:
    return bool(entry) and any(
        isinstance(module.architecture, EncoderArchitecture) for a in entry for module in a.modules.values()
    )
