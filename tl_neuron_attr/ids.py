"""What others call it: neuron ids between this package and other tools.

A neuron is a column of ``W_in`` (and ``W_gate``) and a row of ``W_out``, so everybody counts the
same neurons; but tools look at different numbers of theirs, which is the *basis* of an id:

    post    the coefficient: after the activation, in a gated FFN act(gate) * up
    pre     before the activation, in a plain FFN
    gate    the output of the gate, before the activation     up    the other factor
    z       of an attention neuron: what its head gathered, summed over source positions

An id of another basis names the same neuron, but what that tool reads, scores or edits there is
another number: a ranking carries over, a value or an edit does not. What is no neuron at all (a
dimension of the residual stream, a latent of an SAE, a query or key) is refused with the reason.
"""

import re
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron, parse_neuron
from tl_neuron_attr.prompts import at_least_zero

Basis = Literal["post", "pre", "gate", "up", "z"]
"""Which number of a neuron an id is about: see this module's docstring."""

Tool = Literal["knowledge-neurons", "EasyEdit", "QRNCA", "NEG", "Transluce"]
"""Tools that write an FFN neuron as (layer, index), each in a basis of its own."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What of a model must be known to convert ids: its sizes, and what its modules are called."""

    architecture: str
    """Hugging Face's, e.g. ``LlamaForCausalLM``."""
    n_layers: int
    n_heads: int
    d_head: int
    d_mlp: int
    gated: bool
    n_experts: int = 0
    """Experts of an FFN, a shared one not counted; 0: it is no mixture of them."""
    d_expert: int = 0


@dataclass(frozen=True)
class Unit:
    """A neuron, and which number of it somebody looks at."""

    neuron: FFNNeuron | AttnNeuron
    basis: Basis

    @property
    def is_coefficient(self) -> bool:
        """Whether that number is the coefficient this package scores."""
        return self.basis == _coefficient_of(self.neuron)


def _coefficient_of(neuron: FFNNeuron | AttnNeuron) -> Basis:
    """The basis of the number that this package scores."""
    return "post" if isinstance(neuron, FFNNeuron) else "z"


def layout_of(host: Host) -> Layout:
    """The layout of an open model."""
    return Layout(
        architecture=host.architecture,
        n_layers=host.n_layers,
        n_heads=host.n_heads,
        d_head=host.d_head,
        d_mlp=host.d_mlp,
        gated=host.gated,
        n_experts=host.n_experts,
        d_expert=host.d_expert,
    )


def parse_id(text: str, layout: Layout) -> Unit:
    """The neuron that an id of any known form names, and the basis of the id.

    Ours (``L3.N12``, ``L3.H5.D17``, ``L3.H5.D17@2``; ``L3.E5.N17``, neuron 17 of expert 5, which
    is numbered through its layer as ``L3.N...``), TransformerLens's hooks
    (``blocks.3.mlp.hook_post[12]``), Hugging Face's modules
    (``model.layers.3.mlp.down_proj.input[12]``) and the published notebooks' (``3_12``,
    ``3_5_17_2``). Positions count the tokens of the run: with a BOS in one tool and none in the
    other, they differ by one.

    Raises:
        InputError: If it is no text, names no neuron, or none of this model, with the reason.
    """
    if not isinstance(text, str):
        raise InputError(f"an id is text, like 'L3.N12'; got {text!r}")
    if re.fullmatch(r"\d+(_\d+)+", text):
        unit = _of_notebook(text)
    elif re.fullmatch(r"L\d+\.E\d+\.N\d+", text):
        unit = Unit(_of_expert(text, layout), "post")
    elif re.match(r"L\d", text):
        try:
            neuron = parse_neuron(text)
        except ValueError as error:
            raise InputError(str(error)) from error
        unit = Unit(neuron, _coefficient_of(neuron))
    elif text.startswith("blocks."):
        unit = _of_hook(text, layout)
    else:
        unit = _of_module(text, layout)
    return _checked(unit, layout)


# --- experts ----------------------------------------------------------------------------------


def expert_id(neuron: FFNNeuron, layout: Layout) -> str:
    """An FFN neuron with its expert, and its number there: ``L3.E5.N17``.

    The expert that all positions go through, if there is one, is the one after the last.

    Raises:
        InputError: If the model has no such neuron, or no experts.
    """
    _checked(Unit(neuron, "post"), layout)
    if not layout.n_experts:
        raise InputError(f"the FFN of {layout.architecture} has no experts: {neuron} is the id")
    expert = min(neuron.index // layout.d_expert, layout.n_experts)
    return f"L{neuron.layer}.E{expert}.N{neuron.index - expert * layout.d_expert}"


def _of_expert(text: str, layout: Layout) -> FFNNeuron:
    layer, expert, number = (int(each) for each in re.findall(r"\d+", text))
    if not layout.n_experts:
        raise InputError(f"{text!r}: the FFN of {layout.architecture} has no experts")
    d_shared = layout.d_mlp - layout.n_experts * layout.d_expert
    sizes = [layout.d_expert] * layout.n_experts + [d_shared] * (d_shared > 0)
    if expert >= len(sizes) or number >= sizes[expert]:
        raise InputError(
            f"there is no {text}: a layer has {layout.n_experts} experts of {layout.d_expert} "
            "neurons" + (f", and a shared one of {d_shared}" if d_shared else "")
        )
    return FFNNeuron(layer, expert * layout.d_expert + number)


def _refuse_experts(layout: Layout, what: str) -> None:
    if layout.n_experts:
        raise InputError(
            f"the FFN of {layout.architecture} is a mixture of experts: {what}; its neurons have "
            "the ids L3.N12, numbered through a layer, and L3.E5.N17"
        )


# --- the published notebooks ------------------------------------------------------------------


def notebook_id(unit: Unit) -> str:
    """As the notebooks of Yu & Ananiadou write it: ``layer_index``, or ``layer_head_dim_pos``.

    Raises:
        InputError: For an attention neuron without source position, another basis, or a place that
            is no whole number.
    """
    neuron = _whole(unit.neuron)
    if not unit.is_coefficient:
        raise InputError(
            f"the notebooks' ids are of coefficients, and {neuron} is meant in the basis "
            f"{unit.basis!r}; give it in {_coefficient_of(neuron)!r} if the neuron alone is meant"
        )
    if isinstance(neuron, FFNNeuron):
        return f"{neuron.layer}_{neuron.index}"
    if neuron.source_pos is None:
        raise InputError(
            f"the notebooks' attention neurons have a source position, and {neuron} is summed over "
            "all of them; give one, like L3.H5.D17@2"
        )
    return f"{neuron.layer}_{neuron.head}_{neuron.index}_{neuron.source_pos}"


def _of_notebook(text: str) -> Unit:
    numbers = [int(number) for number in text.split("_")]
    if len(numbers) == 2:
        return Unit(FFNNeuron(*numbers), "post")
    if len(numbers) == 4:
        return Unit(AttnNeuron(*numbers), "z")
    if len(numbers) == 3:
        raise InputError(
            f"{text!r} is a head's dimension without a source position, and the notebooks write "
            f"layer_head_dim_pos; give {AttnNeuron(*numbers)} if it is meant summed over positions"
        )
    raise InputError(f"{text!r} is neither layer_index nor layer_head_dim_pos")


# --- TransformerLens --------------------------------------------------------------------------

_HOOKS: dict[str, tuple[str, Basis]] = {
    # attribute of a plain FFN, and of a gated one
    "mlp.hook_post": ("both", "post"),
    "mlp.hook_pre": ("plain", "pre"),
    "mlp.hook_pre_linear": ("gated", "up"),
    "attn.hook_z": ("both", "z"),
}


def hook_id(unit: Unit, layout: Layout) -> str:
    """As an entry of a TransformerLens activation: ``blocks.3.mlp.hook_post[12]``.

    An attention neuron is ``blocks.3.attn.hook_z[5, 17]``.

    Raises:
        InputError: For an attention neuron with a source position, which is no entry of any
            activation, or a neuron the model has not.
    """
    neuron = _checked(unit, layout).neuron
    if isinstance(neuron, AttnNeuron):
        _refuse_source(neuron, "hook")
        return f"blocks.{neuron.layer}.attn.hook_z[{neuron.head}, {neuron.index}]"
    _refuse_experts(layout, "no hook shows its neurons")
    names = {"post": "hook_post", "pre": "hook_pre", "gate": "hook_pre", "up": "hook_pre_linear"}
    return f"blocks.{neuron.layer}.mlp.{names[unit.basis]}[{neuron.index}]"


def _of_hook(text: str, layout: Layout) -> Unit:
    match = re.fullmatch(r"blocks\.(\d+)\.([\w.]+?)(?:\[([\d, ]+)\])?", text)
    if match is None:
        raise InputError(
            f"{text!r} is no entry of a hook; write it like blocks.3.mlp.hook_post[12] or "
            "blocks.3.attn.hook_z[5, 17]"
        )
    layer, name, inside = int(match[1]), match[2], match[3]
    _refuse_other(text, name)
    if name not in _HOOKS:
        raise InputError(f"{text!r}: no neuron is known to be an entry of {name!r}")
    numbers = _numbers(text, inside)
    if name == "attn.hook_z":
        if len(numbers) != 2:
            raise InputError(
                f"{text!r}: an entry of hook_z has a head and a dimension, like hook_z[5, 17]"
            )
        return Unit(AttnNeuron(layer, *numbers), "z")
    _refuse_experts(layout, f"{name} shows what it reads or writes, not its neurons")
    if len(numbers) != 1:
        raise InputError(f"{text!r}: an entry of {name} has one number, the neuron's")
    if name == "mlp.hook_pre":
        return Unit(FFNNeuron(layer, numbers[0]), "gate" if layout.gated else "pre")
    if name == "mlp.hook_pre_linear" and not layout.gated:
        raise InputError(f"{text!r}: the FFN of {layout.architecture} is plain, and has no such")
    return Unit(FFNNeuron(layer, numbers[0]), _HOOKS[name][1])


# --- Hugging Face -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Modules:
    """What a family calls the modules whose inputs or outputs hold its neurons."""

    block: str
    out: str
    """Its input are the FFN's coefficients."""
    pre: str = ""
    gate: str = ""
    up: str = ""
    fused: str = ""
    """Its output are gate and up, one after the other."""
    attn: str
    """Its input is z, head by head."""


_LLAMA = _Modules(
    block="model.layers",
    out="mlp.down_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    attn="self_attn.o_proj",
)
_GPT2 = _Modules(block="transformer.h", out="mlp.c_proj", pre="mlp.c_fc", attn="attn.c_proj")
_MODULES = {
    **dict.fromkeys(
        (
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "GemmaForCausalLM",
            "Gemma2ForCausalLM",
            "Gemma3ForCausalLM",
            "GraniteForCausalLM",
            "Olmo2ForCausalLM",
            "CohereForCausalLM",
            "MixtralForCausalLM",
            "OlmoeForCausalLM",
            "Qwen2MoeForCausalLM",
            "Qwen3MoeForCausalLM",
        ),
        _LLAMA,
    ),
    "Phi3ForCausalLM": replace(_LLAMA, gate="", up="", fused="mlp.gate_up_proj"),
    "GPT2LMHeadModel": _GPT2,
    "GPTBigCodeForCausalLM": _GPT2,
    "GPTNeoForCausalLM": replace(_GPT2, attn="attn.attention.out_proj"),
    "GPTJForCausalLM": replace(_GPT2, out="mlp.fc_out", pre="mlp.fc_in", attn="attn.out_proj"),
    "GPTNeoXForCausalLM": _Modules(
        block="gpt_neox.layers",
        out="mlp.dense_4h_to_h",
        pre="mlp.dense_h_to_4h",
        attn="attention.dense",
    ),
    "BloomForCausalLM": _Modules(
        block="transformer.h",
        out="mlp.dense_4h_to_h",
        pre="mlp.dense_h_to_4h",
        attn="self_attention.dense",
    ),
    "OPTForCausalLM": _Modules(
        block="model.decoder.layers", out="fc2", pre="fc1", attn="self_attn.out_proj"
    ),
    "PhiForCausalLM": _Modules(
        block="model.layers", out="mlp.fc2", pre="mlp.fc1", attn="self_attn.dense"
    ),
    "Starcoder2ForCausalLM": _Modules(
        block="model.layers", out="mlp.c_proj", pre="mlp.c_fc", attn="self_attn.o_proj"
    ),
}


def module_id(unit: Unit, layout: Layout) -> str:
    """As an entry of a Hugging Face module: ``model.layers.3.mlp.down_proj.input[12]``.

    ``input`` is what goes into the module, ``output`` what comes out of it, both along their last
    axis.

    Raises:
        InputError: For an attention neuron with a source position, which is no entry of any
            activation; a neuron the model has not; or an architecture whose modules are not known.
    """
    neuron, modules = _checked(unit, layout).neuron, _modules(layout)
    place = f"{modules.block}.{neuron.layer}."
    if isinstance(neuron, AttnNeuron):
        _refuse_source(neuron, "module")
        number = neuron.head * layout.d_head + neuron.index
        return f"{place}{modules.attn}.input[{number}]"
    _refuse_experts(layout, "no module has its neurons as inputs or outputs")
    if unit.basis == "post":
        return f"{place}{modules.out}.input[{neuron.index}]"
    if modules.fused and unit.basis in ("gate", "up"):
        number = neuron.index + layout.d_mlp * (unit.basis == "up")
        return f"{place}{modules.fused}.output[{number}]"
    name = {"pre": modules.pre, "gate": modules.gate, "up": modules.up}[unit.basis]
    return f"{place}{name}.output[{neuron.index}]"


def _of_module(text: str, layout: Layout) -> Unit:
    modules = _modules(layout)
    match = re.fullmatch(r"([A-Za-z_.]+)\.(\d+)\.([\w.]+?)\.(input|output)(?:\[(\d+)\])?", text)
    if match is None or match[1] != modules.block:
        _refuse_other(text, text)
        raise InputError(
            f"{text!r} is no id of a neuron of {layout.architecture}; known are L3.N12, 3_12, "
            f"blocks.3.mlp.hook_post[12] and {modules.block}.3.{modules.out}.input[12]"
        )
    layer, name, side = int(match[2]), match[3], match[4]
    if name.startswith("mlp."):
        _refuse_experts(layout, "no module has its neurons as inputs or outputs")
    (number,) = _numbers(text, match[5])
    neuron = FFNNeuron(layer, number)
    if (name, side) == (modules.out, "input"):
        return Unit(neuron, "post")
    if (name, side) == (modules.attn, "input"):
        return Unit(AttnNeuron(layer, number // layout.d_head, number % layout.d_head), "z")
    if side == "output" and name == modules.fused:
        half, index = divmod(number, layout.d_mlp)
        if half > 1:
            raise InputError(f"{text!r}: {name} has {2 * layout.d_mlp} outputs")
        return Unit(FFNNeuron(layer, index), "up" if half else "gate")
    if side == "output":
        bases: tuple[tuple[str, Basis], ...] = (
            (modules.pre, "pre"),
            (modules.gate, "gate"),
            (modules.up, "up"),
        )
        for module, basis in bases:
            if name == module:
                return Unit(neuron, basis)
    if (name, side) in ((modules.out, "output"), (modules.attn, "output")):
        raise InputError(f"{text!r} is a dimension of the residual stream, which is no neuron")
    if side == "input" and name in (modules.pre, modules.gate, modules.up, modules.fused):
        raise InputError(f"{text!r} is a dimension of the residual stream, which is no neuron")
    _refuse_other(text, name)
    raise InputError(
        f"{text!r}: no neuron is known to be an entry of the {side} of {name!r}; those of an FFN "
        f"are the input of {modules.out!r}"
    )


def _modules(layout: Layout) -> _Modules:
    if layout.architecture not in _MODULES:
        raise InputError(
            f"the module names of {layout.architecture} are not known here; use the hooks of "
            "TransformerLens, like blocks.3.mlp.hook_post[12]"
        )
    return _MODULES[layout.architecture]


# --- tools that write (layer, index) ----------------------------------------------------------

_PLAIN: dict[Tool, Basis] = {"knowledge-neurons": "pre", "Transluce": "post"}
_GATED: dict[Tool, Basis] = {"EasyEdit": "gate", "QRNCA": "up", "NEG": "up", "Transluce": "post"}


def from_pair(tool: Tool, layer: int, index: int, layout: Layout) -> Unit:
    """The neuron a tool writes as (layer, index), in the basis that tool looks at.

    Read in their code in November 2026: knowledge-neurons takes GPT-2's FFN before the activation;
    EasyEdit the gate's output, QRNCA and NEG the up projection's; Transluce the coefficient.

    Raises:
        InputError: If it is not known what the tool looks at in such an FFN, or the model has no
            such neuron.
    """
    return _checked(Unit(FFNNeuron(layer, index), _basis_of(tool, layout)), layout)


def to_pair(tool: Tool, unit: Unit, layout: Layout) -> tuple[int, int]:
    """The (layer, index) by which a tool means this neuron in this basis.

    Raises:
        InputError: For an attention neuron, or a basis that is not the tool's.
    """
    neuron, basis = _checked(unit, layout).neuron, _basis_of(tool, layout)
    if isinstance(neuron, AttnNeuron):
        raise InputError(f"{tool} has no attention neurons, and {neuron} is one")
    if unit.basis != basis:
        raise InputError(
            f"{tool} looks at the basis {basis!r}, and {neuron} is meant in {unit.basis!r}; give "
            f"Unit(neuron, {basis!r}) if the neuron alone is meant"
        )
    return neuron.layer, neuron.index


def _basis_of(tool: Tool, layout: Layout) -> Basis:
    if tool not in get_args(Tool):
        raise InputError(f"tool must be one of {', '.join(get_args(Tool))}; got {tool!r}")
    _refuse_experts(layout, f"it is not known how {tool} numbers them")
    found = (_GATED if layout.gated else _PLAIN).get(tool)
    if found is None:
        kind = "gated" if layout.gated else "plain"
        raise InputError(
            f"it is not known what {tool} looks at in a {kind} FFN, as {layout.architecture} has"
        )
    return found


# --- what is no neuron, or none of this model -------------------------------------------------

_OTHERS = (
    (r"sae|transcoder|crosscoder|latent", "a latent of a sparse dictionary, which is no neuron"),
    (
        r"hook_resid|hook_mlp_out|hook_attn_out|hook_mlp_in|hook_attn_in|ln\d|ln_f|norm|embed",
        "a dimension of the residual stream, which is no neuron",
    ),
    (r"pattern|attn_scores", "an attention weight, which is no neuron"),
    (
        r"hook_q|hook_k|hook_rot|q_proj|k_proj|qkv|query_key|c_attn",
        "a query or a key, which no neuron is: attention neurons are dimensions of the value",
    ),
    (
        r"hook_v|v_proj",
        "a value vector before attention weighs it, which several heads may share; name the head "
        "(hook_z, or the input of the output projection), and the source position if one is meant",
    ),
    (
        r"hook_result",
        "a dimension of what a head writes to the residual stream, which is no neuron",
    ),
    (r"lm_head|unembed", "a token's logit, which is no neuron"),
)


def _refuse_other(text: str, name: str) -> None:
    for pattern, what in _OTHERS:
        if re.search(pattern, name):
            raise InputError(f"{text!r} is {what}")


def _refuse_source(neuron: AttnNeuron, what: str) -> None:
    if neuron.source_pos is not None:
        summed = replace(neuron, source_pos=None)
        raise InputError(
            f"{neuron} is what comes from one source position, pattern times value: no {what} "
            f"holds it as one number; {summed}, summed over positions, has an id"
        )


def _numbers(text: str, inside: str | None) -> list[int]:
    if inside is None:
        raise InputError(f"{text!r} is a whole activation; name one entry, like {text}[12]")
    try:
        return [int(number) for number in inside.split(",")]
    except ValueError:
        raise InputError(f"{text!r}: its entry must be whole numbers, like [12]") from None


def _whole(neuron: Any) -> FFNNeuron | AttnNeuron:
    """The neuron with plain whole numbers for its place."""
    if not isinstance(neuron, (FFNNeuron, AttnNeuron)):
        raise InputError(f"a neuron is an FFNNeuron or an AttnNeuron, got {neuron!r}")
    place = {
        name: at_least_zero(value, f"the {name} of a neuron")
        for name, value in vars(neuron).items()
        if value is not None or name != "source_pos"
    }
    return replace(neuron, **place)


def _checked(unit: Unit, layout: Layout) -> Unit:
    """The unit, if the model has such a neuron and such a number of it."""
    neuron = _whole(unit.neuron)
    unit = replace(unit, neuron=neuron)
    if neuron.layer >= layout.n_layers:
        raise InputError(f"there is no layer {neuron.layer}: the model has {layout.n_layers}")
    if isinstance(neuron, AttnNeuron):
        if unit.basis != "z":
            raise InputError(f"the basis of an attention neuron is 'z', got {unit.basis!r}")
        if neuron.head >= layout.n_heads or neuron.index >= layout.d_head:
            raise InputError(
                f"there is no {neuron}: the model has {layout.n_heads} heads of {layout.d_head}"
            )
        return unit
    if neuron.index >= layout.d_mlp:
        raise InputError(f"there is no {neuron}: a layer has {layout.d_mlp} FFN neurons")
    known = ("post", "gate", "up") if layout.gated else ("post", "pre")
    if unit.basis not in known:
        raise InputError(
            f"the FFN of {layout.architecture} has the bases {', '.join(known)}; got {unit.basis!r}"
        )
    return unit
