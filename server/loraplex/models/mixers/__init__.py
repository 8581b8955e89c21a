"""What a layer's blocks are made of: one file for each kind of mixer, its description and how it is built from it."""
