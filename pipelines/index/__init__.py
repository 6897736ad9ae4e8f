"""The ANN index: immutable FAISS segments, their tombstones, and the search over both. The only home of `faiss`."""
