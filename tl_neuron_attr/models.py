"""A name -> a TransformerLens model: the bundled one, a local directory, or a hub name."""

import difflib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tl_neuron_attr.architecture import make_exact
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.tiny_facts import tiny_facts_dir

_MISSING = re.compile(r"^(\S+)\s*\|\s*MISSING", re.MULTILINE)
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tokenizer_config.json")
_HEAD = {"lm_head.weight", "lm_head.bias", "embed_out.weight"}
_CLASSIFIER = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice)$")
_LFS_POINTER = b"version https://git-lfs"


def load_model(
    name: str | os.PathLike[str] = "tiny-facts",
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "float32",
) -> Any:
    """A ``TransformerBridge`` of the model called ``name``, its weights raw, in evaluation mode.

    ``name`` is ``tiny-facts`` (bundled), a local Hugging Face directory, or any name that
    TransformerLens can load (which asks the hub unless the model is already on disk).
    ``device`` is by default what TransformerLens chooses. ``"auto"`` is for a model larger than
    one GPU: its layers are spread over all that are visible (``CUDA_VISIBLE_DEVICES`` says which);
    where there is but one, or none, it is as if left out. ``dtype`` is that of the weights.
    A directory without a tokenizer gives a model whose ``tokenizer`` is None: it can be asked
    by token ids.

    Raises:
        InputError: If ``dtype`` is no floating type, a directory lacks its configuration or
            weights (with what it has instead), or the name cannot be loaded, with the reason
            TransformerLens gives.
    """
    dtype = weight_dtype(dtype)
    name = os.fspath(name)
    source = _source(name)
    path = Path(source) if Path(source).is_dir() else None
    if path is not None:
        _check_files(path)
    several = torch.cuda.device_count() if device == "auto" else 1
    wordless = path is not None and not _has(path, _TOKENIZER_FILES)
    with warnings.catch_warnings():
        # of a notebook without ipywidgets, where a bar is then drawn as text
        warnings.filterwarnings("ignore", "IProgress not found")
        # the slow import of this package, and needed only here: most users bring their own model
        from transformer_lens.model_bridge import TransformerBridge

    try:
        # loading draws initial weights, on the CPU, only to overwrite them
        drawing = torch.random.fork_rng(devices=[])
        with drawing, _load_reports() as reports, no_bar(name == "tiny-facts"):
            model = TransformerBridge.boot_transformers(
                source,
                device=None if device == "auto" else device,
                n_devices=several if several > 1 else None,
                dtype=dtype,
                tokenizer=_no_tokenizer() if wordless else None,
            )
    except Exception as error:  # the libraries below raise of every kind; the reason is passed on
        raise InputError(f"cannot load the model {name!r}: {_reason(name, error)}") from error
    missing = sorted({weight for report in reports for weight in _MISSING.findall(report)})
    if missing:
        raise InputError(f"cannot load the model {name!r}: {_lacking(missing)}")
    if model.tokenizer is not None and not _has_words(model.tokenizer):
        model.tokenizer = None  # made up by transformers: it would read every text as nothing
    if dtype == torch.float64:
        make_exact(model)
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
    if Path(source).is_dir() and not _has(Path(source), _TOKENIZER_FILES):
        raise InputError(f"{source!r} has no tokenizer; give token ids, or copy its files there")
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
    if path.is_file():
        raise InputError(f"{str(path)!r} is a file; give the directory that it is in")
    if not path.is_dir():
        raise InputError(
            f"no such directory: {str(path)!r}{_meant(path)}; give a Hugging Face model directory"
        )
    if not (path / "config.json").is_file():
        raise InputError(
            f"{str(path)!r} is not a Hugging Face model directory: it has no config.json"
            f"{_instead(path)}"
        )
    return str(path)


# --- what is wrong with a directory, or a name ------------------------------------------------


def _has(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(any(path.glob(pattern)) for pattern in patterns)


def _check_files(path: Path) -> None:
    """Refuse a directory whose weights are elsewhere, or are a classifier's."""
    if not _has(path, _WEIGHT_FILES):
        raise InputError(
            f"{str(path)!r} has a config.json but no weights (*.safetensors); copy them there"
        )
    for file in sorted(path.glob("*.safetensors")) + sorted(path.glob("pytorch_model*.bin")):
        with file.open("rb") as opened:
            if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise InputError(
                    f"{str(file)!r} is a Git LFS pointer, not the weights; run 'git lfs pull' there"
                )
    for kind in _architectures(path):
        if _CLASSIFIER.search(kind):
            raise InputError(
                f"{str(path)!r} is a classifier ({kind}), which was not trained to predict tokens; "
                "give a causal language model"
            )


def _architectures(path: Path) -> list[str]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # loading will say so
        return []
    return config.get("architectures") or []


def _instead(path: Path) -> str:
    """What a directory without config.json is, and which one to give."""
    if (path / "adapter_config.json").is_file():
        return (
            ", for it is a PEFT adapter; merge it into its base model, and give what "
            "merge_and_unload().save_pretrained(...) wrote"
        )
    if _has(path, ("*.gguf",)):
        return ", and GGUF weights are not read; give the files that they were converted from"
    # checkpoints of a training run, snapshots of a hub cache, a folder of models
    inside = [*path.glob("*/config.json"), *path.glob("snapshots/*/config.json")]
    newest = sorted(inside, key=lambda config: config.stat().st_mtime, reverse=True)
    if newest:
        names = ", ".join(repr(str(config.parent)) for config in newest[:3])
        return f"; give one inside it: {names}" + (", ..." if len(newest) > 3 else "")
    return "; give the directory that save_pretrained(...) wrote"


def _meant(path: Path) -> str:
    """A directory beside ``path`` of nearly the same name, as a question in brackets."""
    parent = path.parent
    beside = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f" (did you mean {str(parent / near[0])!r}?)" if near else ""


def _lacking(missing: list[str]) -> str:
    if set(missing) <= _HEAD:
        return (
            f"it was saved without its language model's head ({missing[0]!r} would be random); "
            "save it from AutoModelForCausalLM"
        )
    count = f"{len(missing)} weight" + ("s" if len(missing) > 1 else "")
    return (
        f"its checkpoint lacks {count}, e.g. {missing[0]!r}, which would be random; "
        "get the complete files"
    )


def _has_words(tokenizer: Any) -> bool:
    """Whether a vocabulary holds more than special tokens.

    For some families transformers makes an empty tokenizer where it finds no files.
    """
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return bool(set(tokenizer.get_vocab()) - special)


def _no_tokenizer() -> Any:
    """In place of a tokenizer that is not there, which TransformerLens would look for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"  # no BOS token: for one, TransformerLens looks for the files again
    words = Tokenizer(WordLevel({end: 0}, unk_token=end))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end)


def _reason(name: str, error: Exception) -> str:
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, OSError) and lines and not Path(name).exists():
        return _hub_reason(name, lines[0])
    if "deserializing header" in text:
        return "a weights file (*.safetensors) is damaged or cut short; copy it again"
    if "custom code" in text:
        return (
            "it needs code that comes with its files; if you trust that code, load it with "
            "TransformerBridge.boot_transformers(..., trust_remote_code=True) and pass the bridge"
        )
    # some messages introduce a list by a line that ends in a colon
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__


def _hub_reason(name: str, said: str) -> str:
    """Why a name that is no directory could not be had from the hub."""
    nearly = difflib.get_close_matches(name.lower(), ["tiny-facts"], cutoff=0.8)
    meant = " (did you mean 'tiny-facts'?)" if nearly else _meant(Path(name))
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return (
            "it is no directory here, nor a model on disk, and HF_HUB_OFFLINE forbids asking "
            f"the hub for it{meant}"
        )
    if "connect" in said:
        return f"it is no directory here, and the hub cannot be reached{meant}"
    if "gated" in said:
        return f"{said} Ask for access on its page, and set HF_TOKEN to your access token"
    return f"{said}{meant}"
