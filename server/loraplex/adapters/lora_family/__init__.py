"""What the kinds of the LoRA family share: their keys, what a config says of each module, and their tensors."""
