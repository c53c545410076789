"""Stand-in for timm, which nnU-Net imports when it looks for a trainer, and which does not import without torchvision.

The torchvision of PyPI does not import beside a torch without CUDA. No network of these tests uses timm.
"""
