"""Which neurons gave the answer: static neuron-level attribution on TransformerLens.

``attribute(model, prompt)`` is the front door; ``attribute.py`` shows the pipeline behind it. The
names below are grouped by its stages. Figures are in ``tl_neuron_attr.views``.
"""

from tl_neuron_attr.across import layers_by_type, overlap_table
from tl_neuron_attr.answers import AnswerAttribution, attribute_answer
from tl_neuron_attr.attribute import attribute, attribute_all
from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.capture import capture, capture_all, capture_sources
from tl_neuron_attr.captured import Capture, Sources, load_capture, save_capture
from tl_neuron_attr.cards import NeuronCard, neuron_card
from tl_neuron_attr.chosen import value_neurons
from tl_neuron_attr.compare import Comparison, OtherRun, compare
from tl_neuron_attr.curves import mask_curve, random_neurons
from tl_neuron_attr.decompose import (
    AttnDecomposition,
    FFNDecomposition,
    attn_decomposition,
    ffn_decomposition,
)
from tl_neuron_attr.differences import RankedDifferences, Side, top_differences
from tl_neuron_attr.doctor import HOST_CHECKS, Finding, ModelCheck, check_host, check_model
from tl_neuron_attr.errors import (
    ConformanceError,
    DeviceMemoryError,
    IdentityError,
    InputError,
    NeuronAttrError,
    NonFiniteError,
    OutputError,
    TooManyFailuresError,
    UnsupportedModelError,
    WorkerError,
)
from tl_neuron_attr.evaluate import Evaluation, evaluate, load_evaluation
from tl_neuron_attr.graph import Graph, value_query_graph
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.identities import verify
from tl_neuron_attr.ids import (
    Layout,
    Unit,
    expert_id,
    from_pair,
    hook_id,
    layout_of,
    module_id,
    notebook_id,
    parse_id,
    to_pair,
)
from tl_neuron_attr.in_context import InContextHeads, head_inputs, in_context_heads
from tl_neuron_attr.index import ProjectionIndex, projection_index
from tl_neuron_attr.intervals import Intervals, score_intervals, suppressing_neurons
from tl_neuron_attr.interventions import (
    Clamped,
    Edit,
    Intervention,
    MeanCoefficients,
    MeanReplaced,
    Scaled,
    Zeroed,
    capture_zeroed,
    clamp,
    edit_weights,
    head_scan,
    intervened,
    intervention_hooks,
    mean_coefficients,
    replace_mean,
    scale,
    zero,
    zeroed_residuals,
)
from tl_neuron_attr.knowledge import (
    AskedPrompt,
    Fact,
    KnowledgePrompt,
    KnownPrompts,
    corrupted_of,
    knowledge_prompts,
    known_prompts,
    load_prompts,
    load_trivia_qa,
    paper_prompts,
    save_prompts,
)
from tl_neuron_attr.methods import METHODS, Case, best_neurons, check_method
from tl_neuron_attr.models import load_model
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron, Head, parse_neuron, parse_part
from tl_neuron_attr.plan import Plan, plan
from tl_neuron_attr.projection import project
from tl_neuron_attr.prompts import Distribution, Prompt, Target
from tl_neuron_attr.query import QueryScores, query_scores, top_query_neurons
from tl_neuron_attr.readout import ReadOut, read_out
from tl_neuron_attr.runs import (
    Progress,
    Run,
    RunDifference,
    Share,
    Stopped,
    Summary,
    diff_runs,
    load_run,
    run_prompts,
    share_of_environment,
    upgrade_run,
)
from tl_neuron_attr.scores import (
    Baselines,
    baselines,
    head_scores,
    layer_scores,
    neuron_scores,
    position_scores,
)
from tl_neuron_attr.strip import TokenStrip, token_strip
from tl_neuron_attr.styled import styled
from tl_neuron_attr.sums import RankedSums, top_sums
from tl_neuron_attr.tables import neurons_of
from tl_neuron_attr.targets import tokenize
from tl_neuron_attr.topk import RankedNeurons, top_neurons

__version__ = "0.1.0"

__all__ = [
    "AnswerAttribution",
    "AskedPrompt",
    "HOST_CHECKS",
    "METHODS",
    "AttnDecomposition",
    "AttnNeuron",
    "Attribution",
    "Baselines",
    "Capture",
    "Case",
    "Clamped",
    "Comparison",
    "ConformanceError",
    "DeviceMemoryError",
    "Distribution",
    "Edit",
    "Evaluation",
    "FFNDecomposition",
    "FFNNeuron",
    "Fact",
    "Finding",
    "Graph",
    "Head",
    "Host",
    "IdentityError",
    "InContextHeads",
    "InputError",
    "Intervals",
    "Intervention",
    "KnowledgePrompt",
    "KnownPrompts",
    "Layout",
    "MeanCoefficients",
    "MeanReplaced",
    "ModelCheck",
    "NeuronAttrError",
    "NeuronCard",
    "NonFiniteError",
    "OtherRun",
    "OutputError",
    "Plan",
    "ProjectionIndex",
    "Progress",
    "Prompt",
    "QueryScores",
    "RankedDifferences",
    "RankedNeurons",
    "RankedSums",
    "ReadOut",
    "Run",
    "RunDifference",
    "Scaled",
    "Share",
    "Side",
    "Sources",
    "Stopped",
    "Summary",
    "Target",
    "TokenStrip",
    "TooManyFailuresError",
    "Unit",
    "UnsupportedModelError",
    "WorkerError",
    "Zeroed",
    "attn_decomposition",
    "attribute",
    "attribute_all",
    "attribute_answer",
    "baselines",
    "best_neurons",
    "capture",
    "capture_all",
    "capture_sources",
    "capture_zeroed",
    "check_host",
    "check_method",
    "check_model",
    "clamp",
    "compare",
    "corrupted_of",
    "edit_weights",
    "diff_runs",
    "evaluate",
    "expert_id",
    "ffn_decomposition",
    "from_pair",
    "head_inputs",
    "head_scan",
    "head_scores",
    "layer_scores",
    "hook_id",
    "in_context_heads",
    "intervened",
    "intervention_hooks",
    "layout_of",
    "layers_by_type",
    "knowledge_prompts",
    "known_prompts",
    "load_capture",
    "load_evaluation",
    "load_model",
    "load_prompts",
    "load_run",
    "load_trivia_qa",
    "neuron_card",
    "mask_curve",
    "mean_coefficients",
    "module_id",
    "neuron_scores",
    "neurons_of",
    "notebook_id",
    "open_host",
    "overlap_table",
    "paper_prompts",
    "parse_id",
    "parse_neuron",
    "parse_part",
    "plan",
    "position_scores",
    "project",
    "projection_index",
    "query_scores",
    "random_neurons",
    "read_out",
    "replace_mean",
    "run_prompts",
    "save_capture",
    "save_prompts",
    "scale",
    "score_intervals",
    "suppressing_neurons",
    "styled",
    "token_strip",
    "share_of_environment",
    "to_pair",
    "tokenize",
    "top_differences",
    "top_neurons",
    "top_query_neurons",
    "top_sums",
    "upgrade_run",
    "value_neurons",
    "value_query_graph",
    "verify",
    "zero",
    "zeroed_residuals",
]
