"""Pictures of annotated cells, of samples, of clones and of training: each draws into Axes and returns them."""
