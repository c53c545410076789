"""The folder that nnU-Net searches for trainers; it holds one module and nothing that nnU-Net must not load."""
