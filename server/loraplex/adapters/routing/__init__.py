"""Routers: which adapter suits a prompt, told from its tokens before any layer has run."""
