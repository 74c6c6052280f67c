"""How fast: training steps, decoding, the teacher, several GPUs."""
