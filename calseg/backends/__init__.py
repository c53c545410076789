"""The backends: modules with the same functions of a spec and its tensors (:mod:`calseg.operations`).

``reference`` is plain PyTorch, the oracle of the others and the fallback. PyTorch differentiates it, to any order.
``cpu`` is the native engine, ``triton`` the GPU engine. They write gradients too, and have a ``_backward`` where
gradients need a pass of their own. ``cuda`` has what is written in CUDA C++. ``choice`` says which one runs.
"""
