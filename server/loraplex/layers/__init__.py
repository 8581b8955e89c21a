"""The layers models are made of; each adds adapter terms where its output is made."""
