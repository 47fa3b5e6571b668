"""Who looks at a node's records while it writes them."""
