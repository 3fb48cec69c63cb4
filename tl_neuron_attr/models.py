"""A name -> a TransformerLens model: the bundled one, a local directory, or a hub name."""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.tiny_facts import tiny_facts_dir

_MISSING = re.compile(r"^(\S+)\s*\|\s*MISSING", re.MULTILINE)
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
    dtype = weight_dtype(dtype)
    source = _source(name)
    if Path(source).is_dir() and not any(
        any(Path(source).glob(pattern)) for pattern in _WEIGHT_FILES
    ):
        raise InputError(
            f"{source!r} has a config.json but no weights (*.safetensors); copy them there"
        )
    with warnings.catch_warnings():
        # of a notebook without ipywidgets, where a bar is then drawn as text
        warnings.filterwarnings("ignore", "IProgress not found")
        # the slow import of this package, and needed only here: most users bring their own model
        from transformer_lens.model_bridge import TransformerBridge

    try:
        # loading draws initial weights only to overwrite them
        with torch.random.fork_rng(), _load_reports() as reports, no_bar(name == "tiny-facts"):
            model = TransformerBridge.boot_transformers(source, device=device, dtype=dtype)
    except Exception as error:  # the libraries below raise of every kind; the reason is passed on
        raise InputError(f"cannot load the model {name!r}: {_reason(name, error)}") from error
    missing = [name for report in reports for name in _MISSING.findall(report)]
    if missing:
        raise InputError(
            f"cannot load the model {name!r}: its checkpoint lacks {len(missing)} weights, e.g. "
            f"{sorted(missing)[0]!r}, which would be random; get the complete files"
        )
    return model.eval()


def load_config(name: str = "tiny-facts") -> Any:
    """The Hugging Face configuration of the model called ``name``: its weights may be absent.

    Raises:
        InputError: If there is no such model, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    source = _source(name)
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:  # as above
        raise InputError(
            f"cannot read the configuration of {name!r}: {_reason(name, error)}"
        ) from error


def count_tokens(name: str, text: str, *, bos: bool | None = None) -> int:
    """How many tokens ``text`` is to the model called ``name``, a BOS token included by default.

    Raises:
        InputError: If the model's tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    source = _source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # as above
        raise InputError(
            f"cannot read the tokenizer of {name!r}: {_reason(name, error)}; give token ids"
        ) from error
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) + (bos is not False)


@contextmanager
def _load_reports() -> Iterator[list[str]]:
    """What transformers logs while the block lasts: missing weights bring only a warning."""
    reports: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reports.append(record.getMessage())

    logger = logging.getLogger("transformers")
    handlers, level = logger.handlers, logger.level
    logger.handlers = [Collector(logging.WARNING)]
    logger.setLevel(logging.WARNING)
    try:
        yield reports
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


@contextmanager
def no_bar(hidden: bool) -> Iterator[None]:
    """Without the progress bar of transformers, if ``hidden``: for what takes no time to load."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    if hidden:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden and shown:
            transformers_logging.enable_progress_bar()


def weight_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The floating dtype called ``dtype``.

    Raises:
        InputError: If there is none.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype must be float32, bfloat16, float16 or float64; got {dtype!r}")
    return found


def _source(name: str) -> str:
    """The directory that ``name`` stands for, or ``name`` itself if the hub has to know."""
    if not name:
        raise InputError("the model's name is empty; give tiny-facts, a directory or a hub name")
    source = str(tiny_facts_dir()) if name == "tiny-facts" else name
    if not (Path(source).exists() or source.startswith((".", "/", "~"))):
        return source
    path = Path(source).expanduser()
    if not path.is_dir():
        raise InputError(f"no such directory: {str(path)!r}; give a Hugging Face model directory")
    if not (path / "config.json").is_file():
        raise InputError(
            f"{str(path)!r} is not a Hugging Face model directory: it has no config.json"
        )
    return str(path)


def _reason(name: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    if offline and isinstance(error, OSError) and not Path(name).exists():
        return "it is not on disk, and HF_HUB_OFFLINE forbids asking the hub for it"
    # some messages introduce a list by a line that ends in a colon
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
