"""What it will take: a configuration and a prompt's length -> operations, bytes, time.

Everything follows from the model's shapes, which its configuration holds, so no weight is read.
Operations are those of the matrix products (a multiplication and an addition count as two), which
is nearly all of the work. Bytes are counted tensor by tensor, from ``_forward_bytes`` on. Time is
operations over the rate of four short products that are run on the spot, so it is an estimate.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import torch

from tl_neuron_attr.display import Grid, box, grid, line
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.models import load_config, weight_dtype
from tl_neuron_attr.prompts import Target, at_least_one
from tl_neuron_attr.readout import (
    _COLUMNS,
    _SURVEY_COLUMNS,
    CONVENTIONS,
    DEFAULT_BUDGET,
    Convention,
    ReadOut,
)
from tl_neuron_attr.shapes import Shapes, shapes_of, shapes_of_host

# Neurons scored exactly for each one listed. On trained models the bounds exclude all but 1.02 to
# 1.1 times as many as are asked for.
_SCORED_PER_LISTED = 1.1


# Families whose bridge keeps every layer's attention pattern until the next run.
_KEEPING = frozenset({"gpt2", "gpt_bigcode", "gpt_neox", "bloom", "phi3"})

# Families whose bridge holds a second copy of the query, key and value weights.
_COPYING = frozenset({"gpt_neox", "bloom"})

# Families that score attention in float32 throughout, or not at all beyond the weights' dtype;
# the others widen it for the softmax.
_WIDE_ATTENTION = frozenset({"gptj", "gpt_neo"})
_NARROW_ATTENTION = _KEEPING - {"bloom"}


# Families that learn an embedding for each position.
_POSITIONED = frozenset({"gpt2", "gpt_bigcode", "gpt_neo", "opt"})


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one way of working takes."""

    operations: int
    """Of the matrix products; a multiplication and an addition count as two."""
    readouts: int
    """Vectors sent through the unembedding and a softmax over the vocabulary."""
    blocks: int
    """Matrix products those are done in."""
    peak_bytes: int
    """Most memory held at a time, beyond the loaded model."""
    seconds: float
    """An estimate: operations over the measured rate, without what Python itself takes."""


_WAYS = ("forward", "certified", "dense", "index")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What attributing so many prompts of one length to a model's neurons will take.

    ``print`` shows it as a table.
    """

    shapes: Shapes
    n_tokens: int
    n_prompts: int
    batch_size: int
    """Prompts that run together."""
    top: int
    convention: Convention
    dtype: torch.dtype
    """What the weights are held in."""
    weight_bytes: int
    """The model's weights."""
    rows_per_block: int
    """Vectors that are read out together."""
    columns_per_block: int
    """Tokens they are read out on at a time."""
    forward: Cost
    """The forward passes alone, with capture; part of both of the following."""
    certified: Cost
    """``attribute`` with bounds: about 1.1 exact scores for each neuron listed. Where no bound
    holds (``recomputed``), or half of all neurons are asked for, the same as dense."""
    dense: Cost
    """The same with every neuron scored, at every source position. Neither has query neurons, which
    are found when asked for: they take at most two forward passes more, and few products."""
    index: Cost
    """The projection index: every subvalue of the model projected on the vocabulary, once."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        first, asked, *_ = lines = str(self).splitlines()
        rows = []
        for name in _WAYS:
            cost = getattr(self, name)
            operations, peak = f"{cost.operations:.2g}", in_bytes(cost.peak_bytes)
            rows.append((name, operations, cost.readouts, peak, in_time(cost.seconds)))
        header = ("", "operations", "read-outs", "peak memory", "about")
        return box(
            "Plan",
            line(first),
            line(asked),
            grid(Grid(header=header, rows=tuple(rows))),
            *map(line, lines[-3:]),
        )

    def __str__(self) -> str:
        shapes = self.shapes
        prompts = "" if self.n_prompts == 1 else f"{self.n_prompts:,} prompts of "
        lines = [
            f"{shapes.family}: {shapes.n_layers} layers, {shapes.n_heads} heads of "
            f"{shapes.d_head}, d_model {shapes.d_model:,}, d_mlp {shapes.d_mlp:,}, "
            f"{shapes.d_vocab:,} tokens",
            f"{prompts}{self.n_tokens:,} tokens, best {self.top:,} neurons of each kind, "
            f"{self.convention}; weights {in_bytes(self.weight_bytes)} in "
            f"{str(self.dtype).removeprefix('torch.')}",
            "",
            f"{'':12}{'operations':>12}{'read-outs':>18}{'peak memory':>14}{'about':>10}",
        ]
        for name in _WAYS:
            cost = getattr(self, name)
            lines.append(
                f"{name:12}{cost.operations:12.2g}{cost.readouts:18,}"
                f"{in_bytes(cost.peak_bytes):>14}{in_time(cost.seconds):>10}"
            )
        lines += [
            "",
            f"read out in blocks of {self.rows_per_block:,} vectors x "
            f"{self.columns_per_block:,} tokens ({self.certified.blocks:,} certified, "
            f"{self.dense.blocks:,} dense)",
            "memory beyond the loaded model; certified and dense include the forward pass",
            "query neurons, which tables and the command line add: at most two forward passes more",
        ]
        return "\n".join(lines)


def plan(
    config: Any,
    *,
    n_tokens: SupportsIndex,
    top: SupportsIndex = 300,
    convention: Convention = "exact",
    n_prompts: SupportsIndex = 1,
    batch_size: SupportsIndex = 16,
    budget: SupportsIndex = DEFAULT_BUDGET,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    operations_per_second: float | None = None,
) -> Plan:
    """What ``attribute`` would take, certified and dense, from the model's configuration alone.

    The answer is read at the last token, where there are most attention neurons. Certified
    assumes 1.1 exact scores for each neuron listed, as measured on trained models.

    Args:
        config: A Hugging Face configuration; what ``load_model`` takes (``tiny-facts``, a
            directory, a hub name), of which only the configuration is read; or a loaded model.
        n_tokens: Length of the prompt, or of the longest.
        n_prompts: How many prompts of that length, run ``batch_size`` at a time.
        dtype: What the weights are held in: float32 by default, of a loaded model its own. Scores
            are computed in float32 or wider.
        device: Where the rates are measured: by default a loaded model's, or a GPU if there is one.
        operations_per_second: Taken for every product, in place of measuring.

    The others are those of ``attribute``.

    Raises:
        InputError: If a shape is missing from the configuration, or the request cannot be run.
        UnsupportedModelError: For an encoder-decoder, or experts whose router is not known.

    Cost: with ``operations_per_second`` none; otherwise four products, a fraction of a second.
    """
    length, listed, many, together, within = (
        at_least_one(value, name)
        for name, value in (
            ("n_tokens", n_tokens),
            ("top", top),
            ("n_prompts", n_prompts),
            ("batch_size", batch_size),
            ("budget", budget),
        )
    )
    if convention not in CONVENTIONS:
        raise InputError(f"convention must be one of {', '.join(CONVENTIONS)}; got {convention!r}")
    if operations_per_second is not None and not operations_per_second > 0:
        raise InputError(f"operations_per_second must be positive, got {operations_per_second}")
    loaded = config if hasattr(config, "cfg") and hasattr(config, "blocks") else None
    if loaded is not None:
        host = open_host(loaded)
        shapes, held_in, where = shapes_of_host(host), host.dtype, host.device
    else:
        read = load_config(str(config)) if isinstance(config, (str, Path)) else config
        shapes, held_in = shapes_of(read), torch.float32
        where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    held_in = held_in if dtype is None else weight_dtype(dtype)
    if shapes.n_ctx is not None and length > shapes.n_ctx:
        raise InputError(
            f"{length} tokens are longer than the model's context of {shapes.n_ctx}; shorten"
        )
    work = _work_of(
        shapes,
        held_in,
        length=length,
        many=many,
        together=together,
        top=listed,
        convention=convention,
        budget=within,
        hooked=type(loaded).__name__ == "HookedTransformer",
    )
    scored_in = torch.promote_types(held_in, torch.float32)
    if operations_per_second is None:
        try:
            # spread over several GPUs, one layer's work is done by one of them
            where = where if device in (None, "auto") else torch.device(device)
            rates = _measured(work, held_in, scored_in, where)
        except (RuntimeError, AssertionError) as error:  # no such device, or none at hand
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"cannot measure rates on {str(device or where)!r} ({reason}); give another "
                "device, or operations_per_second"
            ) from error
    else:
        rates = _Rates(*[operations_per_second] * 4)
    costs = _costs(work, rates)
    return Plan(
        shapes=shapes,
        n_tokens=length,
        n_prompts=many,
        batch_size=work.together,
        top=listed,
        convention=convention,
        dtype=held_in,
        weight_bytes=_weight_bytes(shapes, held_in, loaded),
        rows_per_block=work.rows,
        columns_per_block=work.columns,
        **costs,
    )


def peaks_of(
    host: Host, *, top: int, convention: Convention, budget: int
) -> Callable[[int, int], int]:
    """Bytes of a certified batch beyond the model, by its tokens a prompt and its prompts.

    What ``plan`` says of each, without asking the model anew; more than ``budget`` where the engine
    would divide the batch.
    """
    shapes = shapes_of_host(host)

    def peak(n_tokens: int, n_prompts: int) -> int:
        work = _work_of(
            shapes,
            host.dtype,
            length=n_tokens,
            many=n_prompts,
            together=n_prompts,
            top=top,
            convention=convention,
            budget=budget,
            hooked=host.class_name == "HookedTransformer",
        )
        return _peaks(work)["certified"] if work.together == n_prompts else budget + 1

    return peak


def _work_of(
    shapes: Shapes,
    held_in: torch.dtype,
    *,
    length: int,
    many: int,
    together: int,
    top: int,
    convention: Convention,
    budget: int,
    hooked: bool,
) -> "_Work":
    """What a request comes to, as the engine would divide it."""
    scored_in = torch.promote_types(held_in, torch.float32)
    # a tensor without memory is enough to ask the engine how it would divide the real one
    W_U = torch.empty(shapes.d_model, shapes.d_vocab, dtype=held_in, device="meta")
    per_prompt = 4 * shapes.n_layers * shapes.d_vocab * scored_in.itemsize
    return _Work(
        shapes=shapes,
        length=length,
        many=many,
        together=max(1, min(together, many, budget // per_prompt)),
        top=top,
        affine=convention != "recomputed",
        rows=_read_out(W_U, scored_in, budget, capped=shapes.capped).rows_per_block,
        columns=min(_COLUMNS, shapes.d_vocab),
        weight=held_in.itemsize,
        score=scored_in.itemsize,
        hooked=hooked,
    )


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is to be done, in numbers."""

    shapes: Shapes
    length: int
    many: int
    together: int
    top: int
    affine: bool
    rows: int
    columns: int
    weight: int
    """Bytes of one number of the weights."""
    score: int
    """Bytes of one number that scores are computed in."""
    hooked: bool
    """Whether a ``HookedTransformer`` runs it, which computes in other steps than the bridge."""

    @property
    def widened(self) -> int:
        """Bytes of one number of weights that are widened for scoring; 0 if they need not be."""
        return self.score if self.score > self.weight else 0

    @property
    def dense(self) -> int:
        """Neurons scored for one prompt where all are."""
        return sum(self.shapes.n_neurons(self.length))

    @property
    def searched(self) -> int:
        """Neurons of one kind scored for one prompt, in order of their bounds."""
        return math.ceil(_SCORED_PER_LISTED * self.top)

    @property
    def certified(self) -> int:
        """Neurons scored for one prompt where bounds may exclude the others."""
        if not self.affine:
            return self.dense
        return sum(
            # where half of all are asked for, all are scored
            kind if 2 * self.top >= kind else min(kind, self.searched)
            for kind in self.shapes.n_neurons(self.length)
        )


def _costs(work: _Work, rates: "_Rates") -> dict[str, Cost]:
    """Operations, read-outs, bytes and time of each way of working."""
    shapes = work.shapes
    peaks = _peaks(work)
    one_readout = 2 * shapes.d_model * shapes.d_vocab
    forward = work.many * (
        2 * work.length * shapes.n_used_weights
        + 2 * shapes.d_model * shapes.d_vocab
        + 4 * shapes.n_layers * shapes.n_heads * shapes.d_head * work.length**2
    )
    # the bases of all layers: their logits, and where there are bounds their gradients
    survey = work.many * one_readout * (2 * shapes.n_layers * (2 if work.affine else 1) + 1)
    products = shapes.n_subvalues - shapes.n_layers * shapes.d_off
    slopes = work.many * 2 * products * shapes.d_model if work.affine else 0

    def cost(name: str, readouts: int, before: int, seconds: float) -> Cost:
        return Cost(
            operations=before + readouts * one_readout,
            readouts=readouts,
            blocks=math.ceil(readouts / work.rows) * math.ceil(shapes.d_vocab / work.columns),
            peak_bytes=peaks[name],
            seconds=seconds + readouts * one_readout / rates.readout,
        )

    running = forward / rates.forward
    preparing = running + survey / rates.survey + slopes / rates.slopes
    layers_and_heads = shapes.n_layers * (2 + shapes.n_heads)
    scored = {
        name: cost(
            name, work.many * (layers_and_heads + neurons), forward + survey + slopes, preparing
        )
        for name, neurons in (("certified", work.certified), ("dense", work.dense))
    }
    return {
        "forward": cost("forward", 0, forward, running),
        **scored,
        "index": cost("index", shapes.n_subvalues, 0, 0.0),
    }


# --- weights ----------------------------------------------------------------------------------


def _weight_bytes(shapes: Shapes, dtype: torch.dtype, loaded: Any) -> int:
    """Matrices and embeddings; norms and biases are too small to count. Of a model, all it has."""
    if loaded is not None:
        storages = [
            tensor.untyped_storage() for tensor in (*loaded.parameters(), *loaded.buffers())
        ]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    qkv = shapes.n_heads + 2 * shapes.n_key_value_heads
    copied = shapes.n_layers * qkv * shapes.d_head if shapes.family in _COPYING else 0
    embeddings = (1 if shapes.tied else 2) * shapes.d_vocab
    positions = shapes.n_ctx or 0 if shapes.family in _POSITIONED else 0
    vectors = embeddings + positions + copied
    return dtype.itemsize * (shapes.n_block_weights + shapes.d_model * vectors)


# --- bytes ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Forward:
    """Bytes of one prompt's forward pass."""

    peak: int
    kept: int
    """What the model itself keeps until the next run."""
    captured: int
    """What the capture keeps."""


def _forward_bytes(work: _Work) -> _Forward:
    """The forward pass peaks in the last layer's attention, in its FFN, or at the logits."""
    shapes, length, weight = work.shapes, work.length, work.weight
    layers, d_model, d_mlp = shapes.n_layers, shapes.d_model, shapes.d_mlp
    key_values = layers * length * shapes.n_key_value_heads * shapes.d_head
    pattern = shapes.n_heads * length**2
    captured = work.score * (
        key_values
        + layers * shapes.n_heads * (length + shapes.d_head)
        + layers * (d_mlp + 4 * d_model)
        + shapes.d_vocab
    )
    vectors = weight * length * d_model
    logits = weight * shapes.d_vocab
    # as many numbers per FFN neuron and token as the activation has steps
    stepwise = shapes.activation == "gelu_new" or shapes.family in ("bloom", "phi3")
    steps = 4 if stepwise else 3 if shapes.gated else 2
    ffn = weight * length * (steps * shapes.d_on + length) + 4 * vectors
    if work.hooked:
        attention = 4 * weight * pattern
        kept = cached = 0
        logits += weight * d_model * shapes.d_vocab  # the unembedding, transposed at each run
    else:
        keeping = shapes.family in _KEEPING
        kept = weight * pattern * layers if keeping else 0
        cached = 2 * weight * key_values  # the model's own keys and values
        if not keeping:
            ffn += weight * pattern  # which a layer holds until it is done
        if shapes.family in _WIDE_ATTENTION:
            attention = 12 * pattern
        elif shapes.family in _NARROW_ATTENTION or weight >= 4:
            attention = 2 * weight * pattern
        else:
            attention = (weight + 8) * pattern
    attention += weight * length**2 + 6 * vectors
    peak = captured + max(
        kept * (layers - 1) // layers + cached + attention,
        kept + cached + ffn,
        kept + logits + max(cached, captured),  # layers are stacked once the run is over
    )
    return _Forward(peak=peak, kept=kept, captured=captured)


def _block_bytes(
    work: _Work, n_rows: int, *, then: Literal["copied", "kept", "summed"] = "copied"
) -> int:
    """One block of the read-out: its vectors before and after the norm, and its logits.

    A block of logits is held beside its copy in a logsumexp, or beside the widened weights it is
    made from, or beside both of the next block, which may be the vocabulary's narrow end. One that
    is summed in its own place is gone before the next. A soft cap has as many copies as there are
    steps in what it makes of a change.
    """
    n_rows = min(work.rows, n_rows)
    logits = work.score * n_rows * work.columns
    vectors = work.score * n_rows * work.shapes.d_model
    weights = work.widened * work.columns * work.shapes.d_model
    following = min(1.0, work.shapes.d_vocab / work.columns - 1)
    beside = max(weights, round(following * (logits + weights)))
    if then == "copied":
        beside = max(beside, logits)
    elif then == "summed":
        beside = weights
    if work.shapes.capped and then != "kept":  # what is kept are projections, which are not capped
        beside = max(beside, (8 if work.affine else 2) * logits)
    return max(2 * vectors + logits + beside, 5 * vectors)


def _peaks(work: _Work) -> dict[str, int]:
    """Most bytes held at a time beyond the loaded model.

    Each sum is of tensors that live at the same time; what is small beside the rest is left out.
    """
    shapes, score, together = work.shapes, work.score, work.together
    layers, d_model = shapes.n_layers, shapes.d_model
    all_heads = shapes.n_heads * shapes.d_head
    subvalues = max(shapes.d_mlp, all_heads)  # of a kind and layer
    neurons = max(shapes.d_mlp, all_heads * work.length)
    forward = _forward_bytes(work)
    running = together * forward.peak + (work.many - together) * forward.captured

    # scoring, beside what the runs left and the predictions of every base
    bases = together * (2 * layers + 1)
    held = together * forward.kept + work.many * forward.captured + score * bases * shapes.d_vocab
    columns = min(_SURVEY_COLUMNS, shapes.d_vocab)
    survey = columns * (score + work.widened) * d_model + 3 * score * bases * (columns + d_model)
    verified = 2 * score * work.length * all_heads + work.widened * subvalues * d_model
    n_heads = together * layers * shapes.n_heads
    heads = score * n_heads * d_model
    heads = max(2 * heads, heads + _block_bytes(work, n_heads))
    before = max(survey, verified, heads)
    slopes = 2 * score * together * layers * subvalues
    bounds = slopes + 5 * score * neurons
    listed = slopes + _block_bytes(work, together * work.searched, then="summed")
    scores = score * work.dense
    all_scored = max(3 * scores, scores + _block_bytes(work, neurons))
    # six numbers a subvalue, and ten tokens of each end with their logits
    index = shapes.n_subvalues * (6 * 4 + 2 * 10 * (4 + 4))
    dense = max(running, held + max(before, all_scored))
    return {
        "forward": running,
        "certified": dense
        if work.certified == work.dense
        else max(running, held + max(before, bounds, listed)),
        "dense": dense,
        # twice while its layers are stacked
        "index": max(2 * index, index + _block_bytes(work, subvalues, then="kept")),
    }


# --- time -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rates:
    """Operations per second of each kind of product: the fewer the rows, the slower."""

    forward: float
    survey: float
    slopes: float
    readout: float


def _measured(
    work: _Work, dtype: torch.dtype, scored_in: torch.dtype, device: torch.device
) -> _Rates:
    """The rates of the engine's own products, on an unembedding as wide as the model's.

    Few of its columns will do, if they are too many for the cache, as the model's weights are;
    and no more than 128 rows, beyond which rates hardly rise.
    """
    shapes = work.shapes
    forward_rows = work.length * work.together
    n_columns = min(shapes.d_vocab, max(1024, 2**23 // shapes.d_model))
    with torch.no_grad():
        W_U = torch.ones(n_columns, shapes.d_model, dtype=dtype, device=device).T
        few = torch.ones(min(128, forward_rows), shapes.d_model, dtype=dtype, device=device)
        one = torch.ones(1, shapes.d_model, dtype=dtype, device=device)
        out = _read_out(W_U, scored_in, DEFAULT_BUDGET, capped=shapes.capped)
        bases = torch.zeros(2 * shapes.n_layers + 1, shapes.d_model, dtype=scored_in, device=device)
        before = out.baseline(bases, Target(id=0))
        vectors = torch.zeros(min(128, work.rows), shapes.d_model, dtype=scored_in, device=device)
        which = torch.arange(len(vectors), device=device) % len(bases)
        seconds = (
            _seconds(lambda: few @ W_U),
            _seconds(lambda: out.baseline(bases, Target(id=0)).log_prob),
            _seconds(lambda: one @ W_U),
            _seconds(lambda: out.increase(before, which, vectors)),
        )
    operations = 2 * W_U.numel()
    n_rows = (len(few), 2 * len(bases), 1, len(vectors))
    return _Rates(*(operations * n / taken for n, taken in zip(n_rows, seconds, strict=True)))


def _seconds(work: Callable[[], torch.Tensor]) -> float:
    """Shortest time of a few, for 20 ms in all; the first, which warms up, does not count."""
    work().sum().item()  # reading a number waits for a GPU
    started, best = time.perf_counter(), math.inf
    while time.perf_counter() - started < 0.02:
        begun = time.perf_counter()
        work().sum().item()
        best = min(best, time.perf_counter() - begun)
    return best


def _read_out(W_U: torch.Tensor, dtype: torch.dtype, budget: int, *, capped: bool) -> ReadOut:
    return ReadOut(
        W_U=W_U,
        b_U=None,
        gain=None,
        bias=None,
        norm_scale=torch.ones((), dtype=dtype, device=W_U.device),
        centered=False,
        eps=0.0,
        dtype=dtype,
        budget=budget,
        soft_cap=1.0 if capped else None,
    )


# --- text -------------------------------------------------------------------------------------


def in_bytes(count: int) -> str:
    """``count`` as a person reads it: 36.4 MiB."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"


def in_time(seconds: float) -> str:
    """``seconds`` as a person reads it: 0.85 s, 12 min, 3.1 h."""
    value, unit = next(
        (
            (seconds / size, unit)
            for size, unit in ((86400, "d"), (3600, "h"), (60, "min"))
            if seconds >= 2 * size
        ),
        (seconds, "s") if seconds >= 0.01 else (1000 * seconds, "ms"),
    )
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
