"""Keep predictions and metrics, and lay them out as tables and plots."""
