"""A node's own half of a boundary's codec: from tensors to messages and back, with the tables that it learns."""
