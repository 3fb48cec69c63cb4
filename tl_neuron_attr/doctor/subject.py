"""Whom we look at: a model, the prompt it is looked at with, and a copy of both in float64."""

import copy
import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tl_neuron_attr.architecture import make_exact
from tl_neuron_attr.attribute import attribute
from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.capture import capture
from tl_neuron_attr.captured import Capture
from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.plan import in_bytes
from tl_neuron_attr.prompts import Prompt, TokenizedPrompt
from tl_neuron_attr.targets import tokenize

COPY_LIMIT = 4 * 2**30
"""Bytes that a copy of the weights in float64 may take by default."""

TOP = 20
"""Neurons of each kind that are ranked to be looked at."""

_TEXT = "The capital of France is"
_LENGTH = 8  # token ids, where there is no tokenizer


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model in one precision, and what it did with the prompt."""

    host: Host
    captured: Capture
    seconds: float
    """Of the forward pass, run for the second time, with what is captured on the way."""

    __repr__ = brief

    @property
    def prompt(self) -> TokenizedPrompt:
        """What was asked."""
        return self.captured.prompt

    @cached_property
    def attributed(self) -> Attribution:
        """The prompt attributed, once for all checks; whatever ``attribute`` raises."""
        return ranked(self.host.model, as_asked(self.prompt))


@dataclass(frozen=True, kw_only=True)
class Examined:
    """A model as it was given, and in float64 where a copy could be made."""

    own: Subject
    double: Subject | None
    why_no_double: str
    """Empty if there is one."""

    __repr__ = brief


def examine(model: Any, prompt: Prompt | None = None, copy_limit: int = COPY_LIMIT) -> Examined:
    """The model and its copy, each run on the prompt; the model given is only run.

    Raises:
        NeuronAttrError: Whatever ``open_host``, ``tokenize`` and ``capture`` raise of the model.
    """
    host = open_host(model)
    asked = tokenize(host, default_prompt(host) if prompt is None else prompt)
    if asked.target is not None and (not asked.target.is_token or asked.target.against):
        raise InputError(
            "the doctor asks about one token: give a Prompt whose target is a token or an id, or "
            "none, for the model's own prediction"
        )
    own = _subject(host, asked)
    double, why = _in_double(own, copy_limit)
    return Examined(own=own, double=double, why_no_double=why)


def default_prompt(host: Host, *, position: int = -1, prepend_bos: bool | None = None) -> Prompt:
    """A sentence if the model reads it, otherwise token ids spread over its vocabulary.

    Raises:
        InputError: If ``prepend_bos`` is given where it takes token ids.
    """
    if why_no_sentence(host, prepend_bos) is None:
        return Prompt(text=_TEXT, position=position, prepend_bos=prepend_bos)
    tokenizer, length = getattr(host.model, "tokenizer", None), min(_LENGTH, host.n_ctx)
    known = len(tokenizer) if isinstance(tokenizer, Sized) else host.d_vocab
    tokens = tuple((7 + 13 * place) % min(known, host.d_vocab) for place in range(length))
    return Prompt(tokens=tokens, position=position, prepend_bos=prepend_bos)


def why_no_sentence(host: Host, prepend_bos: bool | None = None) -> str | None:
    """Why the model cannot be asked the default sentence; ``None`` if it can."""
    try:
        tokenize(host, Prompt(text=_TEXT, prepend_bos=prepend_bos))
    except InputError as error:
        return f"{_TEXT!r} cannot be asked: {error}"
    return None


def as_asked(prompt: TokenizedPrompt, tokens: Sequence[int] | None = None) -> Prompt:
    """The same question by token ids, or another one read at its end."""
    if tokens is not None:
        return Prompt(tokens=tuple(tokens))
    target = None if prompt.target is None else prompt.target.id
    return Prompt(tokens=prompt.tokens, position=prompt.read_pos, target=target)


def ranked(model: Any, prompt: Prompt, **options: Any) -> Attribution:
    """The prompt attributed, with as many neurons as are looked at."""
    return attribute(model, prompt, top=TOP, **options)


def _subject(host: Host, asked: TokenizedPrompt) -> Subject:
    capture(host, asked)  # the first run warms up
    started = time.perf_counter()
    captured = capture(host, asked)
    return Subject(host=host, captured=captured, seconds=time.perf_counter() - started)


def _in_double(own: Subject, copy_limit: int) -> tuple[Subject | None, str]:
    """A copy of the model in float64, run on the same tokens; or why there is none."""
    model = own.host.model
    if own.host.dtype == torch.float64:
        return None, "the model is in float64 itself"
    size = 8 * sum(weight.numel() for weight in model.parameters())
    if size > copy_limit:
        return None, (
            f"a copy in float64 would take {in_bytes(size)}, and {in_bytes(copy_limit)} are allowed"
        )
    try:
        twin = copy.deepcopy(model)
        for block in twin.blocks:  # else what is wired at the first run fires the other's hooks
            getattr(block, "_teardown_capture_hooks", lambda: None)()
        # not twin.double(), which HookedTransformer announces in print
        torch.nn.Module._apply(twin, _widened)
        twin.cfg.dtype = torch.float64
        make_exact(twin)
        return _subject(open_host(twin), own.prompt), ""
    except Exception as error:  # copying and running in another dtype may fail in any way
        reason = (str(error).splitlines() or [""])[0]
        return None, f"a copy in float64 does not run ({type(error).__name__}: {reason})"


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
