"""NSA in a server: sequences of different lengths in one paged cache, a shared prefix, new tokens.

python examples/nsa/serve.py: an untrained model of two layers shows the calls, not good text.
"""

import torch

from nsa_neuron.nn import ByteLanguageModel, NsaConfig

PREFIX = b"The quick brown fox jumps over the lazy dog. " * 4
QUESTIONS = [b"Who jumps?", b"Over whom does it jump, and why?"]
NEW = 4  # tokens per answer


@torch.no_grad()
def main():
    torch.manual_seed(0)
    config = NsaConfig(dim=64, heads=4, kv_heads=1, dk=16, dv=16, phi="mean", window=64)
    model = ByteLanguageModel(config, ["nsa", "nsa"])

    # The prefix is read once, into row 0; the other rows fork it, which copies no page.
    cache = model.new_cache(batch=1 + len(QUESTIONS), capacity=1024, paged=True)
    rows = torch.zeros(cache.batch, len(PREFIX), dtype=torch.long)
    rows[0] = torch.tensor(list(PREFIX))
    with cache.step(len(PREFIX), [len(PREFIX), 0, 0]) as step:
        model(rows, step, last=1)
    for row in range(1, cache.batch):
        cache.fork(0, row)
    print("lengths after the prefix:", cache.lengths)

    # Questions of different lengths in one step: each row's new tokens stand at its end.
    counts = [0, *map(len, QUESTIONS)]
    tokens = torch.zeros(cache.batch, max(counts), dtype=torch.long)
    for row, question in enumerate(QUESTIONS, start=1):
        tokens[row, -len(question) :] = torch.tensor(list(question))
    with cache.step(tokens.shape[1], counts) as step:
        logits = model(tokens, step, last=1)
    for _ in range(NEW - 1):
        with cache.step(1, [0, 1, 1]) as step:
            logits = model(logits[:, -1:].argmax(-1), step, last=1)
    print("lengths after the answers:", cache.lengths)

    # Speculative decoding: four drafted tokens are checked in one step, two of them taken back.
    before = cache.lengths
    with cache.step(4) as step:
        model(tokens[:, :4], step)
    cache.truncate([length + 2 for length in before])
    print("lengths after two of four drafted tokens:", cache.lengths)


if __name__ == "__main__":
    main()
