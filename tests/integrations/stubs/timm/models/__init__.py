"""Holds the one module that nnU-Net imports from."""
