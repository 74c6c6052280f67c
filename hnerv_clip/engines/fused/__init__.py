"""The training step on our own kernels: the network, its parameters' layout, and the engine."""
