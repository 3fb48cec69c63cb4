"""Whole answers: several tokens, each attributed where it is read, and what did most for all.

log p(answer | prompt) = sum of log p(token | prompt, the tokens before it), so the scores of a
layer, a head or a neuron for the tokens add up to one for the answer. The answer is put behind the
prompt (teacher forcing): one forward pass, in which its tokens are read one after another.
"""

import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

import pandas as pd
import torch
from torch import Tensor

from tl_neuron_attr.attribute import attribute_all
from tl_neuron_attr.attribution import Attribution, progress_bar
from tl_neuron_attr.differences import Side
from tl_neuron_attr.display import box, escaped, facts, grid, layer_bars, next_calls, number, warned
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.host import open_host
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.projection import project
from tl_neuron_attr.prompts import Prompt, as_prompt, at_least_one, shown_tokens
from tl_neuron_attr.readout import DEFAULT_BUDGET, Convention
from tl_neuron_attr.styled import grid_of
from tl_neuron_attr.sums import RankedSums, top_sums, with_positions
from tl_neuron_attr.tables import (
    NEURON_COLUMNS,
    Saved,
    head_table,
    layer_table,
    neuron_table,
    token_columns,
    with_experts,
    write_run,
)
from tl_neuron_attr.targets import answer_tokens, answer_warnings, end_warnings, tokenize
from tl_neuron_attr.topk import Kind, subvalues_of

_TOKENS = 10
"""How many tokens that a neuron raises, and lowers, are saved beside it."""


@dataclass(frozen=True, kw_only=True)
class AnswerAttribution:
    """What ``attribute_answer`` found out about one prompt and an answer of several tokens.

    Scores are in nats: rises in log p(answer), each the sum of the rises in its tokens' log p.
    ``parts[i]`` is what ``attribute`` gives for the i-th token, which has all the rest: source
    positions, query neurons, cards.
    """

    parts: tuple[Attribution, ...]
    """One attribution for each token of the answer, read where the token comes next."""
    text: str | None
    """The answer as it was asked about; ``None`` where it was token ids."""
    prompt_text: str | None
    """The prompt, likewise."""
    warnings: tuple[str, ...]
    """What to bear in mind when reading the scores."""
    ffn: RankedSums = field(repr=False)
    """The best FFN neurons for the whole answer, with their certificate."""
    attn: RankedSums = field(repr=False)
    """The best attention neurons, by source position: a position that a token does not see yet
    brings it nothing."""

    @property
    def log_prob(self) -> float:
        """log p(answer), in nats: the sum of its tokens'."""
        return math.fsum(part.log_prob for part in self.parts)

    @property
    def embedding_log_prob(self) -> float:
        """The same of what enters the first block."""
        return math.fsum(part.embedding_log_prob for part in self.parts)

    def tokens(self) -> pd.DataFrame:
        """The answer, token by token: ``number, position, id, token, log_prob, prob,
        embedding_log_prob``; ``position`` is where the token is read."""
        return pd.DataFrame(
            {
                "number": range(len(self.parts)),
                "position": [part.captured.prompt.read_pos for part in self.parts],
                "id": [part.target.id for part in self.parts],
                "token": pd.array([part.target.text for part in self.parts], dtype="string"),
                "log_prob": [part.log_prob for part in self.parts],
                "prob": [math.exp(part.log_prob) for part in self.parts],
                "embedding_log_prob": [part.embedding_log_prob for part in self.parts],
            }
        )

    def layers(self, *, by_token: bool = False) -> pd.DataFrame:
        """Rise from each layer's attention and FFN: ``layer, kind, score``, summed over tokens.

        With ``by_token`` each token's own, its ``number`` in front.
        """
        return _summed([layer_table(part.layer_scores) for part in self.parts], by_token)

    def heads(self, top: int | None = None, *, by_token: bool = False) -> pd.DataFrame:
        """Rise from each head: ``layer, head, score``; in order, or the ``top`` best first.

        With ``by_token`` each token's own, in order, its ``number`` in front.
        """
        table = _summed([head_table(part.head_scores) for part in self.parts], by_token)
        if top is None or by_token:
            return table
        ordered = table.sort_values("score", ascending=False, kind="stable")
        return ordered.head(at_least_one(top, "top")).reset_index(drop=True)

    def neurons(
        self,
        kind: Kind | None = None,
        top: int | None = None,
        *,
        by_token: bool = False,
        tokens: int = 0,
    ) -> pd.DataFrame:
        """The best neurons for the whole answer, ranked within their kind by the sum.

        Columns as of ``Attribution.neurons``, and ``most_at``: the number of the answer token for
        which the neuron does most, whose ``coefficient`` is shown. With ``by_token`` a row for each
        neuron and token in place of that: ``number`` of the token, its ``coefficient`` and
        ``score``, and ``total``, the sum they are ranked by.

        Args:
            kind: ``"ffn"``, ``"attn"``, or both, FFN neurons first.
            top: How many of each kind; by default all that were ranked.
            by_token: Each token's scores in place of the sums.
            tokens: If positive, the source token, and so many tokens that the neuron ``raises`` and
                ``lowers`` most where it does most.

        Raises:
            InputError: If ``kind`` is unknown, or more neurons are asked for than were ranked.
        """
        if kind not in (None, "ffn", "attn"):
            raise InputError(f"kind must be 'ffn', 'attn' or None for both, got {kind!r}")
        tables = []
        for name in ("ffn", "attn") if kind is None else (kind,):
            found = self.ffn if name == "ffn" else self.attn
            count = len(found) if top is None else at_least_one(top, "top")
            there_are = found.neurons.certificate.total
            if len(found) < min(count, there_are):
                raise InputError(
                    f"only the best {len(found)} {name} neurons were ranked; "
                    f"call attribute_answer(..., top={count})"
                )
            tables.append(self._table(found, min(count, len(found)), by_token, tokens))
        return pd.concat(tables, ignore_index=True)

    def certificates(self) -> dict[str, dict[str, Any]]:
        """Why the neurons listed are the best for the whole answer, by kind."""
        return {
            "ffn": asdict(self.ffn.neurons.certificate),
            "attn": asdict(self.attn.neurons.certificate),
        }

    def facts(self) -> dict[str, Any]:
        """Where these numbers come from, ready for JSON. Cost: a hash of the model's weights."""
        last = self.parts[-1]
        found = {
            **last.facts(),
            "prompt": self.prompt_text,
            "read_pos": self.parts[0].captured.prompt.read_pos,
            "certificates": self.certificates(),
            "seconds": round(math.fsum(part.seconds for part in self.parts), 3),
            "warnings": list(self.warnings),
        }
        for name in ("target", "predictions"):
            del found[name]
        answer = [
            {**part.target.facts(), "log_prob": part.log_prob, "read_pos": place}
            for part, place in zip(self.parts, self.tokens()["position"].tolist(), strict=True)
        ]
        return {
            "command": "answer",
            **found,
            "answer": self.text,
            "answer_tokens": answer,
            "log_prob": self.log_prob,
            "embedding_log_prob": self.embedding_log_prob,
        }

    def saved(self, again: str | None = None) -> Saved:
        """The tables and facts that ``save`` writes, by name."""
        found = {**self.facts(), **({} if again is None else {"again": again})}
        tables = {
            "answer_tokens": self.tokens(),
            "layers": self.layers(by_token=True),
            "heads": self.heads(by_token=True),
            "neurons": self.neurons(tokens=_TOKENS),
            "neurons_by_token": self.neurons(by_token=True),
        }
        return Saved(tables=tables, facts=found)

    def save(
        self, directory: str | Path, *, report: bool = False, again: str | None = None
    ) -> None:
        """Write ``answer_tokens``, ``layers`` and ``heads`` (of each token: their sums are the
        answer's), ``neurons``, ``neurons_by_token`` (Parquet) and ``run.json``: all, or none.

        With ``report`` also ``report.html``, to look at in a browser. ``again`` is the command that
        makes it again, for ``run.json``. What an earlier run left and this one has not is removed.

        Raises:
            InputError: If the directory cannot be written to.
            OutputError: If writing fails on the way; nothing has changed then.
        """
        path = check_writable(directory)
        saved = self.saved(again)
        texts = {}
        if report:
            from tl_neuron_attr.report.answer import answer_page

            texts["report.html"] = answer_page(saved)
        texts["run.json"] = json.dumps(saved.facts, indent=2, ensure_ascii=False) + "\n"
        write_run(path, saved.tables, texts)

    def __repr__(self) -> str:
        first = self.parts[0]
        return (
            f"Attribution of the answer {self._answer()} after {first.captured.prompt.words}: "
            f"log p(answer) = {self.log_prob:.4g} nats, {first.host.model_name}, "
            f"{first.convention}, the best {len(self.ffn)} FFN and {len(self.attn)} attention "
            f"neurons{f', {len(self.warnings)} warnings' * bool(self.warnings)}"
        )

    def _repr_html_(self) -> str:
        """For notebooks; runs no model."""
        layers = self.layers()
        attn, ffn = (layers.loc[layers["kind"] == kind, "score"].tolist() for kind in _KINDS)
        tables = {"FFN": self.neurons("ffn"), "Attention": self.neurons("attn")}
        proofs = {"FFN": self.ffn, "attention": self.attn}
        return box(
            "Attribution of a whole answer",
            facts(
                {
                    "prompt": escaped(shown_tokens(self._prompt_texts())),
                    "answer": f"{escaped(self._answer())}, log p = {number(self.log_prob)} nats, "
                    f"p = {number(math.exp(self.log_prob))}",
                }
            ),
            grid(grid_of(self.tokens(), "The answer, token by token")),
            layer_bars(attn, ffn, "rise in log p(answer), nats"),
            *(
                grid(
                    grid_of(
                        table,
                        f"{name} neurons that did most for the whole answer",
                        columns=("most_at", "score", "coefficient"),
                        top=5,
                    )
                )
                for name, table in tables.items()
            ),
            facts(
                {
                    f"{name} neurons": escaped(str(found.neurons.certificate))
                    for name, found in proofs.items()
                }
            ),
            warned(self.warnings),
            next_calls(
                {
                    "found.neurons(tokens=5)": "all ranked neurons",
                    "found.neurons(by_token=True)": "what they do for each token",
                    "found.parts[0]": "the attribution of the first token",
                }
            ),
        )

    def _answer(self) -> str:
        return shown_tokens([part.target.text for part in self.parts])

    def _prompt_texts(self) -> tuple[str, ...]:
        first = self.parts[0].captured.prompt
        return first.token_texts[: first.read_pos + 1]

    def _table(self, found: RankedSums, top: int, by_token: bool, tokens: int) -> pd.DataFrame:
        prompt_id = self.parts[0].captured.prompt.prompt_id
        neurons = found.neurons.first(top)
        host = self.parts[0].host
        table = with_experts(neuron_table(neurons, prompt_id), host.n_experts, host.d_expert)
        table.insert(len(NEURON_COLUMNS), "most_at", found.most_in[:top].tolist())
        if tokens > 0:
            table = table.join(self._token_columns(found, top, tokens))
        if not by_token:
            return table
        places = list(range(len(self.parts)))
        each = pd.concat(
            [
                table.assign(
                    total=table["score"],
                    number=place,
                    coefficient=found.coefficients[place, :top].double().cpu().numpy(),
                    score=found.scores[place, :top].double().cpu().numpy(),
                ).drop(columns="most_at")
                for place in places
            ]
        )
        return each.sort_values(["rank", "number"], kind="stable", ignore_index=True)

    def _token_columns(self, found: RankedSums, top: int, k: int) -> pd.DataFrame:
        part, neurons = self.parts[-1], found.neurons.first(top)
        blocks = part.ffns if neurons.kind == "ffn" else part.attns
        # the sign rule: with a negative coefficient a neuron raises the bottom of its subvalue
        signs = torch.where(neurons.coefficient < 0, -1.0, 1.0)
        with torch.no_grad():
            ends = project(part.out, signs[:, None] * subvalues_of(blocks, neurons), k)
        ids = {*ends.top_ids.flatten().tolist(), *ends.bottom_ids.flatten().tolist()}
        text_of = {token: part.host.token_text(token) for token in ids}
        return token_columns(neurons, ends, part.captured.prompt.token_texts, text_of)


_KINDS = ("attn", "ffn")


def attribute_answer(
    model: Any,
    prompt: str | Iterable[SupportsIndex] | Tensor | Prompt,
    answer: str | Iterable[SupportsIndex],
    *,
    prepend_bos: bool | None = None,
    top: SupportsIndex = 300,
    convention: Convention = "exact",
    dtype: torch.dtype | None = None,
    budget: SupportsIndex = DEFAULT_BUDGET,
    progress: bool = False,
) -> AnswerAttribution:
    """Which layers, heads and neurons raised log p of a whole answer, and by how much.

    Args:
        model: A ``TransformerBridge`` or a ``HookedTransformer``; it is left as it was.
        prompt: Text, token ids or a ``Prompt`` without target and position: the answer follows its
            last token.
        answer: Text as it follows the prompt (mind its leading space), or token ids.
        top: How many neurons of each kind to rank, of the whole answer and of each token.

    The other arguments are those of ``attribute``. The answer's tokens are those of its text alone,
    put behind the prompt's.

    Raises:
        InputError: Before the forward pass: for an empty answer, a target given besides, tokens
            beyond the model's context; and as ``attribute``.

    Cost: one forward pass of prompt and answer, and for each answer token what ``attribute`` takes;
    then about one read-out for each token and neuron listed.
    Source: Yu & Ananiadou (2024), section 3, token by token.
    """
    top = at_least_one(top, "top")
    asked = as_prompt(prompt, prepend_bos=prepend_bos)
    if (asked.target, asked.against, asked.position) != (None, None, -1):
        raise InputError(
            "the answer takes the target's place, behind the whole prompt: leave target, against "
            "and position out of the Prompt"
        )
    host = open_host(model)
    before = tokenize(host, asked)
    ids = answer_tokens(host, answer)
    tokens = (*before.tokens, *ids[:-1])
    if len(tokens) > host.n_ctx:
        raise InputError(
            f"the prompt and all but the last of the answer are {len(before.tokens)} and "
            f"{len(ids) - 1} tokens, together longer than the model's context of {host.n_ctx}; "
            "shorten either"
        )
    prompts = [
        Prompt(
            tokens=tokens,
            target=token,
            position=len(before.tokens) - 1 + place,
            prompt_id=asked.prompt_id,
        )
        for place, token in enumerate(ids)
    ]
    parts = attribute_all(
        model,
        prompts,
        top=top,
        convention=convention,
        dtype=dtype,
        budget=budget,
        progress=progress,
    )
    with torch.no_grad(), full_precision(), progress_bar(2 * top, "neuron", progress) as bar:
        n_pos = parts[-1].attns[0].shape[1]
        ffn = top_sums([_side(part, part.ffns) for part in parts], top, progress=bar.update)
        attn = top_sums(
            [_side(part, [with_positions(each, n_pos) for each in part.attns]) for part in parts],
            top,
            progress=bar.update,
        )
    text = answer if isinstance(answer, str) else None
    slips = end_warnings(before)
    if text is not None:
        slips += answer_warnings(host, text, parts[0].captured.log_prob_of)
    for message in slips:
        warnings.warn(message, stacklevel=2)
    of_parts = (each for part in parts for each in part.warnings)
    return AnswerAttribution(
        parts=tuple(parts),
        text=text,
        prompt_text=before.text,
        warnings=tuple(dict.fromkeys([*slips, *of_parts])),
        ffn=ffn,
        attn=attn,
    )


def _side(part: Attribution, blocks: Sequence[Any]) -> Side:
    bases = torch.stack([block.base for block in blocks])
    return Side(blocks=blocks, out=part.out, before=part.out.baseline(bases, part.target))


def _summed(tables: Sequence[pd.DataFrame], by_token: bool) -> pd.DataFrame:
    """One table a token, in one: by token, or the sum of their scores."""
    if not by_token:
        return tables[0].assign(score=sum(table["score"] for table in tables))
    numbered = [table.assign(number=number) for number, table in enumerate(tables)]
    together = pd.concat(numbered, ignore_index=True)
    return pd.DataFrame(together, columns=["number", *tables[0].columns])
