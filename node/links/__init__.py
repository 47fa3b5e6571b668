"""A connection to a neighbour: who listens and dials, the tensors' stream and its link model, the control stream."""
