"""Hold the frozen base and the adapter beside it: names -> weights, tokenizer, projections, templates, grammars."""
