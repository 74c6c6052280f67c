"""Many runs: which, how they are run side by side, and their table."""
