"""What runs on tensors: the torch reference that defines each operation, and Triton kernels."""
