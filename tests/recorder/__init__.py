"""A CUDA driver that records launches and runs nothing."""
