"""What we found: the result of attributing one prompt, from which every table is made."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tl_neuron_attr.capture import Capture
from tl_neuron_attr.decompose import AttnDecomposition, Decomposition, FFNDecomposition
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.host import Host, weights_hash
from tl_neuron_attr.prompts import Target, integer
from tl_neuron_attr.readout import Convention, ReadOut, project
from tl_neuron_attr.scores import LayerScores, position_scores
from tl_neuron_attr.tables import (
    head_table,
    layer_table,
    neuron_table,
    position_table,
    token_columns,
    write_tables,
)
from tl_neuron_attr.topk import Kind, RankedNeurons, subvalues_of, top_neurons

_VERSIONED = ("tl_neuron_attr", "transformer_lens", "transformers", "torch")


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What ``attribute`` found out about one prompt and target. Scores are in nats.

    Layers, heads and the top neurons are here; ``positions`` and what depends on choices made
    later are computed when asked for, from the capture and the model's weights. It therefore
    keeps the model alive: keep the tables, or ``captured``, where that matters.
    """

    host: Host = field(repr=False)
    """The model, and what is known of it."""
    captured: Capture = field(repr=False)
    """The forward pass; pass it to ``attribute`` for another target without running again."""
    target: Target
    """The token whose log-probability is explained."""
    convention: Convention
    """How residual vectors are read out."""
    out: ReadOut = field(repr=False)
    """The read-out of this run."""
    ffns: tuple[FFNDecomposition, ...] = field(repr=False)
    """The FFN of each layer, as a sum over its neurons."""
    attns: tuple[AttnDecomposition, ...] = field(repr=False)
    """The attention of each layer, as a sum over heads, sources and dimensions."""
    log_prob: float
    """log p(target) of the final residual; in ``exact`` the model's own."""
    embedding_log_prob: float
    """log p(target) of what enters the first block."""
    layer_scores: LayerScores = field(repr=False)
    """What ``layers`` tabulates."""
    head_scores: Float[Tensor, "layer head"] = field(repr=False)
    """What ``heads`` tabulates."""
    ffn_neurons: RankedNeurons = field(repr=False)
    """The best FFN neurons, with their certificate."""
    attn_neurons: RankedNeurons = field(repr=False)
    """The best attention neurons (by source position), with their certificate."""
    warnings: tuple[str, ...] = ()
    """What to bear in mind when reading the scores; also raised as ``UserWarning``."""
    seconds: float
    """What ``attribute`` took, the forward pass included."""

    def layers(self) -> pd.DataFrame:
        """Rise from each layer's attention and FFN: ``layer, kind, score``, in layer order."""
        return layer_table(self.layer_scores)

    def heads(self, top: int | None = None) -> pd.DataFrame:
        """Rise from each head: ``layer, head, score``; in order, or the ``top`` best first."""
        table = head_table(self.head_scores)
        if top is None:
            return table
        top = at_least_one(top, "top")
        ordered = table.sort_values("score", ascending=False, kind="stable")
        return ordered.head(top).reset_index(drop=True)

    def positions(
        self, layer: int | None = None, head: int | None = None, *, progress: bool = False
    ) -> pd.DataFrame:
        """Rise from what a head brings from each source position, with its attention.

        Of one head, of all heads of a layer, or of all heads: ``layer, head, source_pos, token,
        attention, score``. Cost: one read-out per row; computed anew at each call.

        Raises:
            InputError: If there is no such layer or head.
        """
        if layer is None and head is not None:
            raise InputError("give the head's layer too")
        for name, value, count in (
            ("layer", layer, self.host.n_layers),
            ("head", head, self.host.n_heads),
        ):
            if value is not None and not 0 <= integer(value, name) < count:
                raise InputError(f"{name} {value} is out of range: the model has {count} {name}s")
        layers = range(self.host.n_layers) if layer is None else [layer]
        heads = slice(None) if head is None else slice(head, head + 1)
        blocks = [self.attns[place] for place in layers]
        rows = sum(block.pattern[heads].numel() for block in blocks)
        tables = []
        with torch.no_grad(), progress_bar(rows, "position", progress) as bar:
            for block in blocks:
                scores = position_scores(
                    [block], self.out, self.target.id, heads=heads, progress=bar.update
                )[0]
                tables.append(
                    position_table(
                        block.layer,
                        range(self.host.n_heads)[heads],
                        self.captured.prompt.token_texts,
                        block.pattern[heads],
                        scores,
                    )
                )
        return pd.concat(tables, ignore_index=True)

    def neurons(
        self,
        kind: Kind | None = None,
        top: int | None = None,
        *,
        by_source: bool = True,
        tokens: int = 0,
    ) -> pd.DataFrame:
        """The best value neurons: one row a neuron, ranked within its kind.

        Args:
            kind: ``"ffn"``, ``"attn"``, or both, FFN neurons first.
            top: How many of each kind; by default all that were ranked.
            by_source: Attention neurons at each source position (the paper's), or, if False,
                summed over source positions; the latter are scored at each call.
            tokens: If positive, three more columns: the source token, and so many tokens that
                the neuron's signed contribution ``raises`` and ``lowers`` most.

        Raises:
            InputError: If ``kind`` is unknown, or more neurons are asked for than were ranked.
        """
        if kind not in (None, "ffn", "attn"):
            raise InputError(f"kind must be 'ffn', 'attn' or None for both, got {kind!r}")
        ranked = []
        if kind != "attn":
            ranked.append((self.ffn_neurons, self.ffns))
        if kind != "ffn":
            ranked.append((self.attn_neurons, self.attns) if by_source else self._over_sources)
        tables = []
        for neurons, blocks in ranked:
            if top is not None:
                top = at_least_one(top, "top")
                neurons_total = sum(block.n_neurons for block in blocks)
                if len(neurons) < min(top, neurons_total):
                    raise InputError(
                        f"only the best {len(neurons)} {neurons.kind} neurons were ranked; "
                        f"call attribute(..., top={top})"
                    )
                neurons = neurons.first(top)
            table = neuron_table(neurons, self.captured.prompt.prompt_id)
            if tokens > 0:
                table = table.join(self._token_columns(neurons, blocks, tokens))
            tables.append(table)
        return pd.concat(tables, ignore_index=True)

    def predictions(self, top: int = 5) -> pd.DataFrame:
        """The model's likeliest next tokens: ``id, token, log_prob, prob``."""
        likeliest = self.captured.top_predictions(at_least_one(top, "top"))
        return pd.DataFrame(
            {
                "id": [token for token, _ in likeliest],
                "token": [self.host.token_text(token) for token, _ in likeliest],
                "log_prob": [log_prob for _, log_prob in likeliest],
                "prob": [torch.tensor(log_prob).exp().item() for _, log_prob in likeliest],
            }
        )

    def facts(self) -> dict[str, Any]:
        """Where these numbers come from, ready for JSON: prompt, target, model, versions.

        Cost: one pass over the model's weights, for their hash.
        """
        host, prompt = self.host, self.captured.prompt
        return {
            "prompt_id": prompt.prompt_id,
            "prompt": prompt.text,
            "tokens": list(prompt.tokens),
            "token_texts": list(prompt.token_texts),
            "read_pos": prompt.read_pos,
            "target": {
                "id": self.target.id,
                "text": self.target.text,
                "log_prob": self.log_prob,
                "embedding_log_prob": self.embedding_log_prob,
            },
            "convention": self.convention,
            "neuron_basis": {
                "ffn": "mlp.hook_post: act(pre), in a gated FFN act(gate) * up",
                "attn": "pattern * v of one head, one source position, one dimension",
            },
            "model": {
                "name": host.model_name,
                "architecture": host.architecture,
                "class": host.class_name,
                "processing": host.processing,
                "dtype": str(host.dtype).removeprefix("torch."),
                "sha256": weights_hash(host),
            },
            "score_dtype": str(self.out.dtype).removeprefix("torch."),
            "score_unit": "nats",
            "certificates": self.certificates(),
            "versions": {
                "python": platform.python_version(),
                **{name: _version(name) for name in _VERSIONED},
            },
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }

    def certificates(self) -> dict[str, dict[str, Any]]:
        """Why the neurons listed are the best, for each kind: the fields of its ``Certificate``."""
        return {
            ranked.kind: asdict(ranked.certificate)
            for ranked in (self.ffn_neurons, self.attn_neurons)
        }

    def save(self, directory: str | Path, *, progress: bool = False) -> None:
        """Write ``layers``, ``heads``, ``positions``, ``neurons`` (Parquet) and ``run.json``.

        All files appear together at the end, or none. Cost: scores every head at every source
        position, with a progress bar on request where it takes longer than two seconds.

        Raises:
            InputError: If the directory cannot be written to.
            OutputError: If writing fails on the way; nothing has changed then.
        """
        path = check_writable(directory)
        tables = {
            "layers": self.layers(),
            "heads": self.heads(),
            "positions": self.positions(progress=progress),
            "neurons": self.neurons(),
        }
        facts = json.dumps(self.facts(), indent=2, ensure_ascii=False)
        write_tables(path, tables, {"run.json": facts + "\n"})

    @cached_property
    def _over_sources(self) -> tuple[RankedNeurons, Sequence[AttnDecomposition]]:
        blocks = [block.over_sources() for block in self.attns]
        with torch.no_grad():
            ranked = top_neurons(blocks, self.out, self.target.id, len(self.attn_neurons))
        return ranked, blocks

    def _token_columns(
        self,
        neurons: RankedNeurons,
        blocks: Sequence[Decomposition],
        k: int,
    ) -> pd.DataFrame:
        # the sign rule: with a negative coefficient a neuron raises the bottom of its subvalue
        signs = torch.where(neurons.coefficient < 0, -1.0, 1.0)[:, None]
        with torch.no_grad():
            ends = project(self.out, signs * subvalues_of(blocks, neurons), k)
        ids = {*ends.top_ids.flatten().tolist(), *ends.bottom_ids.flatten().tolist()}
        text_of = {token: self.host.token_text(token) for token in ids}
        return token_columns(neurons, ends, self.captured.prompt.token_texts, text_of)


def progress_bar(total: int, unit: str, show: bool) -> Any:
    """A bar for ``total`` steps, shown where they take longer than two seconds, if at all."""
    return tqdm(total=total, unit=unit, delay=2, leave=False, disable=not show)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "not installed"


def at_least_one(value: Any, what: str) -> int:
    """``value`` as a plain integer that counts something.

    Raises:
        InputError: If it is no integer, or below 1.
    """
    count = integer(value, what)
    if count < 1:
        raise InputError(f"{what} must be at least 1, got {count}")
    return count
