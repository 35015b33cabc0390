"""The processes that run a model together, one per rank. Rank 0 is the engine's own.

Rank 0 decides: it has the scheduler, the index of the KV cache and the sampler. The others have
their part of the weights and of the KV, and do what they are told, in the order of their device's
work: run a batch, copy a page. Activations and sampled ids go through the collectives alone.
"""
