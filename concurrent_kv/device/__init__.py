"""Bytes: the tensor of slots and its copies, order between streams, CUDA, the door to what is compiled."""
