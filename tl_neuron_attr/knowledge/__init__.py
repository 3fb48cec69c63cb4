"""What we ask about: facts of six knowledge types, worded as prompts; sets of one's own; and
which of them a model knows."""

from tl_neuron_attr.knowledge.corrupted import corrupted_of
from tl_neuron_attr.knowledge.facts import (
    KNOWLEDGE_TYPES,
    Fact,
    KnowledgePrompt,
    knowledge_prompts,
    load_facts,
    paper_prompts,
)
from tl_neuron_attr.knowledge.known import (
    AskedPrompt,
    DroppedPrompt,
    KnownPrompts,
    known_prompts,
)
from tl_neuron_attr.knowledge.sets import load_prompts, prompt_table, save_prompts
from tl_neuron_attr.knowledge.trivia_qa import load_trivia_qa

__all__ = [
    "KNOWLEDGE_TYPES",
    "AskedPrompt",
    "DroppedPrompt",
    "Fact",
    "KnowledgePrompt",
    "KnownPrompts",
    "corrupted_of",
    "knowledge_prompts",
    "known_prompts",
    "load_facts",
    "load_prompts",
    "load_trivia_qa",
    "paper_prompts",
    "prompt_table",
    "save_prompts",
]
