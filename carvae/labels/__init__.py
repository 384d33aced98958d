"""What a cell may be called: the label tree, mappings of author labels onto it, and gene signatures."""
