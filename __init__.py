"""thinpipe: train one language model over many machines that are joined by thin links."""

__version__ = "0.1.0"
