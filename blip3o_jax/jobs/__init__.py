"""Work over many inputs: sharded over all processes, resumable, each input exactly once (floor 6)."""
