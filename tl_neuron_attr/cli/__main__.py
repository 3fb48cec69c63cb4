"""``python -m tl_neuron_attr.cli``: the same as ``tl-neuron-attr``."""

from tl_neuron_attr.cli import app

app(prog_name="tl-neuron-attr")
