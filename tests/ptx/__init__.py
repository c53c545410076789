"""An interpreter of PTX, the assembly of NVIDIA GPUs: kernels run on a CPU as their compiler made them.

All programs and threads of a launch run at once, as arrays. Faults that a GPU would hide are errors here: an access to
global memory outside of the tensors, a misaligned vector, a race in shared memory, a barrier that some threads miss.
"""
