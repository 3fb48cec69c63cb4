"""The bundled model "tiny-facts", and how it is trained and evaluated.

This file loads no model and no heavy library. The stages, each imported where it is used:
``tokenizer`` (text to tokens), ``corpus`` (facts to batches), ``train``, ``accuracy`` (does the
model know it), ``zeroing`` (where), ``evaluate`` (both, as tables).
"""

from pathlib import Path

__all__ = ["tiny_facts_dir"]


def tiny_facts_dir() -> Path:
    """The folder with the bundled model: config, weights, tokenizer and model card.

    Both ``transformers.AutoModelForCausalLM.from_pretrained`` and TransformerLens's
    ``TransformerBridge.boot_transformers`` accept it as ``str(tiny_facts_dir())``.
    """
    return Path(__file__).parent / "model"
