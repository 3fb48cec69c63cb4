"""A newcomer's own model directory: what loads, and one sentence that says what to do where not."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import FAMILIES, hugging_face_model

from tl_neuron_attr import InputError, attribute, load_model
from tl_neuron_attr.models import count_tokens, load_config
from tl_neuron_attr.tiny_facts import tiny_facts_dir

PROMPT = "The capital of France is"


@pytest.fixture(autouse=True)
def no_random_numbers_are_drawn():
    with torch.random.fork_rng():
        yield


@pytest.fixture
def mine(tmp_path):
    """A complete directory, as ``save_pretrained`` writes it."""
    return shutil.copytree(tiny_facts_dir(), tmp_path / "mine")


def wordless(directory, family):
    """A directory of one family with no tokenizer."""
    class_name, config = FAMILIES[family]
    hugging_face_model(class_name, config()).save_pretrained(directory)
    return directory


def change_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(name):
    with pytest.raises(InputError) as raised:
        load_model(name)
    return str(raised.value)


# -- what loads ---------------------------------------------------------------------------------


def test_a_directory_may_be_a_path(mine):
    assert attribute(load_model(mine), PROMPT, top=1).target.text == " Paris"


def test_weights_may_be_a_pytorch_bin(mine):
    hf = transformers.AutoModelForCausalLM.from_pretrained(mine)
    torch.save(hf.state_dict(), mine / "pytorch_model.bin")  # noqa: TID251
    (mine / "model.safetensors").unlink()
    assert attribute(load_model(mine), PROMPT, top=1).target.text == " Paris"


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_a_model_without_tokenizer_takes_token_ids_and_refuses_text(family, tmp_path):
    directory = wordless(tmp_path / "mine", family)
    model = load_model(directory)
    assert model.tokenizer is None
    found = attribute(model, [3, 17, 5], top=2)
    assert found.captured.prompt.token_texts == ("<3>", "<17>", "<5>")
    with pytest.raises(InputError, match="no tokenizer.*give token ids, or load the model from"):
        attribute(model, PROMPT)
    with pytest.raises(InputError, match="has no tokenizer; give token ids"):
        count_tokens(str(directory), PROMPT)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot read the tokenizer of .*; give token ids"):
        count_tokens(str(directory), PROMPT)
    (directory / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot read the configuration of .*mine"):
        load_config(str(directory))


def test_a_tokenizer_that_transformers_makes_up_is_not_used(tmp_path):
    """A configuration of a tokenizer, without its vocabulary: GPT-2's class comes up empty."""
    directory = wordless(tmp_path / "mine", "gpt2")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(InputError, match="no tokenizer to read the prompt"):
        attribute(load_model(directory), PROMPT)


# -- what does not ------------------------------------------------------------------------------


def test_a_misspelt_directory_is_answered_with_the_one_that_is_there(mine, monkeypatch):
    assert refusal(str(mine.parent / "mien")) == (
        f"no such directory: {str(mine.parent / 'mien')!r} (did you mean {str(mine)!r}?); "
        "give a Hugging Face model directory"
    )
    monkeypatch.chdir(mine.parent)
    assert refusal("mien").endswith("for it (did you mean 'mine'?)")
    assert refusal("tiny_facts").endswith("(did you mean 'tiny-facts'?)")
    assert "did you mean" not in refusal("meta-llama/Llama-2-7b-hf")


def test_a_file_in_place_of_its_directory(mine):
    assert refusal(mine / "model.safetensors").endswith("give the directory that it is in")


def test_a_folder_of_checkpoints_names_those_inside(mine):
    folder = mine.parent / "run"
    shutil.copytree(mine, folder / "checkpoint-500")
    assert refusal(folder).endswith(f"; give one inside it: {str(folder / 'checkpoint-500')!r}")
    cache = mine.parent / "models--me--mine"
    shutil.copytree(mine, cache / "snapshots" / "abc")
    assert refusal(cache).endswith(f"; give one inside it: {str(cache / 'snapshots' / 'abc')!r}")


@pytest.mark.parametrize(
    ("file", "words"),
    [("adapter_config.json", "PEFT adapter; merge it"), ("model.gguf", "GGUF weights"), (None, "")],
)
def test_a_directory_that_is_something_else_says_what(file, words, tmp_path):
    if file is not None:
        (tmp_path / file).write_text("{}")
    assert "it has no config.json" in refusal(tmp_path) and words in refusal(tmp_path)


def test_a_git_lfs_pointer_is_no_weights(mine):
    (mine / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    assert refusal(mine).endswith("is a Git LFS pointer, not the weights; run 'git lfs pull' there")


def test_weights_cut_short_are_called_that(mine):
    weights = mine / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "damaged or cut short; copy it again" in refusal(mine)


def test_a_classifier_is_refused(mine):
    change_config(mine, architectures=["GPT2ForSequenceClassification"])
    assert "is a classifier (GPT2ForSequenceClassification)" in refusal(mine)


def test_a_model_saved_without_its_head_is_refused(tmp_path):
    class_name, config = FAMILIES["llama"]
    body = hugging_face_model(class_name, config()).model
    body.save_pretrained(tmp_path)
    assert "saved without its language model's head ('lm_head.weight' would" in refusal(tmp_path)


def test_code_of_its_own_is_said_to_need_trust(mine):
    code = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    change_config(mine, model_type="x", architectures=["X"], auto_map=code)
    assert "trust_remote_code=True" in refusal(mine)


def test_a_configuration_that_is_no_json_is_called_that(mine):
    (mine / "config.json").write_text("{")
    assert "is not a valid JSON file" in refusal(mine)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("You are trying to access a gated repo.\nMake sure", "set HF_TOKEN to your access token"),
        ("We couldn't connect to 'https://huggingface.co' to load", "the hub cannot be reached"),
        ("me/absent is not a local folder and is not a valid\n", "me/absent is not a local folder"),
    ],
)
def test_what_the_hub_answers_is_passed_on_with_the_next_step(said, words, monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    def answer(*args, **options):
        raise OSError(said)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(TransformerBridge, "boot_transformers", answer)
    assert words in refusal("me/absent")


# -- a name, or another library's model, in place of a model ------------------------------------


def test_a_name_in_place_of_a_model_is_told_to_load_it(mine):
    with pytest.raises(InputError, match=r"load it first: load_model\('tiny-facts'\)"):
        attribute("tiny-facts", PROMPT)


def test_a_hugging_face_model_is_told_how_to_become_one(mine):
    hf = transformers.AutoModelForCausalLM.from_pretrained(mine)
    with pytest.raises(InputError, match="got a GPT2LMHeadModel; save .* load_model"):
        attribute(hf, PROMPT)
