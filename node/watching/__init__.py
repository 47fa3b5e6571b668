"""Views of a node's records while it writes them: Prometheus and TensorBoard."""
