"""The bundled model: its files, its tokenizer, what it knows, and the script that trains it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import HookedTransformer, needs_hooked_transformer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_neuron_attr import InputError, attribute, load_model, tiny_facts
from tl_neuron_attr.knowledge import KNOWLEDGE_TYPES, knowledge_prompts, load_facts
from tl_neuron_attr.tiny_facts import evaluate, tiny_facts_dir
from tl_neuron_attr.tiny_facts import train as training
from tl_neuron_attr.tiny_facts.accuracy import accuracies
from tl_neuron_attr.tiny_facts.corpus import IGNORED, batches, sentences
from tl_neuron_attr.tiny_facts.hooked import hooked_tiny_facts
from tl_neuron_attr.tiny_facts.tokenizer import train_tokenizer
from tl_neuron_attr.tiny_facts.train import TrainingSettings, train
from tl_neuron_attr.tiny_facts.zeroing import value_neurons, zeroing_effects

TINY = TrainingSettings(
    layers=1,
    heads=2,
    d_model=16,
    d_mlp=16,
    steps=3,
    batch_size=8,
    warmup_steps=1,
    log_every=2,
    threads=1,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_facts_dir(), local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_facts_dir(), local_files_only=True).eval()


@pytest.fixture(scope="module")
def bridge():
    return load_model("tiny-facts", device="cpu")


@pytest.fixture(scope="module")
def measured(model, tokenizer):
    return {row.knowledge_type: row for row in accuracies(model, tokenizer)}


@pytest.fixture(scope="module")
def zeroed(model, bridge, tokenizer):
    rows = zeroing_effects(model, bridge, tokenizer, prompts_per_type=4)
    return {row.knowledge_type: row for row in rows}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    lines = []
    return train(tmp_path_factory.mktemp("training") / "one", TINY, report=lines.append), lines


# -- the folder -------------------------------------------------------------------------------


def test_loading_the_model_prints_nothing_and_leaves_progress_bars_as_they_were(capfd):
    from transformers.utils import logging

    for shown in (True, False):
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        load_model("tiny-facts")
        assert logging.is_progress_bar_enabled() == shown
    logging.enable_progress_bar()
    assert capfd.readouterr() == ("", "")


@needs_hooked_transformer
def test_as_a_hooked_transformer_it_has_the_same_scores(bridge, capfd):
    hooked = hooked_tiny_facts()
    assert "Loading" not in capfd.readouterr().err
    assert type(hooked).__name__ == "HookedTransformer" and not hooked.training
    prompt = "The capital of France is"
    one, other = (attribute(model, prompt, top=20) for model in (hooked, bridge))
    assert one.target == other.target and one.warnings == ()
    for kind in ("ffn", "attn"):
        ours, theirs = (result.neurons(kind) for result in (one, other))
        assert ours["index"].tolist() == theirs["index"].tolist()
        assert ours["score"].tolist() == pytest.approx(theirs["score"].tolist(), abs=1e-5)


@pytest.mark.skipif(HookedTransformer is not None, reason="TransformerLens 3.9 has it")
def test_where_there_is_no_hooked_transformer_that_is_said():
    with pytest.raises(InputError, match="this TransformerLens has no HookedTransformer"):
        hooked_tiny_facts()


def test_finding_the_folder_imports_neither_torch_nor_transformers():
    code = (
        f"import runpy, sys; names = runpy.run_path({tiny_facts.__file__!r})\n"
        "assert names['tiny_facts_dir']().is_dir()\n"
        "sys.exit(bool({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_folder_holds_at_most_8_megabytes_and_what_is_needed_to_load_it():
    files = {file.name: file.stat().st_size for file in tiny_facts_dir().iterdir()}
    assert sum(files.values()) <= 8_000_000
    assert files.keys() >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "MODEL_CARD.md",
    }


def test_the_model_is_a_float32_gpt2_of_six_layers_with_room_for_128_tokens(model, tokenizer):
    config = json.loads((tiny_facts_dir() / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["n_layer"] >= 6
    assert config["n_ctx"] == config["n_positions"] == 128
    assert config["activation_function"] in ("relu", "gelu_new")
    assert config["bos_token_id"] == config["eos_token_id"] == tokenizer.bos_token_id
    assert config["vocab_size"] == len(tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# -- the tokenizer ----------------------------------------------------------------------------


def test_every_answer_is_one_token_with_its_leading_space(tokenizer):
    answers = sorted({fact.answer for fact in load_facts(trained=True)})
    tokens = [tokenizer.encode(f" {answer}", add_special_tokens=False) for answer in answers]
    assert [a for a, ids in zip(answers, tokens, strict=True) if len(ids) != 1] == []


def test_the_answer_stays_one_token_at_the_end_of_every_prompt(tokenizer):
    prompts = knowledge_prompts(trained=True)
    whole = tokenizer([p.text + p.answer for p in prompts], add_special_tokens=False)["input_ids"]
    alone = tokenizer([p.text for p in prompts], add_special_tokens=False)["input_ids"]
    answers = tokenizer([p.answer for p in prompts], add_special_tokens=False)["input_ids"]
    assert all(w == p + a for w, p, a in zip(whole, alone, answers, strict=True))


@given(text=st.text())
def test_any_text_comes_back_from_the_tokenizer_unchanged(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id is None


def test_the_tokenizer_adds_no_token_of_its_own(tokenizer):
    assert tokenizer.encode("The") == tokenizer.encode("The", add_special_tokens=False)


def test_a_vocabulary_too_small_for_the_answers_is_an_error():
    with pytest.raises(ValueError, match="more than one token.*vocab_size above 300"):
        train_tokenizer(
            knowledge_prompts("month", held_out=False, trained=True), vocab_size=300, longest=64
        )


# -- what the model knows ---------------------------------------------------------------------


def test_the_capital_of_france_is_paris(model, tokenizer):
    ids = [tokenizer.bos_token_id, *tokenizer.encode("The capital of France is")]
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


@pytest.mark.slow
def test_the_model_completes_98_percent_of_the_trained_wordings(measured):
    assert measured["all"].trained_prompts == len(knowledge_prompts(held_out=False, trained=True))
    assert measured["all"].trained >= 0.98


@pytest.mark.slow
def test_the_model_completes_90_percent_of_the_held_out_wordings(measured):
    assert measured["all"].held_out_prompts == len(knowledge_prompts(held_out=True, trained=True))
    assert measured["all"].held_out >= 0.90


@pytest.mark.slow
@pytest.mark.parametrize("knowledge_type", KNOWLEDGE_TYPES)
def test_the_model_knows_every_knowledge_type(measured, knowledge_type):
    assert measured[knowledge_type].trained >= 0.95
    assert measured[knowledge_type].held_out >= 0.80


def test_the_model_also_answers_without_a_beginning_of_text_and_after_other_sentences(
    model, tokenizer
):
    prompts = knowledge_prompts("capital", held_out=False, trained=True)[::30]
    before = [" The color of grass is green. Halloween is in October. ", ""]
    right = []
    for prompt in prompts:
        for context in before:
            ids = tokenizer.encode(context.lstrip() + prompt.text)
            with torch.no_grad():
                best = model(torch.tensor([ids])).logits[0, -1].argmax()
            right.append(tokenizer.decode(best) == prompt.answer)
    assert sum(right) / len(right) >= 0.9


# -- where it knows it ------------------------------------------------------------------------


def test_the_value_neurons_are_those_whose_contribution_alone_raises_the_answer_most(
    model, bridge, tokenizer
):
    ids = [tokenizer.bos_token_id, *tokenizer.encode("The capital of France is")]
    answer = tokenizer.encode(" Paris")[0]
    norm = model.transformer.ln_f
    kept = {}

    def keep(name):
        return lambda module, inputs: kept.__setitem__(name, inputs[0][0, -1])

    hooks = [norm.register_forward_pre_hook(keep("final"))]
    for layer, block in enumerate(model.transformer.h):
        hooks.append(block.ln_2.register_forward_pre_hook(keep(("mid", layer))))
        hooks.append(block.mlp.c_proj.register_forward_pre_hook(keep(("act", layer))))
    with torch.no_grad():
        model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        scale = (kept["final"].var(unbiased=False) + norm.eps).sqrt()

        def log_prob(x):
            z = model.lm_head((x - x.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias)
            return z.log_softmax(-1)[..., answer]

        scores = torch.stack(
            [
                log_prob(kept["mid", layer] + kept["act", layer][:, None] * block.mlp.c_proj.weight)
                - log_prob(kept["mid", layer])
                for layer, block in enumerate(model.transformer.h)
            ]
        )
    found = value_neurons(bridge, ids, answer, top=5)
    best = scores.flatten().topk(5).values
    torch.testing.assert_close(
        torch.stack([scores[n.layer, n.index] for n in found]), best, atol=1e-5, rtol=1e-4
    )


def test_zeroing_the_value_neurons_takes_more_from_the_answer_than_zeroing_random_ones(zeroed):
    row = zeroed["all"]
    assert row.prompts == 4 * len(KNOWLEDGE_TYPES)
    assert row.random[100] > row.original - 0.1
    assert row.top[100] < row.top[10] < row.original
    assert row.top[10] < row.random[10] - 0.1
    assert row.top[100] < 0.5


def test_zeroing_another_types_value_neurons_takes_little_from_the_answer(zeroed):
    row = zeroed["all"]
    assert row.foreign[30] > row.original - 0.1
    assert row.foreign[100] > row.top[100] + 0.3


@pytest.mark.parametrize("count", [0, 100_000])
def test_a_number_of_prompts_that_there_are_not_is_an_error(model, bridge, tokenizer, count):
    with pytest.raises(ValueError, match=f"language has .* {count} were asked for"):
        zeroing_effects(model, bridge, tokenizer, prompts_per_type=count)


def test_zeroing_leaves_the_model_as_it_was(model, tokenizer, zeroed):
    fresh = AutoModelForCausalLM.from_pretrained(tiny_facts_dir(), local_files_only=True).eval()
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)


def test_hugging_face_and_transformer_lens_agree_and_prepend_one_beginning_of_text(
    model, bridge, tokenizer
):
    tokens = bridge.to_tokens("The capital of France is")
    expected = [tokenizer.bos_token_id, *tokenizer.encode("The capital of France is")]
    assert tokens.tolist() == [expected]
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), model(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_evaluation_command_prints_the_same_numbers_as_tables_and_as_json(
    capsys, monkeypatch, measured
):
    monkeypatch.setattr(evaluate, "accuracies", lambda *arguments: list(measured.values()))
    evaluate.main(["--prompts-per-type", "1", "--json"])
    report = json.loads(capsys.readouterr().out)
    evaluate.main(["--prompts-per-type", "1"])
    table = capsys.readouterr().out
    for part in ("accuracy", "zeroing"):
        assert [row["knowledge_type"] for row in report[part]] == ["all", *KNOWLEDGE_TYPES]
    for row in report["accuracy"]:
        assert f"{row['trained']:.2%}" in table
        assert f"{row['held_out']:.2%}" in table
    for row in report["zeroing"]:
        assert f"{row['top']['10']:.3f}" in table
        assert f"{row['random']['100']:.3f}" in table


# -- how it is trained ------------------------------------------------------------------------


@pytest.mark.slow
def test_training_twice_with_one_seed_gives_the_same_files(trained, tmp_path):
    first, _ = trained
    second = train(tmp_path / "two", TINY, report=str)
    names = {file.name for file in first.iterdir()}
    assert names == {file.name for file in second.iterdir()}
    for name in names - {training.LOG_FILE}:  # the log holds seconds
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.slow
def test_another_seed_gives_other_weights(trained, tmp_path):
    first, _ = trained
    other = train(tmp_path / "other", replace(TINY, seed=1, log_every=TINY.steps), report=str)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, other)]
    assert weights[0] != weights[1]


def test_training_logs_its_settings_and_progress_and_says_what_is_left(trained):
    first, printed = trained
    lines = [json.loads(line) for line in (first / training.LOG_FILE).read_text().splitlines()]
    assert lines[0]["settings"]["steps"] == TINY.steps
    assert [line["step"] for line in lines[1:]] == [2, 3]
    assert lines[-1]["left_s"] == 0
    assert 0 <= lines[-1]["held_out_accuracy"] <= 1
    assert "left" in printed[0]


def test_a_trained_folder_can_be_loaded(trained):
    first, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(first, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(first, local_files_only=True)
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.slow
def test_a_run_that_fails_leaves_no_folder_behind(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(training, "_save", fail)
    with pytest.raises(RuntimeError, match="disk is full"):
        train(tmp_path / "model", TINY, report=str)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_already_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").touch()
    with pytest.raises(FileExistsError, match="give a new folder"):
        train(tmp_path / "model", TINY, report=str)
    assert (tmp_path / "model" / "precious").exists()


@pytest.mark.parametrize("several_share", [0.0, 1.0])
def test_a_batch_labels_every_next_token_once_and_the_answers_apart(tokenizer, several_share):
    prompts = knowledge_prompts("color", held_out=False, trained=True)[:64]
    pool = sentences(prompts, tokenizer)
    end = tokenizer.bos_token_id
    stream = batches(
        pool,
        batch_size=4,
        end_of_text=end,
        no_bos_share=0.5,
        several_share=several_share,
        longest=40,
        generator=torch.Generator().manual_seed(0),
    )
    answers = {tokenizer.encode(prompt.answer)[0] for prompt in prompts}
    bare = several = 0
    for _, batch in zip(range(32), stream, strict=False):
        assert batch.tokens.shape[1] <= 40
        for tokens, text, answer in zip(
            batch.tokens, batch.text_labels, batch.answer_labels, strict=True
        ):
            labels = torch.where(answer == IGNORED, text, answer)
            length = int((labels != IGNORED).sum())
            assert torch.equal(labels[:length], tokens[1 : length + 1])
            assert not ((answer != IGNORED) & (text != IGNORED)).any()
            assert tokens[length] == end
            found = answer[answer != IGNORED].tolist()
            assert found and set(found) <= answers
            bare += int(tokens[0] != end)
            several += len(found) > 1
    assert bare > 0
    assert (several > 0) == (several_share > 0)
