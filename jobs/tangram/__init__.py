"""How the embedded backbone is made: drawings, the parts that learn from them, and their figures."""
