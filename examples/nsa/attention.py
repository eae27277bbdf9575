"""NSA as a function: attention over 2048 tokens, its gradients, the same through torch.compile.

python examples/nsa/attention.py [TARGET], TARGET one of cpu (default), h200, trn2, or a simulator
of theirs: h200:sim, trn2:sim (a short sequence then: simulators are slow).
"""

import sys

import torch

import nsa_neuron


def attend(q, k, v, gates):
    """[B, S, Hq, Dk], [B, S, Hkv, Dk], [B, S, Hkv, Dv], [B, S, Hq, 3] -> [B, S, Hq, Dv]."""
    k_cmp = nsa_neuron.compress(k, method="mean")  # blocks of 32 tokens, every 16
    v_cmp = nsa_neuron.compress(v, method="mean")
    return nsa_neuron.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, num_selected=8)


def main(target="cpu"):
    torch.manual_seed(0)
    machine, _, mode = target.partition(":")
    tokens = 256 if mode == "sim" else 2048
    device = {"h200": "cuda", "trn2": "neuron"}.get(machine, "cpu") if mode != "sim" else "cpu"
    q = torch.randn(1, tokens, 8, 64, device=device, requires_grad=True)
    k, v = torch.randn(2, 1, tokens, 2, 64, device=device).unbind()
    gates = torch.rand(1, tokens, 8, 3, device=device)

    with nsa_neuron.use_backend(target):
        o = attend(q, k, v, gates)
        (dq,) = torch.autograd.grad(o.square().mean(), q)
    print(f"o {list(o.shape)}, largest gradient of q {dq.abs().max():.2e}")

    options = {"target": machine} | ({"mode": mode} if mode else {})
    compiled = torch.compile(attend, backend="nsa_neuron", options=options)
    with torch.no_grad():
        apart = (compiled(q, k, v, gates) - o).abs().max()
    print(f"compiled and eager differ by {apart:.1e} at most")
    print(nsa_neuron.explain(compiled))


if __name__ == "__main__":
    main(*sys.argv[1:])
