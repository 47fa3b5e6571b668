"""A trained model leaves its run: as a directory that transformers loads."""
