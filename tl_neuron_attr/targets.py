"""What is wanted: prompts and targets as the model sees them, in tokens, and slips with spaces.

Everything that can be wrong with a request in words is found here, before the model runs.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host
from tl_neuron_attr.prompts import (
    Answer,
    Distribution,
    Prompt,
    Target,
    TokenizedPrompt,
    as_answer,
    check_text,
    integer,
    visible,
)

_SUMS_TO_1 = 1e-4  # by how much probabilities may miss it: float16's, added up

_WHOLE = ", or call attribute_answer (on the command line: answer) for all of them together"

# A target with the other space is named where it is so many times likelier, and likely at all.
_MUCH_LIKELIER, _LIKELY = 10.0, 1e-3


def tokenize(host: Host, prompt: Prompt) -> TokenizedPrompt:
    """``prompt`` as the model will see it; everything that can be wrong with it is found here.

    Raises:
        InputError: No tokenizer for a text; ids outside the vocabulary; longer than the context;
            position out of range; a target that is not one token (its tokens are shown).
    """
    if prompt.tokens is not None:
        tokens = prompt.tokens
    else:
        _need_tokenizer(host, "prompt")
        ids: Int[Tensor, "1 pos"] = host.model.to_tokens(
            prompt.text, prepend_bos=prompt.prepend_bos, truncate=False
        )
        tokens = tuple(ids[0].tolist())
    for position, token in enumerate(tokens):
        if not 0 <= token < host.d_vocab:
            bos_hint = (
                "; it is the BOS token the tokenizer adds: leave it out with prepend_bos=False "
                "(on the command line --no-bos)"
                if prompt.tokens is None and position == 0
                else ""
            )
            raise InputError(
                f"token id {token} at position {position} is outside the model's vocabulary "
                f"of {host.d_vocab}{bos_hint}"
            )
    if not tokens:
        raise InputError("the prompt has no tokens; give some text, or keep the BOS token")
    if len(tokens) > host.n_ctx:
        raise InputError(
            f"the prompt is {len(tokens)} tokens, longer than the model's context of "
            f"{host.n_ctx}; shorten it"
        )
    if not -len(tokens) <= prompt.position < len(tokens):
        raise InputError(
            f"position {prompt.position} is out of range: the prompt is {len(tokens)} tokens "
            f"(0 to {len(tokens) - 1}, or -{len(tokens)} to -1 from the end)"
        )
    return TokenizedPrompt(
        prompt_id=prompt.prompt_id or "0",
        text=prompt.text,
        tokens=tokens,
        token_texts=tuple(host.token_text(token) for token in tokens),
        read_pos=prompt.position % len(tokens),
        target=(
            None if prompt.target is None else resolve_target(host, prompt.target, prompt.against)
        ),
    )


def resolve_target(
    host: Host, target: Answer | None, against: str | SupportsIndex | None = None
) -> Target:
    """What a target names: one token, the two of a contrast, accepted answers, a distribution.

    Accepted answers come in order of their ids. The model's own distribution is known only after
    its run; ``attribute`` puts it in.

    Raises:
        InputError: For an id outside the vocabulary, a text that is not exactly one token, a
            contrast of a token with itself or with nothing, accepted answers that are none or one
            token twice, a distribution that is none.
    """
    asked = as_answer(target)
    if asked is None:
        raise InputError("a contrast needs both tokens: give target beside against")
    if isinstance(asked, (Set, Distribution)) and against is not None:
        raise InputError(
            "a contrast is of one token against another; give one token as target, or leave "
            "against out"
        )
    if isinstance(asked, Distribution):
        return _distribution(host, asked)
    if isinstance(asked, Set):
        return _accepted(host, asked)
    token = one_token(host, asked)
    if against is None:
        return token
    other = one_token(host, against, "against")
    if other.id == token.id:
        raise InputError(f"target and against are the same token, {token.text!r}")
    return replace(token, against=other)


def one_token(host: Host, given: str | SupportsIndex, what: str = "target") -> Target:
    """The one token that ``given`` names, called ``what`` in errors.

    Raises:
        InputError: For an id outside the vocabulary, or a text that is not exactly one token.
    """
    if not isinstance(given, str):
        token = integer(given, "a token id")
        if not 0 <= token < host.d_vocab:
            raise InputError(
                f"{what} id {token} is outside the model's vocabulary of {host.d_vocab}"
            )
        return Target(id=token, text=host.token_text(token))
    _need_tokenizer(host, what)
    if not given:
        raise InputError(f"the {what} is empty; give a single-token {what} or a token id")
    ids = _behind(host, given)
    if len(ids) == 1:
        return one_token(host, ids[0], what)
    pieces = ", ".join(repr(host.token_text(token)) for token in ids)
    hint = "".join(f" (did you mean {near!r}?)" for near in _one_token_near(host, given)[:1])
    raise InputError(
        f"{what} {given!r} is {len(ids)} tokens ({pieces}){hint}; "
        f"give a single-token {what} or a token id{_WHOLE if what == 'target' else ''}"
    )


def answer_tokens(host: Host, answer: str | Iterable[SupportsIndex]) -> tuple[int, ...]:
    """The ids of a whole answer, given as text or as ids in order.

    Raises:
        InputError: If it is neither, or empty, an id is outside the vocabulary, or there is no
            tokenizer.
    """
    if not isinstance(answer, str):
        unordered = isinstance(answer, (Set, Mapping, bytes))
        if unordered or not isinstance(answer, Iterable):
            raise InputError(
                "an answer is one text, or its token ids in order (accepted answers, as a set, are "
                f"a target of attribute); got {answer!r}"
            )
        ids = tuple(one_token(host, each, "answer").id for each in answer)
        if not ids:
            raise InputError("the answer is empty; give some text, or token ids")
        return ids
    check_text(answer, "answer")
    _need_tokenizer(host, "answer")
    return tuple(_behind(host, answer))


def of_distribution(host: Host, wanted: Distribution) -> Target:
    """A distribution whose probabilities are known, called by its likeliest token."""
    ((token, _),) = wanted.likeliest(1)
    return Target(id=token, text=host.token_text(token), distribution=wanted)


def end_warnings(prompt: TokenizedPrompt) -> tuple[str, ...]:
    """What is to say of a prompt that ends with a space: after it no answer can begin with one."""
    last = len(prompt.tokens) - 1
    if (
        prompt.text is not None
        and prompt.text.endswith(" ")
        and prompt.read_pos == last
        and not prompt.token_texts[last].strip(" ")
    ):
        return (
            f"the prompt ends with a space, a token of its own ({last}:"
            f"{visible(prompt.token_texts[last])}); answers bring theirs: did you mean "
            f"{prompt.text.rstrip(' ')[-30:]!r}?",
        )
    return ()


def answer_warnings(
    host: Host, answer: str, log_prob_of: Callable[[int], float]
) -> tuple[str, ...]:
    """What is to say of an answer that would begin much likelier with, or without, a space.

    ``log_prob_of`` tells what the run makes of a token behind the prompt, in nats.
    """
    other = answer[1:] if answer.startswith(" ") else f" {answer}"
    if not other.strip(" "):
        return ()
    (first, *_), (instead, *_) = answer_tokens(host, answer), answer_tokens(host, other)
    own, others = math.exp(log_prob_of(first)), math.exp(log_prob_of(instead))
    if first == instead or others <= max(_LIKELY, _MUCH_LIKELIER * own):
        return ()
    return (
        f"the answer begins with {host.token_text(first)!r}, of a probability of {own:.2g} here, "
        f"where {host.token_text(instead)!r} has {others:.2g}: did you mean {other!r}?",
    )


def space_warnings(
    host: Host, prompt: TokenizedPrompt, log_prob_of: Callable[[int], float]
) -> tuple[str, ...]:
    """Slips with spaces that a run shows: did you mean ' Paris'?

    A target that is much likelier with, or without, a space in front; a prompt that ends with a
    space of its own. Nothing is changed. ``log_prob_of`` tells what the run makes of a token, in
    nats.
    """
    found = [*end_warnings(prompt)]
    target = prompt.target
    if target is None or target.distribution is not None:
        return tuple(found)
    asked = [*target.answers, *([] if target.against is None else [target.against])]
    for each in asked:
        other = _other_spacing(host, each)
        if other is None or other.id in [token.id for token in asked]:
            continue
        own, others = math.exp(log_prob_of(each.id)), math.exp(log_prob_of(other.id))
        if others > max(_LIKELY, _MUCH_LIKELIER * own):
            found.append(
                f"the token {each.text!r} has a probability of {own:.2g} here, {other.text!r} of "
                f"{others:.2g}: did you mean {other.text!r}?"
            )
    return tuple(found)


# --- kinds of targets -------------------------------------------------------------------------


def _accepted(host: Host, given: Set[Any]) -> Target:
    """Several accepted answers, in order of their ids; of one alone that token."""
    tokens = sorted((one_token(host, each) for each in given), key=lambda token: token.id)
    if not tokens:
        raise InputError("there are no accepted answers; give at least one token in the set")
    for first, second in zip(tokens, tokens[1:], strict=False):
        if first.id == second.id:
            raise InputError(
                f"two of the accepted answers are one token, {first.text!r} (id {first.id}); give "
                "each once"
            )
    return replace(tokens[0], also=tuple(tokens[1:]))


def _distribution(host: Host, given: Distribution) -> Target:
    if host.soft_cap is not None:
        raise InputError(
            "a whole distribution cannot be explained where logits pass through a soft cap "
            "(Gemma 2): its expected logit is not affine there; give a token as target"
        )
    if given.probs is None:
        if not given.is_own:
            raise InputError(
                f"the probabilities of {given.name} are not known here; give Distribution(probs)"
            )
        return Target(id=-1, distribution=given)  # known after the run
    try:
        probs = torch.as_tensor(given.probs).detach().to(host.device, torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"a distribution's probabilities are a tensor, one for each token; got {given.probs!r}"
        ) from error
    if probs.shape != (host.d_vocab,):
        raise InputError(
            f"a distribution has a probability for each of the model's {host.d_vocab} tokens; got "
            f"the shape {list(probs.shape)}"
        )
    total = float(probs.sum())
    if not bool((probs >= 0).all()) or not abs(total - 1) <= _SUMS_TO_1:  # NaN is neither
        raise InputError(
            "a distribution's probabilities must be finite, 0 or more, and sum to 1; these "
            f"sum to {total:.6g} and the least is {float(probs.min()):.6g}"
        )
    # a run's own prediction, asked about in another, is not that one's own
    name = "the prediction of another run" if given.is_own else given.name
    return of_distribution(host, Distribution(probs / total, name))


# --- spaces -----------------------------------------------------------------------------------


def _one_token_near(host: Host, given: str) -> list[str]:
    """Texts that are one token and differ from this one by the spaces around it alone."""
    bare = given.strip(" ")
    near = [text for text in (f" {bare}", bare) if bare and text != given]
    found: list[str] = []
    for text in near:
        ids = _encode(host, text)
        if len(ids) == 1 and host.token_text(ids[0]).strip(" ") == bare:
            found.append(host.token_text(ids[0]))
    return [text for text in found if text != given]


def _other_spacing(host: Host, token: Target) -> Target | None:
    """The token that reads the same but for the space in front, if there is one."""
    if getattr(host.model, "tokenizer", None) is None or not token.text.strip(" "):
        return None
    text = token.text[1:] if token.text.startswith(" ") else f" {token.text}"
    ids = _encode(host, text)
    if len(ids) != 1 or ids[0] == token.id or host.token_text(ids[0]) != text:
        return None
    return Target(id=ids[0], text=text)


def _behind(host: Host, text: str) -> list[int]:
    """The tokens of a text that follows others, as it is written.

    SentencePiece puts a space of its own in front of what it reads; behind another text it does
    not.
    """
    ids = _encode(host, text)
    if not ids or host.token_text(ids[0]).strip(" "):
        return ids
    before, whole = _encode(host, "\n"), _encode(host, f"\n{text}")
    rest = whole[len(before) :] if whole[: len(before)] == before else []
    return rest if rest and ids[1:] == rest else ids


def _encode(host: Host, text: str) -> list[int]:
    return list(host.model.tokenizer(text, add_special_tokens=False)["input_ids"])


def _need_tokenizer(host: Host, what: str) -> None:
    if getattr(host.model, "tokenizer", None) is None:
        raise InputError(
            f"the model has no tokenizer to read the {what} with; give token ids, or load the "
            "model from a directory that holds its tokenizer's files too"
        )
