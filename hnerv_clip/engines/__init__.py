"""What one training step computes, and three ways to compute it.

`plain.PlainEngine` is the definition: eager PyTorch, any device. `fused.engine.FusedEngine`
computes the same on a GPU in bfloat16, forward and backward on our own kernels.
`compiled.CompiledEngine` leaves that to `torch.compile`, in any precision and for every setting of
the model. Both replay a step as one CUDA graph. `select.make_engine` chooses.
"""
