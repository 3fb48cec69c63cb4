"""What we ask: a prompt, the position to read it at, and the target whose probability we explain.

These are plain values. Turning text into token ids needs the model's tokenizer: ``host.py``.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch

from tl_neuron_attr.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question to a model: ``text`` or ``tokens``, exactly one of them.

    ``target`` is a token id, or a string that is one token; ``None`` stands for the model's own
    top prediction. ``position`` is where the answer is read, an index into the tokens as the
    model sees them (a prepended BOS counts), from the end if negative. ``prepend_bos`` is
    ``None`` for TransformerLens's default of that model; token ids are used as they are.
    ``prompt_id`` names the prompt in tables. Integers of numpy and torch become plain ones.
    """

    text: str | None = None
    tokens: Any = None
    target: Any = None
    position: Any = -1
    prepend_bos: bool | None = None
    prompt_id: str = "0"

    def __post_init__(self) -> None:
        if (self.text is None) == (self.tokens is None):
            raise InputError("a prompt needs either text or tokens, exactly one of them")
        if self.text is not None:
            _check_text(self.text, "prompt")
        if self.tokens is not None:
            if isinstance(self.tokens, (str, bytes, dict)):
                raise InputError(f"token ids must be integers, got {self.tokens!r}")
            tokens = tuple(integer(token, "a token id") for token in self.tokens)
            object.__setattr__(self, "tokens", tokens)
            if not tokens:
                raise InputError("the prompt is empty: no token ids were given")
            if self.prepend_bos is not None:
                raise InputError("token ids are used as they are: leave prepend_bos out")
        object.__setattr__(self, "position", integer(self.position, "position"))
        if isinstance(self.target, str):
            _check_text(self.target, "target")
        elif self.target is not None:
            object.__setattr__(self, "target", integer(self.target, "a token id"))


@dataclass(frozen=True)
class Target:
    """The token whose log-probability is explained, and its text as the tokenizer spells it."""

    id: int
    """Its place in the vocabulary."""
    text: str
    """How it reads in a sentence, with its leading space."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the model sees it, checked: ids inside the vocabulary and the context."""

    prompt_id: str
    text: str | None
    tokens: tuple[int, ...]
    token_texts: tuple[str, ...]
    read_pos: int
    target: Target | None


def as_prompt(
    prompt: "str | Iterable[SupportsIndex] | torch.Tensor | Prompt",
    *,
    target: str | SupportsIndex | None = None,
    position: SupportsIndex | None = None,
    prepend_bos: bool | None = None,
) -> Prompt:
    """A ``Prompt`` from text, from token ids (a sequence or a tensor), or from a ``Prompt``.

    Beside a ``Prompt`` the keyword arguments must be left out: it carries them itself.

    Raises:
        InputError: For an empty prompt, a batch of several prompts, or doubly given arguments.
    """
    if isinstance(prompt, Prompt):
        if (target, position, prepend_bos) != (None, None, None):
            raise InputError("target, position and prepend_bos belong inside the Prompt given")
        return prompt
    if not isinstance(prompt, Iterable):
        raise InputError(f"a prompt must be text, token ids or a Prompt, got {prompt!r}")
    position = -1 if position is None else position
    if isinstance(prompt, str):
        return Prompt(text=prompt, target=target, position=position, prepend_bos=prepend_bos)
    if isinstance(prompt, torch.Tensor):
        if prompt.ndim == 2 and prompt.shape[0] == 1:
            prompt = prompt[0]
        if prompt.ndim != 1 or prompt.is_floating_point():
            raise InputError(
                f"token ids must be one prompt: integers of shape [pos] or [1, pos], "
                f"got {prompt.dtype} of shape {list(prompt.shape)}"
            )
        prompt = tuple(prompt.tolist())
    return Prompt(tokens=prompt, target=target, position=position, prepend_bos=prepend_bos)


def integer(value: Any, what: str) -> int:
    """``value`` as a plain integer; numpy and torch integers will do.

    Raises:
        InputError: If it is no integer (a bool is none either), saying ``what`` must be one.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError):
        raise InputError(f"{what} must be an integer, got {value!r}") from None


def _check_text(text: str, what: str) -> None:
    if not text:
        raise InputError(f"the {what} is empty; give some text, or token ids")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"the {what} {text!r} is not valid Unicode text") from None


def visible(text: str) -> str:
    """``text`` so that every character of it can be seen: ``·`` for a space, ``⏎`` for a newline.

    Other characters that print as nothing, or that reorder their neighbours (controls,
    right-to-left marks), become ``\\u`` escapes.
    """
    signs = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(
        signs.get(char) or (char if char.isprintable() else char.encode("unicode_escape").decode())
        for char in text
    )
