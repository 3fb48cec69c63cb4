"""Models that are spread over several devices: the same numbers, and no weight that moves."""

import functools
import re
import warnings

import pandas as pd
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from conftest import (
    FAMILIES,
    HookedTransformer,
    hugging_face_model,
    leaving_the_random_state,
    needs_hooked_transformer,
    own_hooked_of,
)
from fake_devices import fake_devices, put
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_neuron_attr import (
    METHODS,
    Case,
    InputError,
    Prompt,
    attribute,
    attribute_all,
    capture,
    capture_zeroed,
    compare,
    edit_weights,
    head_inputs,
    in_context_heads,
    intervened,
    load_model,
    mean_coefficients,
    neuron_card,
    neuron_scores,
    open_host,
    project,
    projection_index,
    replace_mean,
    run_prompts,
    scale,
    score_intervals,
    tokenize,
    value_query_graph,
    zero,
)
from tl_neuron_attr.identities import subkey_identities

PROMPT = (3, 17, 5, 40, 8, 22)
RAGGED = [PROMPT, (7, 9), (50, 4, 11, 30), (1, 2, 3, 4, 5, 6, 7, 8)]
TOP = 12


# --- what is run on them ----------------------------------------------------------------------


def certified(model, folder):
    result = attribute(model, PROMPT, top=TOP)
    return result.layers(), result.heads(), result.log_probs(), result.neurons(tokens=3)


def dense(model, folder):
    result = attribute(model, PROMPT, top=TOP, convention="recomputed")
    scores = [neuron_scores(block, result.out, result.target) for block in result.attns]
    return result.neurons(), [score.tolist() for score in scores], result.positions()


def a_contrast(model, folder):
    return attribute(model, PROMPT, target=4, against=9, top=TOP).neurons()


def a_ragged_batch(model, folder):
    return [each.neurons() for each in attribute_all(model, RAGGED, top=TOP, batch_size=4)]


def left_padding(model, folder):
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    ids[0], ids[1, 4:], mask[1, :4] = torch.tensor(PROMPT), torch.tensor((7, 9)), 0
    return [each.neurons() for each in attribute_all(model, ids, attention_mask=mask, top=TOP)]


def a_cache(model, folder):
    tokens = torch.tensor([PROMPT]).to(open_host(model).input_device)
    _, cache = model.run_with_cache(tokens)
    return attribute(model, PROMPT, cache=cache, top=TOP).neurons()


def queries(model, folder):
    result = attribute(model, PROMPT, top=TOP)
    return (
        result.query_layers(),
        result.query_heads(),
        result.query_neurons(TOP, tokens=2),
        result.query_neurons(TOP, kind="attn", by_position=True),
        [(each.name, each.error) for each in subkey_identities(result.host, result.captured)],
    )


def published(model, folder):
    result = attribute(model, PROMPT, top=TOP, convention="published")
    return result.neurons(), result.query_neurons(TOP)


def a_graph(model, folder):
    found = value_query_graph(attribute(model, PROMPT, top=TOP), depth=2, opposing=True, tokens=2)
    return found.node_table(), found.edge_table()


def interventions(model, folder):
    host = open_host(model)
    parts = ["L0.N3", "L1.H1", "L2.H0.D2", "L2.N7"]
    asked = tokenize(host, Prompt(tokens=PROMPT, target=4))
    captures = capture_zeroed(host, [asked], [zero([*parts, "L2.H1.D3@2"])])
    means = mean_coefficients(model, [PROMPT, RAGGED[2]])
    at_source = zero("L2.H1.D3@2", position=5)
    for several in (
        zero(parts),
        [scale("L2.H1", 2.0, position=3), at_source],
        replace_mean(parts, means),
    ):
        with intervened(model, several):
            captures.append(capture(host, asked))
    with edit_weights(model, zero(parts)):
        captures.append(capture(host, asked))
        edited = attribute(model, PROMPT, top=TOP).neurons()
    return edited, [(each.z.tolist(), each.logits.tolist()) for each in captures]


def scans(model, folder):
    result = attribute(model, PROMPT, top=TOP)
    few_shot = attribute(model, (5, 11, 6, 12, 5), target=11, top=TOP)
    found = in_context_heads(few_shot, (11, 12), top=3)
    return result.head_scan(), found.heads, head_inputs(result, "L1.H1", [1, 5], tokens=2)


def comparisons(model, folder):
    result = attribute(model, PROMPT, top=TOP)
    other = compare(result, zero(["L1.H1"]), top=TOP)
    return other.neurons(), compare(result, (3, 18, 5, 40, 8, 22), top=TOP).neurons()


def an_index(model, folder):
    index = projection_index(model, folder / "index", k=5)
    result = attribute(model, PROMPT, top=TOP, index=index)
    low = score_intervals(result.ffns, result.out, result.target, index)
    card = neuron_card(result, "L1.N4")
    on_attention = neuron_card(result, "L0.H1.D2")
    files = sorted((folder / "index").rglob("*.safetensors"))
    return (
        result.suppressing(),
        result.shares(),
        low.lower.tolist(),
        card.heads,
        card.downstream,
        on_attention.downstream,
        [{name: tensor.tolist() for name, tensor in load_file(file).items()} for file in files],
    )


def what_is_said(model, folder):
    host = open_host(model)
    out = attribute(model, PROMPT, top=TOP).out
    return [project(out, host.W_out(layer)[:3], 4).top_ids.tolist() for layer in range(3)]


def all_methods(model, folder):
    result = attribute(model, PROMPT, top=TOP)
    case = Case(result=result, corrupted=tokenize(result.host, Prompt(tokens=RAGGED[3][:6])))
    return [
        (name, kind, method(case, kind).tolist())
        for name, method in METHODS.items()
        for kind in ("ffn", "attn")
    ]


def saved(model, folder):
    result = attribute(model, PROMPT, top=TOP)
    result.save(folder / "saved")
    return [
        (file.name, pd.read_parquet(file)) for file in sorted((folder / "saved").rglob("*.parquet"))
    ]


def a_run(model, folder):
    prompts = [Prompt(tokens=tokens, target=4) for tokens in RAGGED]
    what = ("neurons", "query_neurons", "layers", "heads")
    run_prompts(model, prompts, folder / "run", what=what, top=4, shard_size=2)
    return [
        (file.name, pd.read_parquet(file)) for file in sorted((folder / "run").rglob("*.parquet"))
    ]


USES = [certified, dense, a_contrast, a_ragged_batch, left_padding, a_cache, queries, published]
USES += [a_graph, interventions, scans, comparisons, an_index, what_is_said, all_methods]
USES += [saved, a_run]
FEW = [certified, dense, a_ragged_batch, queries, interventions]
READS_ALL_ROWS = {an_index, all_methods}


# --- the models -------------------------------------------------------------------------------

FIRST_TO_LAST = {"embed": 0, "layers": (0, 0, 1), "norm": 1, "unembed": 1}
SPREADS = {
    "gpt2": FIRST_TO_LAST,
    "llama": FIRST_TO_LAST,
    # nothing is beside what comes before it
    "llama, uneven": {"embed": 1, "layers": (0, 1, 0), "norm": 1, "unembed": 0},
}


@leaving_the_random_state
def bridge(family, places=None):
    """A bridge, spread by what TransformerLens spreads bridges by: accelerate."""
    class_name, config, *_ = FAMILIES[family]
    config = config()
    config.tie_word_embeddings = False
    hf = hugging_face_model(class_name, config)
    if places is not None:
        dispatch_model(hf, _device_map(hf, places), force_hooks=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_bridge_from_module(
            hf, class_name, hf_config=config, dtype=torch.float32, device="cpu"
        ).eval()
    if places is not None:
        model.cfg.device, model.cfg.n_devices = f"cuda:{places['embed']}", 2
    return model


def _device_map(hf, places):
    names = {"ln_f": "norm", "norm": "norm"}
    found = {"lm_head": places["unembed"]}
    for name, part in hf.base_model.named_children():
        if isinstance(part, torch.nn.ModuleList):
            for layer, device in enumerate(places["layers"]):
                found[f"{hf.base_model_prefix}.{name}.{layer}"] = device
        else:
            found[f"{hf.base_model_prefix}.{name}"] = places[names.get(name, "embed")]
    return found


def hooked(family, places=None):
    """A HookedTransformer, its parts where its forward pass takes them to be."""
    model = own_hooked_of(family)
    if places is not None:
        put(model, "cuda:0")
        for layer, device in enumerate(places["layers"]):
            put(model.blocks[layer], f"cuda:{device}")
        put(model.ln_final, "cuda:1")
        put(model.unembed, "cuda:1")
        model.cfg.device, model.cfg.n_devices = "cuda", 2
    return model


# everything on one bridge, or where there is one on a HookedTransformer, which has activations
# elsewhere; the bridge is then tested on the newer TransformerLens
BUILDS = {"bridge-llama": USES, "bridge-gpt2": FEW, "bridge-llama, uneven": FEW}
if HookedTransformer is not None:
    BUILDS |= {"bridge-llama": FEW, "hooked-gpt2": USES, "hooked-llama": FEW}


@functools.cache
def built(name):
    """The same model on one device, and spread."""
    kind, case = name.split("-")
    build = {"bridge": bridge, "hooked": hooked}[kind]
    family = case.split(",")[0]
    with fake_devices():
        spread = build(family, SPREADS[case])
    return build(family), spread


@pytest.mark.changes("the weights")  # interventions edit rows, and undo it
@pytest.mark.parametrize(
    ("name", "use"),
    [(name, use) for name, uses in BUILDS.items() for use in uses],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_spread_model_gives_the_same_numbers_and_no_weight_moves(name, use, tmp_path):
    whole, spread = built(name)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    expected = use(whole, tmp_path / "one")
    with fake_devices() as devices:
        found = use(spread, tmp_path / "two")
    same(found, expected)
    # gains, biases and single rows may move; and where every row is read out, block after block
    assert use in READS_ALL_ROWS or not moved_weights(spread, devices.copies)


def moved_weights(model, copies):
    """Copies, from one GPU to another, of as much as the smallest matrix there is."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    least = min(
        weight.nbytes for weight in model.parameters() if weight.ndim > 1 and weight.shape[-2] > 4
    )
    moved = [copy for copy in copies if copy.place in weights and copy.target.type == "cuda"]
    return [copy for copy in moved if copy.bytes >= least]


def same(found, expected):
    """Bit for bit."""
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            same(ours, theirs)
    else:
        assert found == expected


def test_results_are_where_the_unembedding_is_and_tokens_go_to_the_embedding():
    _, spread = built("bridge-llama")
    with fake_devices():
        result = attribute(spread, PROMPT, top=TOP)
        host = result.host
        assert (str(host.input_device), str(host.device)) == ("cuda:0", "cuda:1")
        assert [*map(str, host.devices)] == ["cuda:0", "cuda:1"]
        where = {
            tensor.device
            for holder in (result.captured, result.ffn_neurons, result.attn_neurons, result.out)
            for tensor in vars(holder).values()
            if isinstance(tensor, torch.Tensor)
        }
        assert where == {host.device}
        assert result.ffns[0].W_out.device == host.input_device


def test_a_capture_from_another_device_is_brought_to_the_model():
    whole, spread = built("bridge-llama")
    captured = capture(open_host(whole), tokenize(open_host(whole), Prompt(tokens=PROMPT)))
    expected = attribute_all(whole, captured, target=[4, 9], top=TOP)
    with fake_devices():
        found = attribute_all(spread, captured, target=[4, 9], top=TOP)
        assert found[0].captured.resid_pre is found[1].captured.resid_pre  # brought once
        same([each.neurons() for each in found], [each.neurons() for each in expected])


# --- what is refused --------------------------------------------------------------------------


def test_a_model_with_offloaded_weights_is_refused_before_the_forward_pass():
    class_name, config, *_ = FAMILIES["llama"]
    with torch.random.fork_rng():
        hf = hugging_face_model(class_name, config())
    cpu_offload(hf, execution_device=torch.device("cpu"))
    model = build_bridge_from_module(
        hf, class_name, hf_config=hf.config, dtype=torch.float32
    ).eval()
    with pytest.raises(InputError, match=r"weights are not in memory, e\.g\. .*device='auto'"):
        attribute(model, PROMPT)


def test_a_part_on_meta_is_refused_by_name():
    with fake_devices():
        model = bridge("gpt2", FIRST_TO_LAST)
    weight = model.blocks[2].mlp.W_in
    owner = next(
        (part, name)
        for part in model.modules()
        for name, own in part._parameters.items()
        if own is not None and own.data_ptr() == weight.data_ptr()
    )
    setattr(owner[0], owner[1], torch.nn.Parameter(weight.detach().to("meta")))
    with pytest.raises(InputError, match=r"1 of the model's weights .*\.2\..*c_fc"):
        open_host(model)


@needs_hooked_transformer
@pytest.mark.parametrize(
    ("part", "device", "right"),
    [
        ("blocks[2]", "cuda:0", "cuda:1"),
        ("embed", "cuda:1", "cuda:0"),
        ("unembed", "cuda:0", "cuda:1"),
    ],
)
def test_a_hooked_transformer_with_a_part_elsewhere_is_refused_with_where_it_belongs(
    part, device, right
):
    with fake_devices():
        model = hooked("gpt2", FIRST_TO_LAST)
        open_host(model)
        put(eval(f"model.{part}"), device)
        with pytest.raises(InputError, match=re.escape(f"model.{part}.to('{right}')")):
            open_host(model)
        with pytest.raises(RuntimeError, match="same device"):
            model(torch.tensor([PROMPT]))


def test_auto_spreads_over_all_gpus_and_leaves_one_device_alone(monkeypatch):
    asked = []

    def boot(name, **given):
        asked.append((given["device"], given["n_devices"]))
        raise ValueError("enough")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", boot)
    for count, device in ((4, "auto"), (1, "auto"), (0, "auto"), (4, None), (4, "cuda:1")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(InputError, match="enough"):
            load_model("tiny-facts", device=device)
    assert asked == [(None, 4), (None, None), (None, None), (None, None), ("cuda:1", None)]


def test_workers_cannot_share_a_model_that_is_spread_over_all_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match="leaves none to a second worker"):
        run_prompts("tiny-facts", ["a"], tmp_path / "run", workers=2, device="auto")
    assert not (tmp_path / "run").exists()
