"""What the weights say: range, moments and extreme tokens of every subvalue's projection, on disk.

With a frozen norm a neuron changes the logits by ``coefficient / norm_scale`` times the projection
of its subvalue, ``P = ((r - mean r) * gain) @ W_U`` (RMSNorm: without the mean). Where a norm is
on the sub-layer's output, r is the row times that norm's gain, and its scale divides P too. P does
not depend on the prompt: it is computed once a model, for every row of ``W_out`` and ``W_O``. What
bounds of scores need of it is kept on disk under the SHA-256 of the weights. ``intervals.py``
bounds every neuron's score with it; ``tokens`` says what neurons say without computing it again.
"""

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from tl_neuron_attr.decompose import Outlet
from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable, write_files
from tl_neuron_attr.host import Host, open_host, weights_hash
from tl_neuron_attr.neurons import Kind
from tl_neuron_attr.pieces import Matrix
from tl_neuron_attr.projection import TokenEnds
from tl_neuron_attr.prompts import integer
from tl_neuron_attr.readout import DEFAULT_BUDGET, ReadOut, check_read_out

_FORMAT = "tl_neuron_attr projection index 1"

_COLUMNS = 4096  # vocabulary entries a block, as in a read-out

_KINDS: tuple[Kind, ...] = ("ffn", "attn")

_STALE_SECONDS = 3600.0  # no layer takes that long between two writes to its file


@dataclass(frozen=True, kw_only=True)
class Projections:
    """Of every subvalue of one kind: how its projection P spreads over the vocabulary.

    In logits, before the division by the norm's scale. Moments are over the vocabulary, all tokens
    alike. A row of attention is ``head * d_head + index``.
    """

    low: Float[Tensor, "layer row"]
    high: Float[Tensor, "layer row"]
    mean: Float[Tensor, "layer row"]
    spread: Float[Tensor, "layer row"]
    """Root mean square of P - mean."""
    spread4: Float[Tensor, "layer row"]
    """Fourth root of the mean fourth power of P - mean."""
    rounding: Float[Tensor, "layer row"]
    """By how much any logit of P may be off, for it was computed in finite precision."""
    top_ids: Int32[Tensor, "layer row k"]
    top_logits: Float[Tensor, "layer row k"]
    """Largest first."""
    bottom_ids: Int32[Tensor, "layer row k"]
    bottom_logits: Float[Tensor, "layer row k"]
    """Smallest first."""

    @property
    def second_moment(self) -> Float[Tensor, "layer row"]:
        """Mean square of P."""
        return self.mean.square() + self.spread.square()


@dataclass(frozen=True, kw_only=True)
class ProjectionIndex:
    """The projections of a model's every subvalue. Held on the CPU, whatever the model is on."""

    weights_sha256: str
    """``host.weights_hash`` of the model it was made from."""
    d_vocab: int
    widest: float
    """Largest norm of a column of the unembedding."""
    ffn: Projections
    attn: Projections

    __repr__ = brief

    @property
    def k(self) -> int:
        """How many tokens of each end are known."""
        return self.ffn.top_ids.shape[-1]

    def tokens(
        self,
        kind: Kind,
        layer: Int[Tensor, " neuron"],
        row: Int[Tensor, " neuron"],
        *,
        norm_scale: float = 1.0,
        sign: Float[Tensor, " neuron"] | None = None,
        k: int | None = None,
    ) -> TokenEnds:
        """The ``k`` tokens each subvalue raises most and those it lowers most, without computing.

        What ``projection.project`` gives for the same subvalues. The sign rule: a neuron with a
        negative coefficient raises the *bottom* of its subvalue; give the coefficients' signs, and
        ends and logits are those of the signed subvalue.

        Raises:
            InputError: If more tokens are asked for than the index holds.
        """
        k = self.k if k is None else min(integer(k, "k"), self.d_vocab)
        if not 1 <= k <= self.k:
            raise InputError(
                f"the projection index holds {self.k} tokens of each end, {k} were asked for; "
                "ask for at most as many, or make one with a larger k in another directory"
            )
        if kind not in _KINDS:
            raise InputError(f"kind must be 'ffn' or 'attn', got {kind!r}")
        projections = self.ffn if kind == "ffn" else self.attn
        n_layers, n_rows = projections.low.shape
        for name, places, count in (("layer", layer, n_layers), ("row", row, n_rows)):
            if len(places) and not 0 <= int(places.min()) <= int(places.max()) < count:
                raise InputError(f"a {name} is out of range: there are {count} {name}s")
        place = (layer.cpu(), row.cpu())
        top, bottom = [
            (ids[place][:, :k].long(), logits[place][:, :k] / norm_scale)
            for ids, logits in (
                (projections.top_ids, projections.top_logits),
                (projections.bottom_ids, projections.bottom_logits),
            )
        ]
        mean, spread = projections.mean[place], projections.spread[place]
        if sign is not None:
            flip = (sign < 0).cpu()[:, None]
            mean = (-mean).where(flip[:, 0], mean)
            top, bottom = (
                (bottom[0].where(flip, top[0]), (-bottom[1]).where(flip, top[1])),
                (top[0].where(flip, bottom[0]), (-top[1]).where(flip, bottom[1])),
            )
        return TokenEnds(
            top_ids=top[0].to(layer.device),
            top_logits=top[1].to(layer.device),
            bottom_ids=bottom[0].to(layer.device),
            bottom_logits=bottom[1].to(layer.device),
            mean=(mean / norm_scale).to(layer.device),
            spread=(spread / norm_scale).to(layer.device),
        )


def rounding_unit(d_model: int, dtype: torch.dtype) -> float:
    """What a dot product of ``d_model`` terms may round by, relative to the product of the norms.

    The probabilistic bound of Higham & Mary (2019) taken twice over, sqrt(d) eps, and a few eps
    for the steps around it (centring, gain, scale).
    """
    return (math.sqrt(d_model) + 8) * torch.finfo(dtype).eps


def default_directory() -> Path:
    """Where indices are kept unless told otherwise: the user's cache directory."""
    return user_cache_path("tl_neuron_attr") / "index"


def projection_index(
    model: Any,
    directory: str | Path | None = None,
    *,
    k: int = 10,
    budget: int = DEFAULT_BUDGET,
    progress: bool = False,
) -> ProjectionIndex:
    """The projections of a model's every subvalue: read from disk, computed where not there.

    Each layer is a file in ``directory/<SHA-256 of the weights>``, whole or absent: whatever
    interrupts the computation, the next call goes on with the layers that are missing.

    Args:
        model: A model, or its ``Host``.
        directory: By default the user's cache directory (see ``default_directory``).
        k: How many tokens to keep of each end of a projection.
        budget: Bytes for the working set.
        progress: Show a progress bar where computing takes longer than two seconds.

    Cost: one pass over the weights for their hash. Computing: one read-out for each row, which is
    what scoring every neuron of a one-token prompt densely costs; 24 + 16 k bytes a row on
    disk and in memory.

    Raises:
        InputError: If a file there is corrupt, of another model, of another version or has fewer
            tokens than ``k`` (it is never used), or the directory cannot be written to.
        OutputError: If writing fails; the layers written before stay.
    """
    host = model if isinstance(model, Host) else open_host(model)
    k = integer(k, "k")
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    k = min(k, host.d_vocab)
    dtype = torch.promote_types(host.dtype, torch.float32)
    check_read_out(host, "exact", budget, dtype)
    sha256 = weights_hash(host)
    folder = Path(default_directory() if directory is None else directory) / sha256
    paths = [folder / f"layer-{layer:03}.safetensors" for layer in range(host.n_layers)]
    missing = {layer for layer, path in enumerate(paths) if not path.exists()}
    # what is there is checked before hours may go into what is not
    layers = {
        layer: _read(path, host, sha256, layer, k)
        for layer, path in enumerate(paths)
        if layer not in missing
    }
    if missing:
        check_writable(folder)
        _check_precision()
        n_rows = host.d_mlp + host.n_heads * host.d_head
        with (
            torch.no_grad(),
            torch.autocast(host.device.type, enabled=False),
            tqdm(
                total=len(missing) * n_rows,
                unit="row",
                desc="projection index",
                delay=2,
                leave=False,
                disable=not progress,
            ) as bar,
        ):
            survey = _surveyed(host, dtype, budget)
            for layer in sorted(missing):
                layers[layer] = _computed(host, survey, layer, k, bar)
                _write(paths[layer], layers[layer], sha256, layer)
        _sweep(folder)
    ordered = [layers[layer] for layer in range(host.n_layers)]
    ffn, attn = [
        Projections(
            **{
                field.name: torch.stack([tensors[f"{kind}.{field.name}"] for tensors in ordered])
                for field in fields(Projections)
            }
        )
        for kind in _KINDS
    ]
    return ProjectionIndex(
        weights_sha256=sha256,
        d_vocab=host.d_vocab,
        widest=max(float(tensors["widest"]) for tensors in ordered),
        ffn=ffn,
        attn=attn,
    )


def check_index(host: Host, index: ProjectionIndex) -> None:
    """Stop if ``index`` is not of this very model. Cost: one pass over its weights.

    Raises:
        InputError: If the weights it was made from are others.
    """
    sha256 = weights_hash(host)
    if sha256 != index.weights_sha256:
        raise InputError(
            f"the projection index is of other weights ({index.weights_sha256[:12]}..., the "
            f"model's are {sha256[:12]}...); make one with projection_index(model)"
        )


# --- computing --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """What all rows share: the read-out's linear part, and two facts of the unembedding."""

    out: ReadOut
    mean_column: Float[Tensor, " d_model"]
    widest: float


def _check_precision() -> None:
    """Stop before truncated products are kept that later runs would take as float32's.

    Raises:
        InputError: If this process has set matrix products of float32 to be computed in less.
    """
    if torch.get_float32_matmul_precision() != "highest":
        raise InputError(
            "the projection index needs full float32 products, but this process has set "
            f"{torch.get_float32_matmul_precision()!r}; call "
            "torch.set_float32_matmul_precision('highest') while it is computed"
        )


def _surveyed(host: Host, dtype: torch.dtype, budget: int) -> _Survey:
    W_U = host.W_U
    total = torch.zeros(host.d_model, dtype=torch.float64, device=W_U.device)
    widest = 0.0
    for columns in W_U.split(_COLUMNS, dim=1):
        wide = columns.to(dtype)
        total += wide.sum(1)
        widest = max(widest, float(torch.linalg.vector_norm(wide, dim=0).max()))
    out = ReadOut(
        W_U=W_U,
        b_U=None,
        gain=host.final_gain,
        bias=None,
        norm_scale=torch.ones((), dtype=dtype, device=W_U.device),
        centered=host.norm == "layer_norm",
        eps=host.eps,
        dtype=dtype,
        budget=budget,
    )
    mean_column = (total / W_U.shape[1]).to(dtype)
    return _Survey(out=out, mean_column=mean_column, widest=widest)


def _computed(host: Host, survey: _Survey, layer: int, k: int, bar: tqdm) -> dict[str, Tensor]:
    """Every tensor of one layer's file."""
    tensors = {"widest": torch.tensor(survey.widest)}
    blocks: tuple[tuple[Kind, Matrix], ...] = (
        ("ffn", host.W_out(layer)),
        ("attn", host.W_O(layer).flatten(0, 1)),
    )
    for kind, rows in blocks:
        norm = host.post_norm(layer, kind)
        through = Outlet(gain=None if norm is None else norm.gain)  # without its scale
        parts = []
        for some in rows.split(survey.out.rows_per_block):
            some = some.to(survey.out.W_U.device, survey.out.dtype)
            parts.append(_projected(survey, through(some), k))
            bar.update(len(some))
        for name in parts[0]:
            tensors[f"{kind}.{name}"] = torch.cat([part[name] for part in parts]).cpu()
    return tensors


def _projected(survey: _Survey, rows: Float[Tensor, "row d_model"], k: int) -> dict[str, Tensor]:
    """The fields of ``Projections``, of some rows of one layer."""
    out = survey.out
    added = out.linear(rows)
    # at unit size, so that fourth powers neither overflow nor vanish
    size = torch.linalg.vector_norm(added, dim=1, keepdim=True)
    size = size.clamp(min=torch.finfo(torch.float32).tiny)
    added = added / size
    # moments about the mean as it is stored: for a bound any fixed number will do
    mean = (added @ survey.mean_column[:, None] * size).float()
    centre = mean.to(added.dtype) / size
    second, fourth = torch.zeros(2, len(rows), 1, dtype=torch.float64, device=added.device)
    tops: list[tuple[Tensor, Tensor]] = []
    bottoms: list[tuple[Tensor, Tensor]] = []
    for first in range(0, out.W_U.shape[1], _COLUMNS):
        logits = added @ out.W_U[:, first : first + _COLUMNS].to(added.dtype)
        for ends, largest in ((tops, True), (bottoms, False)):
            found = logits.topk(min(k, logits.shape[1]), largest=largest)
            ends.append((found.values * size, found.indices + first))
        squares = logits.sub_(centre).square_()
        second += squares.sum(1, keepdim=True)
        fourth += squares.square_().sum(1, keepdim=True)
    d_model, d_vocab = out.W_U.shape
    top_logits, top_ids = _extreme(tops, k, largest=True)
    bottom_logits, bottom_ids = _extreme(bottoms, k, largest=False)
    columns = {
        "mean": mean,
        "spread": (second / d_vocab).sqrt() * size,
        "spread4": (fourth / d_vocab).pow(0.25) * size,
        "rounding": rounding_unit(d_model, torch.float32) * survey.widest * size,
    }
    return {
        "low": bottom_logits[:, 0].clone(),
        "high": top_logits[:, 0].clone(),
        **{name: column[:, 0].float() for name, column in columns.items()},
        "top_ids": top_ids,
        "top_logits": top_logits,
        "bottom_ids": bottom_ids,
        "bottom_logits": bottom_logits,
    }


def _extreme(
    blocks: list[tuple[Tensor, Tensor]], k: int, *, largest: bool
) -> tuple[Float[Tensor, "row k"], Int32[Tensor, "row k"]]:
    """The ``k`` extreme logits of all blocks, and their tokens."""
    logits = torch.cat([values for values, _ in blocks], dim=1)
    ids = torch.cat([tokens for _, tokens in blocks], dim=1)
    found = logits.topk(k, largest=largest)
    return found.values.float(), ids.gather(1, found.indices).to(torch.int32)


# --- on disk ----------------------------------------------------------------------------------


def _write(path: Path, tensors: Mapping[str, Tensor], sha256: str, layer: int) -> None:
    facts = {"format": _FORMAT, "weights_sha256": sha256, "layer": str(layer)}
    facts["content_sha256"] = _content_hash(facts, tensors)
    write_files(path.parent, {path.name: lambda place: save_file(dict(tensors), place, facts)})


def _read(path: Path, host: Host, sha256: str, layer: int, k: int) -> dict[str, Tensor]:
    """The tensors of one layer's file, once everything about it has been checked.

    Raises:
        InputError: If anything is not as it was written for this very model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _refused(path, f"it cannot be read: {error}") from error
    content = facts.pop("content_sha256", "")
    if facts.get("format") != _FORMAT:
        raise _refused(path, f"its format is {facts.get('format')!r}, not {_FORMAT!r}")
    if content != _content_hash(facts, tensors):
        raise _refused(path, "it is corrupt: its content does not match its checksum")
    if facts.get("weights_sha256") != sha256:
        raise _refused(path, "it was made from the weights of another model")
    if facts.get("layer") != str(layer):
        raise _refused(path, f"it is of layer {facts.get('layer')}, not of layer {layer}")
    n_rows = {"ffn": host.d_mlp, "attn": host.n_heads * host.d_head}
    stored = tensors["ffn.top_ids"].shape[-1] if "ffn.top_ids" in tensors else 0
    found = {name: (tuple(each.shape), each.dtype) for name, each in tensors.items()}
    if found != _layout(n_rows, stored):
        raise _refused(path, "its tensors are not those of this model's layers")
    if stored < k:
        raise _refused(path, f"it has {stored} tokens of each end, not {k}")
    return {name: each[:, :k] if each.ndim == 2 else each for name, each in tensors.items()}


def _layout(n_rows: Mapping[str, int], k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor of a layer's file."""
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"widest": ((), torch.float32)}
    for kind, rows in n_rows.items():
        for field in fields(Projections):
            shape = (rows, k) if field.name.startswith(("top_", "bottom_")) else (rows,)
            dtype = torch.int32 if field.name.endswith("_ids") else torch.float32
            layout[f"{kind}.{field.name}"] = (shape, dtype)
    return layout


def _refused(path: Path, why: str) -> InputError:
    return InputError(
        f"the projection index {str(path)!r} is not used, for {why}; "
        "delete that file and it will be made anew, or choose another directory"
    )


def _content_hash(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(repr(sorted(facts.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sweep(folder: Path) -> None:
    """Remove what a process that was killed left behind; not what another is writing now."""
    for path in folder.glob(".layer-*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except OSError:  # another process was faster
            continue
