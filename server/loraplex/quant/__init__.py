"""Weight formats: how a matrix is stored, multiplied and dequantized."""
