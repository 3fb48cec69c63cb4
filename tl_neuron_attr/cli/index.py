"""``tl-neuron-attr index``: the projection index of a model."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tl_neuron_attr.cli.options import (
    Device,
    ModelName,
    WeightDtype,
    errors_in_one_sentence,
    index_of,
    load,
)
from tl_neuron_attr.cli.terminal import WIDTH
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.index import default_directory


def index(
    model: ModelName = "tiny-facts",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory to keep indices in. Default: the user's cache.", show_default=False
        ),
    ] = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
) -> None:
    """The projection of every neuron of a model on the vocabulary, computed once and kept.

    Goes on where it was interrupted.

    Example: tl-neuron-attr index --model tiny-facts --out indices
    """
    with errors_in_one_sentence():
        directory = default_directory() if out is None else out
        check_writable(directory)
        started = time.perf_counter()
        found = index_of(load(model, device, dtype), directory)
        n_layers, d_mlp = found.ffn.low.shape
        console = Console(width=min(WIDTH, Console().width), highlight=False, markup=False)
        console.print(
            f"{model}: {n_layers} layers, {n_layers * d_mlp:,} FFN and "
            f"{found.attn.low.numel():,} attention subvalues, {found.k} tokens of each end, "
            f"{time.perf_counter() - started:.1f} s with loading"
        )
        console.print(f"in {directory / found.weights_sha256}", soft_wrap=True)
