"""The generative model, its heads, and the bundle that carries them."""
