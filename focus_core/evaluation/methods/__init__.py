"""Answer trials: FocusLLM and the baselines on the same base, by name."""
