#!/usr/bin/env bash
# Somebody who wants NSA in a model: the README's example, a training step, torch.compile.
source "$(dirname "$0")/common.sh" "$@"
environment
torch
pip install --quiet "$WHEEL[cuda]"
python - "$ROOT/README.md" <<'END'
import pathlib, re, sys
page = pathlib.Path(sys.argv[1]).read_text()
code = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)[0]
pathlib.Path("example.py").write_text(code.replace("4096", "256"))
END
expect 0 "nsa_attention -> cpu:" python example.py
grep -q "torch.Size(\[1, 256, 16, 128\])" said || { cat said; fail "another shape"; }

cat >step.py <<'END'
import torch
from nsa_neuron.nn import ByteLanguageModel, NsaConfig, generate, next_token_loss

torch.manual_seed(0)
model = ByteLanguageModel(NsaConfig(dim=64, heads=4, kv_heads=1, dk=16, dv=16), 2)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
tokens = torch.randint(0, 256, (1, 8)).repeat(1, 16)
losses = []
for _ in range(8):
    loss = next_token_loss(model(tokens), tokens)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print("learns" if losses[-1] < losses[0] - 0.5 else losses)
print("writes", len(generate(model, [b"abc"], 5)[0]))
END
expect 0 "learns" python step.py
grep -q "writes 5" said || { cat said; fail "wrote another number of bytes"; }
expect 0 "fwd, bwd" nsa backends
expect 0 "chosen" nsa explain nsa_attention --device cpu
expect 2 "NSA_BACKEND is 'h2000'" env NSA_BACKEND=h2000 nsa backends
no_traceback
say "a model engineer is at home"
