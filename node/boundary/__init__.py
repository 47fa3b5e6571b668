"""A node's own half of a boundary's codec: from tensors to messages and back, and what it learns on the way."""
