"""A model to port: two NSA layers with different windows, for `nsa agree`."""

import torch
from torch import nn

import nsa_neuron


class Layer(nn.Module):
    """Pre-norm NSA with one key and value head, and a residual."""

    def __init__(self, dim: int, heads: int, head_dim: int, window: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.window = heads, head_dim, window
        self.norm = nn.RMSNorm(dim)
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.kv = nn.Linear(dim, 2 * head_dim, bias=False)
        self.gate = nn.Linear(dim, heads * 3, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        h = self.norm(x)
        q = self.q(h).view(b, s, self.heads, self.head_dim)
        k, v = self.kv(h).view(b, s, 1, 2 * self.head_dim).chunk(2, -1)
        k, v = k.contiguous(), v.contiguous()
        gates = self.gate(h).sigmoid().view(b, s, self.heads, 3)
        k_cmp = nsa_neuron.compress(k, block=16, stride=8)
        v_cmp = nsa_neuron.compress(v, block=16, stride=8)
        o = nsa_neuron.nsa_attention(
            q, k_cmp, v_cmp, k, v, k, v, gates,
            block=16, stride=8, select_block=16, num_selected=4, window=self.window,
        )  # fmt: skip
        return x + self.out(o.flatten(2))


class Model(nn.Module):
    """Token ids `[B, S]` to logits `[B, S, 64]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.layers = nn.ModuleList([Layer(32, 4, 16, window=12), Layer(32, 4, 16, window=20)])
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make() -> tuple[Model, torch.Tensor]:
    """The model and a prompt of 48 tokens."""
    torch.manual_seed(0)
    return Model(), torch.randint(0, 64, (1, 48))
