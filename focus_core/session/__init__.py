"""Hold what a caller is: engine, memories, documents that changed. It knows no framework."""
