"""What we ask about: facts of six knowledge types, worded as prompts."""

from tl_neuron_attr.knowledge.facts import (
    KNOWLEDGE_TYPES,
    Fact,
    KnowledgePrompt,
    knowledge_prompts,
    load_facts,
)

__all__ = ["KNOWLEDGE_TYPES", "Fact", "KnowledgePrompt", "knowledge_prompts", "load_facts"]
