"""Studies and queries: reading, harmonising, storing and batching them."""
