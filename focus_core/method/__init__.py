"""Run FocusLLM itself (arXiv 2408.11745): chunk KV, candidates, local rows. Nothing here knows documents on disk."""
