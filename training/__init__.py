"""How the tiny Flux that paints was made: its captions and their pictures, the scorer, and the training."""
