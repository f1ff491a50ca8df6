"""Rules and the tensors that they prescribe."""
