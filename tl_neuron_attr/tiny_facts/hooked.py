"""tiny-facts as a ``HookedTransformer``, for those whose TransformerLens still has that class."""

import warnings
from importlib import import_module
from typing import Any

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.models import no_bar
from tl_neuron_attr.tiny_facts import tiny_facts_dir


def hooked_tiny_facts() -> Any:
    """The bundled model as a ``HookedTransformer`` with raw weights, in evaluation mode.

    ``HookedTransformer.from_pretrained`` takes names of the hub alone; this takes the parts that
    it is made of. Models of the hub need no such function:
    ``HookedTransformer.from_pretrained_no_processing(name)``.

    Raises:
        InputError: If the installed TransformerLens has no such class (from version 4 on).
    """
    try:
        # by name, for the installed version may have neither
        loading: Any = import_module("transformer_lens.loading_from_pretrained")
        hooked_transformer: Any = import_module("transformer_lens").HookedTransformer
    except ImportError:
        raise InputError(
            "this TransformerLens has no HookedTransformer; 3.9 is the last that has, and "
            "load_model('tiny-facts') gives a TransformerBridge"
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(tiny_facts_dir())
    with no_bar(True):
        hf = AutoModelForCausalLM.from_pretrained(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the class will go
        config = loading.get_pretrained_model_config(
            path, hf_cfg=hf.config.to_dict(), fold_ln=False, device="cpu"
        )
        model = hooked_transformer(config, tokenizer=AutoTokenizer.from_pretrained(path))
        model.load_and_process_state_dict(
            loading.get_pretrained_state_dict(path, config, hf_model=hf),
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
    return model.eval()
