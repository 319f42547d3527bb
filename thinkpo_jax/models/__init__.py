"""The decoder, its attention kernels, and Hugging Face weights in and out."""
