"""Models whose parameters are sharded by FSDP2 (`torch.distributed.fsdp.fully_shard`): what their ranks send, in codes.

FSDP2 has doors for this, of every module that it wraps: a hook on reduced gradients, a reduce-scatter and an all-gather
of one's own. Only these are used. What passes them is a flat buffer of one module's parameters; `units` knows how they
lie in it.
"""
