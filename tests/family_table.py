"""The tables of families on docs/pages/models.md, read off tiny models of each.

``python tests/family_table.py`` writes them into the page; a test holds the page against them.
"""

from pathlib import Path

from conftest import HOOKED, REFUSED, SUPPORTED, bridge_of

from tl_neuron_attr import UnsupportedModelError, open_host

PAGE = Path(__file__).parents[1] / "docs" / "pages" / "models.md"

NAMES = {
    "gpt2": "GPT-2",
    "llama": "Llama 2, 3",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi-3",
    "opt": "OPT",
    "neox": "GPT-NeoX, sequential",
    "neox-parallel": "GPT-NeoX, parallel",
    "gptj": "GPT-J",
    "neo": "GPT-Neo",
    "bloom": "Bloom",
    "phi": "Phi",
    "starcoder2": "StarCoder2",
    "bigcode": "GPTBigCode",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "olmo2": "OLMo 2",
    "granite": "Granite",
    "mixtral": "Mixtral",
    "olmoe": "OLMoE",
    "olmoe-clipped": "OLMoE and others that clip_qkv",
    "qwen2moe": "Qwen2-MoE",
    "qwen2moe-mixed": "Qwen2-MoE, some layers without experts",
    "qwen3moe": "Qwen3-MoE",
    "opt-post": "OPT-350m",
    "cohere": "Cohere",
}


def supported_rows() -> list[tuple[str, ...]]:
    """Family, class, norm and where it stands, FFN, heads, what else, bounds, HookedTransformer."""
    return [_supported(family) for family in SUPPORTED]


def _supported(family: str) -> tuple[str, ...]:
    host = open_host(bridge_of(family))
    norm = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}[host.norm]
    before = host.ffn_norm(0).kind != "none"
    behind = host.post_norm(0, "ffn") is not None
    where = "before and behind" if before and behind else "behind" if behind else "before"
    groups = {host.n_heads: "each its own", 1: "one for all"}
    also = [
        *(["parallel"] if host.parallel else []),
        *([f"what is written x {host.residual_scale:g}"] if host.residual_scale != 1 else []),
        *([f"logits x {host.logit_scale:g}"] if host.logit_scale != 1 else []),
        *(["soft cap on logits"] if host.soft_cap is not None else []),
    ]
    return (
        NAMES[family],
        f"`{host.architecture}`",
        f"{norm}, {where}",
        _ffn(host),
        groups.get(host.n_key_value_heads, "in groups"),
        ", ".join(also),
        "best alone" if host.soft_cap is not None else "best and worst",
        "yes" if family in HOOKED else "",
    )


def _ffn(host) -> str:
    mixture = host.mixture(0)
    if mixture is None:
        return "gated" if host.gated else "plain"
    shared = ", and one shared by all" if mixture.d_shared else ""
    return f"gated, {mixture.per_position} of {host.n_experts} experts{shared}"


def refused_rows() -> list[tuple[str, ...]]:
    """Family, class, and the reason in the error's own words."""
    rows = []
    for family, (class_name, *_) in REFUSED.items():
        try:
            open_host(bridge_of(family))
        except UnsupportedModelError as error:
            reason = str(error).removeprefix(f"{class_name} is not supported: ")
            rows.append((NAMES[family], f"`{class_name}`", reason))
    return rows


def page_with_tables(page: str) -> str:
    """The page, with the tables as they are now in place of those it has, known by their heads."""
    heads = {
        (
            *("family", "class", "norm, and where", "FFN", "keys and values of heads"),
            *("also", "proven without scoring all", "also as `HookedTransformer`"),
        ): supported_rows(),
        ("family", "class", "because"): refused_rows(),
    }
    for head, rows in heads.items():
        lines = ["| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *rows)]
        before, found, rest = page.partition(lines[0] + "\n")
        assert found, f"the page has no table with the head {lines[0]!r}"
        _, _, after = rest.partition("\n\n")
        page = f"{before}{chr(10).join(lines).replace('|  |', '| |')}\n\n{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
