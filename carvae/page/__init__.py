"""Pages of HTML: the report of an annotated file, and the demo's index."""
