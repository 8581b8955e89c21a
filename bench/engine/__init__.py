"""The speed table: our engine and server against transformers and PEFT, on one machine, in one run."""
