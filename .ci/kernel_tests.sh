# shellcheck shell=bash disable=SC2034
# The tests that run the C++ kernels, for pytest in the folder tests. Transforms, fake tensors and graphs run none of
# their code, nor does the reference. Memory cannot be measured where these are used: under a sanitizer, which keeps freed
# blocks, and in an emulator.
without="reference or processes or many_voxels or monai or compile or opcheck or double_backward or fork or memory or transforms or vmap or forward_ad or jvp or jacobian or fake or traced"
kernel_tests=(
  -k "not ($without)"
  test_operations.py test_vls_dice_cross_entropy.py test_cross_entropy.py backends/test_small.py test_vls_cross_entropy.py
  test_vls_elbo.py test_soft_labels.py test_gaussian_kl.py test_calibration.py test_ace_loss.py
)
