"""The passes of `lora_linear`: which kernels a call takes, and their launches."""
