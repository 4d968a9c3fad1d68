"""The forward pass of the toy Llama written out, in float64, one sequence at a time."""

import math
from collections.abc import Mapping

import torch
from factories import toy_model
from torch import Tensor
from torch.nn import functional

LORA_SCALE = 2.0  # alpha 8, rank 4


class Llama:
    """The toy's forward pass written out: logits [tokens, vocab] of one sequence, in float64."""

    def __init__(self, seed: int) -> None:
        model = toy_model(seed)
        self.config = model.config
        self.weights = {n.removeprefix("model."): p.detach().double() for n, p in model.named_parameters()}

    def __call__(self, tokens: tuple[int, ...], own: Mapping[str, Tensor] | None = None) -> Tensor:
        """own: weights that take the place of the model's, or "NAME.A" and "NAME.B" of adapters on them."""
        own = own or {}
        weights = self.weights | {k: v for k, v in own.items() if k in self.weights}
        config, length = self.config, len(tokens)
        size = config.hidden_size // config.num_attention_heads
        share = config.num_attention_heads // (config.num_key_value_heads or 1)

        def linear(name: str, x: Tensor) -> Tensor:
            found = x @ weights[f"{name}.weight"].T
            if f"{name}.A" in own:
                found = found + LORA_SCALE * (x @ own[f"{name}.A"].T) @ own[f"{name}.B"].T
            return found

        def norm(name: str, x: Tensor) -> Tensor:
            return weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

        # angles are float32 in every Llama
        steps = 1.0 / 10000.0 ** (torch.arange(0, size, 2).float() / size)
        angles = torch.arange(length).float()[:, None] * steps
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos().double()[:, None], angles.sin().double()[:, None]

        def turned(x: Tensor) -> Tensor:
            half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
            return x * cos + half * sin

        hidden = functional.embedding(torch.tensor(tokens), weights["embed_tokens.weight"])
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        for layer in range(config.num_hidden_layers):
            at = f"layers.{layer}"
            x = norm(f"{at}.input_layernorm", hidden)
            query, key, value = (linear(f"{at}.self_attn.{n}_proj", x).view(length, -1, size) for n in ("q", "k", "v"))
            query, key = turned(query), turned(key).repeat_interleave(share, 1)
            scores = torch.einsum("thd,shd->hts", query, key) / math.sqrt(size)
            seen = scores.masked_fill(future, -torch.inf).softmax(-1)
            mixed = torch.einsum("hts,shd->thd", seen, value.repeat_interleave(share, 1)).reshape(length, -1)
            hidden = hidden + linear(f"{at}.self_attn.o_proj", mixed)
            x = norm(f"{at}.post_attention_layernorm", hidden)
            gate = functional.silu(linear(f"{at}.mlp.gate_proj", x))
            hidden = hidden + linear(f"{at}.mlp.down_proj", gate * linear(f"{at}.mlp.up_proj", x))
        return norm("norm", hidden) @ weights["embed_tokens.weight"].T
