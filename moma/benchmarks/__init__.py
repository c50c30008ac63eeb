"""What `moma bench` times: one file per suite, each with `run(config, device) -> Bench`.

    layer       a feed-forward, forward and backward            head        linear layer and cross-entropy
    attention   one attention layer over packed documents       step        a whole training step
    decode      tokens one after the other                      data        micro-batches from a corpus
    checkpoint  what saving costs the training

Every suite compares what is ours with other ways to do the same work in one run (`timing.py`), says what the machine
could do at best (`ceilings.py`), and judges its goals by ratios, never by seconds.
"""

# "module:function", imported on use
SUITES = {
    name: f"moma.benchmarks.{name}:run"
    for name in ("layer", "head", "attention", "step", "decode", "data", "checkpoint")
}
