"""A forward pass of GPT-2 and Llama models with parts of it that can be frozen, for closest.py.

What the package ships needs none of this. It is here to measure what else was tried: gradients of
a model in which norms or attention patterns are constants, activations straight lines through the
origin, or only paths through so many later sub-layers count.
"""

import torch
from transformers import AutoModelForCausalLM

NORMS, PATTERNS, CHORDS, HALVES = "norms", "patterns", "chords", "halves"
"""What can be frozen: a norm's scale; attention patterns; activations at coefficient over
pre-activation; and, beside chords, gate and up of a gated FFN each given half."""


class FrozenModel:
    """Weights of a Hugging Face directory in float64, taken apart."""

    def __init__(self, path):
        hf = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval().double()
        hf.requires_grad_(False)
        cfg = hf.config
        self.gpt2 = cfg.model_type == "gpt2"
        self.n_heads, self.n_layers = cfg.num_attention_heads, cfg.num_hidden_layers
        self.d_head = cfg.hidden_size // self.n_heads
        self.eps = cfg.layer_norm_epsilon if self.gpt2 else cfg.rms_norm_eps
        self.body = hf.transformer if self.gpt2 else hf.model
        self.layers = [
            (self._gpt2 if self.gpt2 else self._llama)(block)
            for block in (self.body.h if self.gpt2 else self.body.layers)
        ]
        final = self.body.ln_f if self.gpt2 else self.body.norm
        self.final_norm = (final.weight, getattr(final, "bias", None))
        self.W_U = hf.get_output_embeddings().weight.T

    def _gpt2(self, block):
        qkv, fc = block.attn.c_attn, block.mlp.c_fc
        d_model = qkv.weight.shape[0]
        return {
            "norms": [(norm.weight, norm.bias) for norm in (block.ln_1, block.ln_2)],
            "qkv": [*zip(qkv.weight.split(d_model, 1), qkv.bias.split(d_model), strict=True)],
            "out": (block.attn.c_proj.weight, block.attn.c_proj.bias),
            "in": (fc.weight, fc.bias),
            "gate": None,
            "act": block.mlp.act,
            "down": (block.mlp.c_proj.weight, block.mlp.c_proj.bias),
        }

    def _llama(self, block):
        attn, mlp = block.self_attn, block.mlp

        def by_head(linear):
            grouped = linear.weight.unflatten(0, (-1, self.d_head))
            return grouped.repeat_interleave(self.n_heads // len(grouped), 0).flatten(0, 1).T

        return {
            "norms": [
                (norm.weight, None)
                for norm in (block.input_layernorm, block.post_attention_layernorm)
            ],
            "qkv": [
                (attn.q_proj.weight.T, 0.0),
                (by_head(attn.k_proj), 0.0),
                (by_head(attn.v_proj), 0.0),
            ],
            "out": (attn.o_proj.weight.T, 0.0),
            "in": (mlp.up_proj.weight.T, 0.0),
            "gate": mlp.gate_proj.weight.T,
            "act": mlp.act_fn,
            "down": (mlp.down_proj.weight.T, 0.0),
        }

    def embed(self, tokens):
        if self.gpt2:
            return self.body.wte(tokens) + self.body.wpe(torch.arange(len(tokens)))
        return self.body.embed_tokens(tokens)

    def norm(self, x, weights, frozen):
        x = x - x.mean(-1, keepdim=True) if self.gpt2 else x
        scale = (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        x = x / (scale.detach() if NORMS in frozen else scale) * weights[0]
        return x if weights[1] is None else x + weights[1]

    def z(self, layer, x, frozen=()):
        """What each head gathered at each position, heads side by side."""
        weights, n_pos = self.layers[layer], len(x)
        read = self.norm(x, weights["norms"][0], frozen)
        q, k, v = (
            (read @ weight + bias).view(n_pos, self.n_heads, self.d_head).transpose(0, 1)
            for weight, bias in weights["qkv"]
        )
        if not self.gpt2:
            cos, sin = self.body.rotary_emb(x[None], torch.arange(n_pos)[None])
            half = self.d_head // 2

            def rotated(t):
                return t * cos.to(t) + torch.cat([-t[..., half:], t[..., :half]], -1) * sin.to(t)

            q, k = rotated(q), rotated(k)
        later = torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / self.d_head**0.5).masked_fill(later, -torch.inf)
        pattern = scores.softmax(-1)
        pattern = pattern.detach() if PATTERNS in frozen else pattern
        return (pattern @ v).transpose(0, 1).flatten(1)

    def hidden(self, layer, x, frozen=()):
        """The FFN's coefficients at each position."""
        weights = self.layers[layer]
        read = self.norm(x, weights["norms"][1], frozen)
        up = read @ weights["in"][0] + weights["in"][1]

        def act(pre):
            after = weights["act"](pre)
            return pre * (after / pre).detach() if CHORDS in frozen else after

        if weights["gate"] is None:
            return act(up)
        gate = act(read @ weights["gate"])
        if HALVES in frozen:
            return (gate * up.detach() + gate.detach() * up) / 2
        return gate * up

    def attn_out(self, layer, z):
        weight, bias = self.layers[layer]["out"]
        return z @ weight + bias

    def ffn_out(self, layer, hidden):
        weight, bias = self.layers[layer]["down"]
        return hidden @ weight + bias

    def run(self, tokens, frozen=(), scale=1.0):
        """(coefficients by kind and layer, residuals before each sub-layer, the final residual).

        ``scale`` multiplies every FFN coefficient.
        """
        x = self.embed(tokens)
        found = {"ffn": [], "attn": []}
        before = {"ffn": [], "attn": []}
        for layer in range(self.n_layers):
            before["attn"].append(x)
            # so that there is a gradient with respect to what layer 0 gathered
            found["attn"].append(self.z(layer, x, frozen) + torch.zeros(1).requires_grad_())
            x = x + self.attn_out(layer, found["attn"][-1])
            before["ffn"].append(x)
            found["ffn"].append(self.hidden(layer, x, frozen) * scale)
            x = x + self.ffn_out(layer, found["ffn"][-1])
        return found, before, x

    def log_prob(self, final, target, frozen=(), temperature=1.0):
        logits = self.norm(final[-1], self.final_norm, frozen) @ self.W_U
        return (logits / temperature).log_softmax(-1)[target]


def frozen_gradient(model, tokens, target, frozen=(), *, scale=1.0, temperature=1.0):
    """Coefficient x gradient over all positions, with parts of the model frozen, by kind."""
    with torch.enable_grad():
        found, _, final = model.run(tokens, frozen, scale)
        each = [*found["ffn"], *found["attn"]]
        quantity = model.log_prob(final, target, frozen, temperature)
        products = [
            (coefficients * gradient).sum(0).detach()
            for coefficients, gradient in zip(
                each, torch.autograd.grad(quantity, each), strict=True
            )
        ]
    n = model.n_layers
    return {"ffn": torch.stack(products[:n]), "attn": torch.stack(products[n:])}


def few_steps(model, tokens, target, steps, frozen=()):
    """Coefficient x what reaches the answer through at most ``steps`` later sub-layers, by kind."""
    with torch.no_grad():
        found, before, final = model.run(tokens)
    with torch.enable_grad():
        final = final.detach().requires_grad_()
        (direct,) = torch.autograd.grad(model.log_prob(final, target), final)
    # by how many sub-layers it came through
    worth = [direct, *(torch.zeros_like(direct) for _ in range(steps))]
    scores = {"ffn": [], "attn": []}
    kinds = (("ffn", model.hidden, model.ffn_out), ("attn", model.z, model.attn_out))
    for layer in reversed(range(model.n_layers)):
        for kind, coefficients, out in kinds:
            weight = model.layers[layer]["down" if kind == "ffn" else "out"][0]
            each = found[kind][layer].detach()
            scores[kind].append((sum(worth) @ weight.T * each).sum(0))
            with torch.enable_grad():
                x = before[kind][layer].detach().requires_grad_()
                y = out(layer, coefficients(layer, x, frozen))
                back = [
                    torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in worth[:steps]
                ]
            worth = [worth[0], *(one + more for one, more in zip(worth[1:], back, strict=True))]
    return {kind: torch.stack(layers[::-1]) for kind, layers in scores.items()}
