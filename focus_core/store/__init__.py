"""Keep what a model has read: chunk KV on disk, and the documents and chunks of a memory."""
