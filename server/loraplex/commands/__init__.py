"""The subcommands of ``loraplex``: each file adds its arguments to the parser and runs."""
