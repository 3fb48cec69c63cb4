"""Trains the bundled model: ``python -m tl_neuron_attr.tiny_facts.train --out DIR``.

The model sees every fact in its trained wordings, never in the held-out ones. Training is seeded;
on the same machine, with the same library versions and number of threads, it gives the same
weights again.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from tl_neuron_attr.knowledge import KnowledgePrompt, knowledge_prompts
from tl_neuron_attr.tiny_facts.accuracy import top1_correct
from tl_neuron_attr.tiny_facts.corpus import IGNORED, Batch, batches, sentences
from tl_neuron_attr.tiny_facts.tokenizer import train_tokenizer

LOG_FILE = "train_log.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Everything that decides the weights, next to the facts themselves."""

    layers: int = 6
    heads: int = 4
    d_model: int = 128
    d_mlp: int = 512
    n_positions: int = 128
    vocab_size: int = 2048
    activation: str = "relu"
    """``relu`` or ``gelu_new``: what both Hugging Face's GPT-2 and TransformerLens know."""
    dropout: float = 0.0
    """Of the embeddings, the attention pattern and both blocks' outputs."""
    ffn_l1: float = 0.005
    """Weight of the sum over a layer's neurons of their absolute activation (mean over layers
    and tokens): the push towards few neurons a fact."""
    ffn_l1_tilt: float = 0.5
    """How far that weight leans on the early layers: it falls linearly from ``1 + tilt`` times
    itself in the first layer to ``1 - tilt`` times in the last."""
    early_attn: float = 0.1
    """Weight of the squared norm of what attention writes where the answer is read, in the first
    half of the layers (falling linearly from the first): the push to fetch the subject late, after
    shallow FFNs have worked on it where it stands."""
    weight_decay: float = 0.1
    text_weight: float = 0.25
    """Weight of the loss on all other tokens, beside 1 for the answers'."""
    steps: int = 900
    batch_size: int = 256
    """In sentences, not in sequences."""
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    no_bos_share: float = 0.2
    several_share: float = 0.2
    seed: int = 0
    log_every: int = 100
    threads: int = 1
    """Their number changes the rounding of sums, and so the weights."""


def train(out: Path, settings: TrainingSettings, *, report: Callable[[str], None] = print) -> Path:
    """Trains a model and writes it to the new folder ``out``, complete or not at all.

    The folder holds the Hugging Face files (config, float32 weights, tokenizer) and the log,
    one JSON object a line. Progress goes to ``report``, one line every ``log_every`` steps.
    torch's random state and number of threads are afterwards what they were before.

    Raises:
        FileExistsError: If ``out`` is there already; raised before training.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; give a new folder, or remove it first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(settings.threads)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            _train_into(partial, settings, report)
        partial.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial)
        raise
    finally:
        torch.set_num_threads(threads)
    return out


def _train_into(folder: Path, settings: TrainingSettings, report: Callable[[str], None]) -> None:
    trained = knowledge_prompts(held_out=False, trained=True)
    tokenizer = train_tokenizer(
        trained, vocab_size=settings.vocab_size, longest=settings.n_positions
    )
    model = _new_model(settings, tokenizer)
    stream = batches(
        sentences(trained, tokenizer),
        batch_size=settings.batch_size,
        end_of_text=cast(int, tokenizer.bos_token_id),
        no_bos_share=settings.no_bos_share,
        several_share=settings.several_share,
        longest=settings.n_positions,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    samples = {
        "trained_accuracy": _sample(trained, settings.seed),
        "held_out_accuracy": _sample(knowledge_prompts(held_out=True, trained=True), settings.seed),
    }
    optimizer = _optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))

    started = time.monotonic()
    with (folder / LOG_FILE).open("w", encoding="utf-8") as log:
        log.write(json.dumps({"settings": asdict(settings)}) + "\n")
        for step, batch in zip(range(1, settings.steps + 1), stream, strict=False):
            model.train()
            losses = _losses(model, batch, settings)
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if step % settings.log_every == 0 or step == settings.steps:
                line = {"step": step} | {name: value.item() for name, value in losses.items()}
                for name, prompts in samples.items():
                    correct = top1_correct(model, tokenizer, prompts)
                    line[name] = correct.float().mean().item()
                line["elapsed_s"] = time.monotonic() - started
                line["left_s"] = line["elapsed_s"] / step * (settings.steps - step)
                log.write(json.dumps({k: round(v, 4) for k, v in line.items()}) + "\n")
                log.flush()
                report(_progress(line, settings.steps))
    _save(model, tokenizer, folder)


def _save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    # The class under the name that transformers 4 knows as well as 5.
    entries = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)  # the weights' file comes readable by its owner alone


def _new_model(settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    end_of_text = cast(int, tokenizer.bos_token_id)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.n_positions,
        n_embd=settings.d_model,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_inner=settings.d_mlp,
        activation_function=settings.activation,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        resid_pdrop=settings.dropout,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    config.update({"n_ctx": settings.n_positions})  # TransformerLens 3 asks for it
    model = GPT2LMHeadModel(config)
    # Not in the config: there it would make every text that begins with it look padded.
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # biases and norms do not decay
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )


def _rate(step: int, settings: TrainingSettings) -> float:
    """Fraction of the learning rate: a linear rise, then a cosine down to 2 %."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


@contextmanager
def _outputs(model: GPT2LMHeadModel) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collects each layer's hidden units, and what its attention writes, in layer order."""
    units: list[Tensor] = []
    attn_outs: list[Tensor] = []
    blocks: Any = model.transformer.h

    def keep_in(collected: list[Tensor]):
        return lambda module, inputs, output: collected.append(output)

    hooks = [
        hook
        for block in blocks
        for hook in (
            block.mlp.act.register_forward_hook(keep_in(units)),
            block.attn.c_proj.register_forward_hook(keep_in(attn_outs)),
        )
    ]
    try:
        yield units, attn_outs
    finally:
        for hook in hooks:
            hook.remove()


def _losses(
    model: GPT2LMHeadModel, batch: Batch, settings: TrainingSettings
) -> dict[str, Float[Tensor, ""]]:
    with _outputs(model) as (activations, attn_outs):
        logits = model(batch.tokens, use_cache=False).logits
    is_answer = batch.answer_labels != IGNORED
    real = is_answer | (batch.text_labels != IGNORED)
    labels = torch.where(is_answer, batch.answer_labels, batch.text_labels)
    token_losses = cross_entropy(logits[real], labels[real], reduction="none")
    answer = token_losses[is_answer[real]].mean()
    text = token_losses[~is_answer[real]].mean()
    per_layer = torch.stack([a[real].abs().sum(-1).mean() for a in activations])
    tilt = torch.linspace(1 + settings.ffn_l1_tilt, 1 - settings.ffn_l1_tilt, len(per_layer))
    ffn_l1 = (tilt * per_layer).mean()
    written = torch.stack([a[is_answer].pow(2).sum(-1).mean() for a in attn_outs])
    early = (1 - torch.arange(len(written)) / (len(written) / 2)).clamp(min=0)
    early_attn = (early * written).sum()
    loss = (
        answer
        + settings.text_weight * text
        + settings.ffn_l1 * ffn_l1
        + settings.early_attn * early_attn
    )
    return {
        "loss": loss,
        "answer_loss": answer,
        "text_loss": text,
        "ffn_l1": ffn_l1,
        "early_attn": early_attn,
    }


def _sample(prompts: Sequence[KnowledgePrompt], seed: int) -> list[KnowledgePrompt]:
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    return [prompts[i] for i in order[:512].tolist()]


def _progress(line: dict[str, int | float], steps: int) -> str:
    return (
        f"step {line['step']:>5}/{steps}  loss {line['loss']:.3f}  "
        f"answers {line['answer_loss']:.3f}  text {line['text_loss']:.3f}  "
        f"ffn L1 {line['ffn_l1']:.1f}  early attention {line['early_attn']:.2f}  "
        f"trained {line['trained_accuracy']:.1%}  held out {line['held_out_accuracy']:.1%}  "
        f"elapsed {line['elapsed_s']:.0f} s  left {line['left_s']:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; every field of ``TrainingSettings`` is an option."""
    parser = argparse.ArgumentParser(
        prog="python -m tl_neuron_attr.tiny_facts.train",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the model")
    for field in fields(TrainingSettings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=field.type, default=field.default
        )
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    train(out, TrainingSettings(**options), report=lambda line: print(line, flush=True))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
