"""Recovery by learning from the original: losses between two networks, and the one training loop.

Refuses to know what made the student smaller, and needs inputs only.

| loss | compares |
|---|---|
| `logits` | class distributions (Hinton et al. 2015), or values where outputs are no logits |
| `features` | the outputs of inner nodes at the channels the student kept (FitNets, Romero et al. 2015) |
"""
