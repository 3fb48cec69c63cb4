"""A name -> a TransformerLens model: the bundled one, a local directory, or a hub name."""

import os
from pathlib import Path
from typing import Any

import torch

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.tiny_facts import tiny_facts_dir

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def load_model(
    name: str = "tiny-facts", *, device: str | None = None, dtype: str | torch.dtype = "float32"
) -> Any:
    """A ``TransformerBridge`` of the model called ``name``, its weights raw, in evaluation mode.

    ``name`` is ``tiny-facts`` (bundled), a local Hugging Face directory, or any name that
    TransformerLens can load (which asks the hub unless the model is already on disk).
    ``device`` is by default what TransformerLens chooses; ``dtype`` is that of the weights.

    Raises:
        InputError: If ``dtype`` is no floating type, a directory lacks its configuration or
            weights, or the name cannot be loaded, with the reason TransformerLens gives.
    """
    dtype = _weight_dtype(dtype)
    source = str(tiny_facts_dir()) if name == "tiny-facts" else name
    if Path(source).exists() or source.startswith((".", "/", "~")):
        source = str(_model_directory(Path(source).expanduser()))
    # the slow import of this package, and needed only here: most users bring their own model
    from transformer_lens.model_bridge import TransformerBridge

    try:
        with torch.random.fork_rng():  # loading draws initial weights only to overwrite them
            model = TransformerBridge.boot_transformers(source, device=device, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise InputError(f"cannot load the model {name!r}: {_reason(name, error)}") from error
    return model.eval()


def _weight_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype must be float32, bfloat16, float16 or float64; got {dtype!r}")
    return found


def _model_directory(path: Path) -> Path:
    if not path.is_dir():
        raise InputError(f"no such directory: {str(path)!r}; give a Hugging Face model directory")
    if not (path / "config.json").is_file():
        raise InputError(
            f"{str(path)!r} is not a Hugging Face model directory: it has no config.json"
        )
    if not any(any(path.glob(pattern)) for pattern in _WEIGHT_FILES):
        raise InputError(
            f"{str(path)!r} has a config.json but no weights (*.safetensors); copy them there"
        )
    return path


def _reason(name: str, error: Exception) -> str:
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    if offline and not Path(name).exists():
        return "it is not on disk, and HF_HUB_OFFLINE forbids asking the hub for it"
    return first_line or type(error).__name__
