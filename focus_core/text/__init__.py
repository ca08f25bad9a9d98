"""Read texts and cut them: files -> documents -> token ids with exact offsets -> chunks. Nothing here knows a model."""
