"""From raw documents to micro-batches: sources, shards, the plan, the loader."""
