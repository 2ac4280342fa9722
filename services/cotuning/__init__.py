"""What is computed: the method as functions of tensors. No files, clock or logs; the device follows the input."""
