"""Which prompts a model knows the answer to: the filter of Yu & Ananiadou (2024).

A prompt is kept if its answer is one token, is among the model's ten most probable next tokens, and
is more probable than every other answer of its knowledge type. What falls out is kept beside,
with the reason.

The paper says nothing of aliases. Here every accepted answer counts as right: the target is the one
that the model finds most probable (of those that are one token), and none of them competes with
it. What competes are all other one-token answers and aliases of the same type, of the prompts
given and, for the six types, of the facts that come with this package: so what is kept does not
depend on which prompts are asked beside.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_neuron_attr.capture import capture
from tl_neuron_attr.display import box, grid, next_calls, warned
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.hook_points import has_hooks
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.identities import verify
from tl_neuron_attr.interventions import Zeroed, zeroed_residuals
from tl_neuron_attr.knowledge.facts import (
    KNOWLEDGE_TYPES,
    KnowledgePrompt,
    in_order,
    load_facts,
)
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import Prompt, Target, TokenizedPrompt, at_least_one, at_least_zero
from tl_neuron_attr.readout import ReadOut, read_out
from tl_neuron_attr.styled import grid_of
from tl_neuron_attr.targets import one_token, tokenize

Reason = Literal[
    "not one token", "cannot be asked", "not among the top", "another answer of its type above"
]
"""Why a prompt falls out, in the order in which it is looked at."""

COUNT_COLUMNS = ("knowledge_type", "asked", "one_token", "in_top", "kept")

_WHY = ("text", "answer", "reason", "detail")

# Prompts whose residuals are held at once, and of those the ones whose logits are.
_PROMPTS_AT_A_TIME = 1024
_ROWS_AT_A_TIME = 128


@dataclass(frozen=True, kw_only=True)
class AskedPrompt:
    """A prompt as a model sees it, and what the model makes of its answer."""

    prompt: KnowledgePrompt
    tokenized: TokenizedPrompt
    """Its ``target`` is the accepted answer that the model finds most probable."""
    log_prob: float
    """log p(target), in nats: the model's own."""
    rank: int
    """Place of the target among all tokens: 1 where it is the model's top prediction."""

    def as_prompt(self) -> Prompt:
        """The same for ``attribute`` and ``attribute_all``: its tokens, its answer, its id.

        Raises:
            InputError: If it has no target.
        """
        if self.tokenized.target is None:
            raise InputError(
                f"prompt {self.prompt.prompt_id!r} has no answer to be asked about; give one"
            )
        return Prompt(
            tokens=self.tokenized.tokens,
            target=self.tokenized.target.id,
            position=self.tokenized.read_pos,
            prompt_id=self.prompt.prompt_id,
        )


@dataclass(frozen=True, kw_only=True)
class DroppedPrompt:
    """A prompt that fell out, and why."""

    prompt: KnowledgePrompt
    reason: Reason
    detail: str
    """In one sentence, with what the model has in the answer's place."""


@dataclass(frozen=True, kw_only=True)
class KnownPrompts:
    """What remains of a set of prompts for one model; every prompt is in one of the two."""

    kept: tuple[AskedPrompt, ...]
    dropped: tuple[DroppedPrompt, ...]
    top: int | None
    above_type: bool
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"KnownPrompts({self.summary()})"

    def _repr_html_(self) -> str:
        reasons = self.reasons()
        some = [] if reasons.empty else [grid(grid_of(reasons, "Left out", top=5, columns=_WHY))]
        return box(
            f"Prompts that the model knows: {self.summary()}",
            grid(grid_of(self.counts())),
            *some,
            warned(self.warnings),
            next_calls({"known.kept": "with log p and rank", "known.reasons()": "all left out"}),
        )

    def counts(self) -> pd.DataFrame:
        """One row a knowledge type, then one for all together.

        Columns ``knowledge_type, asked, one_token, in_top, kept``: of the prompts asked those with
        an accepted answer of one token, of these those with it among the top, of these those kept.
        """
        passed = {reason: place for place, reason in enumerate(get_args(Reason))}
        stages = [(each.prompt, len(passed)) for each in self.kept]
        stages += [(each.prompt, passed[each.reason]) for each in self.dropped]
        types = in_order(prompt.fact.knowledge_type for prompt, _ in stages)
        rows = []
        for name in [*types, "all"]:
            reached = [
                stage for prompt, stage in stages if name in ("all", prompt.fact.knowledge_type)
            ]
            rows.append((name, len(reached), *(sum(s >= n for s in reached) for n in (1, 3, 4))))
        return pd.DataFrame(rows, columns=list(COUNT_COLUMNS))

    def reasons(self) -> pd.DataFrame:
        """One row a dropped prompt: ``prompt_id, knowledge_type, text, answer, reason, detail``."""
        rows = [
            (
                each.prompt.prompt_id,
                each.prompt.fact.knowledge_type,
                each.prompt.text,
                each.prompt.answer,
                each.reason,
                each.detail,
            )
            for each in self.dropped
        ]
        columns = ("prompt_id", "knowledge_type", "text", "answer", "reason", "detail")
        return pd.DataFrame(rows, columns=list(columns))

    def drawn(self, limit: int, *, seed: int = 0) -> tuple[AskedPrompt, ...]:
        """At most ``limit`` of those kept, drawn evenly from the knowledge types, in their order.

        A smaller limit draws some of the same; ``evaluate(..., limit=)`` draws like this.

        Raises:
            InputError: If ``limit`` is below 1, or the seed below 0.
        """
        return drawn_evenly(self.kept, at_least_one(limit, "limit"), at_least_zero(seed, "seed"))

    def summary(self) -> str:
        """How many remain and why others fell out, in a line."""
        return _summary(self.kept, self.dropped)


def drawn_evenly(
    asked: Sequence[AskedPrompt], limit: int | None, seed: int
) -> tuple[AskedPrompt, ...]:
    """At most ``limit`` of them, the knowledge types in turn, in the order they came in.

    What is drawn depends on ids and ``seed``: a smaller limit, or fewer prompts to draw from, give
    some of the same.
    """
    if limit is None or limit >= len(asked):
        return tuple(asked)

    def draw(each: AskedPrompt) -> bytes:
        return hashlib.sha256(f"{seed}\0{each.prompt.prompt_id}".encode()).digest()

    of_type: dict[str, list[AskedPrompt]] = {}
    for each in sorted(asked, key=draw):
        of_type.setdefault(each.prompt.fact.knowledge_type, []).append(each)
    types = [of_type[name] for name in sorted(of_type)]
    in_turn = [each for turn in zip_longest(*types) for each in turn if each is not None]
    taken = {each.prompt.prompt_id for each in in_turn[:limit]}
    return tuple(each for each in asked if each.prompt.prompt_id in taken)


def known_prompts(
    model: Any,
    prompts: Iterable[KnowledgePrompt],
    *,
    top: int | None = 10,
    above_type: bool = True,
    prepend_bos: bool | None = None,
    progress: bool = False,
) -> KnownPrompts:
    """The prompts whose answer ``model`` knows, as this module's docstring defines it.

    Args:
        model: A ``TransformerBridge``, a ``HookedTransformer``, or its ``Host``.
        prompts: From ``load_prompts``, ``knowledge_prompts`` or ``paper_prompts``.
        top: Among how many most probable tokens the answer must be; ``None`` for any place.
        above_type: Whether it must be above every other answer of its type.
        prepend_bos: Whether texts get a BOS token; by default what TransformerLens does.
        progress: Show a progress bar where it takes longer than two seconds.

    With ``top=None, above_type=False`` every prompt is kept that can be asked at all.

    A knowledge type with one answer only has no other answer to be above: a warning, also in
    ``KnownPrompts.warnings``, names it.

    Raises:
        InputError: If there are no prompts, or none remain (with the counts); if two have the same
            ``prompt_id``; if the model has no tokenizer.
        UnsupportedModelError, IdentityError, NonFiniteError: As in ``attribute``.

    Cost: one forward pass of each prompt, padded together by length; two read-outs.
    Peak memory: one such batch, and 128 x d_vocab floats three times over.

    Source: Yu & Ananiadou (2024), arXiv 2312.12141.
    """
    asked = tuple(prompts)
    _check(asked)
    top = None if top is None else at_least_one(top, "top")
    host = model if isinstance(model, Host) else open_host(model)
    if getattr(host.model, "tokenizer", None) is None:
        raise InputError("the model has no tokenizer to read prompts with")
    vocabulary = _vocabulary(host, asked)
    candidates, dropped = _candidates(host, asked, vocabulary, prepend_bos)
    kept: dict[int, AskedPrompt] = {}
    for row, found in _answers(host, candidates, asked, vocabulary, progress):
        reason = _fault(found, top, above_type)
        if reason is None:
            kept[row] = found.asked
        else:
            dropped[row] = DroppedPrompt(
                prompt=asked[row], reason=reason, detail=_detail(host, found, top, reason)
            )
    in_order = tuple(kept[row] for row in sorted(kept))
    fell_out = tuple(dropped[row] for row in sorted(dropped))
    if not kept:
        example = fell_out[0]
        raise InputError(
            f"no prompt remains: {_summary(in_order, fell_out)}; the first, "
            f"{example.prompt.text!r}, because {example.detail}"
        )
    messages = _without_rivals(asked, vocabulary) if above_type else ()
    messages += _of_one_answer(asked)
    for message in messages:
        warnings.warn(message, stacklevel=2)
    return KnownPrompts(
        kept=in_order, dropped=fell_out, top=top, above_type=above_type, warnings=messages
    )


def _check(asked: Sequence[KnowledgePrompt]) -> None:
    if not asked:
        raise InputError("there are no prompts; give at least one")
    seen: set[str] = set()
    for prompt in asked:
        if prompt.prompt_id in seen:
            raise InputError(f"two prompts have the prompt_id {prompt.prompt_id!r}; give each once")
        seen.add(prompt.prompt_id)


def _summary(kept: Sequence[AskedPrompt], dropped: Sequence[DroppedPrompt]) -> str:
    counts = {reason: 0 for reason in get_args(Reason)}
    for each in dropped:
        counts[each.reason] += 1
    parts = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    total = len(kept) + len(dropped)
    return f"{len(kept)} of {total} prompts kept" + (f"; {parts}" if parts else "")


# --- answers as tokens ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """The answers of a set of prompts as tokens."""

    ids: Mapping[str, int]
    """Of those that are one token."""
    why_not: Mapping[str, str]
    """What is wrong with the others."""
    of_type: Mapping[str, Int[Tensor, " answer"]]
    """Ids of all answers of each type, in order."""

    def accepted(self, prompt: KnowledgePrompt) -> list[int]:
        """Ids of the prompt's right answers that are one token."""
        return [self.ids[word] for word in prompt.fact.accepted if word in self.ids]


def _vocabulary(host: Host, asked: Sequence[KnowledgePrompt]) -> _Vocabulary:
    words: dict[str, set[str]] = {prompt.fact.knowledge_type: set() for prompt in asked}
    own = (fact for name in words if name in KNOWLEDGE_TYPES for fact in load_facts(name))
    for fact in (*(prompt.fact for prompt in asked), *own):
        words[fact.knowledge_type].update(fact.accepted)
    ids: dict[str, int] = {}
    why_not: dict[str, str] = {}
    for word in sorted(set().union(*words.values())):
        try:
            ids[word] = one_token(host, word, "answer").id
        except InputError as error:
            # without what one would do about a single prompt
            why_not[word] = str(error).rpartition("; ")[0]
    of_type = {
        name: torch.tensor(sorted({ids[word] for word in of_it if word in ids}), dtype=torch.long)
        for name, of_it in words.items()
    }
    return _Vocabulary(ids=ids, why_not=why_not, of_type=of_type)


def _candidates(
    host: Host,
    asked: Sequence[KnowledgePrompt],
    vocabulary: _Vocabulary,
    prepend_bos: bool | None,
) -> tuple[dict[int, TokenizedPrompt], dict[int, DroppedPrompt]]:
    """What can be asked, and what cannot, by their places."""
    candidates: dict[int, TokenizedPrompt] = {}
    dropped: dict[int, DroppedPrompt] = {}
    for row, prompt in enumerate(asked):
        if not vocabulary.accepted(prompt):
            detail = vocabulary.why_not[prompt.answer]
            dropped[row] = DroppedPrompt(prompt=prompt, reason="not one token", detail=detail)
            continue
        question = Prompt(text=prompt.text, prepend_bos=prepend_bos, prompt_id=prompt.prompt_id)
        try:
            candidates[row] = tokenize(host, question)
        except InputError as error:
            dropped[row] = DroppedPrompt(prompt=prompt, reason="cannot be asked", detail=str(error))
    return candidates, dropped


def _without_rivals(asked: Sequence[KnowledgePrompt], vocabulary: _Vocabulary) -> tuple[str, ...]:
    """A warning of types with nothing for their answers to be above."""
    rivals: dict[str, bool] = {}
    for prompt in asked:
        name = prompt.fact.knowledge_type
        own = vocabulary.accepted(prompt)
        if own:
            others = set(vocabulary.of_type[name].tolist()) - set(own)
            rivals[name] = rivals.get(name, False) or bool(others)
    alone = [repr(name) for name, found in rivals.items() if not found]
    if not alone:
        return ()
    return (
        f"of the knowledge type {', '.join(alone)} only one answer is one token, so that there is "
        "none for it to be above: such prompts are kept by their rank alone",
    )


def _of_one_answer(asked: Sequence[KnowledgePrompt]) -> tuple[str, ...]:
    """A warning of relations of several subjects that all have the same answer."""
    subjects: dict[str, set[str]] = {}
    answers: dict[str, set[str]] = {}
    for prompt in asked:
        fact = prompt.fact
        subjects.setdefault(fact.relation, set()).add(fact.subject)
        answers.setdefault(fact.relation, set()).add(prompt.answer)
    alone = [
        repr(name) for name, each in subjects.items() if len(each) > 1 and len(answers[name]) == 1
    ]
    if not alone:
        return ()
    return (
        f"of the relation {', '.join(alone)} every subject has the same answer, so that what is "
        "found there may be the answer's alone",
    )


# --- what the model answers -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Answer:
    asked: AskedPrompt
    rival: int | None
    """The most probable other answer of its type, if that is no less probable than the target."""


@full_precision()
def _answers(
    host: Host,
    candidates: Mapping[int, TokenizedPrompt],
    asked: Sequence[KnowledgePrompt],
    vocabulary: _Vocabulary,
    progress: bool,
) -> list[tuple[int, _Answer]]:
    found: list[tuple[int, _Answer]] = []
    rows = sorted(candidates, key=lambda row: len(candidates[row].tokens))
    if rows:
        first = capture(host, candidates[rows[0]])
        verify(host, first, own_run=not has_hooks(host.model))
    with (
        torch.no_grad(),
        tqdm(total=len(rows), unit="prompt", delay=2, leave=False, disable=not progress) as bar,
    ):
        for start in range(0, len(rows), _PROMPTS_AT_A_TIME):
            here = rows[start : start + _PROMPTS_AT_A_TIME]
            tokenized = [candidates[row] for row in here]
            resid = zeroed_residuals(host, tokenized, [Zeroed()] * len(here))
            out = read_out(host, resid[0], "recomputed")
            for place in range(0, len(here), _ROWS_AT_A_TIME):
                part = slice(place, place + _ROWS_AT_A_TIME)
                some = [asked[row] for row in here[part]]
                answers = _read(host, out, resid[part], tokenized[part], some, vocabulary)
                found += zip(here[part], answers, strict=True)
                bar.update(len(some))
    return found


def _read(
    host: Host,
    out: ReadOut,
    resid: Float[Tensor, "row d_model"],
    tokenized: Sequence[TokenizedPrompt],
    prompts: Sequence[KnowledgePrompt],
    vocabulary: _Vocabulary,
) -> list[_Answer]:
    logits = out.logits(resid)
    accepted = _as_rows([vocabulary.accepted(prompt) for prompt in prompts]).to(logits.device)
    best = logits.gather(1, accepted).max(1)
    rank = 1 + (logits > best.values[:, None]).sum(1)
    ids = accepted.gather(1, best.indices[:, None])[:, 0].tolist()
    targets = [Target(id=token, text=host.token_text(token)) for token in ids]
    log_probs = out.log_prob_of_each(resid, targets).tolist()
    rivals = _rivals(logits, best.values, accepted, prompts, vocabulary)
    return [
        _Answer(
            asked=AskedPrompt(
                prompt=prompts[row],
                tokenized=replace(tokenized[row], target=targets[row]),
                log_prob=log_probs[row],
                rank=place,
            ),
            rival=rivals[row],
        )
        for row, place in enumerate(rank.tolist())
    ]


def _as_rows(ids: Sequence[Sequence[int]]) -> Int[Tensor, "row accepted"]:
    """Filled up with the first of each row."""
    width = max(map(len, ids))
    return torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in ids])


def _rivals(
    logits: Float[Tensor, "row d_vocab"],
    target: Float[Tensor, " row"],
    accepted: Int[Tensor, "row accepted"],
    prompts: Sequence[KnowledgePrompt],
    vocabulary: _Vocabulary,
) -> list[int | None]:
    """Of each row the best other answer of its type, where that is no less probable."""
    found: list[int | None] = [None] * len(prompts)
    types = [prompt.fact.knowledge_type for prompt in prompts]
    for name in dict.fromkeys(types):
        rows = torch.tensor([row for row, each in enumerate(types) if each == name])
        rows = rows.to(logits.device)
        ids = vocabulary.of_type[name].to(logits.device)
        own: Bool[Tensor, "some answer"] = (ids[:, None] == accepted[rows][:, None]).any(-1)
        best = logits[rows][:, ids].masked_fill(own, -torch.inf).max(1)
        above = best.values >= target[rows]
        for row, token in zip(rows[above].tolist(), ids[best.indices[above]].tolist(), strict=True):
            found[row] = token
    return found


def _fault(found: _Answer, top: int | None, above_type: bool) -> Reason | None:
    if top is not None and found.asked.rank > top:
        return "not among the top"
    if above_type and found.rival is not None:
        return "another answer of its type above"
    return None


def _detail(host: Host, found: _Answer, top: int | None, reason: Reason) -> str:
    target = found.asked.tokenized.target
    assert target is not None
    if reason == "not among the top" or found.rival is None:
        return f"the answer {target.text!r} has rank {found.asked.rank}, not among the top {top}"
    return (
        f"{host.token_text(found.rival)!r}, another answer of its type, is no less probable than "
        f"{target.text!r}"
    )
