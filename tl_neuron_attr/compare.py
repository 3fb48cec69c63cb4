"""What changed: Comparative Neuron Analysis of two runs.

``CNA(k) = Imp_original(k) - Imp_other(k)``: by how much more a layer, head or neuron raises
log p(target) in one run than in another. The other is the same prompt with heads or neurons
zeroed, another prompt of the same length, or another checkpoint of the same shape. Both are asked
about the original's target, their norm frozen at the scale of the original's run.

Source: Yu & Ananiadou (2024), arXiv 2409.14144.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, SupportsIndex

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_neuron_attr.attribution import Attribution, progress_bar
from tl_neuron_attr.capture import capture_all, check_fits, check_same_run
from tl_neuron_attr.captured import Capture
from tl_neuron_attr.decompose import attn_decomposition, ffn_decomposition
from tl_neuron_attr.differences import RankedDifferences, Side, top_differences
from tl_neuron_attr.display import box, brief, escaped, facts, grid, next_calls, number
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.glance import target_words
from tl_neuron_attr.host import Host, model_facts, open_host
from tl_neuron_attr.identities import verify
from tl_neuron_attr.index import ProjectionIndex, check_index
from tl_neuron_attr.interventions import Part, Zeroed, as_zeroed, capture_zeroed, check_zeroed
from tl_neuron_attr.neurons import FFNNeuron
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.projection import project
from tl_neuron_attr.prompts import Prompt, TokenizedPrompt, as_prompt, at_least_one
from tl_neuron_attr.readout import read_out
from tl_neuron_attr.scores import LayerScores, baselines, head_scores, layer_scores
from tl_neuron_attr.styled import grid_of
from tl_neuron_attr.tables import (
    Saved,
    compared_head_table,
    compared_layer_table,
    compared_neuron_table,
    token_columns,
    with_experts,
    write_run,
)
from tl_neuron_attr.targets import tokenize
from tl_neuron_attr.topk import Kind, subvalues_of

_TOKENS = 10  # saved beside each neuron

# What two checkpoints must have in common, and what it is called.
_SHAPE = {
    "n_layers": "layers",
    "n_heads": "heads",
    "n_key_value_heads": "key-value heads",
    "d_head": "dimensions a head",
    "d_mlp": "FFN neurons a layer",
    "n_experts": "experts a layer",
    "d_expert": "neurons an expert",
    "d_model": "dimensions of the residual stream",
    "d_vocab": "tokens in the vocabulary",
}


@dataclass(frozen=True, kw_only=True)
class OtherRun:
    """What an attribution is compared with."""

    what: str
    """In words."""
    host: Host = field(repr=False)
    """Its model."""
    captured: Capture = field(repr=False)
    """What happened; coefficients of what was zeroed are 0."""
    zeroed: Zeroed = Zeroed()
    """What it was without."""

    __repr__ = brief


_COMPARED = ("difference", "score", "other_score")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What ``compare`` found out about two runs. Scores are in nats; differences are the original's
    less the other's, positive where the original raised the target more.

    Like ``Attribution`` it keeps the models alive.
    """

    original: Attribution = field(repr=False)
    other: OtherRun
    log_prob: float
    """log p(target) of the other run's final residual, its norm frozen at the original's scale."""
    own_log_prob: float
    """The same as the other run's model has it itself, its norm at that run's own scale."""
    layer_scores: LayerScores = field(repr=False)
    """The other run's."""
    head_scores: Float[Tensor, "layer head"] = field(repr=False)
    """The other run's."""
    ffn_neurons: RankedDifferences = field(repr=False)
    """FFN neurons by how much more they score in the original, with their certificate."""
    attn_neurons: RankedDifferences = field(repr=False)
    """Likewise attention neurons, by source position."""
    sides: dict[Kind, tuple[Side, Side]] = field(repr=False)
    """All neurons of a kind in either run."""

    def layers(self) -> pd.DataFrame:
        """Both scores of each layer's attention and FFN, in layer order.

        Columns: ``layer, kind, score, other_score, difference``.
        """
        return compared_layer_table(self.original.layer_scores, self.layer_scores)

    def heads(self, top: int | None = None) -> pd.DataFrame:
        """Both scores of each head: in order, or the ``top`` largest differences first.

        Columns: ``layer, head, score, other_score, difference``.
        """
        table = compared_head_table(self.original.head_scores, self.head_scores)
        if top is None:
            return table
        ordered = table.sort_values("difference", ascending=False, kind="stable")
        return ordered.head(at_least_one(top, "top")).reset_index(drop=True)

    def neurons(
        self,
        kind: Kind | None = None,
        top: int | None = None,
        *,
        lowest: bool = False,
        tokens: int = 0,
    ) -> pd.DataFrame:
        """The neurons whose score in the original exceeds that in the other run most.

        Columns: ``prompt_id, kind, layer, head, index, source_pos, coefficient,
        other_coefficient, score, other_score, difference, rank``.

        Args:
            kind: ``"ffn"``, ``"attn"``, or both, FFN neurons first.
            top: How many of each kind; by default all that were ranked.
            lowest: Those whose score falls short of the other run's most, lowest difference first.
            tokens: If positive, four more columns: the source token in either run, and so many
                tokens that the neuron's signed contribution ``raises`` and ``lowers`` most (in the
                original; where it is off there, in the other run).

        Raises:
            InputError: If ``kind`` is unknown, or more neurons are asked for than were ranked.
        """
        tables = []
        for name in _kinds(kind):
            found = (self.lowest if lowest else self._highest)[name]
            if top is not None:
                top = at_least_one(top, "top")
                blocks = self.sides[name][0].blocks
                if len(found) < min(top, sum(block.n_neurons for block in blocks)):
                    raise InputError(
                        f"only {len(found)} {name} neurons were ranked; call compare(..., "
                        f"top={top})"
                    )
                found = found.first(top)
            prompt_id = self.original.captured.prompt.prompt_id
            host = self.original.host
            table = compared_neuron_table(found, prompt_id)
            table = with_experts(table, host.n_experts, host.d_expert)
            tables.append(table.join(self._tokens(name, found, tokens)) if tokens > 0 else table)
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def lowest(self) -> dict[Kind, RankedDifferences]:
        """By kind the neurons that score less in the original, as many as were ranked."""
        with torch.no_grad():
            return {
                kind: top_differences(*self.sides[kind], len(found), lowest=True)
                for kind, found in self._highest.items()
            }

    def certificates(self) -> dict[str, dict[str, Any]]:
        """Why the neurons listed differ most, by kind; of the lowest too, once asked for."""
        lists: dict[str, RankedDifferences] = {kind: r for kind, r in self._highest.items()}
        if "lowest" in vars(self):
            lists |= {f"lowest_{kind}": found for kind, found in self.lowest.items()}
        return {name: asdict(found.neurons.certificate) for name, found in lists.items()}

    def facts(self) -> dict[str, Any]:
        """Where these numbers come from, ready for JSON: both runs, and the certificates.

        Cost: one pass over each model's weights, for their hash.
        """
        prompt, host = self.other.captured.prompt, self.other.host
        same = host.model is self.original.host.model
        original = self.original.facts()
        return {
            "command": "compare",
            **original,
            "certificates": self.certificates(),
            "other": {
                "what": self.other.what,
                "zeroed": [str(part) for part in self.other.zeroed.parts],
                "prompt": prompt.text,
                "tokens": list(prompt.tokens),
                "token_texts": list(prompt.token_texts),
                "read_pos": prompt.read_pos,
                "model": original["model"] if same else model_facts(host),
                "log_prob": self.log_prob,
                "own_log_prob": self.own_log_prob,
            },
        }

    def save(
        self,
        directory: str | Path,
        *,
        lowest: bool = False,
        report: bool = False,
        again: str | None = None,
    ) -> None:
        """Write ``layers``, ``heads``, ``neurons`` (Parquet) and ``run.json``: all, or none.

        Neurons have the ten tokens each raises and lowers most. With ``lowest`` also ``lowest``,
        those that score less in the original; with ``report`` also ``report.html``, to look at in a
        browser. ``again`` is the command that makes it again, for ``run.json``. What an earlier
        run left and this one has not is removed.

        Raises:
            InputError: If the directory cannot be written to.
            OutputError: If writing fails on the way; nothing has changed then.
        """
        path = check_writable(directory)
        tables = {
            "layers": self.layers(),
            "heads": self.heads(),
            "neurons": self.neurons(tokens=_TOKENS),
        }
        if lowest:
            tables["lowest"] = self.neurons(lowest=True, tokens=_TOKENS)
        found = {**self.facts(), **({} if again is None else {"again": again})}
        texts = {}
        if report:
            from tl_neuron_attr.report.comparison import comparison_page

            texts["report.html"] = comparison_page(Saved(tables=tables, facts=found))
        texts["run.json"] = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
        write_run(path, tables, texts)

    def __repr__(self) -> str:
        target = self.original.target
        return (
            f"Comparison with {self.other.what}: {target.quantity} of {target.words} = "
            f"{self.original.log_prob:.4g} nats, there {self.log_prob:.4g} nats"
        )

    def _repr_html_(self) -> str:
        """For notebooks; runs no model."""
        original = self.original
        prompt = original.captured.prompt
        names = {"ffn": "FFN", "attn": "Attention"}
        tables = [
            grid(
                grid_of(
                    compared_neuron_table(found.first(5), prompt.prompt_id),
                    f"{names[kind]} neurons that raise the target more in the original",
                    columns=_COMPARED,
                )
            )
            for kind, found in self._highest.items()
        ]
        proofs = {f"{names[kind]} neurons": found for kind, found in self._highest.items()}
        asked = prompt.text if prompt.text is not None else "".join(prompt.token_texts)
        return box(
            "Comparison of two runs",
            facts(
                {
                    "original": f"{escaped(asked)}: "
                    f"{target_words(original.target, original.log_prob)}",
                    "other": f"{escaped(self.other.what)}: log p = {number(self.log_prob)} nats, "
                    f"with its own norm {number(self.own_log_prob)}",
                }
            ),
            *tables,
            grid(grid_of(self.heads(5), "Heads by difference", columns=_COMPARED)),
            facts({name: escaped(str(each.neurons.certificate)) for name, each in proofs.items()}),
            next_calls(
                {
                    "comparison.neurons(tokens=5)": "all ranked neurons",
                    "comparison.neurons(lowest=True)": "those that score less in the original",
                    "comparison.layers()": "layers",
                }
            ),
        )

    @property
    def _highest(self) -> dict[Kind, RankedDifferences]:
        return {"ffn": self.ffn_neurons, "attn": self.attn_neurons}

    def _tokens(self, kind: Kind, found: RankedDifferences, k: int) -> pd.DataFrame:
        neurons, original = found.neurons, self.original
        # the sign rule: with a negative coefficient a neuron raises the bottom of its subvalue
        here = neurons.coefficient
        negative = here.where(here != 0, found.second_coefficient) < 0
        signs = torch.where(negative, -1.0, 1.0).to(here)
        with torch.no_grad():
            subvalues = subvalues_of(self.sides[kind][0].blocks, neurons)
            ends = project(original.out, signs[:, None] * subvalues, k)
        ids = {*ends.top_ids.flatten().tolist(), *ends.bottom_ids.flatten().tolist()}
        text_of = {token: original.host.token_text(token) for token in ids}
        table, others = (
            token_columns(neurons, ends, run.prompt.token_texts, text_of)
            for run in (original.captured, self.other.captured)
        )
        table.insert(1, "other_source_token", others["source_token"])
        return table


def compare(
    original: Attribution,
    other: Any,
    *,
    prompt: str | Iterable[SupportsIndex] | Tensor | Prompt | None = None,
    top: SupportsIndex = 300,
    index: ProjectionIndex | None = None,
    progress: bool = False,
) -> Comparison:
    """Which layers, heads and neurons raise the target more in ``original`` than in another run.

    Args:
        original: What ``attribute`` found out; target, convention and dtype are taken from it.
        other: What to compare it with. A ``Zeroed``, a head or neuron, or a list of these or of
            their labels (``["L3.H2", "L9.N12"]``): the same prompt without them. Text, token ids or
            a ``Prompt``: the same model on another prompt of as many tokens. A TransformerLens
            model: another checkpoint of the same shape. A ``Capture`` or an ``Attribution``: a run
            there is already.
        prompt: Beside another model, another prompt for it.
        top: How many neurons of each kind to rank by their difference.
        index: A projection index of the other model. The original's, if it has one, serves both
            runs where they are of one model.
        progress: Show a progress bar where scoring takes longer than two seconds.

    Bounds on both scores bound their difference: the neurons listed are proven to be those that
    scoring all in both runs would list. A projection index makes the bounds closer, but none is
    needed. In the convention ``recomputed`` every neuron is scored.

    Raises:
        InputError: Before the forward pass for a request that cannot be met: nothing zeroed, a head
            out of range, prompts of different length, models of different shape.
        UnsupportedModelError: If the other model's neurons would come out wrong.
        IdentityError: If the other run contradicts what this package believes about its model.
        NonFiniteError: If it gives NaN or infinite activations.

    Cost: a forward pass (of two rows, where something is zeroed), and some four read-outs per
    neuron listed.
    Source: Yu & Ananiadou (2024), arXiv 2409.14144.
    """
    top = at_least_one(top, "top")
    run = _other_run(original, other, prompt)
    same_model = run.host.model is original.host.model
    our_index, their_index = _indices(original, run, index, same_model)
    out, target = original.out, original.target
    if not same_model:
        out = read_out(run.host, run.captured.resid_final, original.convention, budget=out.budget)
        out = replace(out, norm_scale=original.out.norm_scale)
    layers = range(run.host.n_layers)
    ffns = [ffn_decomposition(run.host, run.captured, layer) for layer in layers]
    attns = [attn_decomposition(run.host, run.captured, layer) for layer in layers]
    with torch.no_grad(), full_precision(), progress_bar(4 * top, "neuron", progress) as bar:
        ours = baselines(original.captured, original.out, target)
        theirs = baselines(run.captured, out, target)
        first = partial(Side, out=original.out, index=our_index)
        second = partial(Side, out=out, index=their_index)
        sides: dict[Kind, tuple[Side, Side]] = {
            "ffn": (
                first(blocks=original.ffns, before=ours.ffn),
                second(blocks=ffns, before=theirs.ffn),
            ),
            "attn": (
                first(blocks=original.attns, before=ours.attn),
                second(blocks=attns, before=theirs.attn),
            ),
        }
        ranked = {
            kind: top_differences(*pair, top, progress=bar.update) for kind, pair in sides.items()
        }
        own = read_out(run.host, run.captured.resid_final, "recomputed", budget=out.budget)
        layer_results = layer_scores([run.captured], out, theirs)[0]
        head_results = head_scores([attns], out, theirs.attn)[0]
        if same_model:
            layer_results, head_results = _settled(original, run, layer_results, head_results)
        return Comparison(
            original=original,
            other=run,
            log_prob=float(theirs.final.log_prob[0]),
            own_log_prob=float(own.log_prob(run.captured.resid_final, target)),
            layer_scores=layer_results,
            head_scores=head_results,
            ffn_neurons=ranked["ffn"],
            attn_neurons=ranked["attn"],
            sides=sides,
        )


def _settled(
    original: Attribution,
    run: OtherRun,
    layers: LayerScores,
    heads: Float[Tensor, "layer head"],
) -> tuple[LayerScores, Float[Tensor, "layer head"]]:
    """The other run's scores, where nothing has changed the original's to the last bit."""
    ours, theirs = original.captured, run.captured

    def same(*names: str) -> Bool[Tensor, "layer _"]:
        equal = torch.stack([getattr(ours, name) == getattr(theirs, name) for name in names])
        return equal.flatten(2).all(-1).all(0)[:, None]

    base = "resid_pre" if ours.resid_mid is None else "resid_mid"
    attn, ffn = same("resid_pre", "attn_out")[:, 0], same(base, "mlp_out")[:, 0]
    head = same("resid_pre") & (ours.z == theirs.z).all(-1)
    if ours.attn_post_scale is not None:  # by which all heads of the layer are divided
        head &= same("attn_post_scale")
    scores = original.layer_scores
    return LayerScores(
        attn=scores.attn.where(attn, layers.attn), ffn=scores.ffn.where(ffn, layers.ffn)
    ), original.head_scores.where(head, heads)


def _indices(
    original: Attribution, run: OtherRun, index: ProjectionIndex | None, same_model: bool
) -> tuple[ProjectionIndex | None, ProjectionIndex | None]:
    """The projection index of either run's model."""
    if index is not None:
        if not isinstance(index, ProjectionIndex):
            raise InputError(
                f"index must be a ProjectionIndex, got a {type(index).__name__}; "
                "make one with projection_index(model, directory)"
            )
        check_index(run.host, index)
    if same_model:
        index = original.index or index
        return index, index
    return original.index, index


# --- the other run ----------------------------------------------------------------------------


def _other_run(original: Attribution, other: Any, prompt: Any) -> OtherRun:
    """What ``other`` stands for, run, verified, and in the original's dtype."""
    host = original.host
    if prompt is not None and not _is_model(other):
        raise InputError("prompt= belongs beside another model; give another prompt alone instead")
    if isinstance(other, Attribution):
        run = _given(original, other.host, other.captured)
    elif isinstance(other, Capture):
        run = _given(original, host, other)
    elif _is_model(other):
        run = _on_model(original, other, prompt)
    elif _is_prompt(other):
        asked = _asked(original, host, other)
        run = OtherRun(
            what=f"the prompt {_shown(asked)}",
            host=host,
            captured=capture_all(host, [asked])[0],
        )
    else:
        return _without(original, as_zeroed(other))
    return _verified(original, run)


def _is_model(other: Any) -> bool:
    return isinstance(other, torch.nn.Module) or (
        hasattr(other, "cfg") and hasattr(other, "blocks")
    )


def _is_prompt(other: Any) -> bool:
    if isinstance(other, str):
        try:
            Zeroed.parse(other)
        except InputError:
            return True
        raise InputError(
            f"{other!r} could be a prompt or a label: give [{other!r}] to zero it, or "
            f"Prompt(text={other!r}) to run it"
        )
    if isinstance(other, (Prompt, Tensor)) or hasattr(other, "__array__"):
        return True
    if isinstance(other, (Zeroed, *Part.__args__)) or not isinstance(other, Sequence):
        return False
    return len(other) > 0 and not any(isinstance(each, (str, *Part.__args__)) for each in other)


def _without(original: Attribution, zeroed: Zeroed) -> OtherRun:
    """The original's prompt without some heads or neurons."""
    host, prompt = original.host, original.captured.prompt
    if len(zeroed) == 0:
        raise InputError(
            "nothing is zeroed, so nothing would differ; give heads or neurons, like ['L3.H2']"
        )
    check_zeroed(host, zeroed, prompt)
    whole, captured = capture_zeroed(host, [prompt] * 2, [Zeroed(), zeroed])
    check_same_run(host, original.captured, whole.resid_final)
    run = OtherRun(
        what=f"the same prompt without {_listed(zeroed)}",
        host=host,
        captured=captured,
        zeroed=zeroed,
    )
    run = _verified(original, run)
    return replace(run, captured=_as_before(original.captured, run.captured, zeroed))


def _as_before(original: Capture, captured: Capture, zeroed: Zeroed) -> Capture:
    """The zeroed run with the original's own numbers before the first layer that it touches.

    They are the same but for rounding in another batch; so that they differ by exactly 0.
    """
    first = min(part.layer for part in zeroed.parts)
    ffn = {isinstance(part, FFNNeuron) for part in zeroed.parts if part.layer == first}
    before = {"resid_pre": first + 1, "pattern": first + 1, "v": first + 1}
    # of the first such layer what reads the same: all of its attention, if only its FFN is touched,
    # and the other way in parallel blocks
    for name in ("z", "attn_out", "attn_post_scale", "resid_mid"):
        before[name] = first + (ffn == {True})
    for name in ("mlp_post", "mlp_out", "ffn_post_scale"):
        before[name] = first + (original.resid_mid is None and ffn == {False})
    tensors = {}
    for name, count in before.items():
        ours, theirs = getattr(original, name), getattr(captured, name)
        if ours is None:
            continue
        if name == "v":  # one for each head, and 0 where it was zeroed
            ours = ours.repeat_interleave(theirs.shape[2] // ours.shape[2], dim=2)
            ours = ours.where(theirs != 0, 0.0)
        tensors[name] = torch.cat([ours[:count], theirs[count:]])
    return replace(captured, **tensors)


def _on_model(original: Attribution, model: Any, prompt: Any) -> OtherRun:
    """The original's prompt, or another, on another checkpoint."""
    host, ours = open_host(model), original.host
    differ = [
        f"{getattr(ours, name)} and {getattr(host, name)} {what}"
        for name, what in _SHAPE.items()
        if getattr(ours, name) != getattr(host, name)
    ]
    if host.norm != ours.norm or host.parallel != ours.parallel:
        differ.append(f"blocks as in {ours.architecture} and as in {host.architecture}")
    if differ:
        raise InputError(
            f"the models are of different shape: {', '.join(differ)}; "
            "compare checkpoints of one shape"
        )
    if host.device != ours.device:
        raise InputError(
            f"the models are on different devices, {ours.device} and {host.device}; "
            "move one of them"
        )
    if prompt is None:
        own = original.captured.prompt
        asked = tokenize(
            host, Prompt(tokens=own.tokens, position=own.read_pos, prompt_id=own.prompt_id)
        )
        asked = replace(asked, text=own.text)
    else:
        asked = _asked(original, host, prompt)
    what = f"the model {host.model_name}"
    if prompt is not None:
        what += f" on the prompt {_shown(asked)}"
    return OtherRun(what=what, host=host, captured=capture_all(host, [asked])[0])


def _asked(original: Attribution, host: Host, prompt: Any) -> TokenizedPrompt:
    """Another prompt, once it is known to be comparable position by position."""
    asked = as_prompt(prompt)
    if asked.target is not None:
        raise InputError("both runs are asked about the original's target: leave out the other's")
    tokenized = tokenize(host, asked)
    if not isinstance(prompt, Prompt) and len(tokenized.tokens) > original.captured.prompt.read_pos:
        tokenized = replace(tokenized, read_pos=original.captured.prompt.read_pos)
    _check_positions(original, tokenized)
    return tokenized


def _check_positions(original: Attribution, prompt: TokenizedPrompt) -> None:
    own = original.captured.prompt
    if len(prompt.tokens) != len(own.tokens):
        raise InputError(
            f"the prompts are of different length: the original is {len(own.tokens)} tokens, the "
            f"other {len(prompt.tokens)}; compare prompts of as many tokens"
        )
    if prompt.read_pos != own.read_pos:
        raise InputError(
            f"the prompts are read at different positions, the original at {own.read_pos}, the "
            f"other at {prompt.read_pos}; read both at the same"
        )


def _given(original: Attribution, host: Host, captured: Capture) -> OtherRun:
    """A run that is there already."""
    check_fits(original.host, captured.mlp_post, captured.v, captured.resid_pre)
    _check_positions(original, captured.prompt)
    what = f"the prompt {_shown(captured.prompt)}"
    if host.model is not original.host.model:
        what = f"the model {host.model_name} on {what}"
    return OtherRun(what=what, host=host, captured=captured)


def _verified(original: Attribution, run: OtherRun) -> OtherRun:
    verify(run.host, run.captured, own_run=False)
    return replace(run, captured=run.captured.to(original.captured.resid_final.dtype))


def _shown(prompt: TokenizedPrompt) -> str:
    return repr("".join(prompt.token_texts) if prompt.text is None else prompt.text)


def _listed(zeroed: Zeroed) -> str:
    shown = [str(part) for part in zeroed.parts[:5]]
    more = len(zeroed) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _kinds(kind: Kind | None) -> tuple[Kind, ...]:
    if kind is None:
        return ("ffn", "attn")
    if kind not in ("ffn", "attn"):
        raise InputError(f"kind must be 'ffn', 'attn' or None for both, got {kind!r}")
    return (kind,)
