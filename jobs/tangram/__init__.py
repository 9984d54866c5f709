"""How the embedded backbone is made: drawings, the parts that learn from them, and their figures."""

PARTS = ("vae", "diffusion", "clip", "classifier", "judge")  # each is trained by itself
