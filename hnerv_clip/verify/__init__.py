"""Is what a CLIP head learned real? Baselines, tests, a verdict, and its report."""
