"""Text in, vectors out: the tower, its training and its evaluation. Plain torch, no Ray, no storage, no catalog."""
