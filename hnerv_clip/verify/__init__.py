"""Is what a CLIP head learnt real? Baselines, tests, a verdict, and its report."""
