"""Chunks: the lanes of a run hold parts of the same sequences, and exchange keys and values in every layer."""
