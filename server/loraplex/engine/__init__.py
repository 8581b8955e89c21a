"""The engine process: scheduler, batch, runner, and the front end's handle on it."""
