"""What we ask: a prompt, the position to read it at, and the target whose probability we explain.

These are plain values. Turning text into token ids needs the model's tokenizer: ``targets.py``.
"""

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex

import torch

from tl_neuron_attr.errors import InputError

_OWN = "the model's own prediction"

_MANY = 16  # tokens of a prompt that are shown in one line; of more, so many from both ends

PaddingSide = Literal["right", "left"]
"""Where prompts shorter than the longest of their batch are filled up."""


@dataclass(frozen=True, eq=False)
class Distribution:
    """A target that is a whole prediction: how near the model's comes to it, as a divergence.

    What is explained is ``-KL(wanted || prediction)`` in nats, never above 0: a score is by how
    much a part brings the prediction nearer to the one wanted. By default that is the model's own,
    at the read position of the run; ``probs`` are others, one for each token.
    """

    probs: Any = None
    """A tensor, or an array, of ``[d_vocab]``; once it was checked float64, where the model is."""
    name: str = ""
    """What it is called: the model's own, unless ``probs`` are given."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(
                self, "name", _OWN if self.probs is None else "the distribution given"
            )

    def __repr__(self) -> str:
        return f"Distribution({self.name})"

    @property
    def is_own(self) -> bool:
        """Whether it is the model's own."""
        return self.name == _OWN

    def likeliest(self, k: int = 5) -> list[tuple[int, float]]:
        """The tokens it holds likeliest, as (id, probability); none while it is not known."""
        if self.probs is None:
            return []
        probs, ids = self.probs.topk(min(k, len(self.probs)))
        return list(zip(ids.tolist(), probs.tolist(), strict=True))


Answer = str | SupportsIndex | Set[Any] | list[Any] | Distribution
"""What may be asked about: one token as text or id, accepted answers as a set or a list of these, a
distribution."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question to a model: ``text`` or ``tokens``, exactly one of them.

    ``target`` is a token id, or a string that is one token; a set of these, for the log of the sum
    of their probabilities; or a ``Distribution``; ``None`` stands for the model's own top
    prediction. ``against`` makes it a contrast: what is explained is then
    log p(target) - log p(against). ``position`` is where the answer is read, an index into the
    tokens as the model sees them (a prepended BOS counts), from the end if negative.
    ``prepend_bos`` is ``None`` for TransformerLens's default of that model; token ids are used as
    they are. ``prompt_id`` names the prompt in tables. Integers of numpy and torch become plain
    ones.
    """

    text: str | None = None
    tokens: Any = None
    target: Any = None
    against: Any = None
    position: Any = -1
    prepend_bos: bool | None = None
    prompt_id: str | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.tokens is None):
            raise InputError("a prompt needs either text or tokens, exactly one of them")
        if self.text is not None:
            check_text(self.text, "prompt")
        if self.tokens is not None:
            if isinstance(self.tokens, (str, bytes, dict)):
                raise InputError(f"token ids must be integers, got {self.tokens!r}")
            given = tuple(self.tokens)
            if any(isinstance(token, str) for token in given):
                raise InputError(
                    "a prompt is one text, or its token ids; for several texts use attribute_all"
                )
            tokens = tuple(integer(token, "a token id") for token in given)
            object.__setattr__(self, "tokens", tokens)
            if not tokens:
                raise InputError("the prompt is empty: no token ids were given")
            if self.prepend_bos is not None:
                raise InputError("token ids are used as they are: leave prepend_bos out")
        object.__setattr__(self, "position", integer(self.position, "position"))
        if self.against is not None and self.target is None:
            raise InputError("a contrast needs both tokens: give target beside against")
        object.__setattr__(self, "target", as_answer(self.target))
        if isinstance(self.target, (Set, Distribution)) and self.against is not None:
            raise InputError(
                "a contrast is of one token against another; give one token as target, or leave "
                "against out"
            )
        if self.against is not None:
            object.__setattr__(self, "against", _token(self.against, "against"))


@dataclass(frozen=True)
class Target:
    """What is explained: log p(token); with ``against`` log p(token) - log p(other token).

    With ``also`` the log of the sum of several tokens' probabilities; with ``distribution``
    -KL(that || prediction), and ``id`` is its likeliest token.
    """

    id: int
    """The token's place in the vocabulary."""
    text: str = ""
    """How it reads in a sentence, with its leading space."""
    against: "Target | None" = None
    """The other token of a contrast. The difference of two log-probabilities is a difference of
    two logits, so that under a frozen norm every score is linear in the contribution."""
    also: "tuple[Target, ...]" = ()
    """Further accepted answers, each one token."""
    distribution: Distribution | None = None

    @property
    def answers(self) -> "tuple[Target, ...]":
        """Every accepted answer by itself."""
        return (replace(self, also=()), *self.also)

    @property
    def as_asked(self) -> Answer:
        """It as it may be asked about again, tokens by their ids."""
        if self.distribution is not None:
            return self.distribution
        return frozenset(each.id for each in self.answers) if self.also else self.id

    @property
    def is_token(self) -> bool:
        """Whether it is one token and nothing else."""
        return self.against is None and not self.also and self.distribution is None

    @property
    def form(self) -> tuple[bool, int, bool]:
        """What kind of target it is: those of one form can be scored together."""
        return self.against is not None, len(self.also), self.distribution is not None

    @property
    def has_prob(self) -> bool:
        """Whether what is explained is the log of a probability."""
        return self.against is None and self.distribution is None

    @property
    def quantity(self) -> str:
        """What a score is a rise in, for titles: ``log p(target)``, or what is in its place."""
        if self.distribution is not None:
            return "-KL(target || prediction)"
        return "log p(target)" if self.against is None else "log p(target) - log p(against)"

    @property
    def words(self) -> str:
        """What it is called, its tokens so that every space can be seen."""
        if self.distribution is not None:
            return self.distribution.name
        if self.against is not None:
            return f"{visible(self.text)} against {visible(self.against.text)}"
        return " or ".join(visible(each.text) for each in self.answers)

    @property
    def in_tables(self) -> str:
        """What it is called in a cell of a table: a token's text as it is, else ``words``."""
        return self.words if self.also or self.distribution is not None else self.text

    @property
    def words_and_ids(self) -> str:
        """The same, with the ids of its tokens."""
        if self.distribution is not None:
            return self.distribution.name
        if self.against is not None:
            return f"{_with_id(self)} against {_with_id(self.against)}"
        return " or ".join(map(_with_id, self.answers))

    def facts(self) -> dict[str, Any]:
        """It as plain values, ready for JSON; ``of_facts`` reads them, but for the ``probs``."""
        against, wanted = self.against, self.distribution
        found: dict[str, Any] = {
            "id": self.id,
            "text": self.text,
            "against": None if against is None else {"id": against.id, "text": against.text},
        }
        if self.also:
            found["also"] = [{"id": each.id, "text": each.text} for each in self.also]
        if wanted is not None:
            found["distribution"] = wanted.name
        return found

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "Target":
        """What ``facts`` wrote; also in files of versions that knew fewer kinds of targets.

        Raises:
            KeyError, TypeError: If they are something else.
        """
        against, wanted = facts.get("against"), facts.get("distribution")
        return cls(
            id=facts["id"],
            text=facts["text"],
            against=None if against is None else cls.of_facts(against),
            also=tuple(cls.of_facts(each) for each in facts.get("also", ())),
            distribution=None if wanted is None else Distribution(name=wanted),
        )


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the model sees it, checked: ids inside the vocabulary and the context."""

    prompt_id: str
    text: str | None
    tokens: tuple[int, ...]
    token_texts: tuple[str, ...]
    read_pos: int
    target: Target | None

    @property
    def words(self) -> str:
        """Its tokens up to the read position, so that every space can be seen: ``The|·sea``."""
        return shown_tokens(self.token_texts[: self.read_pos + 1])


def as_prompt(
    prompt: "str | Iterable[SupportsIndex] | torch.Tensor | Prompt",
    *,
    target: Answer | None = None,
    against: str | SupportsIndex | None = None,
    position: SupportsIndex | None = None,
    prepend_bos: bool | None = None,
    prompt_id: str | None = None,
) -> Prompt:
    """A ``Prompt`` from text, from token ids (a sequence or a tensor), or from a ``Prompt``.

    Beside a ``Prompt`` the keyword arguments must be left out: it carries them itself.

    Raises:
        InputError: For an empty prompt, a batch of several prompts, or doubly given arguments.
    """
    if isinstance(prompt, Prompt):
        if any(each is not None for each in (target, against, position, prepend_bos)):
            raise InputError(
                "target, against, position and prepend_bos belong inside the Prompt given"
            )
        return prompt
    if not isinstance(prompt, Iterable):
        raise InputError(f"a prompt must be text, token ids or a Prompt, got {prompt!r}")
    asked: dict[str, Any] = {
        "target": target,
        "against": against,
        "position": -1 if position is None else position,
        "prepend_bos": prepend_bos,
        "prompt_id": prompt_id,
    }
    if isinstance(prompt, str):
        return Prompt(text=prompt, **asked)
    if isinstance(prompt, torch.Tensor):
        if prompt.ndim == 2 and prompt.shape[0] == 1:
            prompt = prompt[0]
        if prompt.ndim != 1 or prompt.is_floating_point():
            raise InputError(
                f"token ids must be one prompt: integers of shape [pos] or [1, pos], "
                f"got {prompt.dtype} of shape {list(prompt.shape)}"
            )
        prompt = tuple(prompt.tolist())
    return Prompt(tokens=prompt, **asked)


def as_answer(target: Any) -> Any:
    """What is asked about in the form ``Prompt`` holds it: accepted answers as a frozen set.

    Raises:
        InputError: If it is neither text nor an integer, nor several of these, each once.
    """
    if target is None or isinstance(target, Distribution):
        return target
    if isinstance(target, (Set, list, tuple)):
        tokens = [_token(each, "target") for each in target]
        for token, times in Counter(tokens).items():
            if times > 1:
                raise InputError(f"the accepted answer {token!r} is given twice; give each once")
        return frozenset(tokens)
    return _token(target, "target")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One of several things asked at once: a prompt in any form, and what it is asked about."""

    prompt: Any
    row: int
    """Which of the prompts given it is."""
    prompt_id: str
    target: Any
    against: Any

    def as_prompt(self, prepend_bos: bool | None) -> Prompt:
        """As a ``Prompt``; one that was given as such takes the target it lacks.

        Raises:
            InputError: As ``as_prompt``.
        """
        asked = {"target": self.target, "against": self.against}
        prompt = self.prompt
        if isinstance(prompt, Prompt):
            if prompt.target is None and self.target is not None:
                prompt, asked = replace(prompt, **asked), {}
            if prompt.prompt_id is None:
                prompt = replace(prompt, prompt_id=self.prompt_id)
        return as_prompt(prompt, **asked, prepend_bos=prepend_bos, prompt_id=self.prompt_id)


def as_questions(
    prompts: Any,
    *,
    target: Any = None,
    against: Any = None,
    attention_mask: Any = None,
) -> tuple[list[Question], PaddingSide]:
    """One question for each prompt, or for each target of one prompt, and the side of padding.

    Raises:
        InputError: If nothing is asked; if the numbers of prompts and of targets differ; if the
            mask does not fit the ids, or leaves gaps.
    """
    padding_side: PaddingSide = "right"
    if isinstance(prompts, (Mapping, bytes, bytearray, Set)):
        raise InputError(
            f"prompts must be text, token ids or Prompts in a row, got a "
            f"{type(prompts).__name__}; of a tokenizer's output give ['input_ids'], and its "
            "attention_mask beside it"
        )
    if not isinstance(prompts, (str, torch.Tensor)) and hasattr(prompts, "ndim"):
        prompts = torch.as_tensor(prompts)
    if isinstance(prompts, torch.Tensor) and prompts.ndim == 2:
        prompts, padding_side = _without_padding(prompts, attention_mask)
    elif attention_mask is not None:
        raise InputError("an attention_mask belongs beside token ids of shape [batch, pos]")
    # text, a row of ids, and what cannot be walked through are one prompt
    if isinstance(prompts, (str, Prompt, torch.Tensor)) or not isinstance(prompts, Iterable):
        listed = [prompts]
    else:
        listed = list(prompts)
        ids = [isinstance(each, SupportsIndex) and not getattr(each, "ndim", 0) for each in listed]
        listed = [listed] if listed and all(ids) else listed
    if not listed:
        raise InputError("there are no prompts; give at least one")
    given = {"targets": target, "tokens to compare with": against}
    several = {name: len(each) for name, each in given.items() if isinstance(each, (list, tuple))}
    count = max([1, *several.values()]) if len(listed) == 1 else len(listed)
    for name, length in several.items():
        if length != count:
            raise InputError(
                f"give one for all prompts, or one for each: there are {length} {name} for "
                f"{count} {'questions' if len(listed) == 1 else 'prompts'}"
            )

    def each(value: Any) -> list[Any]:
        return list(value) if isinstance(value, (list, tuple)) else [value] * count

    questions = [
        Question(
            prompt=prompt,
            row=0 if len(listed) == 1 else number,
            prompt_id=str(number),
            target=token,
            against=other,
        )
        for number, (prompt, token, other) in enumerate(
            zip(
                listed * count if len(listed) == 1 else listed,
                each(target),
                each(against),
                strict=True,
            )
        )
    ]
    return questions, padding_side


def _without_padding(
    tokens: torch.Tensor, attention_mask: Any
) -> tuple[list[tuple[int, ...]], PaddingSide]:
    if tokens.is_floating_point():
        raise InputError(f"token ids must be integers, got {tokens.dtype}")
    if attention_mask is None:
        return [tuple(row) for row in tokens.tolist()], "right"
    attention_mask = torch.as_tensor(attention_mask)
    if attention_mask.shape != tokens.shape:
        raise InputError(
            f"the attention_mask is of shape {list(attention_mask.shape)}, the token ids of "
            f"{list(tokens.shape)}; they must be the same"
        )
    kept = attention_mask.bool().to(tokens.device)
    lengths = kept.sum(1, keepdim=True)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    if torch.equal(kept, place < lengths):
        side: PaddingSide = "right"
    elif torch.equal(kept, place >= tokens.shape[1] - lengths):
        side = "left"
    else:
        raise InputError(
            "the attention_mask must be 1 for the tokens of each prompt in a row and 0 for padding "
            "on one side, the same for all prompts"
        )
    return [tuple(row[mask].tolist()) for row, mask in zip(tokens, kept, strict=True)], side


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


def at_least_one(value: Any, what: str) -> int:
    """``value`` as a plain integer that counts something.

    Raises:
        InputError: If it is no integer, or below 1.
    """
    count = integer(value, what)
    if count < 1:
        raise InputError(f"{what} must be at least 1, got {count}")
    return count


def at_least_zero(value: Any, what: str) -> int:
    """``value`` as a plain integer that is not negative, such as a seed.

    Raises:
        InputError: If it is no integer, or below 0.
    """
    number = integer(value, what)
    if number < 0:
        raise InputError(f"{what} must be at least 0, got {number}")
    return number


def fraction(value: Any, what: str) -> float:
    """``value`` as a share of a whole: above 0, and 1 at the most.

    Raises:
        InputError: If it is no number, or not in there.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        share = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{what} must be a number, got {value!r}") from None
    if not 0 < share <= 1:
        raise InputError(f"{what} must be above 0 and at most 1, got {share:g}")
    return share


def _token(given: Any, what: str) -> str | int:
    """A token as text or as an id."""
    if isinstance(given, str):
        check_text(given, what)
        return given
    return integer(given, "a token id")


def check_text(text: str, what: str) -> None:
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


def shown_tokens(texts: Sequence[str]) -> str:
    """Tokens in one line, of many the first and the last: ``The|·capital|·of|·France|·is``."""
    shown = [visible(text) or "(empty)" for text in texts]
    if len(shown) > _MANY:
        shown[_MANY // 4 : len(shown) - 3 * _MANY // 4] = ["…"]
    return "|".join(shown)


def _with_id(token: Target) -> str:
    return f"{visible(token.text)} (id {token.id})"
